"""Training speed: `python -m benchmarks.throughput [--repeats 5] [--json FILE]
[--part cpu|plain|pair|noise|muon|gpu]`.

- cpu: tokens/s of one thread in float32 against Hugging Face's LlamaForCausalLM and
  MixtralForCausalLM of the same shapes, all without QK-norm; ours measures the noise scale
  besides. Goal: 1.5 times, geometric mean, of each.
- plain: the same against our own decoder without the hand-written blocks. Goal: 1.0 times at least,
  on every shape.
- pair: two trials at once on two cores against one. Goal: 1.8 times.
- noise: what measuring the gradient noise scale costs. Goal: at most 3 %.
- muon: what Muon costs over AdamW. Goal: at most 15 %. At these batches of 2,048 tokens its
  iteration takes about d_model / 580 of a dense step's products, and d_model / 150 of those of a
  MoE of 8 experts, all of which it turns at every step: less in proportion at larger batches.
- gpu: model FLOPs utilisation in bfloat16, compiled, where there is a GPU; and 16 tiny trials that
  share it. Goals: 45 % dense; MoE at 60 % of its dense twin's tokens/s.

Every number is the median of as many fresh processes as `--repeats` says, peers in turn with ours;
of `noise`, of runs with and without in turn within one process.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.entry import make_parser, save, start
from raysweep.scaling.compute.roofline import gpu_of_device
from raysweep.training.record import library_versions
from raysweep.training.runtime import device_name

SHAPES = ((32, 2, 2), (64, 4, 4), (128, 4, 4))
"""(d_model, layers, heads)."""
CPU_CASE = {"vocab_size": 256, "sequence_length": 128, "batch": 16, "qk_norm": False}
STEPS = {32: 150, 64: 60, 128: 30}
NOISE_STEPS, NOISE_ROUNDS = 64, 4
"""Of one run with the noise scale or without, and how often each for every repeat."""


def launch(case: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.throughput_worker", json.dumps(case)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measurement failed: {process.args}")
    return json.loads(out.splitlines()[-1])["tokens_per_second"]


def measure(case: dict[str, Any], together: int = 1) -> float:
    """Tokens/s of a case, in all if several run together."""
    return sum(map(finish, [launch(case) for _ in range(together)]))


def show(name: str, values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{name} {middle:,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def geometric_mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def named(d_model: int, layers: int, heads: int, experts: int) -> tuple[str, dict[str, Any]]:
    """A shape in words, and its case."""
    shape = {"d_model": d_model, "layers": layers, "heads": heads, "steps": STEPS[d_model]}
    if experts == 1:
        return f"{(d_model, layers, heads)}", CPU_CASE | shape
    return f"{(d_model, layers, heads)}, {experts} experts", CPU_CASE | shape | {"experts": experts}


def against(
    repeats: int, experts: int, peer: str
) -> Iterator[tuple[tuple[int, int, int], str, list[float], list[float]]]:
    """Each of `SHAPES`, its name, and tokens/s of ours and of a peer (`plain` or `peer`), by
    turns."""
    for shape in SHAPES:
        name, case = named(*shape, experts)
        us, them = [], []
        for _ in range(repeats):
            them.append(measure(case | {peer: True}))
            us.append(measure(case))
        yield shape, name, us, them


def plain(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for experts in (1, 8):
        for _, name, us, them in against(repeats, experts, "plain"):
            ratio = statistics.median(us) / statistics.median(them)
            print(f"  {name}: {show('tokens/s', us)}, {show('plain', them)}: {ratio:.2f}x")
            found[name] = {"ratio": ratio, "ours": us, "plain": them}
    least = min(case["ratio"] for case in found.values())
    print(f"plain: at least {least:.2f}x the plain decoder")
    return {"least": least, "cases": found}


def cpu(repeats: int) -> dict[str, Any]:
    if find_spec("transformers") is None:
        print("cpu: left out, as it measures against transformers: pip install 'raysweep[dev]'")
        return {}
    found: dict[str, Any] = {}
    for kind, experts in (("LlamaForCausalLM", 1), ("MixtralForCausalLM", 8)):
        ratios, cases = [], []
        for shape, _, us, them in against(repeats, experts, "peer"):
            ratios.append(statistics.median(us) / statistics.median(them))
            cases.append({"shape": shape, "ours": us, "peer": them})
            texts = show("tokens/s", us), show(kind, them)
            print(f"  {shape}: {texts[0]}, {texts[1]}: {ratios[-1]:.2f}x")
        ratio = geometric_mean(ratios)
        print(f"cpu: {ratio:.2f}x {kind}, geometric mean")
        found[kind] = {"ratio": ratio, "ratios": ratios, "tokens_per_second": cases}
    return found


def pair(repeats: int) -> dict[str, Any]:
    case = CPU_CASE | {"d_model": 64, "layers": 4, "heads": 4, "steps": 100, "wall": True}
    one, two = [], []
    for _ in range(repeats):
        one.append(measure(case))
        two.append(measure(case, together=2))
    ratio = statistics.median(two) / statistics.median(one)
    print(f"pair: {show('one', one)}, {show('two', two)} tokens/s: {ratio:.2f}x")
    return {"ratio": ratio, "one": one, "two": two}


def noise(repeats: int) -> dict[str, Any]:
    costs, cases = [], []
    for d_model, layers, heads in SHAPES:
        shape = {"d_model": d_model, "layers": layers, "heads": heads}
        case = CPU_CASE | shape | {"steps": NOISE_STEPS, "noise_rounds": NOISE_ROUNDS * repeats}
        rounds = finish(launch(case))
        ratios = [off / on - 1 for on, off in rounds]
        low, cost, high = statistics.quantiles(ratios, n=4)
        costs.append(cost)
        cases.append({"shape": (d_model, layers, heads), "on_off": rounds, "cost": cost})
        spread = f"quartiles {100 * low:.1f} to {100 * high:.1f} %, n = {len(rounds)}"
        print(f"  {d_model, layers, heads}: {100 * cost:.1f} % ({spread})")
    mean = statistics.mean(costs)
    print(f"noise: costs {100 * mean:.1f} %, mean of the shapes")
    return {"cost": mean, "cases": cases}


def muon(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for experts in (1, 8):
        for shape in SHAPES:
            name, case = named(*shape, experts)
            speeds: dict[str, list[float]] = {"adamw": [], "muon": []}
            for _ in range(repeats):
                for optimizer, values in speeds.items():
                    values.append(measure(case | {"recipe": {"optimizer": optimizer}}))
            ratios = [a / b - 1 for a, b in zip(*speeds.values(), strict=True)]
            cost = statistics.median(ratios)
            print(f"  {name}: {cost:.1%} ({min(ratios):.1%} to {max(ratios):.1%})")
            found[name] = {"cost": cost, "tokens_per_second": speeds}
    return found


def gpu(repeats: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        print("gpu: PyTorch sees no GPU here; nothing measured")
        return {}
    from benchmarks.throughput_worker import make_spec

    card = gpu_of_device(torch.cuda.get_device_name())
    peak = card and card.flops
    base = {"vocab_size": 50_304, "sequence_length": 1024, "steps": 40, "gpus": 1, "compile": "on"}
    small = {"d_model": 768, "layers": 12, "heads": 12, "batch": 256}
    found: dict[str, Any] = {"peak_flops": peak}
    for label, shape in {
        "124M": small,
        "350M": {"d_model": 1024, "layers": 24, "heads": 16, "batch": 128},
        "124M, 16 experts": small | {"experts": 16},
    }.items():
        values = [measure(base | shape) for _ in range(repeats)]
        counts = make_spec(base | shape).cell.counts
        used = counts.flops_per_token * statistics.median(values)
        mfu = used / peak if peak else None
        share = f"MFU {mfu:.1%}" if mfu else "peak of this GPU unknown"
        print(f"  {label}: {show('tokens/s', values)}, {used / 1e12:.0f} TFLOP/s, {share}")
        found[label] = {
            "tokens_per_second": values,
            "mfu": mfu,
            "params_total": counts.params_total,
            "params_active": counts.params_active,
        }
    speeds = [
        statistics.median(found[k]["tokens_per_second"]) for k in ("124M, 16 experts", "124M")
    ]
    found["moe_over_dense"] = speeds[0] / speeds[1]
    print(f"gpu: MoE at {found['moe_over_dense']:.0%} of its twin's tokens/s")
    tiny = CPU_CASE | {"d_model": 128, "layers": 4, "heads": 4, "steps": 400, "gpus": 1}
    alone = [measure(tiny) for _ in range(repeats)]
    shared = [measure(tiny | {"gpus": 1 / 16}, together=16) for _ in range(repeats)]
    ratio = statistics.median(shared) / statistics.median(alone)
    print(f"gpu: {show('one', alone)}, {show('16 sharing', shared)} tokens/s: {ratio:.1f}x")
    return found | {"sharing": {"ratio": ratio, "one": alone, "sixteen": shared}}


PARTS = {"cpu": cpu, "plain": plain, "pair": pair, "noise": noise, "muon": muon, "gpu": gpu}


def main() -> None:
    parser = make_parser("throughput", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, action="append")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = library_versions()
    words = ", ".join(f"{k} {v}" for k, v in versions.items())
    print(f"{device_name(device)}, {os.cpu_count()} cores; {words}; n = {arguments.repeats}")
    found: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.throughput", *sys.argv[1:]]),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "versions": versions,
        "n": arguments.repeats,
    }
    for part in arguments.part or PARTS:
        found[part] = PARTS[part](arguments.repeats)
        save(arguments.json, found)


if __name__ == "__main__":
    start(main)
