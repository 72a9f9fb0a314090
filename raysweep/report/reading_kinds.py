"""Noise, experts and what they save, in words, with what is not supported."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from raysweep.report.kinds import law_of_loss
from raysweep.report.numbers import Numbers
from raysweep.report.reading import listed, plural
from raysweep.report.trends import names_of
from raysweep.scaling.compute.efficiency import Efficiency
from raysweep.scaling.fits import Fits

AMOUNTS = {
    "tokens_for_equal_loss": ("tokens", "at the same active parameters"),
    "compute_for_equal_loss": ("compute", "each budget split at its best"),
}


def efficiency(fits: Fits, n: Numbers) -> list[Markup]:
    """How much less MoE needs than dense for the same loss, and whether that is settled."""
    said: list[Markup] = []
    for name, saving in fits.efficiency.items():
        if not saving.ok:
            said.append(
                Markup("What the experts of <b>{}</b> save cannot be told: {}.").format(
                    name, saving.message or saving.status
                )
            )
            continue
        at = ("efficiency", name)
        parts = []
        for key, (what, how) in AMOUNTS.items():
            found: Efficiency | None = getattr(saving, key)
            if found is None or not math.isfinite(found.ratio):
                parts.append(Markup("no amount of {} makes up for them ({})").format(what, how))
                continue
            span = n.interval("ratio", (at, key, "interval", 0), (at, key, "interval", 1))
            text = Markup("{} times the {} ({}), {}").format(
                n("ratio", at, key, "ratio"), what, span or "no interval", how
            )
            ends = found.interval
            if ends is None or ends[0] <= 1 <= ends[1]:
                text += Markup(": a saving is <em>not</em> shown")
            parts.append(text)
        said.append(
            Markup(
                "For the loss of <b>{}</b> at {} active parameters and {} tokens, the fitted law "
                "would have a dense model use {}."
            ).format(
                name,
                n("params", at, "params"),
                n("tokens", at, "tokens"),
                Markup("; or ").join(parts),
            )
        )
        if saving.message:
            said.append(
                Markup("That rests on a law that is not certain: {}.").format(saving.message)
            )
    return said


def noise(fits: Fits, n: Numbers) -> list[Markup]:
    """How batch and noise scale move with loss, and how the one tells of the other."""
    said: list[Markup] = []
    scales = fits.noise_scale["noise_scale_tokens"].dropna().to_dict()
    for name in names_of(fits):
        cells = fits.groups[name].cells.index
        parts = []
        for key, quantity, word in (
            ("critical_batch", "batch_tokens", "the optimal batch"),
            ("noise_scale", "noise_scale_tokens", "the noise scale"),
        ):
            law = law_of_loss(fits.groups[name], quantity)
            if not law.ok:
                continue
            at = ("groups", name, key, "law", "exponents", "loss")
            slope = law.exponents["loss"]
            clear = slope.high < 0 or slope.low > 0
            parts.append(
                Markup("{} ~ <i>L</i><sup>{}</sup> (95 %: {}), {}").format(
                    word,
                    n("exponent", at, "value"),
                    n.interval("exponent", (at, "low"), (at, "high")) or "no interval",
                    (
                        "so it grows as loss falls"
                        if slope.value < 0
                        else "so it shrinks as loss falls"
                    )
                    if clear
                    else Markup("whose sign is <em>not</em> settled"),
                )
            )
        if parts:
            said.append(Markup("<b>{}</b>: {}.").format(name, Markup("; ").join(parts)))
        optima = fits.optima[fits.method]
        both = [
            scales[c] / optima[c].batch_tokens
            for c in cells
            if c in scales and c in optima and optima[c].interior
        ]
        if both:
            said.append(
                Markup(
                    "<b>{}</b>: in {} with both, the measured noise scale is {} times the optimal "
                    "batch on the median ({} to {})."
                ).format(
                    name,
                    plural(len(both), "cell"),
                    *(f"{v:.2g}" for v in (np.median(both), min(both), max(both))),
                )
            )
    if not scales:
        said.append(
            Markup(
                "No gradient noise scale was measured, so nothing is said of whether it explains "
                "the optimal batch."
            )
        )
    else:
        for why, left in fits.noise_scale[fits.noise_scale["left_out"] != ""].groupby("left_out"):
            names = listed(left.index)
            said.append(Markup("Without a noise scale: {} ({}).").format(names, why))
    return said


def load(fits: Fits) -> list[Markup]:
    """How even the load of experts is, and what cannot be told of it."""
    table = fits.expert_load
    if not len(table):
        return []
    said = []
    busiest = table["expert_load_max_over_mean"].dropna()
    if len(busiest):
        said.append(
            Markup(
                "The busiest expert of a layer takes {} to {} times its even share; 1 would be "
                "even, and a step waits for the busiest."
            ).format(f"{busiest.min():.2f}", f"{busiest.max():.2f}")
        )
    said.append(
        Markup(
            "These are means over each cell's trials within 1 % of its best ({} in all), bars "
            "their standard deviation: how they go with size is shown, whether they cause a "
            "difference in loss is <em>not</em>."
        ).format(plural(int(table["n_trials"].sum()), "trial"))
    )
    return said


def kinds_title(fits: Fits) -> str:
    """What the section of kinds is called: not all results have both."""
    return (
        "Dense against mixture of experts" if fits.comparison else "Optimum and noise against loss"
    )
