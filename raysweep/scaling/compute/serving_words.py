"""What serving costs, told: the table for a terminal, and plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.compute.roofline import Roofline
from raysweep.scaling.compute.serving import KINDS, Serving, ServingLaw, Solution
from raysweep.scaling.plain import plain_dict
from raysweep.scaling.quantities import QUANTITIES
from raysweep.text import dollars, scientific, short


def serving_dict(solutions: Sequence[Solution], law: ServingLaw) -> dict[str, object]:
    """What `raysweep serving --json` prints: the law, the assumptions, then the solutions."""
    serving = law.serving
    return plain_dict(
        {
            "law": law.curve.law.key,
            "count": law.curve.count,
            "reference": law.reference,
            "assume": {
                "gpu": asdict(serving.gpu),
                "dollars_per_gpu_hour": serving.dollars_per_hour,
                "latency": latency_words(serving),
                "prompt_tokens": serving.prompt,
                "generated_tokens": serving.generated,
                "max_sequences": serving.max_sequences,
                "gpus": serving.gpu_counts,
                "usable_memory": serving.usable_memory,
                "architectures": {
                    name: {**asdict(other.candidate.model), "trained": other.candidate.trained}
                    for name, other in law.candidates.items()
                },
            },
            "solutions": [{**asdict(s), "outside": s.outside} for s in solutions],
        }
    )


def share(value: float) -> str:
    """A share in per cent, a dash where there is none."""
    return f"{value:.0%}" if math.isfinite(value) else "-"


Said = Callable[[Solution], str]

COLUMNS: tuple[tuple[str, str, Said], ...] = (
    ("N", "dense N", lambda s: short(s.params)),
    ("", "all parameters", lambda s: short(s.params_total)),
    ("of optimum", "N, of optimum", lambda s: share(s.size_share)),
    ("tokens", "tokens", lambda s: short(s.tokens)),
    ("loss", "loss", lambda s: QUANTITIES["loss"].write(s.loss)),
    ("training", "training, of the budget", lambda s: f"{s.training_share:.2f}x"),
    ("1M tokens", "a million tokens", lambda s: _price(s)),
    ("", "GPUs", lambda s: str(s.cost.gpus)),
    ("of ref.", "cost, of ref.", lambda s: share(s.cost_share)),
    ("active", "active, of ref.", lambda s: share(s.active_share)),
    (
        "ref. FLOPs",
        "",
        lambda s: scientific(s.base_flops) if math.isfinite(s.base_flops) else "-",
    ),
    ("saved", "FLOPs saved", lambda s: share(s.saved)),
)
"""What is told of a solution: the heading in a terminal and on the page, where it stands there."""


def _price(s: Solution) -> str:
    return dollars(s.cost.dollars_per_million) if s.cost.status == "fits" else "no room"


def serving_text(solutions: Sequence[Solution], law: ServingLaw) -> str:
    """A table a budget, one row a solution."""
    serving = law.serving
    columns = {title: (max(8, len(title) + 1), said) for title, _, said in COLUMNS if title}
    wide = max([12, *(len(s.name) for s in solutions)])
    lines = [
        f"loss by the law {law.curve.law.key}, N: {COUNT_NAMES.get(law.curve.count, '')}; "
        f"reference {law.reference}",
        assumptions(serving),
    ]
    for budget in dict.fromkeys(s.budget for s in solutions):
        head = "".join(f"{title:>{width}}" for title, (width, _) in columns.items())
        lines += ["", f"{scientific(budget)} training FLOPs", f"{'':<{wide}}  {'':<22}{head}"]
        for s in (s for s in solutions if s.budget == budget):
            start = f"{s.name:<{wide}}  {s.kind:<22}"
            if s.status != "found":
                lines.append(f"{start}  {s.message}")
                continue
            cells = "".join(f"{said(s):>{width}}" for width, said in columns.values())
            lines.append(start + cells + marks(s))
    lines += ["", *(f"{kind}: {words}" for kind, words in KINDS.items())]
    lines += [
        "N is the dense model that the experts are added to, embeddings aside; 'of ref.' the cost "
        "and 'active' the",
        "active parameters over those of the reference, loss-optimal on the budget; 'ref. FLOPs' "
        "what the reference",
        "would need, loss-optimal, for that loss, and 'saved' the share of them that is not spent.",
    ]
    if any(s.outside for s in solutions if s.status == "found"):
        lines.append(
            "! outside what was trained, so many times beyond the cells' params, tokens or "
            "experts: the law's word alone"
        )
    return "\n".join(lines)


def marks(s: Solution) -> str:
    """What a reader must know of a row that lies outside what was trained."""
    if not s.outside:
        return ""
    words = [] if s.trained else ["not trained"]
    if s.beyond > 1:
        words.append(f"{s.beyond:.2g}x")
    return " ! " + ", ".join(words)


def assumptions(serving: Serving) -> str:
    """Machines, traffic and prices in a sentence."""
    gpus = ", ".join(map(str, serving.gpu_counts))
    return (
        f"served on {gpus} {serving.gpu.name} at ${serving.dollars_per_hour:g} an hour each "
        f"({latency_words(serving)}), {serving.prompt:g} tokens read and {serving.generated:g} "
        f"written a request, at most {serving.max_sequences:g} at once"
    )


def latency_words(serving: Serving) -> str:
    """Where latencies come from."""
    if isinstance(serving.timing, Roofline):
        return "latency by its roofline, with assumed efficiencies"
    return "latency as profiled"
