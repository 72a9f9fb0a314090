"""What a training run gives back, and how it talks to whoever started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raysweep.errors import UserError

Status = Literal["finished", "diverged", "out_of_memory", "stopped"]


class WorkerOutOfMemory(UserError):
    """Workers that train together lack memory; the message says what to set."""


class Reporter(Protocol):
    """Hears of progress, and may end the run. Called at most about 500 times a run.

    With several workers each has its own, and all are told the same at the same steps.
    """

    def report(self, step: int, tokens: int, loss: float) -> None:
        """`step` steps and `tokens` tokens are done; `loss` is the smoothed training loss."""
        ...

    def should_stop(self) -> bool:
        """True ends the run after the current step, with status `stopped` and a checkpoint from
        which it goes on. Asked every few seconds at least; only the first worker's reporter is."""
        ...


class Silent:
    """A reporter that says nothing and lets the run finish."""

    def report(self, step: int, tokens: int, loss: float) -> None:
        pass

    def should_stop(self) -> bool:
        return False


Curve = dict[str, list[Any]]
"""The training curve by column, at most about 500 points: `step` and `tokens` (steps and tokens
done), and since the point before, mean `train_loss` and `grad_norm` (before clipping), and the
`learning_rate` of the last step."""

CURVE_COLUMNS = ("step", "tokens", "train_loss", "learning_rate", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """How one training run ended. Losses are in nats a token; None is not measured."""

    status: Status
    reason: str | None
    """Why it did not finish; None when it did."""
    step: int
    """Optimizer steps done."""
    tokens_seen: int
    tokens_trained: int
    """Of these, not lent by another run, as the stable phase of a WSD branch is."""
    loss: float | None
    """Mean over the validation slice, of finished runs."""
    loss_se: float | None
    """Its standard error, from the spread of the sequences' losses."""
    loss_ema: float | None
    """That of the averaged weights, where `recipe.ema_tokens` is set."""
    loss_ema_se: float | None
    named_losses: dict[str, tuple[float, float]]
    """Loss and standard error on each named validation set."""
    bits_per_byte: float | None
    train_loss: float | None
    """Mean over the last twentieth of the steps."""
    seconds_train: float
    """In the step loop and the evaluation, over all attempts of a resumed run."""
    tokens_per_second: float
    """Of the step loop, all workers together."""
    peak_memory_bytes: int
    """Of the device, or of the process on CPUs; the most of any worker."""
    micro_batch_sequences: int | None
    """None where there was no memory even for the model."""
    accumulation: int | None
    """Micro-batches a step and worker."""
    world_size: int
    noise_scale_tokens: float | None
    """B_simple = tr S / |G|^2; None where it was not measured or |G|^2 is lost in the noise."""
    noise_grad_sq: float | None
    noise_trace: float | None
    """tr S of the gradient of one sequence."""
    noise_quarters: str | None = None
    """Of each quarter of the run the mean training `loss`, `grad_sq` and `trace`, as JSON; None
    where they were not measured."""
    expert_load_entropy: float | None
    """Over the validation slice, mean of the MoE layers, as a share of its maximum."""
    expert_load_max_over_mean: float | None
    router_confidence: float | None
    """Mean probability that the router gave to the chosen experts together."""
    device: str
    curve: Curve
