"""The laws in words and tables: formulas with their intervals, and what they do not support."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup, escape

from raysweep.report.numbers import Numbers
from raysweep.report.reading import listed, plural
from raysweep.report.trends import Rule, loss_fit
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.power_law import PowerLaw
from raysweep.scaling.quantities import QUANTITIES, SEARCHED
from raysweep.scaling.surface import Surface
from raysweep.text import NOTHING, STYLES

FEW_CELLS = 5
"""A law on fewer cells than this is called a sketch."""

Row = tuple[object, ...]


def formula(n: Numbers, law: PowerLaw, group: str) -> Markup:
    """A law of an optimum as HTML, each number marked: 1.79 N^-0.713 D^0.307."""
    at = ("groups", group, "laws", law.name)
    powers = Markup(" ").join(
        Markup("<i>{}</i><sup>{}</sup>").format(
            QUANTITIES[name].symbol, n("exponent", *at, "exponents", name, "value")
        )
        for name in law.inputs
    )
    return Markup("{} · {}").format(n("coefficient", *at, "coefficient", "value"), powers)


def powers(text: str) -> Markup:
    """A formula in plain text with its powers raised."""
    return Markup(re.sub(r"\^(\([^)]*\)|\w+)", r"<sup>\1</sup>", str(escape(text))))


def law_rows(
    fits: Fits, n: Numbers, used: Mapping[str, Mapping[str, Rule]]
) -> list[tuple[object, ...]]:
    """The table of the laws that recommend: one row an architecture and quantity."""
    rows: list[tuple[object, ...]] = []
    for name, by_target in used.items():
        for target, rule in by_target.items():
            word = QUANTITIES[target].name
            if isinstance(rule, Surface):
                rows.append((name, word, *_surface_row(rule, target), NOTHING, len(rule.cells)))
                continue
            group = name if rule.name in fits.groups[name].laws else ALL
            at = ("groups", group, "laws", rule.name)
            spans = [
                _span(
                    QUANTITIES[q].symbol,
                    n.interval(
                        "exponent", (at, "exponents", q, "low"), (at, "exponents", q, "high")
                    ),
                )
                for q in rule.inputs
            ]
            off = n("percent", at, "held_out_log_error")
            law = formula(n, rule, group)
            rows.append((name, word, law, Markup(", ").join(spans), off, n("count", at, "n_cells")))
    return rows


def _span(symbol: str, span: Markup) -> Markup:
    return Markup("<i>{}</i> {}").format(symbol, span or "unknown")


def _surface_row(surface: Surface, target: str) -> tuple[Markup, Markup]:
    """The exponents of the joint surface's law, with their intervals."""
    quantity = "batch" if target == "batch_tokens" else target
    powers_, spans = [], []
    for column, symbol in (("params", "N"), ("tokens", "D")):
        mean, low, high = (float(np.ravel(v)[-1]) for v in surface.laws.exponent(quantity, column))
        write = STYLES["exponent"]
        powers_.append(Markup("<i>{}</i><sup>{}</sup>").format(symbol, write(mean)))
        spans.append(_span(symbol, Markup("{} to {}").format(write(low), write(high))))
    return Markup("joint surface, ~ ") + Markup(" ").join(powers_), Markup(", ").join(spans)


def laws(fits: Fits, used: Mapping[str, Mapping[str, Rule]]) -> list[Markup]:
    """What the laws say of direction, and what they do not support."""
    said: list[Markup] = []
    for name, by_target in used.items():
        for target in SEARCHED:
            word = QUANTITIES[target].name
            if target in by_target:
                continue
            own = fits.groups[name].laws.values()
            why = dict.fromkeys(x.message for x in own if x.target == target and not x.ok)
            said.append(
                Markup("<b>{}</b> has no law of the {}: {}.").format(
                    name, word, "; ".join(why) or "no cell has an interior optimum"
                )
            )
        laws_ = [rule for rule in by_target.values() if isinstance(rule, PowerLaw)]
        if laws_:
            parts = Markup("; ").join(_direction(law) for law in laws_)
            said.append(Markup("<b>{}</b>: {}.").format(name, parts))
    leaning = [n for n, by in used.items() if any(isinstance(r, Surface) for r in by.values())]
    if leaning:
        said.append(
            Markup(
                "{} {} too few cells for a law of {} own: the joint surface answers, whose "
                "exponents lean on Step Law's where the cells do not say otherwise."
            ).format(listed(leaning), *(("has", "its") if len(leaning) == 1 else ("have", "their")))
        )
    fitted = [
        (name, rule)
        for name, by in used.items()
        for rule in by.values()
        if isinstance(rule, PowerLaw)
    ]
    few = dict.fromkeys(name for name, law in fitted if law.n_cells < FEW_CELLS)
    if few:
        said.append(
            Markup(
                "Laws on fewer than {} cells ({}) are sketches: read the direction off them, "
                "not the exponents."
            ).format(FEW_CELLS, listed(few))
        )
    if any(law.name not in fits.groups[name].laws for name, law in fitted):
        said.append(
            Markup(
                "A law with <i>R</i> or <i>E</i> is fitted to all architectures together, for "
                "want of cells of one alone."
            )
        )
    return said


