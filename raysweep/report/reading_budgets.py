"""Budgets and serving in words and tables, and what the fits do not support of them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from raysweep.report.budgets import split_names
from raysweep.report.numbers import NOTHING, Numbers
from raysweep.report.reading import listed, plural
from raysweep.report.reading_laws import Row
from raysweep.report.serving import WORDS, Served
from raysweep.report.trends import names_of
from raysweep.scaling.compute.serving import FAR_BEYOND
from raysweep.scaling.fits import Fits

PUBLISHED_SPLITS = (
    ("Hoffmann et al. 2022, parametric fit refitted by Besiroglu et al. 2024", "dense", 0.513),
    ("Wang et al. 2024, dense", "dense", 0.507),
    ("Wang et al. 2024, MoE", "moe", 0.590),
)
"""Published exponents of N_opt: source, kind, value."""

COUNT_WORDS = {
    "params_total": "all parameters, of all experts",
    "params_total_non_embedding": "all parameters but embeddings, of all experts",
    "params_active": "active parameters",
    "params_active_non_embedding": "active parameters but embeddings",
    "params_dense": "the parameters of the dense twin",
}


def budget_rows(fits: Fits, n: Numbers) -> list[Row]:
    """The table of splits: by the law, and by the parabolas where budgets were held."""
    rows: list[Row] = []
    for name in split_names(fits):
        split = fits.allocation[name]
        at = ("allocation", name, "optimum")
        rows.append(
            (
                name,
                "law",
                _with(n, "exponent", at, "exponent"),
                n("exponent", at, "tokens_exponent"),
                _with(n, "params", at, "params"),
                _with(n, "tokens", at, "tokens"),
                _outside(fits, name, n) or Markup("no"),
            )
        )
        if split.parabolas is not None:
            at = ("allocation", name, "parabolas")
            span = n.interval("exponent", (at, "interval", 0), (at, "interval", 1))
            value = Markup("{} ({})").format(n("exponent", at, "exponent"), span or "no interval")
            other = n("exponent", at, "tokens_exponent")
            rows.append((name, "parabolas", value, other, *[NOTHING] * 3))
    return rows


def _outside(fits: Fits, name: str, n: Numbers) -> Markup:
    """How far the best split of the largest cell's budget lies outside the sizes and tokens tried;
    empty where it lies inside."""
    best = fits.allocation[name].optimum
    assert best is not None
    at = ("allocation", name, "optimum", "extrapolation")
    return Markup("; ").join(
        Markup("{} {}× the {}").format(
            symbol, n("ratio", at, quantity), "largest" if factor > 1 else "smallest"
        )
        for symbol, (quantity, factor) in zip("ND", best.extrapolation.items(), strict=True)
        if factor != 1
    )


def _with(n: Numbers, style: str, at: Sequence[object], name: str) -> Markup:
    """A number of an allocation with its interval."""
    at = tuple(at)
    span = n.interval(style, (at, "intervals", name, 0), (at, "intervals", name, 1))
    return Markup("{} ({})").format(n(style, at, name), span or "no interval")


def budgets(fits: Fits, n: Numbers) -> list[Markup]:
    """What the splits say, where they rest on a slice of a law only, and what biases them."""
    said: list[Markup] = []
    shown = split_names(fits)
    for name in shown:
        split = fits.allocation[name]
        assert split.optimum is not None
        at = ("allocation", name, "optimum")
        ends = split.optimum.intervals.get("exponent")
        if ends is None:
            text = Markup("no interval, so nothing tells how sure its split is")
        elif ends[0] > 0.5 or ends[1] < 0.5:
            more = "parameters" if ends[0] > 0.5 else "tokens"
            text = Markup("as a budget grows, more of it should go to {}").format(more)
        else:
            text = Markup(
                "parameters and tokens may grow alike, or one faster: which is <em>not</em> settled"
            )
        text = Markup(
            "<b>{}</b>: N ~ <i>C</i><sup>{}</sup>, D ~ <i>C</i><sup>{}</sup>; {}."
        ).format(name, n("exponent", at, "exponent"), n("exponent", at, "tokens_exponent"), text)
        if split.optimum.status == "outside":
            text += Markup(
                " At the largest cell's budget the best split lies outside the cells ({} tried): a "
                "guess, <em>not</em> a finding."
            ).format(_outside(fits, name, n))
        said.append(text)
        if split.parabolas is None:
            continue
        at = ("allocation", name, "parabolas")
        inside = sum(p.status == "interior" for p in split.parabolas.parabolas)
        said.append(
            Markup(
                "<b>{}</b>: parabolas through {} with a minimum inside their sizes say "
                "N ~ <i>C</i><sup>{}</sup>. Were the law the truth, they would be off by {} on "
                "these very sizes: prefer the law."
            ).format(
                name,
                plural(inside, "budget"),
                n("exponent", at, "exponent"),
                n("exponent", at, "exponent_bias"),
            )
        )
    for message in dict.fromkeys(m for name in shown if (m := fits.allocation[name].message)):
        same = [name for name in shown if fits.allocation[name].message == message]
        said.append(Markup("{}: {}.").format(listed(same), message))
    sliced = [name for name in shown if fits.allocation[name].parabolas is None]
    if sliced:
        said.append(
            Markup(
                "No budget was held while sizes varied{}: the dashed curves are slices of the "
                "fitted law, <em>not</em> measurements."
            ).format("" if len(sliced) == len(names_of(fits)) else f" in {', '.join(sliced)}")
        )
    without: dict[str, list[str]] = {}
    for name in names_of(fits):
        if name not in shown:
            why = fits.allocation[name].message or fits.allocation[name].status
            without.setdefault(why, []).append(name)
    said += [
        Markup("{}: no law tells how to split a budget ({}).").format(listed(names), why)
        for why, names in without.items()
    ]
    kinds = {fits.groups[name].kind for name in shown}
    if "moe" in kinds:
        counts = dict.fromkeys(COUNT_WORDS[fits.allocation[name].count] for name in shown)
        text = (
            "N counts {}, as this law has it: a larger N of a MoE is <em>not</em> a dearer model."
        )
        said.append(Markup(text).format(" or ".join(counts)))
    quoted = [f"{v:.3f} ({source})" for source, kind, v in PUBLISHED_SPLITS if kind in kinds]
    if quoted:
        said.append(Markup("Published exponents of N: {}.").format("; ".join(quoted)))
    return said


def serving_rows(served: Served, n: Numbers) -> list[Row]:
    """The table of solutions: one row each."""
    rows: list[Row] = []
    for i, s in served.shown:
        at = ("serving", "solutions", i)
        rows.append(
            (
                f"{s.experts:g}",
                WORDS[s.kind] + (" (far out)" if s.beyond >= FAR_BEYOND else ""),
                n("params", at, "params"),
                n("share", at, "size_share"),
                n("ratio", at, "training_share"),
                n("tokens", at, "tokens"),
                n("loss", at, "loss"),
                n("number", at, "cost", "dollars_per_million"),
                n("count", at, "cost", "gpus"),
            )
        )
    return rows


def serving(served: Served, n: Numbers) -> list[Markup]:
    """Which number of experts serves most cheaply at equal quality, and what this rests on."""
    if served.data is None:
        return [Markup("The fits do not support an answer: {}.").format(served.message)]
    said = []
    at = ("serving", "solutions")
    best = [(i, s) for i, s in served.shown if s.kind == "loss-optimal"]
    same = [(i, s) for i, s in served.shown if s.kind == "equal quality"]
    if best and same:
        first = min(best, key=lambda found: found[1].experts)
        cheap = min(same, key=lambda found: found[1].cost.dollars_per_million)
        if cheap[1].cost.dollars_per_million < first[1].cost.dollars_per_million:
            said.append(
                Markup(
                    "Of the models of equal quality, {} experts trained to {} of their "
                    "loss-optimal size serve most cheaply: {} dollars a million tokens, against {} "
                    "for the loss-optimal model of {} experts."
                ).format(
                    f"{cheap[1].experts:g}",
                    n("share", at, cheap[0], "size_share"),
                    n("number", at, cheap[0], "cost", "dollars_per_million"),
                    n("number", at, first[0], "cost", "dollars_per_million"),
                    f"{first[1].experts:g}",
                )
            )
        else:
            said.append(Markup("No number of experts serves more cheaply at equal quality."))
    missed = [s for s in served.solutions if s.status == "unreachable"]
    for s in missed:
        said.append(
            Markup("{} experts, {}: {}.").format(f"{s.experts:g}", WORDS[s.kind], s.message)
        )
    far = sum(s.beyond >= FAR_BEYOND for _, s in served.shown)
    if far:
        said.append(
            Markup(
                "{} of {} solutions lie {} times or more outside the sizes, tokens or experts "
                "that were fitted (hollow): guesses, <em>not</em> findings."
            ).format(far, len(served.shown), f"{FAR_BEYOND:g}")
        )
    assume = served.data["assume"]
    said.append(
        Markup(
            "Costs are those of {} GPUs by {}, {} tokens read and {} written a request, at {} "
            "dollar a GPU-hour: a unit, so multiply by your price. No latency was measured; "
            "<code>raysweep serving</code> takes a measured profile, another GPU, other requests."
        ).format(
            assume["gpu"]["name"],
            "a roofline with assumed efficiencies",
            f"{assume['prompt_tokens']:g}",
            f"{assume['generated_tokens']:g}",
            f"{assume['dollars_per_gpu_hour']:g}",
        )
    )
    return said
