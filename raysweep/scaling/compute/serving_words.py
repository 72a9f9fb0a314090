"""What serving costs, told: the table for a terminal, and plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from raysweep.scaling.compute.allocation import COUNT_NAMES
from raysweep.scaling.compute.roofline import Roofline
from raysweep.scaling.compute.serving import KINDS, Serving, ServingLaw, Solution
from raysweep.scaling.plain import plain_dict
from raysweep.text import scientific, short


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


COLUMNS = (
    ("N", 8),
    ("of optimum", 11),
    ("tokens", 8),
    ("loss", 8),
    ("training", 9),
    ("$/1M tokens", 12),
    ("of ref.", 8),
    ("active", 8),
    ("ref. FLOPs", 11),
    ("saved", 6),
)


def serving_text(solutions: Sequence[Solution], law: ServingLaw) -> str:
    """A table a budget, one row a solution."""
    serving = law.serving
    wide = max([12, *(len(s.name) for s in solutions)])
    lines = [
        f"loss by the law {law.curve.law.key}, N: {COUNT_NAMES.get(law.curve.count, '')}; "
        f"reference {law.reference}",
        assumptions(serving),
    ]
    for budget in dict.fromkeys(s.budget for s in solutions):
        head = "".join(f"{title:>{width}}" for title, width in COLUMNS)
        lines += ["", f"{scientific(budget)} training FLOPs", f"{'':<{wide}}  {'':<22}{head}"]
        for s in (s for s in solutions if s.budget == budget):
            start = f"{s.name:<{wide}}  {s.kind:<22}"
            if s.status != "found":
                lines.append(f"{start}  {s.message}")
                continue
            cells = "".join(
                f"{text:>{width}}" for text, (_, width) in zip(_cells(s), COLUMNS, strict=True)
            )
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


def _cells(s: Solution) -> tuple[str, ...]:
    price = f"{s.cost.dollars_per_million:.3g}" if s.cost.status == "fits" else "no room"
    return (
        short(s.params),
        f"{s.size_share:.0%}",
        short(s.tokens),
        f"{s.loss:.4f}",
        f"{s.training_share:.2f}x",
        price,
        share(s.cost_share),
        share(s.active_share),
        scientific(s.base_flops) if math.isfinite(s.base_flops) else "-",
        share(s.saved),
    )


def share(value: float) -> str:
    """A share in per cent, a dash where there is none."""
    return f"{value:.0%}" if math.isfinite(value) else "-"


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
