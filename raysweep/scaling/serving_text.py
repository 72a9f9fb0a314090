"""Serving solutions as a table for a terminal, and as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from raysweep.scaling.plain import plain
from raysweep.scaling.roofline import Roofline
from raysweep.scaling.serving import Serving, Solution

FAR_BEYOND = 10.0
"""Times outside the fitted range from which a row is marked."""


def serving_dict(
    solutions: Sequence[Solution], serving: Serving, flops: float
) -> dict[str, object]:
    """What `raysweep serving --json` prints: the assumptions, then the solutions."""
    gpu = serving.gpu
    found = plain(
        {
            "flops": flops,
            "assume": {
                "gpu": asdict(gpu),
                "dollars_per_gpu_hour": serving.dollars_per_hour,
                "latency": _latency(serving),
                "prompt_tokens": serving.prompt,
                "generated_tokens": serving.generated,
                "usable_memory": serving.usable_memory,
                "top_k": serving.model.top_k,
                "moe_share": serving.model.moe_share,
            },
            "solutions": [asdict(s) for s in solutions],
        }
    )
    assert isinstance(found, dict)
    return found


def serving_text(solutions: Sequence[Solution], serving: Serving, flops: float) -> str:
    """A table, one row a solution; N is the corresponding dense model."""
    lines = [
        f"training budget {flops:.3g} FLOPs; served on {serving.gpu.name} at "
        f"${serving.dollars_per_hour:g} an hour each ({_latency(serving)}), "
        f"{serving.prompt:g} tokens read and {serving.generated:g} written a request, "
        f"top-{serving.model.top_k:g}",
        "",
        "experts  solution                        N   N/optimal  training     tokens     loss"
        "   $/1M tokens  GPUs",
    ]
    for s in solutions:
        if s.status != "found":
            lines.append(f"{s.experts:7g}  {s.kind:<26} {s.message}")
            continue
        price = f"{s.cost.dollars_per_million:.3g}" if s.cost.status == "fits" else "no room"
        mark = " !" if s.beyond >= FAR_BEYOND else ""
        lines.append(
            f"{s.experts:7g}  {s.kind:<26} {s.params:8.3g}  {s.size_share:9.2f}x  "
            f"{s.training_share:7.2f}x  {s.tokens:9.3g}  {s.loss:7.4f}  {price:>12}  "
            f"{s.cost.gpus:4d}{mark}"
        )
    beyond = max((s.beyond for s in solutions if s.status == "found"), default=math.nan)
    lines += ["", "N is the dense model that the experts are added to, embeddings aside."]
    if beyond >= FAR_BEYOND:
        lines.append(
            f"! lies {FAR_BEYOND:g} times or more outside what was fitted (at most "
            f"{beyond:.2g} times): a guess, not a measurement"
        )
    return "\n".join(lines)


def _latency(serving: Serving) -> str:
    if isinstance(serving.timing, Roofline):
        return "latency by its roofline, with assumed efficiencies"
    return "latency as profiled"
