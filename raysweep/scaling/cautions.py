"""What to be wary of in an answer: the words, and when they are due.

The page's calculator says the same words: it fills the blanks of `WORDS` itself, and is handed the
sentences that no run can change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from raysweep.scaling.power_law import PowerLaw

if TYPE_CHECKING:
    from raysweep.scaling.groups import Group

FAR = {"params": 10.0, "tokens": 10.0, "FLOPs": 30.0}
"""Beyond or below the cells by more than this factor, an extrapolation is called long. Each axis
has its own: many parameters on few tokens cancel in the FLOPs."""

WORDS = {
    "foreign": "no cell of {architecture} has {experts} experts and top-{top_k}: the answer rests "
    "on how other numbers of experts behave",
    "far": "a long extrapolation: {reach}",
    "beyond": "beyond the cells by {factors}",
    "below": "below the cells by {factors}",
    "compute_only": "the laws of {quantities} know compute only, from cells of {low} to {high} "
    "tokens a parameter; asked for {asked}",
}
"""Sentences that depend on the run asked about."""

COMPUTE_LOSS = "kaplan"
"""The law of the loss that knows compute only."""

SPLIT_MARGIN = 2.0
"""A law of compute may be asked this far outside its cells' tokens a parameter, unwarned."""


def far(factors: Mapping[str, float]) -> dict[str, float]:
    """Those of the factors of an extrapolation, by axis, that are long."""
    return {axis: f for axis, f in factors.items() if max(f, 1 / f) > FAR[axis]}


def reach(
    factors: Mapping[str, float], write: Callable[[float], str] = lambda f: f"{f:.3g}x"
) -> str:
    """How far a run lies outside the cells, upward and downward; empty where it lies inside."""
    sides = {
        "beyond": {axis: f for axis, f in factors.items() if f > 1},
        "below": {axis: 1 / f for axis, f in factors.items() if f < 1},
    }
    return "; ".join(
        WORDS[side].format(factors=", ".join(f"{write(f)} in {axis}" for axis, f in own.items()))
        for side, own in sides.items()
        if own
    )


def no_law(group: Group, quantity: str) -> str:
    """Why nothing answers for a quantity of an architecture's run."""
    asked = [x for x in group.laws.values() if x.target == quantity and "loss" not in x.inputs]
    why = "; ".join(f"{law.name} {_why_silent(group, law)}" for law in asked)
    return f"no law of {quantity} can answer: {why}"


def _why_silent(group: Group, law: PowerLaw) -> str:
    if not law.ok:
        return f"has {law.status}" + (f" ({law.message})" if law.message else "")
    if group.wants_routing and not {"active_ratio", "experts"} & set(law.inputs):
        return "does not read experts, in which the cells differ"
    return "rests on cells of one size or one horizon, far from the run's"


def of_law(quantity: str, law: PowerLaw | None) -> tuple[str, ...]:
    """What is to be said of whatever answers for a quantity: a law, or the joint surface (None)."""
    if law is None:
        return (
            f"too few cells for a law of {quantity} of their own: the answer leans on Step Law's "
            "exponents",
        )
    if law.left_out:
        n = len(law.left_out)
        return (f"the law of {quantity} leaves out {n} of {n + law.n_cells} cells",)
    return ()


def of_run(
    laws: Mapping[str, PowerLaw | None],
    loss_law: str,
    factors: Mapping[str, float],
    cells: pd.DataFrame,
    asked: float,
) -> list[str]:
    """What is to be said of a run of `asked` tokens a parameter, which lies outside `cells` by
    `factors`; `laws` answer by quantity, None where the joint surface does."""
    said = []
    if long := far(factors):
        said.append(WORDS["far"].format(reach=reach(long)))
    ratio = cells["tokens"] / cells["params_active_non_embedding"]
    blind = [q for q, law in laws.items() if law and law.inputs[0] == "flops"]
    blind += ["loss"] if loss_law == COMPUTE_LOSS else []
    if blind and not ratio.min() / SPLIT_MARGIN <= asked <= ratio.max() * SPLIT_MARGIN:
        said.append(_compute_only(blind, float(ratio.min()), float(ratio.max()), asked))
    for quantity, law in laws.items():
        said += of_law(quantity, law)
    return said


def _compute_only(blind: Sequence[str], low: float, high: float, asked: float) -> str:
    numbers = {"low": low, "high": high, "asked": asked}
    return WORDS["compute_only"].format(
        quantities=" and ".join(blind), **{name: f"{v:.3g}" for name, v in numbers.items()}
    )
