"""A recommendation: learning rate, batch and expected loss of a run, read off the evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from raysweep.display import InNotebooks
from raysweep.errors import UserError
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import Evidence, LossAnswer
from raysweep.scaling.optima.literature import published_answers
from raysweep.scaling.optima.surface import OptimumPosterior
from raysweep.scaling.plain import plain_dict
from raysweep.scaling.quantities import ANSWERS, QUANTITIES
from raysweep.scaling.runs import describe_run, extrapolation
from raysweep.study.shape import RunSize
from raysweep.text import estimated, short, spanned, written

INSIDE, EXTRAPOLATED, PRIOR, NOT_DETERMINED = (
    "inside the cells",
    "extrapolated",
    "published laws only",
    "not determined",
)
"""The verdicts."""

LONG = {"N": 10.0, "D": 10.0, "FLOPs": 30.0}
"""Beyond or below the cells by more than this factor, an extrapolation is called long. Each axis
has its own: many parameters on few tokens cancel in the FLOPs."""

NEAR = 1.5
"""A run this far outside the cells in N and D, at most, still counts as inside them."""

BATCH_WITHIN = 0.005
"""Share of the best loss that the largest batch of a recommendation may cost."""


@dataclass(frozen=True, eq=False, repr=False)
class Recommendation(InNotebooks):
    """What to run, how sure that is, and what it rests on.

    Intervals are 95 %. `batch_tokens` is `batch_tokens_exact` rounded to 4, 5, 6 or 7 times a power
    of two sequences, at least one; where rounding leaves the interval, that reaches to it. Where no
    cell varied its batch, it is the one that was run, `batch_as_run`, and has no interval.
    `covariance` [2, 2] is that of (ln learning rate, ln batch). `largest_batch`
    is the largest batch, in tokens, whose loss at its own best learning rate
    (`largest_batch_learning_rate`) lies within `within` of the best. `verdict` says whether the run
    lies inside the cells, is extrapolated to, or is not determined; `extrapolation` by how much
    (above 1: beyond the cells; below: beneath). `directions` are those that the cells do not span,
    along which the answer follows published laws. `told_by` names what told the loss.
    """

    architecture: str
    run: RunSize
    learning_rate: float
    learning_rate_interval: tuple[float, float]
    batch_tokens: float
    batch_tokens_exact: float
    batch_tokens_interval: tuple[float, float]
    batch_as_run: bool
    batch_sequences: int | None
    sequence_length: int | None
    covariance: np.ndarray
    within: float
    largest_batch: float
    largest_batch_learning_rate: float
    loss: float
    loss_interval: tuple[float, float]
    told_by: str
    verdict: str
    extrapolation: dict[str, float]
    directions: tuple[str, ...]
    published: tuple[dict[str, object], ...]
    warnings: tuple[str, ...]

    @property
    def params(self) -> float:
        """Active non-embedding parameters of the run."""
        return self.run.params_active_non_embedding

    @property
    def tokens(self) -> float:
        """The horizon."""
        return self.run.tokens

    @property
    def experts(self) -> int:
        return self.run.experts

    @property
    def top_k(self) -> int:
        return self.run.top_k

    @property
    def status(self) -> str:
        """`ok`, or the verdict where there is no learning rate."""
        return "ok" if math.isfinite(self.learning_rate) else self.verdict

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values: what `raysweep recommend --json` prints."""
        return plain_dict(
            {
                "architecture": self.architecture,
                "params": self.params,
                "tokens": self.tokens,
                "experts": self.experts,
                "top_k": self.top_k,
                "group": self.run.group,
                **{f.name: getattr(self, f.name) for f in fields(self)[2:]},
                "status": self.status,
            }
        )

    def to_row(self) -> dict[str, object]:
        """One row of a table: the run, each answer with the ends of its interval, the verdict."""
        row: dict[str, object] = {
            name: getattr(self, name)
            for name in ("architecture", "params", "tokens", "experts", "top_k")
        }
        for name in ANSWERS:
            low, high = getattr(self, f"{name}_interval")
            row |= {name: getattr(self, name), f"{name}_low": low, f"{name}_high": high}
        return row | {"largest_batch": self.largest_batch, "verdict": self.verdict}

    def cells(self) -> list[str]:
        """Learning rate, batch and loss with their intervals, for a table."""
        found = []
        for key in ANSWERS:
            low, high = getattr(self, f"{key}_interval")
            found.append(spanned(getattr(self, key), low, high, QUANTITIES[key].style))
        return found

    def __repr__(self) -> str:
        rate, batch = written(self.learning_rate, "rate"), written(self.batch_tokens, "batch")
        loss = written(self.loss, "loss")
        return (
            f"<Recommendation: {_asked(self)}: learning rate {rate}, batch {batch} tokens, "
            f"loss {loss}, {self.verdict}>"
        )

    def __str__(self) -> str:
        return _text(self)


