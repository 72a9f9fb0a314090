"""What the figures say in plain words, and what they do not support: sentences from the fits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from raysweep.report.numbers import NOTHING, STYLES, Numbers
from raysweep.report.style import short
from raysweep.report.trends import Rule, loss_fit
from raysweep.scaling.fits import ALL, Fits
from raysweep.scaling.power_law import SYMBOLS, PowerLaw
from raysweep.scaling.recommend import Recommendation
from raysweep.scaling.surface import Surface

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


def powers(text: str) -> Markup:
    """A formula in plain text with its powers raised."""
    return Markup(re.sub(r"\^(\([^)]*\)|\w+)", r"<sup>\1</sup>", str(escape(text))))


def answer_limits(answer: Recommendation) -> list[Markup]:
    """What to be wary of in one recommendation."""
    # How far it extrapolates stands above the list already.
    warnings = [w for w in answer.warnings if not w.startswith("a long extrapolation")]
    said = [escape(_sentence(w)) for w in warnings]
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


def law_rows(
    fits: Fits, n: Numbers, used: Mapping[str, Mapping[str, Rule]]
) -> list[tuple[object, ...]]:
    """The table of the laws that recommend: one row an architecture and quantity."""
    rows: list[tuple[object, ...]] = []
    for name, by_target in used.items():
        for target, rule in by_target.items():
            word = TARGETS[target]
            if isinstance(rule, Surface):
                rows.append((name, word, *_surface_row(rule, target), NOTHING, len(rule.cells)))
                continue
            group = name if rule.name in fits.groups[name].laws else ALL
            at = ("groups", group, "laws", rule.name)
            spans = [
                _span(
                    SYMBOLS[q][0],
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
        for target, word in TARGETS.items():
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
        Markup("{} with <i>{}</i>").format("rises" if e.value > 0 else "falls", SYMBOLS[q][0])
        for q, e in clear.items()
    ]
    unclear = [Markup("<i>{}</i>").format(SYMBOLS[q][0]) for q in law.inputs if q not in clear]
    if unclear:
        parts.append(
            Markup("may rise or fall with {}: the sign is <em>not</em> settled").format(
                Markup(" and ").join(unclear)
            )
        )
    return Markup("the optimal {} {}").format(TARGETS[law.target], Markup(" and ").join(parts))


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


def loss(fits: Fits, used: Mapping[str, str]) -> list[Markup]:
    """What the laws of the loss cannot tell; architectures of which the same is true together."""
    said: dict[Markup, list[str]] = {}
    for name in fits.groups:
        if name == ALL:
            continue
        _, found = loss_fit(fits, name, used.get(name))
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
    return [Markup("{}: {}.").format(listed(names), text) for text, names in said.items()]


RATIO_WORDS = {
    "batch_tokens": ("optimal batch", "smaller", "larger"),
    "learning_rate": ("optimal learning rate", "lower", "higher"),
    "noise_scale_tokens": ("average gradient noise scale", "lower", "higher"),
}


def comparison(fits: Fits, n: Numbers) -> list[Markup]:
    """MoE over dense: what differs, what cannot be told apart, and where they do not overlap."""
    said: list[Markup] = []
    for label, ratios in fits.comparison.items():
        differ, same = [], []
        for quantity, ratio in ratios.items():
            if not ratio.ok:
                continue
            word, less, more = RATIO_WORDS.get(quantity, (quantity, "less", "more"))
            at = ("comparison", label, quantity)
            span = n.interval("ratio", (at, "low"), (at, "high"))
            text = Markup("{} {} times that of dense ({})").format(
                word, n("ratio", at, "ratio"), span or "no interval"
            )
            if span and (ratio.low > 1 or ratio.high < 1):
                differ.append(text + Markup(", {}").format(less if ratio.ratio < 1 else more))
            else:
                same.append(text)
        title = Markup("<b>{}</b>").format(label[:1].upper() + label[1:])
        if differ:
            said.append(Markup("{} MoE has an {}.").format(title, Markup("; an ").join(differ)))
        if same:
            said.append(
                Markup("{}, no difference is shown in: {}.").format(title, Markup("; ").join(same))
            )
        apart = [r for r in ratios.values() if r.ok and not math.isfinite(r.overlap[0])]
        if apart:
            said.append(Markup("{} the two kinds do not overlap: this extrapolates.").format(title))
        why = dict.fromkeys(r.message or r.status for r in ratios.values() if not r.ok)
        if why:
            left = [RATIO_WORDS.get(q, (q,))[0] for q, r in ratios.items() if not r.ok]
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
    """How far beyond the cells a recommendation lies, in a few words."""
    factors = {k: v for k, v in answer.extrapolation.items() if v != 1}
    if not factors:
        return "Inside the range of the cells"
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
