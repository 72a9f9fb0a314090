"""The live display of a study: cells, trials, best loss, time left; plain lines in a log file."""

from __future__ import annotations

import math
import time

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

MEMORY = 0.35
"""Share of the time gone over which the estimate of the end is averaged."""


class Timing:
    """How long a study has been running, and what is said of the time left."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        self._scheduler = scheduler
        self._begun = scheduler.clock()
        self._end: tuple[float, float] | None = None
        """Seconds gone when it was last asked, and the log of the whole time that it said then."""

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return self._scheduler.clock() - self._begun

    def left(self) -> float | None:
        """The scheduler's seconds left, smoothed: the end moves as slowly as the time gone allows;
        None before the first trial is through."""
        left, gone = self._scheduler.seconds_left, self.gone
        if left is None:
            return None
        whole = math.log(max(gone + left, 1e-3))
        if self._end is not None:
            before, said = self._end
            whole = said + (whole - said) * -math.expm1(-(gone - before) / (MEMORY * gone + 1e-9))
        self._end = gone, whole
        return max(left / 2, math.exp(whole) - gone)


class Progress:
    """Shows a scheduler. Use as a context; call `refresh` often."""

    def __init__(self, scheduler: StudyScheduler, console: Console) -> None:
        self._scheduler = scheduler
        self._console = console
        self._timing = Timing(scheduler)
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
        left = self._timing.left()
        return (
            f"{self._scheduler.study.name}: {done}/{total} trials, "
            f"{self._scheduler.running} running, "
            f"{duration(self._timing.gone)} gone, "
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
        left = self._timing.left()
        gone = duration(self._timing.gone)
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
    rate, log2, _ = state.point_of(best) if best else (math.nan, 0, {})
    failed = state.concluded - state.finished
    return [
        state.cell.name,
        short(state.cell.counts.params_active_non_embedding),
        short(state.cell.tokens),
        f"{state.finished}/{state.budget}" + (f" (+{failed} failed)" if failed else ""),
        str(len(state.running) or ""),
        written(best.value, "loss") if best else "",
        written(rate, "rate") if best else "",
        short(2**log2 * state.cell.sequence_length) if best else "",
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