def recommend(
    evidence: Evidence,
    architecture: str,
    params: float,
    tokens: float,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    group: str | None = None,
    within: float = BATCH_WITHIN,
) -> Recommendation:
    """What to run for `params` active non-embedding parameters on `tokens` tokens.

    `architecture` is one of the evidence's; `experts` and `top_k` are those of its cells unless
    given; `group` is one of the groups that the results were fitted by.

    Raises:
        UserError: a question that no results could answer.
    """
    if not 0 < within < 1:
        raise UserError(f"within must be a share such as 0.5%, not {within}")
    own = evidence.cells[evidence.cells["architecture"] == architecture]
    experts, top_k, foreign = _routing(architecture, own, experts, top_k)
    group = _group(evidence, own, group)
    run = describe_run(
        evidence.cells if foreign else own,
        params,
        tokens,
        experts=experts,
        top_k=top_k,
        group=group,
    )
    return answer(evidence, architecture, run, within=within, foreign=foreign)


def answer(
    evidence: Evidence,
    architecture: str,
    run: RunSize,
    *,
    within: float = BATCH_WITHIN,
    foreign: bool = False,
) -> Recommendation:
    """The recommendation for a run whose counts are known."""
    family = evidence.cells if foreign else _family(evidence, architecture)
    length = _sequence_length(family)
    factors = extrapolation(family, run)
    optimum = evidence.optimum(run)
    loss = evidence.loss(architecture, run)
    directions = () if evidence.surface is None else evidence.surface.unspanned(run)
    verdict = _verdict(evidence, optimum, factors)
    nothing = Estimate.missing("no trial tells both learning rate and batch")
    rate, batch = optimum.estimates() if optimum is not None else (nothing, nothing)
    if rate.value > 1:
        rate = Estimate.missing("the learning rate would be above 1")
    as_run = optimum is not None and optimum.as_run
    usable, sequences = usable_batch(batch.value, length, as_run=as_run)
    most = (math.nan, math.nan)
    if evidence.surface is not None and evidence.surface.batch_rule is None:
        most = evidence.surface.largest_batch(run, within)
    return Recommendation(
        architecture=architecture,
        run=run,
        learning_rate=float(f"{rate.value:.3g}"),
        learning_rate_interval=(rate.low, rate.high),
        batch_tokens=usable,
        batch_tokens_exact=batch.value,
        batch_tokens_interval=_reaching(batch, usable),
        batch_as_run=as_run,
        batch_sequences=sequences,
        sequence_length=length,
        covariance=np.full((2, 2), math.nan) if optimum is None else optimum.covariance,
        within=within,
        largest_batch=most[0],
        largest_batch_learning_rate=most[1],
        loss=loss.loss.value,
        loss_interval=(loss.loss.low, loss.loss.high),
        told_by=loss.told_by,
        verdict=verdict,
        extrapolation=factors,
        directions=directions,
        published=tuple(published_answers(run)),
        warnings=tuple(
            _warnings(evidence, architecture, run, rate, batch, loss, factors, directions, foreign)
        ),
    )


def usable_batch(
    tokens: float, sequence_length: int | None, *, as_run: bool = False
) -> tuple[float, int | None]:
    """The batch rounded to 4, 5, 6 or 7 times a power of two sequences, as (tokens, sequences).

    Without a sequence length: to two significant digits, and None sequences. The batch that was run
    is rounded to whole sequences or tokens, no further."""
    if not math.isfinite(tokens):
        return math.nan, None
    if not sequence_length:
        return float(round(tokens) if as_run else f"{tokens:.2g}"), None
    wanted = max(tokens / sequence_length, 1.0)
    if as_run:
        return float(round(wanted) * sequence_length), round(wanted)
    quarter = max(1, 2 ** (math.floor(math.log2(wanted)) - 2))
    choices = {quarter * k for k in range(1, 9)}
    sequences = min(choices, key=lambda c: abs(math.log(c / wanted)))
    return float(sequences * sequence_length), sequences


