"""The gradient noise scale B_simple = tr S / |G|^2, measured while training.

McCandlish et al. 2018 (arXiv 1812.06162, appendix A) compare squared gradient norms at two batch
sizes b < B. With two halves of one batch (B = 2 b) their estimator of tr S is |g1 - g2|^2 b / 2,
which needs no difference of large numbers; other pairs of micro-batches serve as well. The squared
norm |G_B|^2 of the whole batch is at hand at every step, and exceeds |G|^2 by tr S / B on average.

Both are averaged over the second half of the run *separately*, then divided: the ratio of noisy
numbers is biased, and the first steps, whose gradients are huge, would drown the rest. Besides,
each quarter of the run has averages of its own, to see the noise scale grow as the loss falls.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

PERIOD = 8
"""A pair is compared every so many steps, half as often in the first half of the run. Splitting a
batch in two for it costs a CPU up to about half a step where models are tiny: 5 % at most."""
QUARTERS = 4


@dataclass
class NoiseScale:
    """Running sums; S is the covariance of the gradient of one sequence."""

    steps: int
    """Of the whole run."""
    batch_sequences: int
    norm_sum: float = 0.0
    norm_count: int = 0
    trace_sum: float = 0.0
    trace_count: int = 0
    quarters: list[list[float]] = field(
        default_factory=lambda: [[0.0] * 5 for _ in range(QUARTERS)]
    )
    """Of each quarter: sums of the loss and of |G_B|^2 with their number, of tr S with its."""

    def quarter(self, step: int) -> int:
        """The quarter of the run that a step lies in, from 0."""
        return min(QUARTERS * step // max(self.steps, 1), QUARTERS - 1)

    def counts(self, step: int) -> bool:
        """Whether a step lies in the half of the run that is measured."""
        return 2 * step >= self.steps

    def wants_pair(self, step: int) -> bool:
        """Whether to compare two parts of the batch at this step."""
        period = PERIOD if self.counts(step) else 2 * PERIOD
        return (self.steps - 1 - step) % period == 0

    def add_step(self, step: int, loss: float, grad_sq: float) -> None:
        """The training loss and |G_B|^2 of a step's whole batch."""
        own = self.quarters[self.quarter(step)]
        own[0] += loss
        own[1] += grad_sq
        own[2] += 1
        if self.counts(step):
            self.norm_sum += grad_sq
            self.norm_count += 1

    def add_trace(self, step: int, trace: float) -> None:
        """One estimate of tr S, from `trace_of_pair` or `trace_of_workers`."""
        own = self.quarters[self.quarter(step)]
        own[3] += trace
        own[4] += 1
        if self.counts(step):
            self.trace_sum += trace
            self.trace_count += 1

    @property
    def along(self) -> str | None:
        """Of each quarter the mean training `loss`, `grad_sq` without the noise of the batch, and
        `trace`, as JSON: null where a quarter measured none; None where none did."""
        found: list[dict[str, float | None]] = []
        for loss, norms, steps, traces, pairs in self.quarters:
            known = steps and pairs and math.isfinite(loss + norms + traces)
            trace = traces / pairs if known else None
            grad_sq = norms / steps - trace / self.batch_sequences if trace is not None else None
            found.append(
                {"loss": loss / steps if known else None, "grad_sq": grad_sq, "trace": trace}
            )
        return json.dumps(found) if any(q["trace"] is not None for q in found) else None

    @property
    def trace(self) -> float | None:
        """tr S, of one sequence's gradient."""
        return self.trace_sum / self.trace_count if self.trace_count else None

    @property
    def grad_sq(self) -> float | None:
        """|G|^2 without the noise of the batch; may come out negative where noise dominates."""
        if self.trace is None or not self.norm_count:
            return None
        return self.norm_sum / self.norm_count - self.trace / self.batch_sequences

    @property
    def sequences(self) -> float | None:
        """B_simple in sequences; None where |G|^2 is not distinguishable from zero."""
        if self.trace is None or self.grad_sq is None or self.grad_sq <= 0:
            return None
        return self.trace / self.grad_sq

    def state(self) -> dict[str, Any]:
        return asdict(self)


def trace_of_pair(difference_sq: float, sequences: int) -> float:
    """tr S from |g1 - g2|^2 of the mean gradients of two parts of `sequences` sequences each."""
    return sequences * difference_sq / 2


def trace_of_workers(mean_sq: float, whole_sq: float, sequences: int, workers: int) -> float:
    """tr S from the mean of |g|^2 over workers of `sequences` sequences each, and of |G|^2."""
    return (mean_sq - whole_sq) / (1 / sequences - 1 / (sequences * workers))
