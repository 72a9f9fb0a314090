"""Dense against MoE as Wang et al. 2024 (arXiv 2410.05661) have it: claims, and exponents."""

from __future__ import annotations

from typing import Any

from raysweep.report.figure import Axis, Line, Panel, PlotFigure, Points, Series, looks
from raysweep.report.laws import names_of
from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.fits import Fits
from raysweep.text import estimated

METHODS = {
    "law": "Chinchilla's law of its own cells",
    "parabolas": "parabolas through held budgets",
    "source": "the source, by its IsoFLOP profiles",
}


def claim_rows(fits: Fits) -> list[dict[str, Any]]:
    """Each claim with what this study gives for it."""
    return [
        {
            "name": name,
            "claim": c.claim,
            "quantity": c.quantity,
            "value": estimated(c.value, style="number") if c.value.known else "",
            "source": c.source,
            "verdict": c.verdict,
            "note": c.note if c.value.known else c.value.why,
        }
        for name, own in fits.claims.items()
        for c in own
    ]


def exponent_rows(fits: Fits) -> list[dict[str, Any]]:
    """Exponents of the best split, all in one count; none where only the source's are known."""
    found = fits.exponents
    if not any(e.params.known for e in found if e.method != "source"):
        return []
    return [
        {
            "name": e.architecture,
            "method": METHODS[e.method],
            "params": _exponent(e.params),
            "tokens": _exponent(e.tokens),
            "count": COUNT_NAMES[e.count],
            "note": e.note if e.params.known else e.params.why,
        }
        for e in found
    ]


def _exponent(value: Any) -> str:
    if not value.known:
        return "–"
    if not value.has_interval:
        return f"{value.value:.3f}"
    return estimated(value, style="exponent")


def along_figure(fits: Fits) -> PlotFigure | None:
    """The noise scale in each quarter of a run against the running loss; None where not
    measured."""
    table = fits.noise_along
    names = [n for n in names_of(fits) if len(table) and (table["architecture"] == n).any()]
    if not names:
        return None
    look = looks(fits.architectures)
    series: list[Series] = []
    for name in names:
        for cell, own in table[table["architecture"] == name].groupby("cell", sort=False):
            x, y = own["loss"].to_numpy(float), own["noise_scale_tokens"].to_numpy(float)
            tips = [f"{cell}, quarter {q}" for q in own["quarter"]]
            series += [
                Line(f"{name}, {cell}", x, y, look[name].colour, thin=True),
                Points(f"{name}, cells", x, y, *look[name], tips=tips, size=18,
                       names=[str(cell)] * len(own)),
            ]  # fmt: skip
    x_axis = Axis("mean training loss of a quarter, nats a token", "loss", reverse=True)
    panel = Panel(x_axis, Axis.of("noise_scale_tokens"), tuple(series))
    return PlotFigure(
        "noise-along",
        "Gradient noise scale along each cell's best runs, by quarters, against running loss",
        (panel,),
        tuple(names),
        width=7.4,
    )
