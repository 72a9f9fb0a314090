"""Fits as text for a terminal: the headline first, everything else on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysweep.scaling.optima.surface import EXPONENTS, TARGETS
from raysweep.text import estimated, written

if TYPE_CHECKING:
    from raysweep.scaling.fits import Fits

_NAMES = {"learning_rate": "learning rate", "batch_tokens": "batch", "loss": "loss"}
_STYLES = {"learning_rate": "rate", "batch_tokens": "batch", "loss": "loss"}
_SYMBOLS = {"params": "N", "tokens": "D", "sparsity": "total/active"}


def summary(fits: Fits, everything: bool = True) -> str:
    """What a reader wants to see first; the cells, the prior and the checks with `everything`."""
    counted = fits.n_rows - sum(fits.left_out.values())
    lines = [f"{len(fits.cells)} cells; {counted} of {fits.n_rows} rows count"]
    lines += [f"  {n} left out: {why}" for why, n in fits.left_out.items()]
    lines += [f"  note: {message}" for message in fits.messages]
    for label, evidence in fits.evidence.items():
        lines += ["", *_laws(fits, label)] if evidence.surface is not None else []
    lines += _losses(fits)
    lines += _held_out(fits)
    lines += _comparison(fits)
    if everything:
        lines += _cells(fits) + _prior(fits) + _readings(fits)
    return "\n".join(lines)


def _laws(fits: Fits, label: str) -> list[str]:
    surface = fits.evidence[label].surface
    assert surface is not None
    laws = surface.laws
    of = f" of {label}" if label else ""
    n, d = (written(float(v), "params") for v in laws.centre_sizes)
    lines = [f"Laws of the optimum{of} ({surface.status}), at N {n} and D {d}:"]
    for axis, target in enumerate(TARGETS):
        at = written(laws.at_centre[axis], _STYLES[target])
        lines.append(f"  {_NAMES[target]:<14}{at}")
        for name in EXPONENTS:
            if name == "sparsity" and not surface.sparse:
                continue
            exponent = laws.exponent(target, name)
            learned = laws.learned(target, name)
            source = "" if learned > 0.5 else ", mostly from published laws"
            lines.append(f"    ~ {_SYMBOLS[name]}^{estimated(exponent, style='exponent')}{source}")
    if surface.batch_rule is not None:
        lines.append("  no cell varied its batch: the learning rate is that at the batch run")
    for group in surface.design.groups:
        rate, batch, loss = surface.group_effect(group)
        lines.append(
            f"  {group}: learning rate x{estimated(rate, style='ratio')}, "
            f"batch x{estimated(batch, style='ratio')}, loss {100 * (loss.value - 1):+.2f} %"
        )
    return lines


def _losses(fits: Fits) -> list[str]:
    lines = []
    shown: set[int] = set()
    for name in fits.architectures:
        model = fits.loss_model(name)
        if id(model) in shown:
            continue
        shown.add(id(model))
        if not model.ok or model.law is None:
            lines.append(f"Law of the loss: not determined ({model.why})")
            continue
        lines.append(f"Law of the loss: {model.law.formula}, N = {model.count}")
        parts = [f"{k} {written(v.value, 'coefficient')}" for k, v in model.coefficients.items()]
        lines.append(f"  {', '.join(parts)}")
        if model.ahead:
            off = sum(a.error * a.n for a in model.ahead) / sum(a.n for a in model.ahead)
            inside = sum(a.covered for a in model.ahead), sum(a.n for a in model.ahead)
            lines.append(
                f"  one level of compute ahead: {written(off, 'percent')} off on average, "
                f"{inside[0]} of {inside[1]} runs inside their interval"
            )
    return ["", *lines] if lines else []


def _held_out(fits: Fits) -> list[str]:
    held = fits.held_out
    if held is None:
        return []
    parts = []
    for quantity, name in _NAMES.items():
        inside, n = held.covered(quantity)
        if n:
            parts.append(f"{name} in {inside} of {n}")
    regret = written(held.mean_regret, "percent")
    return [
        "",
        f"{len(held.cells)} largest cells, predicted from the {held.n_train} smaller ones: mean "
        f"regret {regret}; inside the 95 % interval: {', '.join(parts)}",
    ]


def _comparison(fits: Fits) -> list[str]:
    lines = []
    for name, ratios in fits.comparison.items():
        lines += ["", f"{name} over dense"]
        for r in ratios:
            told = estimated(r.ratio, style="ratio") if r.ok else r.ratio.why
            quantity = _NAMES.get(r.quantity, r.quantity.replace("_tokens", "").replace("_", " "))
            lines.append(f"  {quantity:<14} at equal {r.at_equal:<8} {told}")
    return lines


def _cells(fits: Fits) -> list[str]:
    searched = fits.cells[fits.cells["learning_rate"].notna()]
    if not len(searched):
        return []
    wide = max(len(str(n)) for n in searched.index)
    lines = ["", f"{'cell':<{wide}}  trials  learning rate     batch    loss  optimum"]
    for name, row in searched.iterrows():
        lines.append(
            f"{name!s:<{wide}}  {row['n_finished']:6d}  {written(row['learning_rate'], 'rate'):>13}"
            f"  {written(row['batch_tokens'], 'batch'):>8}  {written(row['loss'], 'loss'):>6}"
            f"  {row['status']}"
        )
    return lines


def _prior(fits: Fits) -> list[str]:
    table = fits.prior_table
    if not len(table):
        return []
    lines = ["", f"Prior, of {len(fits.prior.laws)} published laws, and what the data made of it"]
    for row in table.to_dict("records"):
        lines.append(
            f"  {_NAMES[row['target']]:<14}{row['coefficient']:<14}{row['prior']:>10.3g}  ->"
            f" {row['value']:>10.3g}  ({row['moved']:+.1f} of its sds)"
        )
    return lines


def _readings(fits: Fits) -> list[str]:
    if not fits.optima:
        return []
    lines = ["", "Other ways to read the optima (checks; none of them answers)"]
    for name, row in fits.readings.iterrows():
        lines.append(
            f"  {name!s:<13}{int(row['interior']):>3} interior; from the model, median |ln|: "
            f"rate {row['learning_rate']:.2f}, batch {row['batch_tokens']:.2f}"
        )
    return lines
