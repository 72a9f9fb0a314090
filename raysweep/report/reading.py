"""What the figures say in plain words, and what they do not support: sentences from the fits."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

from raysweep.report.numbers import Numbers
from raysweep.scaling import cautions
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.quantities import QUANTITIES
from raysweep.scaling.recommend import Recommendation
from raysweep.text import short

NAMES_LISTED = 6

INSIDE = "inside the range of the cells"
NO_INTERVAL = "The expected loss has no interval: too few cells to resample."


def listed(names: Iterable[object], most: int = NAMES_LISTED) -> Markup:
    """Names in a row, the last few counted only."""
    items = [Markup("<b>{}</b>").format(n) for n in names]
    rest = len(items) - most
    if rest > 0:
        return Markup("{} and {} more").format(Markup(", ").join(items[:most]), rest)
    return Markup(", ").join(items)


def plural(n: int, word: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def answer_limits(answer: Recommendation) -> list[Markup]:
    """What to be wary of in one recommendation."""
    # How far it extrapolates stands above the list already.
    long = cautions.WORDS["far"].partition("{")[0]
    warnings = [w for w in answer.warnings if not w.startswith(long)]
    said = [escape(_sentence(w)) for w in warnings]
    if not math.isfinite(answer.loss_interval[0]) and math.isfinite(answer.loss):
        said.append(Markup(NO_INTERVAL))
    return said


def _sentence(text: str) -> str:
    text = text.strip().replace("learning_rate", "learning rate").replace("batch_tokens", "batch")
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def surfaces(fits: Fits, drawn: int, dots: int) -> list[Markup]:
    """Which optima are found, which run into an edge, and what would settle them.

    `drawn` cells are shown, each with at most `dots` trials."""
    optima = fits.optima[fits.method]
    inside = [o for o in optima.values() if o.interior]
    edges = [o for o in optima.values() if o.status.startswith("edge")]
    flat = [o for o in optima.values() if o.status == "flat"]
    few = [o for o in optima.values() if o.status == "too few trials"]
    said = [
        Markup("{} of {} have their optimum inside the searched range.").format(
            len(inside), plural(len(optima), "cell")
        )
    ]
    for side, mend in (
        ("learning_rate low", "lower learning rates"),
        ("learning_rate high", "higher learning rates"),
        ("batch low", "smaller batches"),
        ("batch high", "larger batches"),
    ):
        hit = [o.cell for o in edges if side in o.status]
        if hit:
            said.append(
                Markup("{} {} to the edge: the best there may lie beyond, at {}. {}.").format(
                    listed(hit),
                    "runs" if len(hit) == 1 else "run",
                    mend,
                    "Its optimum is a bound, not an estimate"
                    if len(hit) == 1
                    else "Their optima are bounds, not estimates",
                )
            )
    if flat:
        said.append(
            Markup("In {} the trials do not single out any optimum: the loss is flat over the "
                   "range, or its noise hides the valley.").format(listed(o.cell for o in flat))
        )  # fmt: skip
    if few:
        said.append(
            Markup("{} {} too few finished trials for an optimum of {} own; the best trial "
                   "stands in.").format(
                listed(o.cell for o in few),
                "has" if len(few) == 1 else "have",
                "its" if len(few) == 1 else "their",
            )
        )  # fmt: skip
    if len(inside) < len(optima):
        said.append(Markup("Only interior optima enter the laws below."))
    if (fits.cells["n_searched"] > dots).any():
        said.append(
            Markup("Of cells with more than {} trials so many are drawn, thinned by loss.").format(
                dots
            )
        )
    if drawn < len(optima):
        said.append(
            Markup("{} of {} cells are drawn, spread evenly over compute; the table of cells has "
                   "them all.").format(drawn, len(optima))
        )  # fmt: skip
    return said


def comparison(fits: Fits, n: Numbers) -> list[Markup]:
    """MoE over dense: what differs, what cannot be told apart, and where they do not overlap."""
    said: list[Markup] = []
    for label, ratios in fits.comparison.items():
        differ, same = [], []
        for quantity, ratio in ratios.items():
            if not ratio.ok:
                continue
            word = QUANTITIES[quantity].optimal
            at = ("comparison", label, quantity)
            span = n.interval("ratio", (at, "low"), (at, "high"))
            text = Markup("{} {} times that of dense ({})").format(
                word, n("ratio", at, "ratio"), span or "no interval"
            )
            if span and (ratio.low > 1 or ratio.high < 1):
                differ.append(
                    text + Markup(", {}").format("lower" if ratio.ratio < 1 else "higher")
                )
            else:
                same.append(text)
        title = Markup("<b>{}</b>").format(label[:1].upper() + label[1:])
        if differ:
            said.append(Markup("{}, of MoE: {}.").format(title, Markup("; ").join(differ)))
        if same:
            said.append(
                Markup("{}, no difference is shown in: {}.").format(title, Markup("; ").join(same))
            )
        apart = [r for r in ratios.values() if r.ok and not math.isfinite(r.overlap[0])]
        if apart:
            said.append(Markup("{} the two kinds do not overlap: this extrapolates.").format(title))
        why = dict.fromkeys(r.message or r.status for r in ratios.values() if not r.ok)
        if why:
            left = [QUANTITIES[q].optimal for q, r in ratios.items() if not r.ok]
            said.append(
                Markup("{}, these cannot be compared: {} ({}).").format(
                    title, ", ".join(left), "; ".join(why)
                )
            )
    return said


def checks(fits: Fits, n: Numbers) -> list[Markup]:
    """What following the laws would have cost on cells that they have and have not seen."""
    said: list[Markup] = []
    for name, group in fits.groups.items():
        title = "All architectures together" if name == ALL else name
        for key, gap, words in (
            ("in_sample", group.in_sample, "on the cells that they were fitted to"),
            ("held_out", group.held_out, "on larger cells that they have not seen"),
        ):
            if gap is None or not gap.gaps:
                continue
            at = ("groups", name, key)
            text = Markup("<b>{}</b>: following its laws {} costs {} of loss on average, {} at "
                          "worst ({}, fitted on {}).").format(
                title, words, n("percent", *at, "mean_gap"), n("percent", *at, "max_gap"),
                plural(len(gap.gaps), "cell"), gap.n_train,
            )  # fmt: skip
            if gap.unmeasured:
                text += Markup(" In {} no trial lies near enough to tell.").format(
                    plural(len(gap.unmeasured), "more cell")
                )
            said.append(text)
    return said


def extrapolation(answer: Recommendation) -> str:
    """How far outside the cells a recommendation lies, in a few words."""
    factors = answer.extrapolation
    said = cautions.reach(factors, lambda f: f"{short(f)}×") or INSIDE
    if cautions.far(factors):
        said = cautions.WORDS["far"].format(reach=said)
    return said[:1].upper() + said[1:]
