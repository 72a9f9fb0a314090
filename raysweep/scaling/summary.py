"""Fits as text for a terminal: the headline first, everything else on request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raysweep.scaling.claims import claims_text
from raysweep.scaling.compare import Ratio
from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.compute.budgets import exponents_text
from raysweep.scaling.fitted import Fitted
from raysweep.scaling.quantities import ANSWERS, EXPONENTS, QUANTITIES, TARGETS
from raysweep.text import between, estimated, written

NAMED = max(len(quantity.name) for quantity in QUANTITIES.values())
"""Characters of the longest name of a quantity."""


def summary(fits: Fitted, everything: bool = False) -> str:
    """The laws of the optimum and of the loss, and how they did on what was held out; the cells,
    the comparison of architectures, the prior and the checks with `everything`."""
    counted = fits.n_rows - sum(fits.left_out.values())
    n = len(fits.cells)
    lines = [f"{n} cell{'s' * (n != 1)}; {counted} of {fits.n_rows} rows count"]
    lines += [f"  {choice}" for choice in fits.choices]
    # What a message says of these is not said twice.
    lines += [
        f"  {n} left out: {why}"
        for why, n in fits.left_out.items()
        if not why.startswith("diverged: ")
    ]
    lines += [f"  warning: {message}" for message in fits.messages]
    for label in fits.evidence:
        lines += _laws(fits, label)
    if found := hyperparameter_sentences(fits):
        lines += ["", "Further hyperparameters", *(f"  {sentence}" for sentence in found)]
    lines += _losses(fits)
    lines += _held_out(fits)
    if everything:
        lines += _cells(fits) + _comparison(fits) + claims_text(fits.claims)
        lines += exponents_text(fits.exponents) + _prior(fits) + _readings(fits)
    return "\n".join(lines)


def _laws(fits: Fitted, label: str) -> list[str]:
    surface = fits.evidence[label].surface
    if surface is None:
        return []
    laws = surface.laws
    of = f" of {label}" if label else ""
    lines = ["", f"Optimum{of} (N: active non-embedding parameters, D: tokens)"]
    if surface.status == "not converged":
        lines.append("  warning: the fit did not converge: the numbers are its last step's")
    if surface.batch_rule is not None:
        lines.append(
            "  warning: no cell varied its batch: the learning rate is that at the batch run"
        )
    if not surface.varied[0]:
        lines.append("  warning: no cell varied its learning rate: it follows published laws")
    for axis, target in enumerate(TARGETS):
        if target == "batch_tokens" and surface.batch_rule is not None:
            continue
        terms = [QUANTITIES[target].write(laws.at_centre[axis])]
        spans = []
        for name, base in surface.bases.items():
            exponent = laws.exponent(target, name)
            terms.append(f"{base}^{written(exponent.value, 'exponent')}")
            told = between(exponent.low, exponent.high, "exponent")
            source = "" if laws.learned(target, name) > 0.5 else " (mostly published laws)"
            spans.append(f"{EXPONENTS[name]} {told}{source}")
        lines.append(f"  {QUANTITIES[target].name:<13} = {' · '.join(terms)}")
        lines.append(f"    95 %: {', '.join(spans)}")
    for group in surface.design.groups:
        rate, batch, loss = surface.group_effect(group)
        batches = f"batch x {estimated(batch, style='ratio')}, " if batch.known else ""
        lines.append(
            f"  {group}: learning rate x {estimated(rate, style='ratio')}, {batches}"
            f"loss x {estimated(loss, style='loss')}"
        )
    return lines


def hyperparameter_sentences(fits: Fitted) -> list[str]:
    """Where each further hyperparameter is best, and whether that moves with size."""
    lines = []
    for label, found in fits.hyperparameters.items():
        for one in found.values():
            name = f"{one.name}{f' of {label}' if label else ''}"
            span = between(one.optimum.low, one.optimum.high, "rate")
            n = written(one.params, "params")
            if one.status == "flat":
                lines.append(
                    f"{name}: {one.runs} runs from {one.low:.3g} to {one.high:.3g} do not "
                    "tell where it is best"
                )
                continue
            edge = "" if one.status == "inside" else ", or beyond the range that was run"
            exponent = between(one.exponent.low, one.exponent.high, "exponent")
            moves = "moves with size" if one.moves else "no sign that it moves with size"
            unit = "N^" if one.log else "slope in ln N "
            lines.append(
                f"{name}: best at {written(one.optimum.value, 'rate')} ({span}{edge}) for N = {n}; "
                f"{moves} ({unit}{exponent})"
            )
    return lines


def _losses(fits: Fitted) -> list[str]:
    lines: list[str] = []
    by_model: dict[int, list[str]] = {}
    for name in fits.architectures:
        by_model.setdefault(id(fits.loss_model(name)), []).append(name)
    for names in by_model.values():
        model = fits.loss_model(names[0])
        of = "" if len(by_model) == 1 else f" of {', '.join(names)}"
        if not model.ok or model.law is None:
            lines += ["", f"Loss{of}: not determined ({model.why})"]
            continue
        lines += ["", f"Loss{of} = {model.law.formula.removeprefix('L = ')}"]
        if "params" in model.law.inputs:
            lines[-1] += f" (N: {COUNT_NAMES.get(model.count, model.count)})"
        parts = [f"{k} {written(v.value, 'coefficient')}" for k, v in model.coefficients.items()]
        lines.append(f"  {', '.join(parts)}")
        if (score := model.score).runs:
            lines.append(
                f"  one level of compute ahead: {written(score.off, 'percent')} off on average, "
                f"{score.covered} of {score.runs} cells inside their 95 % interval"
            )
    return lines


def _held_out(fits: Fitted) -> list[str]:
    held = fits.held_out
    if held is None:
        return ["", "Held out: too few cells to predict the largest from the others"]
    counts = {QUANTITIES[quantity].name: held.covered(quantity) for quantity in ANSWERS}
    parts = [f"{name} {inside} of {n}" for name, (inside, n) in counts.items() if n]
    lines = [
        "",
        f"Held out: the {len(held.cells)} largest cells, predicted from the {held.n_train} smaller "
        "ones",
        f"  inside the 95 % interval: {', '.join(parts)}",
    ]
    if math.isfinite(held.mean_regret):
        lines.append(
            f"  the trial nearest to the prediction is {written(held.mean_regret, 'percent')} "
            "above its cell's best on average"
        )
    return lines


def _comparison(fits: Fitted) -> list[str]:
    lines = []
    for name, ratios in fits.comparison.items():
        lines += ["", *ratio_lines(f"{name} over dense", ratios)]
    return lines


def ratio_lines(title: str, ratios: Sequence[Ratio]) -> list[str]:
    """Ratios as a table: a row a quantity, a block for what is held equal."""
    sizes = ratios[0].n if ratios else 0
    where = f"mean over {sizes} size{'s' * (sizes != 1)}"
    where += "" if not ratios or ratios[0].paired == sizes else f", {ratios[0].paired} in both"
    lines = [f"{title} ({where})" if sizes else title]
    whys = {r.ratio.why for r in ratios}
    if ratios and not any(r.ok for r in ratios) and len(whys) == 1:
        return [f"{lines[0]}: not compared: {whys.pop()}"]
    for equal in dict.fromkeys(r.at_equal for r in ratios):
        block = [r for r in ratios if r.at_equal == equal]
        silent = {r.ratio.why for r in block if not r.ok}
        lines += [
            f"  at equal {equal:<8} {QUANTITIES[r.quantity].name:<{NAMED}} x {r.said}"
            for r in block
            if r.ok
        ]
        names = ", ".join(QUANTITIES[r.quantity].name for r in block if not r.ok)
        lines += [f"  at equal {equal:<8} {names}: {why}" for why in sorted(silent)[:1]]
    return lines


def _cells(fits: Fitted) -> list[str]:
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


def _prior(fits: Fitted) -> list[str]:
    table = fits.prior_table
    if not len(table):
        return []
    lines = ["", f"Prior, of {len(fits.prior.laws)} published laws, and what the data made of it"]
    for row in table.to_dict("records"):
        name = QUANTITIES[row["target"]].name
        lines.append(
            f"  {name:<14}{row['coefficient']:<14}{row['prior']:>10.3g}  ->"
            f" {row['value']:>10.3g}  ({row['moved']:+.1f} of its sds)"
        )
    return lines


def _readings(fits: Fitted) -> list[str]:
    if not fits.optima:
        return []
    lines = ["", "Other ways to read the optima (checks only)"]
    for name, row in fits.readings.iterrows():
        lines.append(
            f"  {name!s:<13}{int(row['interior']):>3} interior; from the model, median |ln|: "
            f"rate {row['learning_rate']:.2f}, batch {row['batch_tokens']:.2f}"
        )
    return lines
