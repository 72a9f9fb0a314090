"""Held-out predictions and sensitivity in words and tables, with what they leave open."""

from __future__ import annotations

import math

from markupsafe import Markup

from raysweep.report.numbers import Numbers
from raysweep.report.reading import plural
from raysweep.report.reading_laws import Row
from raysweep.report.trends import names_of
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.group_loss import LossCheck
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import NOTHING

STEADY = 1.25
"""A prediction that no variant moves by more than this factor is called steady."""


def heldout(fits: Fits, n: Numbers) -> list[Markup]:
    """How the best law of each group predicted what it had not seen, and how far that reaches."""
    said: list[Markup] = []
    for name, group in fits.groups.items():
        order = group.loss_order()
        check = group.loss_checks[order[0]] if order else None
        if check is None or not math.isfinite(check.error):
            if name != ALL:
                said.append(
                    Markup(
                        "<b>{}</b>: no law of the loss could be tried on a scale that it had not "
                        "seen, so nothing tells how it extrapolates."
                    ).format(name)
                )
            continue
        at = ("groups", name, "loss_checks", order[0])
        text = Markup(
            "<b>{}</b>: fitted without the largest scale, <i>{}</i> predicts the loss of its {} "
            "{} off on average, {} times beyond the sizes that it had"
        ).format(
            "All together" if name == ALL else name,
            order[0].replace("_", " "),
            plural(check.n_test, "cell"),
            n("percent", at, "error"),
            n("ratio", at, "extrapolation"),
        )
        inside, known = _inside(check)
        if known:
            text += Markup("; {} of {} lie inside the 95 % interval").format(inside, known)
            if inside < 0.8 * known:
                text += Markup(", so its intervals are too narrow or the law does not hold there")
        said.append(text + Markup("."))
    far = _farthest(fits)
    if far:
        said.append(
            Markup(
                "No law was tried farther out than {} times the size it was fitted to: a longer "
                "extrapolation is <em>not</em> supported by this check."
            ).format(n("ratio", *far))
        )
    return said


def _inside(check: LossCheck) -> tuple[int, int]:
    known = [u for u in check.unseen if math.isfinite(u.low) and math.isfinite(u.high)]
    return sum(u.low <= u.observed <= u.high for u in known), len(known)


def _farthest(fits: Fits) -> tuple[object, ...] | None:
    """Where the longest tried extrapolation stands in the fits."""
    tried = [
        (check.extrapolation, ("groups", name, "loss_checks", key, "extrapolation"))
        for name, group in fits.groups.items()
        for key, check in group.loss_checks.items()
        if math.isfinite(check.error)
    ]
    return max(tried, default=(0.0, None), key=lambda t: t[0])[1]


def variants(fits: Fits) -> list[Markup]:
    """Whether the answer hangs on a choice that another reader could make otherwise."""
    said: list[Markup] = []
    for name in names_of(fits):
        for target, found in fits.sensitivity[name].items():
            base = found.variants[0].at.value
            others = [v for v in found.variants[1:] if math.isfinite(v.at.value)]
            failed = len(found.variants) - 1 - len(others)
            text = Markup("<b>{}</b>, {}: ").format(name, QUANTITIES[target].name)
            if not others:
                said.append(text + Markup("too few cells for any other reading to give a law."))
                continue
            moved = max(others, key=lambda v: abs(math.log(v.at.value / base)))
            factor = moved.at.value / base
            if 1 / STEADY <= factor <= STEADY:
                text += Markup("no other reading moves the prediction by more than {} ({})").format(
                    f"{100 * abs(factor - 1):.0f} %", moved.name
                )
            else:
                text += Markup(
                    "the prediction depends on the reading: {} times with <i>{}</i>"
                ).format(f"{factor:.2g}", moved.name)
            if failed:
                text += Markup("; {} could not be fitted at all").format(plural(failed, "reading"))
            said.append(text + Markup("."))
    return said


def variant_rows(fits: Fits, n: Numbers) -> list[Row]:
    """The table of variants: exponents and prediction of each."""
    rows: list[Row] = []
    for name in names_of(fits):
        for target, found in fits.sensitivity[name].items():
            for i, v in enumerate(found.variants):
                at = ("sensitivity", name, target, "variants", i)
                exponents = Markup(", ").join(
                    Markup("<i>{}</i> {}").format(q, n("exponent", at, "exponents", key, "value"))
                    for key, q in (("params", "N"), ("tokens", "D"), ("flops", "C"))
                    if key in v.exponents
                )
                style = "rate" if target == "learning_rate" else "batch"
                if not math.isfinite(v.at.value):
                    exponents = Markup(v.status)
                value = n(style, at, "at", "value")
                span = n.interval(style, (at, "at", "low"), (at, "at", "high"))
                rows.append(
                    (name, QUANTITIES[target].name, v.name, exponents, value, span or NOTHING,
                     n("count", at, "n_cells"))
                )  # fmt: skip
    return rows
