"""From fits to a recommendation: which law answers, what it says, and what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from raysweep.errors import UserError
from raysweep.scaling import cautions
from raysweep.scaling.expected_loss import expected_loss
from raysweep.scaling.groups import ALL, Group
from raysweep.scaling.optima_laws import KNOWN_AHEAD, best_law
from raysweep.scaling.optimum import OPTIMUM_METHODS
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.published import published_answers
from raysweep.scaling.recommend import Recommendation, usable_batch
from raysweep.scaling.target import Target, describe_target, extrapolation

if TYPE_CHECKING:
    from raysweep.scaling.fits import Fits

QUANTITIES = ("learning_rate", "batch_tokens")

SURFACE_CELLS = 3
"""Cells with a known optimum that the joint surface needs before it may answer."""


def advise(
    fits: Fits,
    architecture: str | None,
    params: float,
    tokens: float,
    experts: int | None,
    top_k: int | None,
) -> Recommendation:
    """See `Fits.recommend`."""
    for name, value in (("params", params), ("tokens", tokens)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"recommend needs {name} above zero, not {value}")
    name = _architecture(fits, architecture, experts)
    own = fits.groups[name]
    if own.kind == "dense" and (experts or 1) > 1:
        raise UserError(f"architecture {name!r} is dense: leave out experts, or ask for a MoE")
    experts, top_k, foreign = _routing(own.cells, experts, top_k)
    warnings: list[str] = []
    candidates = [fits.groups[ALL]] if foreign and ALL in fits.groups else [own]
    if ALL in fits.groups and not foreign:
        candidates.append(fits.groups[ALL])
    if foreign:
        blanks = {"architecture": name, "experts": experts, "top_k": top_k}
        warnings.append(cautions.WORDS["foreign"].format(**blanks))
    family = candidates[0].cells
    target = describe_target(family, params, tokens, experts, top_k)
    warnings += target.notes

    answers: dict[str, _Answer] = {}
    for quantity in QUANTITIES:
        answer = _answer(fits, candidates, quantity, target)
        if answer is None:
            warnings.append(cautions.no_law(own, quantity))
        else:
            answers[quantity] = answer
    nothing = _Answer("", math.nan, (math.nan, math.nan), "", (), None)
    rate, batch = (answers.get(q, nothing) for q in QUANTITIES)
    length = _sequence_length(family)
    usable, sequences = usable_batch(batch.value, length)

    loss = expected_loss(fits, own, foreign, target.inputs)
    warnings += loss.warnings

    used = fits.cells.loc[sorted({c for answer in answers.values() for c in answer.cells})]
    used = used if len(used) else family
    factors = extrapolation(used, target.inputs)
    speaking = {q: answer.law for q, answer in answers.items()}
    warnings += cautions.of_run(speaking, loss.law, factors, used, tokens / params)
    laws = {q: answer.name for q, answer in answers.items()}
    return Recommendation(
        architecture=name,
        params=params,
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        learning_rate=float(f"{rate.value:.3g}"),
        learning_rate_interval=rate.interval,
        batch_tokens=usable,
        batch_tokens_exact=batch.value,
        batch_tokens_interval=batch.interval,
        batch_sequences=sequences,
        sequence_length=length,
        loss=loss.value,
        loss_interval=loss.interval,
        laws=laws | ({"loss": loss.law} if loss.law else {}),
        extrapolation=factors,
        rests_on=(*dict.fromkeys(a.rests_on for a in answers.values()), *loss.rests_on),
        by_method=_by_method(candidates, answers, target.inputs),
        published=tuple(
            a
            for a in published_answers(target.setting())
            if a["learning_rate"] is not None or a["batch_tokens"] is not None
        ),
        warnings=tuple(warnings),
        status=_status(answers),
    )


def _status(answers: Mapping[str, _Answer]) -> str:
    missing = [q for q in QUANTITIES if q not in answers]
    if missing:
        return "no law" if len(missing) == 2 else f"no law of {missing[0]}"
    return "ok" if all(a.law is not None for a in answers.values()) else "few cells"


@dataclass(frozen=True)
class _Answer:
    """One quantity of a run: by which law, how sure, and from which cells."""

    name: str
    value: float
    interval: tuple[float, float]
    rests_on: str
    cells: tuple[str, ...]
    law: PowerLaw | None
    """None where the joint surface answers."""


def _architecture(fits: Fits, wanted: str | None, experts: int | None) -> str:
    """The group's name that a request means."""
    names = [g for g in fits.groups if g != ALL]
    if not names:
        raise UserError("the results hold no cell, so there is nothing to recommend from")
    if wanted in names:
        return wanted
    many = (experts or 1) > 1
    kind = wanted if wanted is not None else "moe" if many else "dense"
    of_kind = [n for n in names if fits.groups[n].kind == kind]
    if wanted in ("dense", "moe", None) and of_kind:
        routing = [n for n in of_kind if experts in set(fits.groups[n].cells["experts"])]
        return (routing or of_kind)[0]
    if wanted is None and not many:
        return names[0]
    if wanted in ("moe", None):
        raise UserError("no MoE cell in the results, so nothing tells of experts: leave them out")
    raise UserError(f"no architecture {wanted!r} in the results; known: {', '.join(names)}")


