"""The live display of a study: cells, trials, best loss, time left; plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raysweep.search.cells import CellState
from raysweep.search.scheduler import StudyScheduler
from raysweep.text import duration, short, written

PLAIN_SECONDS = 15.0
"""Least time between two lines where the output is no terminal."""

WITH_BAR = 110
"""Columns of a terminal that has room for a bar."""

COLUMNS = {
    "cell": 0,
    "params": 76,
    "tokens": 76,
    "trials": 0,
    "running": 46,
    "best loss": 0,
    "at lr": 58,
    "batch": 58,
}
"""Of the table of cells, each with the width from which it is shown."""


@dataclass
class Timing:
    """How long trials take, to say when a study will end."""

    begun: float = field(default_factory=time.monotonic)
    seconds: dict[float, list[float]] = field(default_factory=dict)
    """Durations of finished trials by FLOPs of their cell."""

    def add(self, flops: float, seconds: float) -> None:
        """Note one finished trial."""
        self.seconds.setdefault(flops, []).append(seconds)

    def one(self, flops: float) -> float:
        """Seconds expected of a trial: its cell's mean, or a power law through the other cells.

        Tiny models take time a step and large ones a FLOP, so the exponent is learned, between
        0.3 and 1.1; the line goes through the nearest cell known.
        """
        if flops in self.seconds:
            return _mean(self.seconds[flops])
        known = {math.log(f): math.log(_mean(s)) for f, s in self.seconds.items()}
        x, near = math.log(flops), min(known, key=lambda k: abs(k - math.log(flops)))
        spread = sum((k - _mean(known)) ** 2 for k in known)
        slope = 0.7
        if spread > 0:
            level = _mean(known.values())
            slope = sum((k - _mean(known)) * (v - level) for k, v in known.items()) / spread
        return math.exp(known[near] + min(1.1, max(0.3, slope)) * (x - near))

    def left(self, scheduler: StudyScheduler) -> float | None:
        """Seconds until the end at the present pace; None before the first trial is through."""
        if not self.seconds:
            return None
        work = sum(
            self.one(s.cell.flops) * (s.wanted + 0.5 * len(s.running))
            for s in scheduler.states.values()
        )
        return work / max(1.0, scheduler.workers)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


class Progress:
    """Shows a scheduler. Use as a context; call `refresh` often, `trial_done` once a trial."""

    def __init__(self, scheduler: StudyScheduler, console: Console) -> None:
        self._scheduler = scheduler
        self._console = console
        self._timing = Timing()
        self._last_line = 0.0
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self.refresh(force=True)
            self._live.stop()

    def trial_done(self, cell: str, status: str, seconds: float) -> None:
        """Note one concluded trial."""
        if status == "finished":
            self._timing.add(self._scheduler.states[cell].cell.flops, seconds)

    def refresh(self, *, force: bool = False) -> None:
        """Draw again, at most five times a second; or print a line now and then."""
        now = time.monotonic()
        if self._live is not None:
            if force or now - self._last_line > 0.2:
                self._last_line = now
                self._live.update(self._panel(), refresh=True)
        elif force or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            self.say(self._line())

    def say(self, text: str) -> None:
        """Print a line that stays, above the display."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _totals(self) -> tuple[int, int]:
        states = self._scheduler.states.values()
        concluded = sum(s.concluded for s in states)
        return concluded, concluded + sum(s.wanted + len(s.running) for s in states)

    def _line(self) -> str:
        done, total = self._totals()
        left = self._timing.left(self._scheduler)
        return (
            f"{self._scheduler.study.name}: {done}/{total} trials, "
            f"{self._scheduler.running} running, "
            f"{duration(time.monotonic() - self._timing.begun)} gone, "
            f"{duration(left) if left is not None else '?'} left{_best_words(self._scheduler)}"
        )

    def _panel(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        width = self._console.width
        shown = [k for k, least in enumerate(COLUMNS.values()) if width >= least]
        for k, title in enumerate(COLUMNS):
            if k in shown:
                table.add_column(title, justify="right" if k else "left", no_wrap=True)
        states = list(self._scheduler.states.values())
        for state in _window(states, self._console.height - 6):
            row = _cells_row(state)
            table.add_row(*(row[k] for k in shown), style="dim" if not state.concluded else "")
        done, total = self._totals()
        left = self._timing.left(self._scheduler)
        gone = duration(time.monotonic() - self._timing.begun)
        words = [
            Text(f"study {self._scheduler.study.name}", style="bold"),
            f"{done}/{total} trials",
            f"{self._scheduler.running} running",
            f"{gone} gone",
            f"{duration(left)} left" if left is not None else "time left: measuring",
        ]
        if width < WITH_BAR:
            return Group(Text(", ").join([words[0], *(Text(str(w)) for w in words[1:])]), table)
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, total), completed=done, width=30)
        head.add_row(words[0], bar, *words[1:])
        return Group(head, table)


def _cells_row(state: CellState) -> list[str]:
    best = state.best
    at = best.user_attrs.get("ran_at") if best else None
    rate = (at[0] if at else best.params["learning_rate"]) if best else math.nan
    log2 = (at[1] if at else best.params["log2_batch_sequences"]) if best else 0
    failed = state.concluded - state.finished
    return [
        state.cell.name,
        short(state.cell.counts.params_active_non_embedding),
        short(state.cell.tokens),
        f"{state.finished}/{state.budget}" + (f" (+{failed} failed)" if failed else ""),
        str(len(state.running) or ""),
        written(best.value, "loss") if best else "",
        written(rate, "rate") if best else "",
        short(2**log2 * state.cell.shape.sequence_length) if best else "",
    ]


def _window(states: list[CellState], room: int) -> list[CellState]:
    """As many cells as fit, around the ones at work."""
    if room >= len(states) or room < 1:
        return states
    busy = next((i for i, s in enumerate(states) if s.running), 0)
    start = max(0, min(busy - room // 4, len(states) - room))
    return states[start : start + room]


def _best_words(scheduler: StudyScheduler) -> str:
    values = [b.value for s in scheduler.states.values() if (b := s.best) and b.value is not None]
    return f", best loss {written(min(values), 'loss')}" if values else ""