def _direction(law: PowerLaw) -> Markup:
    """Which way the optimum moves with each input, as far as the intervals tell."""
    clear = {q: e for q, e in law.exponents.items() if e.low > 0 or e.high < 0}
    parts = [
        Markup("{} with <i>{}</i>").format(
            "rises" if e.value > 0 else "falls", QUANTITIES[q].symbol
        )
        for q, e in clear.items()
    ]
    unclear = [
        Markup("<i>{}</i>").format(QUANTITIES[q].symbol) for q in law.inputs if q not in clear
    ]
    if unclear:
        parts.append(
            Markup("may rise or fall with {}: the sign is <em>not</em> settled").format(
                Markup(" and ").join(unclear)
            )
        )
    return Markup("the {} {}").format(QUANTITIES[law.target].optimal, Markup(" and ").join(parts))


def loss_law_rows(fits: Fits, n: Numbers, used: Mapping[str, str]) -> list[tuple[object, ...]]:
    """The table of the laws that predict losses: one row an architecture."""
    rows = []
    for name, key in used.items():
        group, found = loss_fit(fits, name, key)
        if found is None:
            continue
        at = ("groups", group, "loss_laws", key)
        values = Markup(", ").join(
            Markup("<i>{}</i> {}").format(c, n("coefficient", at, "coefficients", c))
            for c in found.coefficients
        )
        rows.append(
            (
                name,
                powers(found.law.formula),
                values,
                n("percent", at, "rms_log_residual"),
                n("count", at, "n_cells"),
            )
        )
    return rows


def loss(fits: Fits, n: Numbers, used: Mapping[str, str]) -> list[Markup]:
    """How well the laws of the loss describe the cells, then what they cannot tell; architectures
    of which the same is true together."""
    said: dict[Markup, list[str]] = {}
    told: list[Markup] = []
    for name in fits.groups:
        if name == ALL:
            continue
        key = used.get(name)
        group, found = loss_fit(fits, name, key)
        if found is not None:
            told.append(
                Markup(
                    "<b>{}</b>: the law leaves {} of loss unexplained on average (rms), {} at its "
                    "worst cell."
                ).format(
                    name,
                    n("percent", "groups", group, "loss_laws", key, "rms_log_residual"),
                    STYLES["percent"](float(np.abs(np.expm1(found.residuals)).max())),
                )
            )
        if found is None:
            tried = fits.groups[name].loss_laws.items()
            why = "; ".join(dict.fromkeys(f"{k}: {f.message}" for k, f in tried))
            text = Markup("no law of the loss, so none is predicted ({})").format(
                why or "nothing to fit"
            )
            said.setdefault(text, []).append(name)
            continue
        if found.status == "at bound":
            text = Markup("{}; do not read the coefficients one by one").format(found.message)
            said.setdefault(text, []).append(name)
        if found.n_points - found.n_free < 3:
            text = Markup(
                "{} for {} would follow almost any data, so a small residual shows nothing"
            ).format(plural(found.n_points, "point"), plural(found.n_free, "coefficient"))
            said.setdefault(text, []).append(name)
    if told:
        largest = float(fits.cells.loc[fits.cells["loss"].notna(), "flops"].max())
        told.append(
            Markup(
                "Beyond the largest cell, {} FLOPs, the curves are extrapolations: no run there "
                "supports them."
            ).format(STYLES["flops"](largest))
        )
    limits = [Markup("{}: {}.").format(listed(names), text) for text, names in said.items()]
    return told + limits


def check_rows(fits: Fits, n: Numbers) -> list[Row]:
    """The table of the laws of the loss that were tried: how each predicts the highest compute from
    the smaller ones."""
    rows: list[Row] = []
    for name, group in fits.groups.items():
        for key in group.loss_order():
            check = group.loss_checks[key]
            if not math.isfinite(check.error):
                continue
            at = ("groups", name, "loss_checks", key)
            reach = n("ratio", at, "extrapolation")
            rows.append((name, key, n("percent", at, "error"), reach, n("count", at, "n_test")))
    return rows


def method_rows(fits: Fits, n: Numbers) -> list[Row]:
    """The table of the ways to read optima: how each differs from the one used."""
    rows: list[Row] = []
    for name, group in fits.groups.items():
        if name == ALL:
            continue
        for method in group.methods:
            at = ("groups", name, "methods", method)
            rate, batch = (
                n("percent", at, f"median_log_difference_{q}") for q in ("learning_rate", "batch")
            )
            used = " (used here)" if method == fits.method else ""
            rows.append((name, method + used, rate, batch, n("count", at, "n_interior")))
    return rows