def _routing(cells: pd.DataFrame, experts: int | None, top_k: int | None) -> tuple[int, int, bool]:
    """(experts, top_k) of the run, and whether no cell of the architecture has them."""
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


def _answer(
    fits: Fits, candidates: Sequence[Group], quantity: str, target: Target
) -> _Answer | None:
    """By the architecture's own law where it has two cells to spare, else the joint one's; with
    fewer cells by the joint surface, whose exponents lean on a published law."""
    for group in candidates:
        laws = {n: x for n, x in group.laws.items() if _speaks(x, group, target.inputs)}
        law = best_law(laws, quantity, KNOWN_AHEAD)
        if law is not None and law.dof >= 2:
            value, low, high = _ask(law, target.inputs)
            off = law.held_out
            said = f", {100 * off:.1f} % off on unseen cells" if math.isfinite(off) else ""
            said = f"{law.formula}, {law.n_cells} cells{said}"
            return _Answer(law.name, value, (low, high), said, law.cells, law)
    axis = QUANTITIES.index(quantity)
    known = [
        name
        for name, optimum in fits.optima["surface"].items()
        if optimum.interior and math.isfinite(optimum.covariance[axis, axis])
    ]
    if fits.surface is None or len(known) < SURFACE_CELLS:
        return None
    posterior = fits.surface.optimum(target.features())
    degrees = np.broadcast_to(fits.surface.laws.degrees, len(QUANTITIES))[axis]
    reach = stats.t.ppf(0.975, degrees)
    half = float(reach * np.sqrt(posterior.covariance[axis, axis]))
    middle = float(posterior.mean[axis])
    return _Answer(
        "surface",
        math.exp(middle),
        (math.exp(middle - half), math.exp(middle + half)),
        f"the joint surface of {len(known)} cells, whose exponents lean on Step Law's",
        tuple(known),
        None,
    )


def _speaks(law: PowerLaw, group: Group, inputs: Mapping[str, float]) -> bool:
    """Whether a law's cells can tell of a run at all.

    A joint law without a further power would take a MoE for a dense model. A law in compute or
    tokens alone, from cells of one size (or one horizon), knows nothing of other sizes (or
    horizons).
    """
    if group.wants_routing and not {"active_ratio", "experts"} & set(law.inputs):
        return False
    if "params" in law.inputs or not law.ok:
        return True
    used = group.cells.loc[[c for c in law.cells if c in group.cells.index]]
    for column in ("params_active_non_embedding", "tokens"):
        logs = np.log(used[column].to_numpy(float))
        if np.ptp(logs) < 0.1 and abs(math.log(inputs[column]) - logs.mean()) > math.log(2):
            return False
    return True


def _ask(law: PowerLaw, inputs: Mapping[str, float]) -> tuple[float, float, float]:
    named = {**inputs, "params": inputs.get(law.count, math.nan)} if law.count else dict(inputs)
    value = float(law.predict(named))
    low, high = law.interval(named)
    return value, float(low), float(high)


def _by_method(
    candidates: Sequence[Group], answers: Mapping[str, _Answer], inputs: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """The same laws on the optima of every method that can fit them."""
    if any(q not in answers or answers[q].law is None for q in QUANTITIES):
        return {}
    found = {}
    for method in OPTIMUM_METHODS:
        values = []
        for quantity in QUANTITIES:
            for group in candidates:
                other = group.methods[method].laws.get(answers[quantity].name)
                if other is not None and other.ok:
                    values.append(_ask(other, inputs)[0])
                    break
        if len(values) == len(QUANTITIES):
            found[method] = (values[0], values[1])
    return found


def _sequence_length(cells: pd.DataFrame) -> int | None:
    known = cells["sequence_length"].dropna()
    return int(known.mode().iloc[0]) if len(known) else None
