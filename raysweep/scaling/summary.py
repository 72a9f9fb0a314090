"""Fits as text for a terminal: cells, laws with intervals, losses, dense against MoE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raysweep.scaling.group_loss import NotFitted
from raysweep.scaling.loss_fit import LossFit
from raysweep.scaling.noise import Ratio
from raysweep.scaling.power_law import SYMBOLS, PowerLaw

if TYPE_CHECKING:
    from raysweep.scaling.fits import Fits
    from raysweep.scaling.groups import Group


def summary(fits: Fits) -> str:
    """What a reader wants to see first; everything else is in `Fits.to_dict`."""
    counted = fits.n_rows - sum(fits.left_out.values())
    lines = [f"{len(fits.cells)} cells; {counted} of {fits.n_rows} rows count"]
    lines += [f"  {n} left out: {why}" for why, n in fits.left_out.items()]
    lines += [f"  note: {message}" for message in fits.messages]
    lines += ["", f"Optima by the method '{fits.method}'", *_cells(fits)]
    for group in fits.groups.values():
        lines += ["", f"{group.name} ({group.kind}, {len(group.cells)} cells)", *_group(group)]
    for label, ratios in fits.comparison.items():
        lines += ["", f"MoE over dense {label}"]
        for name, r in ratios.items():
            text = f"{r.ratio:.3g} (95 %: {r.low:.3g} to {r.high:.3g})" if r.ok else _why(r)
            lines.append(f"  {name:<20} {text}")
    return "\n".join(lines)


def _cells(fits: Fits) -> list[str]:
    searched = fits.cells[fits.cells["learning_rate"].notna()]
    if not len(searched):
        return ["  none: no cell has a finished trial with its learning rate and batch"]
    wide = max(len(str(n)) for n in searched.index)
    lines = [f"  {'cell':<{wide}}  trials   learning rate   batch tokens     loss  status"]
    for name, row in searched.iterrows():
        lines.append(
            f"  {name!s:<{wide}}  {row['n_finished']:6d}  {_number(row['learning_rate'], '14.3g')}"
            f"  {_number(row['batch_tokens'], '13.4g')}  {_number(row['loss'], '7.4f')}"
            f"  {row['status']}"
        )
    return lines


def _group(group: Group) -> list[str]:
    lines = []
    best = {law.name for t in ("learning_rate", "batch_tokens") if (law := group.best_law(t))}
    if not any(law.n_cells for law in group.laws.values()):
        lines.append("    no laws of the optima: no cell has an interior optimum")
    else:
        for law in group.laws.values():
            lines.append(f"  {'*' if law.name in best else ' '} {_law(law)}")
        lines.append("    * predicts unseen cells best; N is " + group.count)
    for key, fit in group.loss_laws.items():
        if isinstance(fit, LossFit) and fit.ok:
            values = ", ".join(f"{k} {v:.4g}" for k, v in fit.coefficients.items())
            lines.append(f"    {fit.law.formula}: {values} ({fit.status})")
        else:
            lines.append(f"    {key}: {_why(fit)}")
    for label, gap in (("all cells", group.in_sample), ("held-out cells", group.held_out)):
        if gap is not None and gap.gaps:
            lines.append(
                f"    loss gap of the laws on {label}: mean {100 * gap.mean:.3f} %, max "
                f"{100 * gap.max:.3f} %, {len(gap.gaps)} cells, fitted on {gap.n_train}"
            )
    return lines


def _law(law: PowerLaw) -> str:
    if not law.ok:
        return f"{law.name}: {_why(law)}"
    ends = ", ".join(
        f"{SYMBOLS[name][0]} {e.low:.3f}..{e.high:.3f}" for name, e in law.exponents.items()
    )
    off = f", {100 * law.held_out:.1f} % off unseen" if math.isfinite(law.held_out) else ""
    return f"{law.formula}  (95 %: {ends}; {law.n_cells} cells{off})"


def _why(fit: PowerLaw | LossFit | NotFitted | Ratio) -> str:
    return f"{fit.status}: {fit.message}"


def _number(value: float, style: str) -> str:
    width = int(style.split(".")[0])
    return f"{value:{style}}" if math.isfinite(value) else f"{'-':>{width}}"
