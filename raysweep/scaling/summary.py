"""Fits as text for a terminal: cells, laws with intervals, losses, dense against MoE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raysweep.scaling.group_loss import NotFitted
from raysweep.scaling.loss_fit import LossFit
from raysweep.scaling.noise import Ratio
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import estimated

if TYPE_CHECKING:
    from raysweep.scaling.allocation import Allocation
    from raysweep.scaling.budgets import Saving, Split
    from raysweep.scaling.fits import Fits
    from raysweep.scaling.groups import Group

LONGEST, BEST = 5, 3
"""A target with more laws than the first shows as many as the second."""


def summary(fits: Fits) -> str:
    """What a reader wants to see first; everything else is in `Fits.to_dict`."""
    counted = fits.n_rows - sum(fits.left_out.values())
    lines = [f"{len(fits.cells)} cells; {counted} of {fits.n_rows} rows count"]
    lines += [f"  {n} left out: {why}" for why, n in fits.left_out.items()]
    lines += [f"  note: {message}" for message in fits.messages]
    lines += ["", f"Optima by the method '{fits.method}'", *_cells(fits)]
    for group in fits.groups.values():
        lines += ["", f"{group.name} ({group.kind}, {len(group.cells)} cells)", *_group(group)]
        if group.name in fits.allocation:
            lines += _split(fits.allocation[group.name])
    for label, ratios in fits.comparison.items():
        lines += ["", f"MoE over dense {label}"]
        for name, r in ratios.items():
            text = estimated(r.ratio, r.low, r.high, style="ratio") if r.ok else _why(r)
            lines.append(f"  {name:<20} {text}")
    for saving in fits.efficiency.values():
        lines += ["", f"Experts of {saving.architecture} against a dense model", *_saving(saving)]
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
        for target in dict.fromkeys(law.target for law in group.laws.values()):
            shown, hidden = _shown([x for x in group.laws.values() if x.target == target])
            lines += [f"  {'*' if law.name in best else ' '} {_law(law)}" for law in shown]
            if hidden:
                lines.append(f"    and {hidden} more of {target}, see --json")
        lines.append("    * predicts unseen cells best")
        lines.append(f"    N: {group.counts.message}")
        lines += _batches(group)
    for key, fit in group.loss_laws.items():
        if isinstance(fit, LossFit) and fit.ok:
            first = "*" if key == next(iter(group.loss_order()), None) else " "
            lines.append(
                f"  {first} {fit.law.formula}: {_coefficients(fit)} ({_trust(group, key)})"
            )
            if fit.status != "converged":
                lines.append(f"      {fit.message}")
        else:
            lines.append(f"    {key}: {_why(fit)}")
    if group.loss_order():
        lines.append("    * predicts the largest scale best, fitted without it")
    for label, gap in (("all cells", group.in_sample), ("held-out cells", group.held_out)):
        if gap is not None and gap.gaps:
            lines.append(
                f"    loss gap of the laws on {label}: mean {100 * gap.mean:.3f} %, max "
                f"{100 * gap.max:.3f} %, {len(gap.gaps)} cells, fitted on {gap.n_train}"
            )
    return lines


def _shown(laws: list[PowerLaw]) -> tuple[list[PowerLaw], int]:
    """The laws of one target to print, and how many are left out: of a long list the best."""
    if len(laws) <= LONGEST:
        return laws, 0
    best = sorted((law for law in laws if law.ok), key=lambda law: law.held_out)
    shown = (best or laws)[:BEST]
    return shown, len(laws) - len(shown)


def _batches(group: Group) -> list[str]:
    """The critical batch and the noise scale against loss, where they could be fitted."""
    lines = []
    for what, found in (
        ("critical batch", group.critical_batch),
        ("noise scale", group.noise_scale),
    ):
        if found.law.ok and math.isfinite(found.a.value):
            ends = " to ".join(
                "infinity" if math.isnan(e) else f"{e:.3g}" for e in (found.a.low, found.a.high)
            )
            lines.append(
                f"    {what}: {found.b0.value:.4g} tokens / L^(1/a), a {found.a.value:.3g} "
                f"(95 %: {ends}; {found.law.n_cells} cells)"
            )
        elif found.law.ok:
            lines.append(f"    {what}: does not fall with the loss here ({found.law.formula})")
    return lines


def _coefficients(fit: LossFit) -> str:
    """Every coefficient, exponents with their intervals."""
    exponents = {c.name for c in fit.law.form.coefficients if c.kind == "exponent"}
    texts = []
    for name, value in fit.coefficients.items():
        text = f"{name} {value:.4g}"
        if name in exponents and fit.samples is not None and len(fit.samples) > 1:
            low, high = fit.coefficient_interval(name)
            text += f" (95 %: {low:.3g}..{high:.3g})"
        texts.append(text)
    return ", ".join(texts)


def _trust(group: Group, key: str) -> str:
    check, fit = group.loss_checks.get(key), group.loss_laws[key]
    known = check is not None and math.isfinite(check.error)
    off = f"; {100 * check.error:.2f} % off the largest scale" if check and known else ""
    return fit.status + off


def _split(split: Split) -> list[str]:
    if split.optimum is None:
        return [f"    split of a budget: {split.status}: {split.message}"]
    best = split.optimum
    ends = best.intervals.get("exponent")
    between = f" (95 %: {ends[0]:.3f}..{ends[1]:.3f})" if ends else ""
    lines = [
        f"    best split of {best.flops:.3g} FLOPs: N {best.params:.4g}, D {best.tokens:.4g}; "
        f"N_opt ~ C^{best.exponent:.3f}{between}, N is {split.count} ({split.status})"
    ]
    if best.status == "outside":
        lines.append(f"      {_beyond(best)}: no cell tells of such a run, only the law does")
    if split.parabolas is not None:
        ends = split.parabolas.interval
        between = f" (95 %: {ends[0]:.3f}..{ends[1]:.3f})" if ends else ""
        lines.append(
            f"    by IsoFLOP parabolas: N_opt ~ C^{split.parabolas.exponent:.3f}{between}, of "
            f"which {split.bias:+.3f} is their bias on these sizes; prefer the line above"
        )
    return lines


def _beyond(best: Allocation) -> str:
    """How far a split lies outside what was tried."""
    return " and ".join(
        f"{symbol} is {factor:.3g} times the {'largest' if factor > 1 else 'smallest'} tried"
        for symbol, factor in zip("ND", best.extrapolation.values(), strict=True)
        if factor != 1
    )


def _saving(saving: Saving) -> list[str]:
    tokens, compute = saving.tokens_for_equal_loss, saving.compute_for_equal_loss
    if tokens is None or compute is None:
        return [f"  {saving.status}: {saving.message}"]
    lines = [
        f"  at N {saving.params:.4g} active, D {saving.tokens:.4g}, by the law '{saving.law}' "
        f"({saving.status}):"
    ]
    for name, e in (("tokens for equal loss", tokens), ("compute for equal loss", compute)):
        ends = f" (95 %: {e.interval[0]:.3g} to {e.interval[1]:.3g})" if e.interval else ""
        lines.append(f"  {name:<23} {e.ratio:.3g} times as many{ends}: {e.message}")
    return lines


def _law(law: PowerLaw) -> str:
    if not law.ok:
        return f"{law.name}: {_why(law)}"
    ends = ", ".join(
        f"{QUANTITIES[name].symbol} {e.low:.3f}..{e.high:.3f}" for name, e in law.exponents.items()
    )
    off = f", {100 * law.held_out:.1f} % off unseen" if math.isfinite(law.held_out) else ""
    return f"{law.formula}  (95 %: {ends}; {law.n_cells} cells{off})"


def _why(fit: PowerLaw | LossFit | NotFitted | Ratio) -> str:
    return f"{fit.status}: {fit.message}"


def _number(value: float, style: str) -> str:
    width = int(style.split(".")[0])
    if abs(value) >= 1e5 and style.endswith("f"):
        style = f"{width}.3g"
    return f"{value:{style}}" if math.isfinite(value) else f"{'-':>{width}}"
