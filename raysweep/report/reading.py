"""What the figures say in plain words, and what they do not support: sentences made from the fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

from raysweep.report.numbers import Numbers
from raysweep.report.style import short
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.loss_fit import LossFit
from raysweep.scaling.power_law import SYMBOLS, PowerLaw
from raysweep.scaling.recommend import Recommendation

TARGETS = {"learning_rate": "learning rate", "batch_tokens": "batch"}
FEW_CELLS = 5
"""A law on fewer cells than this is called a sketch."""

NAMES_LISTED = 6


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


def formula(n: Numbers, law: PowerLaw, group: str) -> Markup:
    """A law of an optimum as HTML, each number marked: 1.79 N^-0.713 D^0.307."""
    at = ("groups", group, "laws", law.name)
    powers = Markup(" ").join(
        Markup("<i>{}</i><sup>{}</sup>").format(
            SYMBOLS[name][0], n("exponent", *at, "exponents", name, "value")
        )
        for name in law.inputs
    )
    return Markup("{} · {}").format(n("coefficient", *at, "coefficient", "value"), powers)


def answer_limits(answer: Recommendation) -> list[Markup]:
    """What to be wary of in one recommendation."""
    said = [escape(_sentence(w)) for w in answer.warnings]
    if not math.isfinite(answer.loss_interval[0]) and math.isfinite(answer.loss):
        said.append(Markup("The expected loss has no interval: too few cells to resample."))
    return said


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def surfaces(fits: Fits, drawn: int) -> list[Markup]:
    """Which optima are found, which run into an edge, and what would settle them."""
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
    if drawn < len(optima):
        said.append(
            Markup("{} of {} cells are drawn, spread evenly over compute; the table of cells has "
                   "them all.").format(drawn, len(optima))
        )  # fmt: skip
    return said


def laws(fits: Fits, n: Numbers, used: dict[str, dict[str, PowerLaw]]) -> list[Markup]:
    """How the optima move with size, how far that can be trusted, and where it cannot."""
    said: list[Markup] = []
    for name, by_target in used.items():
        for target, word in TARGETS.items():
            law = by_target.get(target)
            if law is None:
                own = fits.groups[name].laws.values()
                why = dict.fromkeys(f"{x.message}" for x in own if x.target == target and not x.ok)
                reason = "; ".join(why) or "no cell has an interior optimum"
                said.append(
                    Markup("<b>{}</b> has no law of the {}: {}.").format(name, word, reason)
                )
                continue
            group = name if law.name in fits.groups[name].laws else ALL
            said.append(_law(fits, n, name, group, word, law))
    return said


def _law(fits: Fits, n: Numbers, name: str, group: str, word: str, law: PowerLaw) -> Markup:
    at = ("groups", group, "laws", law.name)
    parts = [
        Markup("<b>{}</b>: {} = {} ({}{}).").format(
            name,
            "lr*" if law.target == "learning_rate" else "batch*",
            formula(n, law, group),
            plural(law.n_cells, "cell"),
            ", all architectures together" if group == ALL else "",
        )
    ]
    for quantity in law.inputs:
        e = law.exponents[quantity]
        span = n.interval(
            "exponent",
            (*at, "exponents", quantity, "low"),
            (*at, "exponents", quantity, "high"),
        )
        symbol = SYMBOLS[quantity][0]
        if not span:
            parts.append(Markup("The exponent of <i>{}</i> has no interval.").format(symbol))
        elif e.low <= 0 <= e.high:
            parts.append(
                Markup("The exponent of <i>{}</i> may be of either sign (95 %: {}): whether the "
                       "optimal {} rises or falls with it is <em>not</em> settled.").format(
                    symbol, span, word)
            )  # fmt: skip
        else:
            parts.append(
                Markup("With <i>{}</i> the optimal {} {} (95 %: {}).").format(
                    symbol, word, "rises" if e.value > 0 else "falls", span
                )
            )
    if math.isfinite(law.held_out):
        parts.append(
            Markup("Left-out cells are predicted to within {} on average.").format(
                n("percent", *at, "held_out_log_error")
            )
        )
    if law.n_cells < FEW_CELLS:
        parts.append(
            Markup("{} make a sketch, not a law: read the exponents as the direction only.").format(
                plural(law.n_cells, "cell").capitalize()
            )
        )
    return Markup(" ").join(parts)


def loss(fits: Fits, n: Numbers, used: dict[str, str]) -> list[Markup]:
    """Which law describes the loss, how closely, and what its coefficients cannot tell."""
    said: list[Markup] = []
    for name in fits.groups:
        if name == ALL:
            continue
        key = used.get(name)
        found = fits.groups[name].loss_laws.get(key or "")
        group = name
        if not (isinstance(found, LossFit) and found.ok) and ALL in fits.groups:
            found, group = fits.groups[ALL].loss_laws.get(key or ""), ALL
        if not (isinstance(found, LossFit) and found.ok):
            why = dict.fromkeys(f"{k}: {f.message}" for k, f in fits.groups[name].loss_laws.items())
            said.append(
                Markup("<b>{}</b> has no law of the loss ({}): no loss is predicted.").format(
                    name, "; ".join(why) or "nothing to fit"
                )
            )
            continue
        at = ("groups", group, "loss_laws", found.name)
        values = Markup(", ").join(
            Markup("<i>{}</i> {}").format(c, n("coefficient", *at, "coefficients", c))
            for c in found.coefficients
        )
        text = Markup("<b>{}</b>: {} with {} describes the loss of {} to {} (rms).").format(
            name, found.law.formula, values, plural(found.n_cells, "cell"),
            n("percent", *at, "rms_log_residual"),
        )  # fmt: skip
        if found.status == "at bound":
            text += Markup(" But {}. Do not read its coefficients one by one.").format(
                found.message
            )
        spare = found.n_points - found.n_free
        if spare < 3:
            text += Markup(" With {} for {} it would follow almost any data.").format(
                plural(found.n_points, "point"), plural(found.n_free, "coefficient")
            )
        said.append(text)
    return said


RATIO_WORDS = {
    "batch_tokens": ("optimal batch", "smaller", "larger"),
    "learning_rate": ("optimal learning rate", "lower", "higher"),
    "noise_scale_tokens": ("gradient noise scale", "lower", "higher"),
}


def comparison(fits: Fits, n: Numbers) -> list[Markup]:
    """MoE over dense: what differs, what cannot be told apart, and where they do not overlap."""
    said: list[Markup] = []
    for label, ratios in fits.comparison.items():
        for quantity, ratio in ratios.items():
            word, less, more = RATIO_WORDS.get(quantity, (quantity, "less", "more"))
            at = ("comparison", label, quantity)
            if not ratio.ok:
                said.append(
                    Markup("{}: the {} cannot be compared ({}).").format(
                        label.capitalize(), word, ratio.message or ratio.status
                    )
                )
                continue
            span = n.interval("ratio", (*at, "low"), (*at, "high"))
            start = Markup("{}, the {} of MoE is {} times that of dense").format(
                label.capitalize(), word, n("ratio", *at, "ratio")
            )
            if not span:
                end = Markup(", without an interval: too few cells.")
            elif ratio.low <= 1 <= ratio.high:
                end = Markup(" (95 %: {}): no difference is shown.").format(span)
            else:
                end = Markup(" (95 %: {}): {}.").format(span, less if ratio.ratio < 1 else more)
            if not math.isfinite(ratio.overlap[0]):
                end += Markup(" The two kinds do not overlap there, so this is an extrapolation.")
            said.append(start + end)
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
    """How far beyond the cells a recommendation lies, in a few words."""
    factors = {k: v for k, v in answer.extrapolation.items() if v != 1}
    if not factors:
        return "inside the range of the cells"
    far = max(factors.items(), key=lambda kv: abs(math.log(kv[1])))
    side = "beyond" if far[1] > 1 else "below"
    factor = far[1] if far[1] > 1 else 1 / far[1]
    return f"{short(factor)}× {side} the cells in {far[0]}"


def methods(n: Numbers, group: str, checked: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """Rows of the table of methods: how each way of reading optima differs from the default."""
    rows = []
    for name in checked:
        at = ("groups", group, "methods", name)
        rows.append(
            {
                "method": name,
                "interior": n("count", *at, "n_interior"),
                "rate": n("percent", *at, "median_log_difference_learning_rate"),
                "batch": n("percent", *at, "median_log_difference_batch"),
            }
        )
    return rows
