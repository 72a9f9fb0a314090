"""A study on hundreds of GPUs by discrete events: `python -m benchmarks.simulation [--losses 0.1]`.

The real scheduler and pool hand out trials on one, 4, 8 and 64 workers; instead of training, a
trial takes the seconds that its FLOPs do at a constant speed. Nodes are lost at a given rate and
replaced; trials then go on from their last checkpoint, once they have a place again. Printed are
the share of the time that GPUs were busy, the makespan against its lower bound, the tail, the FLOPs
proposed while little was known, the nodes that groups span, the work done twice, and the time that
was said to be left when a tenth of it was gone, over the time that was.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from benchmarks.entry import make_parser, save, start
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import Proposal, StudyScheduler
from raysweep.study import Cell, Study
from raysweep.study.shape import RunSize

GPUS, CPUS = 8, 96
"""Of a node."""
FLOPS_A_SECOND = 4e14
"""Of a GPU: 40 % of an H100's peak."""
START_SECONDS = 30.0
"""From a lost node to training again, once there is a place."""
NODE_HOURS = 0.25
"""Until a lost node is replaced."""
KNOWN = 60
"""Trials before which a proposal counts as blind."""


def make_study(strategy: str, cells: int, per_cell: int) -> Study:
    """From 20M to 2B parameters at two horizons; larger ones on more workers."""
    scales = []
    for params in np.geomspace(2e7, 2e9, max(1, cells // 2)):
        workers = 1 if params < 2e8 else 4 if params < 5e8 else 8 if params < 1.2e9 else 64
        resources = {"workers": workers, "gpus_per_worker": 1, "cpus_per_worker": 4}
        strategy_of = {"strategy": "fsdp"} if workers > 1 else {}
        scales.append({"params": float(params), "resources": resources | strategy_of})
    return Study.from_dict(
        {
            "study": "simulation",
            "model": {"sequence_length": 2048},
            "scales": scales,
            "horizons": [{"tokens_per_param": 10}, {"tokens_per_param": 20}],
            "search": {
                "strategy": strategy,
                "trials_per_cell": per_cell,
                "extend_edges": False,
                "learning_rate": {"low": 1e-4, "high": 2e-2},
                "batch_sequences": {"low": 64, "high": 2048},
            },
        }
    )


def seconds_of(cell: Cell) -> float:
    """Training time of a trial."""
    return cell.flops / (cell.resources.workers * FLOPS_A_SECOND)


def loss_of(size: RunSize, learning_rate: float, batch_tokens: float, noise: float) -> float:
    """A valley about Step Law's optimum, with 0.1 % of noise."""
    params, tokens = size.params_active_non_embedding, size.tokens
    u = math.log(learning_rate / (1.79 * params**-0.713 * tokens**0.307))
    v = math.log(batch_tokens / (0.58 * tokens**0.571))
    level = 1.7 + 400 * params**-0.35 + 400 * tokens**-0.28
    return level * math.exp(0.02 * u * u + 0.01 * v * v + 1e-3 * noise)


@dataclass
class _Run:
    """A trial that is under way."""

    proposal: Proposal
    left: float
    """Seconds of training left at its last checkpoint."""
    since: float | None
    """When it began to train from there; None while it waits for a place."""
    attempt: int = 0

    @property
    def workers(self) -> int:
        return self.proposal.spec.cell.resources.workers


class Simulation:
    """One study on `nodes` nodes. `losses` is how often a node is lost an hour."""

    def __init__(
        self, study: Study, *, nodes: int, losses: float, checkpoint_seconds: float, seed: int
    ) -> None:
        self.now = 0.0
        self._names = itertools.count()
        self._nodes = {f"n{next(self._names):03}": dict(CPU=CPUS, GPU=GPUS) for _ in range(nodes)}
        self.gpus = nodes * GPUS
        pool = ResourcePool(self._nodes)
        self.scheduler = StudyScheduler(study, "data", pool, clock=lambda: self.now)
        self._losses, self._checkpoint_seconds = losses, checkpoint_seconds
        self._rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = itertools.count()
        self._runs: dict[str, _Run] = {}
        self.busy: list[tuple[float, int]] = [(0.0, 0)]
        """(time, GPUs that train) at each change."""
        self.offered = 0.0
        """GPU-seconds of nodes that were there."""
        self.redone = 0.0
        """GPU-seconds of training lost with nodes."""
        self.known = 0
        self.flops: dict[bool, float] = defaultdict(float)
        """FLOPs proposed, by whether little was known."""
        self.span: dict[int, list[int]] = defaultdict(list)
        """Nodes of groups, by workers."""
        self.lost = 0
        self.asks: list[float] = []
        self.full_asks: list[float] = []
        """Seconds that asks took, and those right after one that found nothing."""
        self.left: list[tuple[float, float]] = []
        """(time, seconds said to be left) at each change."""

    def run(self) -> None:
        """To the end of the study."""
        for node in self._nodes:
            self._plan_loss(node)
        self._hand_out()
        while self._runs:
            when, _, kind, payload = heapq.heappop(self._events)
            self.offered += len(self._nodes) * GPUS * (when - self.now)
            self.now = when
            if getattr(self, f"_{kind}")(*payload):
                self._take_up()
                self._hand_out()
                self._note()
        assert self.scheduler.done

    def _at(self, when: float, kind: str, *payload: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, payload))

    def _plan_loss(self, node: str) -> None:
        if self._losses:
            hours = self._rng.exponential(1 / self._losses)
            self._at(self.now + 3600 * hours, "lose", node)

    def _hand_out(self) -> None:
        pool = self.scheduler.pool
        while True:
            begun = time.perf_counter()
            name = f"t{next(self._order)}"
            proposal = self.scheduler.ask(name)
            self.asks.append(time.perf_counter() - begun)
            if proposal is None:
                begun = time.perf_counter()
                assert self.scheduler.ask(name) is None
                self.full_asks.append(time.perf_counter() - begun)
                return
            cell = proposal.spec.cell
            self.flops[self.known < KNOWN] += cell.flops
            if cell.resources.workers > 1:
                self.span[cell.resources.workers].append(len(set(pool.nodes_of(name))))
            run = _Run(proposal, seconds_of(cell) * self._rng.uniform(0.97, 1.03), self.now)
            self._runs[name] = run
            self._at(self.now + run.left, "end", name, 0)

    def _end(self, name: str, attempt: int) -> bool:
        run = self._runs.get(name)
        if run is None or run.attempt != attempt:
            return False  # a node was lost meanwhile
        del self._runs[name]
        spec = run.proposal.spec
        loss = loss_of(spec.cell.size, spec.learning_rate, spec.batch_tokens, self._rng.normal())
        self.scheduler.tell(name, "finished", loss)
        self.known += 1
        return True

    def _lose(self, node: str) -> bool:
        self.lost += 1
        for name, run in self._runs.items():
            if node not in self.scheduler.pool.nodes_of(name):
                continue
            if run.since is not None and self.now > run.since:
                trained = self.now - run.since
                kept = trained - trained % self._checkpoint_seconds
                self.redone += (trained - kept) * run.workers
                run.left -= kept
            run.since, run.attempt = None, run.attempt + 1
        del self._nodes[node]
        self.scheduler.pool.update(self._nodes)
        self._at(self.now + 3600 * NODE_HOURS, "replace")
        return True

    def _replace(self) -> bool:
        name = f"n{next(self._names):03}"
        self._nodes[name] = dict(CPU=CPUS, GPU=GPUS)
        self._plan_loss(name)
        self.scheduler.pool.update(self._nodes)
        return True

    def _take_up(self) -> None:
        """Trials whose nodes were lost go on where the pool has given them others."""
        for name, run in self._runs.items():
            if run.since is None and name not in self.scheduler.pool.displaced:
                run.since = self.now + START_SECONDS
                self._at(run.since + run.left, "end", name, run.attempt)

    def _note(self) -> None:
        training = sum(run.workers for run in self._runs.values() if run.since is not None)
        self.busy.append((self.now, training))
        if (left := self.scheduler.seconds_left) is not None:
            self.left.append((self.now, left))

    def left_ratio(self) -> list[float]:
        """Least and most of what was said to be left over what was, from a tenth of the time to
        nine tenths."""
        times, said = np.array(self.left).T
        later = (times > 0.1 * self.now) & (times < 0.9 * self.now)
        ratios = said[later] / (self.now - times[later])
        return [float(ratios.min()), float(ratios.max())]

    def figures(self) -> dict[str, Any]:
        """What came out."""
        times, busy = np.array(self.busy).T
        used = float(np.sum(busy[:-1] * np.diff(times)))
        cells = [(s.cell, s.concluded) for s in self.scheduler.states.values()]
        needed = sum(n * seconds_of(cell) * cell.resources.workers for cell, n in cells)
        bound = max(needed / self.gpus, max(seconds_of(cell) for cell, _ in cells))
        late = times[busy >= 0.9 * self.gpus]
        return {
            "trials": self.known,
            "GPU-hours": needed / 3600,
            "makespan, h": self.now / 3600,
            "over its bound": self.now / bound,
            "busy": used / self.offered,
            "tail": 1 - (late.max() / self.now if len(late) else 0.0),
            f"FLOPs proposed with fewer than {KNOWN} trials known": self.flops[True]
            / sum(self.flops.values()),
            "nodes lost": self.lost,
            "work done twice": self.redone / needed,
            "fewest nodes": {
                workers: float(np.mean([n == math.ceil(workers / GPUS) for n in spans]))
                for workers, spans in sorted(self.span.items())
            },
            "time left, said over true": self.left_ratio(),
            "ask, ms (median, most)": [1e3 * float(np.median(self.asks)), 1e3 * max(self.asks)],
            "ask on a full cluster, ms": 1e3 * float(np.median(self.full_asks)),
        }  # fmt: skip


def main() -> None:
    parser = make_parser("simulation", __doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--per-cell", type=int, default=12)
    parser.add_argument("--strategy", default="qmc", help="ladder takes minutes")
    parser.add_argument("--losses", type=float, default=0.0, help="of each node, an hour")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    simulation = Simulation(
        make_study(args.strategy, args.cells, args.per_cell),
        nodes=args.nodes,
        losses=args.losses,
        checkpoint_seconds=60 * args.checkpoint_minutes,
        seed=args.seed,
    )
    simulation.run()
    figures = simulation.figures()
    for name, value in figures.items():
        print(f"{name:45}  {f'{value:.4g}' if isinstance(value, float) else value}")
    save(args.json, figures)


if __name__ == "__main__":
    start(main)
