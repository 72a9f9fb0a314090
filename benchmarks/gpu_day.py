"""The day of the first card: `python -m benchmarks.gpu_day --minutes 60 --out DIR`.

Everything that only a GPU can say, in one command, in parts that are bounded in time and kept apart
from each other's failures. It needs torch (2.11 or newer), numpy, pydantic and PyYAML, and no Ray,
Optuna, Arrow or network. `DIR/gpu_day.json` holds what is known so far; a second call goes on with
what is missing, or went wrong. Without a GPU the same parts run at toy size.

- checks: what must hold (`benchmarks.gpu_checks`).
- mfu: each rung of dense.yaml and moe.yaml that fits a card: tokens/s, model FLOPs utilisation,
  memory, seconds beside the steps (building, compiling). Of experts, the share of the dense twin's.
- noise: what measuring the gradient noise scale costs.
- packing: small trials side by side on one card, against one.
- fsdp: a model shared by one card, two, ... all.
- ladder: trials of a small dense and MoE ladder on the text of this machine, as `DIR/rows.jsonl`;
  where Arrow is installed, `--results` writes them to `DIR/results`, for `raysweep report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import measure as throughput
from benchmarks.throughput_worker import RandomCorpus
from raysweep.scaling.compute.roofline import gpu_of_device
from raysweep.study import Cell, Study, TrialSpec

REPO = Path(__file__).resolve().parent.parent
PARTS = {"checks": 8, "mfu": 20, "noise": 3, "packing": 4, "fsdp": 6, "ladder": 60}
"""Minutes that each part gets at most, and in which order. What one leaves, the next may take."""
TASK_MINUTES = {"checks": 4, "mfu": 5, "noise": 3, "packing": 4, "fsdp": 3, "ladder": 60}
MEASURED_SECONDS = 4.0, 20.0
"""Of steps in a measurement: at least, and where there is time, at most."""

ON_GPU = torch.cuda.is_available()


def ladder_study() -> Study:
    """A ladder that a card trains in minutes, and a CPU at toy size."""
    scales: list[dict[str, Any]] = [
        {"name": "s", "d_model": 256, "layers": 4, "heads": 2, "d_ff": 768},
        {"name": "m", "d_model": 384, "layers": 6, "heads": 3, "d_ff": 1024},
        {"name": "l", "d_model": 512, "layers": 8, "heads": 4, "d_ff": 1536},
    ]
    horizons: list[dict[str, Any]] = [{"tokens_per_param": 10}, {"tokens_per_param": 20}]
    length, megabytes, batches = 512, 200.0, (16, 256)
    if not ON_GPU:
        scales = [{"name": "s", "d_model": 16, "layers": 1, "heads": 2, "d_ff": 64}]
        horizons, length, megabytes, batches = [{"tokens": 20_000}], 32, 1.0, (4, 16)
    return Study.from_dict(
        {
            "study": "gpu-day",
            "architectures": {
                "dense": {},
                "moe": {"experts": 16, "top_k": 3, "shared_experts": 1, "balance": "bias"},
            },
            "model": {"sequence_length": length},
            "scales": scales,
            "horizons": horizons,
            "search": {"batch_sequences": {"low": batches[0], "high": batches[1]}},
            "recipe": {"compile": "auto" if ON_GPU else "off"},
            "data": {"max_megabytes": megabytes, "validation_sequences": 512 if ON_GPU else 8},
            "resources": {"gpus_per_worker": 1 if ON_GPU else 0},
        },
        REPO,
    )


def rungs() -> dict[str, Cell]:
    """The shipped rungs by name, one horizon each, MoE beside their twins first; of a toy ladder
    without a GPU."""
    if not ON_GPU:
        return {cell.name: cell for cell in ladder_study().cells}
    found = {}
    for space in ("moe", "dense"):
        for cell in Study.load(REPO / f"search_spaces/{space}.yaml").cells:
            found.setdefault(f"{space}/{cell.architecture}-{cell.scale}", cell)
    return found


def peak_flops() -> float | None:
    card = gpu_of_device(torch.cuda.get_device_name()) if ON_GPU else None
    return card and card.flops


def measured_spec(
    cell: Cell, seconds: float, *, workers: int = 1, strategy: str = "ddp", **recipe: Any
) -> TrialSpec:
    """A run of a cell's shape: of so many seconds half goes to its steps, within bounds, the rest
    to start and compile."""
    study = ladder_study()
    length, batch = cell.shape.sequence_length, (64 if ON_GPU else 4) * workers
    flops = cell.counts.flops_per_token * batch * length
    wanted = min(max(seconds / 2, MEASURED_SECONDS[0]), MEASURED_SECONDS[1])
    a_step = flops / (0.3 * (peak_flops() or 1e10) * workers)
    steps = int(min(max(wanted / a_step, 12), 400)) if ON_GPU else 12
    resources = cell.resources.model_copy(
        update={"workers": workers, "strategy": strategy, "gpus_per_worker": float(ON_GPU)}
    )
    cell = dataclasses.replace(cell, tokens=steps * batch * length, resources=resources)
    spec = study.trial(cell, "random", 1e-4, batch, 0)
    changes = {"compile": "on" if ON_GPU else "off", **recipe}
    return dataclasses.replace(
        spec, recipe=spec.recipe.model_copy(update=changes), validation_sequences=workers
    )


def measure(spec: TrialSpec, workers: Any = None) -> dict[str, Any]:
    """Speed and memory of a run of random tokens."""
    from raysweep.training import monitor
    from raysweep.training.loop import train

    monitor.POINTS = 4  # the device is waited for at each point of the curve: as in a long run
    corpus: Any = RandomCorpus(spec.cell.shape.vocab_size)
    begun = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else "cpu"
    outcome = train(spec, corpus, device=device, workers=workers, threads=1)
    wall = time.perf_counter() - begun
    speed, counts = outcome.tokens_per_second, spec.cell.counts
    cards = outcome.world_size
    peak = peak_flops()
    steps = outcome.tokens_seen / speed if speed else 0.0
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "params_active": counts.params_active,
        "params_total": counts.params_total,
        "tokens_per_second": speed,
        "mfu": speed * counts.flops_per_token / peak / cards if peak else None,
        "seconds_beside_steps": wall - steps,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "micro_batch_sequences": outcome.micro_batch_sequences,
        "sequence_length": spec.cell.shape.sequence_length,
        "batch_sequences": spec.batch_sequences,
    }


def do_check(name: str, out: Path, seconds: float) -> dict[str, Any]:
    from benchmarks.gpu_checks import CHECKS
    from raysweep.model import compiled

    if not ON_GPU:
        compiled.BACKEND = "aot_eager"
    begun = time.perf_counter()
    CHECKS[name](torch.device("cuda", 0) if ON_GPU else torch.device("cpu"))
    return {"holds": True, "seconds": time.perf_counter() - begun}


def do_mfu(name: str, out: Path, seconds: float) -> dict[str, Any]:
    cell = rungs()[name]
    room = torch.cuda.mem_get_info()[1] if ON_GPU else 1e12
    if 20 * cell.counts.params_total > room:
        return {"status": "left out", "reason": "weights, gradients and moments do not fit a card"}
    return measure(measured_spec(cell, seconds))


def do_noise(name: str, out: Path, seconds: float) -> dict[str, Any]:
    cell = list(rungs().values())[len(rungs()) // 4]
    rounds = []
    for k in range(3):
        speeds = {}
        for on in (True, False) if k % 2 else (False, True):
            found = measure(measured_spec(cell, seconds / 6, noise_scale=on))
            speeds[on] = found["tokens_per_second"]
        rounds.append(speeds[False] / speeds[True] - 1)
    return {"cell": cell.name, "cost": statistics.median(rounds), "rounds": rounds}


def do_packing(name: str, out: Path, seconds: float) -> dict[str, Any]:
    many = int(name)
    case = {
        "d_model": 128, "layers": 4, "heads": 2, "vocab_size": 256, "sequence_length": 128,
        "batch": 16, "steps": 400, "wall": True,
    }  # fmt: skip
    if ON_GPU:
        case["gpus"] = 1 / many
    else:
        case |= {"d_model": 32, "layers": 1, "sequence_length": 32, "steps": 12}
    return {"trials": many, "tokens_per_second": throughput(case, together=many)}


def do_fsdp(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """One process a card; this one starts them and takes what the first says."""
    cards = int(name)
    meet = out / f".meet-{os.getpid()}"
    processes = []
    for rank in range(cards):
        environment = os.environ | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(cards)}
        command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out)]
        command += ["--member", f"{rank}/{cards}/{seconds}/{meet}"]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    texts = [process.communicate()[0] for process in processes]
    meet.unlink(missing_ok=True)
    return json.loads(texts[0].splitlines()[-1])


def one_of_a_group(place: str) -> dict[str, Any]:
    """What one of the processes of `do_fsdp` does."""
    import torch.distributed as dist

    from raysweep.training.parallel import Workers

    rank, cards, seconds, meet = place.split("/", 3)
    if ON_GPU:
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if ON_GPU else "gloo",
        init_method=f"file://{meet}", rank=int(rank), world_size=int(cards),
    )  # fmt: skip
    names = [name for name in rungs() if "moe" in name]
    cell = rungs()[next((n for n in names if "350M" in n), names[0])]
    workers = Workers(int(rank), int(cards), sharded=True)
    spec = measured_spec(cell, float(seconds), workers=int(cards), strategy="fsdp")
    found = measure(spec, workers)
    dist.destroy_process_group()
    return {"cell": cell.name, "cards": int(cards), **found}


def do_ladder(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """Trials of a cell, learning rates by batch sizes, until the time is up."""
    from raysweep.data.corpus import prepare
    from raysweep.training.loop import train
    from raysweep.training.record import outcome_columns

    begun, study = time.monotonic(), ladder_study()
    cell = study.cell(name)
    length = cell.shape.sequence_length
    corpus = prepare(study.space.data, out, cache=out / "corpus", sequence_length=length)
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {row["trial_key"] for row in rows}
    batch = study.space.search.batch_sequences
    middle = int((batch.low * batch.high) ** 0.5)
    rates = (2e-3, 4e-3, 1e-3, 8e-3, 5e-4) if ON_GPU else (4e-3, 1e-2)
    points = [(rate, size) for size in (middle, middle // 2, middle * 2) for rate in rates]
    longest = 0.0
    done = 0
    for rate, size in points[: 15 if ON_GPU else 2]:
        spec = study.trial(cell, corpus.hash, rate, size, 0)
        if spec.key in known:
            done += 1
            continue
        if time.monotonic() - begun + longest > seconds:
            break
        started, at = time.monotonic(), datetime.now(UTC)
        outcome = train(spec, corpus, threads=1)
        longest = max(longest, time.monotonic() - started)
        row = outcome_columns(spec, outcome, train_tokens=corpus.train_tokens)
        row |= {"strategy": "grid", "started_at": at.isoformat(), "curve": outcome.curve}
        row["seconds_wall"] = time.monotonic() - started
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        done += 1
    wanted = len(points[: 15 if ON_GPU else 2])
    return {"trials": done, "wanted": wanted, "unfinished": done < wanted}


def tasks() -> dict[str, list[str]]:
    """What each part consists of."""
    from benchmarks.gpu_checks import CHECKS

    cards = torch.cuda.device_count() if ON_GPU else 2
    sizes = [1 << k for k in range(cards.bit_length()) if 1 << k <= cards]
    cells = [cell.name for cell in ladder_study().cells]
    return {
        "checks": list(CHECKS),
        "mfu": list(rungs()),
        "noise": ["cost"],
        "packing": ["1", "4", "16"] if ON_GPU else ["1", "2"],
        "fsdp": [str(size) for size in sizes],
        "ladder": cells,
    }


DO: dict[str, Callable[[str, Path, float], dict[str, Any]]] = {
    "checks": do_check,
    "mfu": do_mfu,
    "noise": do_noise,
    "packing": do_packing,
    "fsdp": do_fsdp,
    "ladder": do_ladder,
}


def in_a_process(part: str, name: str, out: Path, seconds: float, share: float) -> dict[str, Any]:
    """A task, in a process of its own that is to take its share of the time, and is ended after so
    many seconds; an error is a result."""
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out)]
    command += ["--task", part, name, f"{0.9 * share:.0f}"]
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    begun = time.monotonic()
    try:
        text, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not done within {seconds:.0f} s"}
    found: dict[str, Any] = {"error": errors.strip()[-2000:] or f"exit {process.returncode}"}
    if process.returncode == 0:
        found = json.loads(text.splitlines()[-1])
    return found | {"seconds": time.monotonic() - begun}


def is_done(found: dict[str, Any] | None) -> bool:
    return found is not None and "error" not in found and not found.get("unfinished")


def run(minutes: float, out: Path, parts: list[str]) -> dict[str, Any]:
    """All parts, or those that are missing in `out`, within so many minutes."""
    out.mkdir(parents=True, exist_ok=True)
    path, deadline = out / "gpu_day.json", time.monotonic() + 60 * minutes
    day: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    day["machine"] = {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor(),
        "cards": torch.cuda.device_count() if ON_GPU else 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    given = 60 * sum(PARTS[part] for part in parts)
    scale = min(1.0, 60 * minutes / given)
    for part in parts:
        end = min(deadline, time.monotonic() + 60 * PARTS[part] * scale)
        known = day["parts"].setdefault(part, {})
        waiting = [name for name in tasks()[part] if not is_done(known.get(name))]
        for place, name in enumerate(waiting):
            left = end - time.monotonic()
            if left < 5:
                break
            limit = min(left, 60 * TASK_MINUTES[part])
            known[name] = in_a_process(part, name, out, limit, left / (len(waiting) - place))
            print(f"{part} {name}: {summary(known[name])}", flush=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(day, indent=1) + "\n")
            partial.replace(path)
    missing = [
        f"{p} {n}" for p in parts for n in tasks()[p] if not is_done(day["parts"].get(p, {}).get(n))
    ]
    print(f"{path}: " + (f"missing {', '.join(missing)}" if missing else "complete"), flush=True)
    return day


def summary(found: dict[str, Any]) -> str:
    """A result in a line."""
    if "error" in found:
        return "error: " + found["error"].splitlines()[-1][:200]
    parts = []
    for key, value in found.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if value is not None and not isinstance(value, list | dict):
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def write_results(out: Path) -> None:
    """The rows of the ladder as a results folder. This needs Arrow."""
    from raysweep.results import Results
    from raysweep.results.schema import make_row

    results = Results.open(out / "results", create=True)
    for line in (out / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        curve = row.pop("curve")
        row["started_at"] = datetime.fromisoformat(row["started_at"])
        results.write(make_row(**row), curve)
    print(f"{out / 'results'}: raysweep report {out / 'results'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="these parts only")
    parser.add_argument("--results", action="store_true", help="only write rows as results")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--member", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.task:
        part, name, seconds = arguments.task
        print(json.dumps(DO[part](name, out, float(seconds))))
    elif arguments.member:
        print(json.dumps(one_of_a_group(arguments.member)))
    elif arguments.results:
        write_results(out)
    else:
        run(arguments.minutes, out, arguments.part or list(PARTS))


if __name__ == "__main__":
    main()