def _reaching(estimate: Estimate, value: float) -> tuple[float, float]:
    """The interval of an estimate, widened to hold the rounded value that is recommended."""
    if not (estimate.has_interval and math.isfinite(value)):
        return estimate.low, estimate.high
    return min(estimate.low, value), max(estimate.high, value)


def long_reach(factors: Mapping[str, float]) -> dict[str, float]:
    """Those of the factors of an extrapolation, by axis, that are long."""
    return {axis: f for axis, f in factors.items() if max(f, 1 / f) > LONG[axis]}


def reach(factors: Mapping[str, float]) -> str:
    """How far a run lies outside the cells, in words; empty where it lies inside."""
    beyond = [f"{f:.3g}x in {axis}" for axis, f in factors.items() if f > 1]
    below = [f"{1 / f:.3g}x in {axis}" for axis, f in factors.items() if f < 1]
    parts = [f"beyond the cells by {', '.join(beyond)}"] if beyond else []
    parts += [f"below the cells by {', '.join(below)}"] if below else []
    return "; ".join(parts)


def _verdict(
    evidence: Evidence, optimum: OptimumPosterior | None, factors: Mapping[str, float]
) -> str:
    if optimum is None:
        return NOT_DETERMINED
    surface = evidence.surface
    if surface is None or not surface.trials.any():
        return PRIOR
    outside = max(max(factors[axis], 1 / factors[axis]) for axis in ("N", "D"))
    return INSIDE if outside <= NEAR else EXTRAPOLATED


def _warnings(
    evidence: Evidence,
    architecture: str,
    run: RunSize,
    rate: Estimate,
    batch: Estimate,
    loss: LossAnswer,
    factors: Mapping[str, float],
    directions: Sequence[str],
    foreign: bool,
) -> list[str]:
    said = []
    if foreign:
        said.append(
            f"no cell of {architecture} has {run.experts} experts and top-{run.top_k}: the answer "
            "rests on how other numbers of experts behave"
        )
    if long := long_reach(factors):
        said.append(f"a long extrapolation: {reach(long)}")
    if directions:
        listed = " and of ".join(directions)
        said.append(
            f"the cells do not tell the effect of {listed}: there the answer follows published laws"
        )
    surface = evidence.surface
    if surface is not None and surface.batch_rule is not None:
        said.append("no cell varied its batch: the learning rate is that at the batch that was run")
    if surface is not None and surface.trials.any() and not surface.varied[0]:
        said.append(
            "no cell varied its learning rate: it follows published laws, and the batch is that at "
            "the rate that was run"
        )
    unseen = evidence.unseen(architecture, run)
    if loss.loss.known and unseen > evidence.noise(architecture):
        said.append(
            "the trials do not reach the optimum: its loss is told half way between the best runs' "
            "and what the fit expects"
        )
    if surface is not None and surface.status == "not converged":
        said.append("the fit did not converge: the numbers are its last step's")
    if not rate.known and rate.why:
        said.append(rate.why)
    length = _sequence_length(_family(evidence, architecture))
    if length and batch.value < length:
        said.append(f"the best batch would be smaller than one sequence of {length} tokens")
    if not loss.loss.known:
        said.append(f"the loss is not determined: {loss.loss.why}")
    if loss.told_by == "pairs":
        said.append("the loss rests on its ratio in cells of the same size")
    return said


def _family(evidence: Evidence, architecture: str) -> pd.DataFrame:
    return evidence.cells[evidence.cells["architecture"] == architecture]


def _routing(
    architecture: str, cells: pd.DataFrame, experts: int | None, top_k: int | None
) -> tuple[int, int, bool]:
    """(experts, top_k) of the run, and whether no cell of the architecture has them."""
    if set(cells["architecture_kind"]) == {"dense"} and (experts or 1) > 1:
        raise UserError(
            f"architecture {architecture!r} is dense: leave out experts, or ask for a MoE"
        )
    for name, value in (("experts", experts), ("top_k", top_k)):
        if value is not None and not float(value).is_integer():
            raise UserError(f"{name} must be a whole number, not {value}")
    pairs = cells[["experts", "top_k"]].drop_duplicates()
    common = pairs.iloc[0]
    e = int(common["experts"]) if experts is None else int(experts)
    k = int(common["top_k"]) if top_k is None else int(top_k)
    if experts is not None and top_k is None:
        same = pairs[pairs["experts"] == e]
        k = int(same.iloc[0]["top_k"]) if len(same) else min(k, e)
    if not 1 <= k <= e:
        raise UserError(f"top_k {k} must lie between 1 and experts {e}")
    return e, k, not bool(((pairs["experts"] == e) & (pairs["top_k"] == k)).any())


