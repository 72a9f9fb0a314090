"""What was forecast of cells before they were trained, beside what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raysweep.scaling.quantities import ANSWERS, QUANTITIES
from raysweep.text import spanned


def forecast_rows(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a cell and quantity, of records as `raysweep.scaling.forecast` makes them: all
    words, empty where there is nothing to say."""
    rows = []
    for name, row in told.get("cells", {}).items():
        own = found.get("cells", {}).get(name, {})
        for quantity in ANSWERS:
            one = QUANTITIES[quantity]
            now, best = own.get(quantity), own.get("best", {}).get(quantity)
            known = "inside" in own and row[quantity]["value"] is not None
            off = own.get("loss_error") if quantity == "loss" else None
            rows.append(
                {
                    "cell": name,
                    "quantity": one.axis,
                    "forecast": _said(row[quantity], one.style),
                    "found": _said(now, one.style) if now else "not trained yet",
                    "best": one.write(best) if best else "",
                    "inside": ("yes" if own["inside"][quantity] else "no") if known else "",
                    "off": f"{off:+.2%}" if off is not None else "",
                }
            )
        if own.get("regret") is not None:
            noise = own["regret_sd"]
            rows.append(
                {
                    "cell": name,
                    "quantity": "regret of the forecast's settings",
                    "forecast": "",
                    "found": f"{own['regret']:+.2%}"
                    + (f" ± {1.96 * noise:.2%}" if noise is not None else ""),
                    "best": "",
                    "inside": "",
                    "off": f"{own['checked']} runs",
                }
            )
    return rows


def forecast_words(told: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """When it was made, of what, and how many trials followed."""
    if not told:
        return ""
    trials = [c["trials"] for c in found.get("cells", {}).values()]
    then = f"; since then {_range(trials)} trials a cell were searched there" if trials else ""
    return (
        f"Scale {told['scale']} was forecast on {told['written']} from {told['rows']} rows of the "
        f"smaller scales, before any trial of it{then}."
    )


def _range(counts: list[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _said(estimate: Mapping[str, float | None], style: str) -> str:
    value, low, high = (
        math.nan if v is None else v for v in (estimate[k] for k in ("value", "low", "high"))
    )
    return spanned(value, low, high, style)