def _group(evidence: Evidence, cells: pd.DataFrame, group: str | None) -> str:
    """The group asked for; the one of lowest loss, other things equal, where none is named."""
    known = list(dict.fromkeys(cells["group"]))
    if group is None:
        return min(known, key=evidence.group_offset)
    if group not in known:
        raise UserError(f"no group {group!r} in the results; known: {', '.join(known)}")
    return group


def _sequence_length(cells: pd.DataFrame) -> int | None:
    known = cells["sequence_length"].dropna()
    return int(known.mode().iloc[0]) if len(known) else None


# ---------------------------------------------------------------------- as text


def _asked(answer: Recommendation) -> str:
    """`moe, adamw: 7B active parameters on 1.4T tokens, 8 experts, top-2`."""
    of = answer.architecture + (f", {answer.run.group}" if answer.run.group else "")
    sparse = answer.experts > 1
    said = f"{of}: {short(answer.params)} {'active ' if sparse else ''}parameters"
    said += f" on {short(answer.tokens)} tokens"
    return said + (f", {answer.experts} experts, top-{answer.top_k}" if sparse else "")


def _text(answer: Recommendation) -> str:
    """What a terminal shows: warnings before the numbers, and nothing twice."""
    rows = [
        ("learning rate", _told(answer.learning_rate, answer.learning_rate_interval, "rate")),
        ("batch", _batch_text(answer)),
        ("loss", _loss_text(answer)),
        ("largest batch", _largest_text(answer)),
        ("verdict", _verdict_text(answer)),
    ]
    lines = [_asked(answer), *(f"  warning: {w}" for w in answer.warnings)]
    lines += [f"  {name:<14} {said}" for name, said in rows if said]
    laws = [(str(law["law"]), _law_text(law)) for law in answer.published]
    if laws:
        wide = max(14, *(len(name) for name, _ in laws))
        lines.append(f"  {'published laws':<{wide}} learning rate  batch")
        lines += [f"  {name:<{wide}} {said}" for name, said in laws]
    return "\n".join(lines)


def _told(value: float, interval: tuple[float, float], style: str, unit: str = "") -> str:
    if not math.isfinite(value):
        return NOT_DETERMINED
    return estimated(value, *interval, style=style, unit=unit)


def _batch_text(answer: Recommendation) -> str:
    said = _told(answer.batch_tokens, answer.batch_tokens_interval, "batch", "tokens")
    if answer.batch_as_run:
        said = f"{written(answer.batch_tokens, 'batch')} tokens (as run)"
    if answer.batch_sequences is None or answer.sequence_length is None:
        return said
    many = f"{answer.batch_sequences} sequence{'s' * (answer.batch_sequences > 1)}"
    return f"{said}: {many} of {answer.sequence_length}"


def _loss_text(answer: Recommendation) -> str:
    said = _told(answer.loss, answer.loss_interval, "loss")
    by = {
        "": "",
        "pairs": "",
        "edge": ", beyond the trials of this cell",
        "cell": ", as measured in this cell",
    }
    return said + by.get(answer.told_by, f", by the law {answer.told_by!r}")


def _largest_text(answer: Recommendation) -> str:
    if not math.isfinite(answer.largest_batch):
        return ""
    batch, rate = written(answer.largest_batch, "batch"), answer.largest_batch_learning_rate
    return (
        f"{batch} tokens within {written(answer.within, 'percent')} of the best loss, at a "
        f"learning rate of {written(rate, 'rate')}"
    )


def _verdict_text(answer: Recommendation) -> str:
    far = "" if long_reach(answer.extrapolation) else reach(answer.extrapolation)
    return answer.verdict + (f": {far}" if far else "")


def _law_text(law: Mapping[str, object]) -> str:
    rate, batch = (law[name] for name in ("learning_rate", "batch_tokens"))
    rate, batch = (v if isinstance(v, float) else None for v in (rate, batch))
    return f"{written(rate, 'rate'):<14} {written(batch, 'batch')}"
