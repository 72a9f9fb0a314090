"""What must hold on a GPU, as plain functions: `tests/training/test_gpu.py` and `gpu_day` run them.

Each takes the device and raises AssertionError. On a CPU they check the same code with what a CPU
has, which says nothing about a GPU's kernels.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput import finish, launch
from benchmarks.throughput_worker import RandomCorpus, make_spec
from raysweep.model import build, compiled, functional, moe
from raysweep.study.cells import Architecture
from raysweep.study.shape import ModelShape
from raysweep.study.spec import TrialSpec
from raysweep.training import memory
from raysweep.training.loop import train
from raysweep.training.outcome import Silent

CASE: dict[str, Any] = {
    "d_model": 256, "layers": 2, "heads": 2, "d_ff": 512, "vocab_size": 512,
    "sequence_length": 128, "batch": 16, "steps": 20,
}  # fmt: skip
if not torch.cuda.is_available():  # bfloat16 is slow on most CPUs
    CASE |= {"d_model": 32, "d_ff": 64, "vocab_size": 64, "sequence_length": 16, "steps": 8}


def make(device: torch.device, **changes: Any) -> TrialSpec:
    """A small trial, compiled in bfloat16; on the device if it is a GPU."""
    on_gpu = {"gpus": 1} if device.type == "cuda" else {}
    recipe = {"precision": "bfloat16", **changes.pop("recipe", {})}
    return make_spec({**CASE, "compile": "on", **on_gpu, **changes, "recipe": recipe})


def corpus() -> Any:
    return RandomCorpus(CASE["vocab_size"])


def graphs() -> int:
    """Graphs compiled in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def experts_against_a_reference(device: torch.device) -> None:
    """Forward and backward in bfloat16 of 64 experts, top-7 and a shared one, one of them idle,
    against the plain rule in float32; and bit for bit the same a second time."""
    n, d, width, n_experts, top_k = 1024, 256, 128, 64, 7
    torch.manual_seed(0)
    logits = torch.randn(n, n_experts)
    logits[:, 5] = -50.0
    settings = Architecture(experts=n_experts, top_k=top_k, shared_experts=1, balance="none")
    weights = [
        torch.randn(n_experts, d, 2 * width) / d**0.5,
        torch.randn(n_experts, width, d) / width**0.5,
        torch.randn(d, 2 * width) / d**0.5,
        torch.randn(width, d) / width**0.5,
    ]
    x, ahead = torch.randn(1, n, d), torch.randn(1, n, d, device=device)
    share, bias = (torch.zeros(n_experts, device=device) for _ in "ab")

    def run(function: Any) -> list[Tensor]:
        given = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, *weights)]
        scored = logits.to(device).requires_grad_()
        y, _, load, _, _ = function(given[0], scored, *given[1:], share, bias, top_k, settings)
        assert load[5] == 0
        (y.float() * ahead).sum().backward()
        grads = [t.grad for t in (*given, scored)]
        assert all(g is not None for g in grads)
        return [y, *grads]  # type: ignore[list-item]

    exact = [t.to(device, torch.bfloat16).float().requires_grad_() for t in (x, *weights)]
    scored = logits.to(device).requires_grad_()
    routing = moe.route(scored, top_k, share, bias, settings)
    flat = exact[0].flatten(0, 1)
    total = functional.swiglu(flat @ exact[3]) @ exact[4]
    for expert in range(n_experts):
        rows, k = (routing.experts_NK == expert).nonzero(as_tuple=True)
        hidden = functional.swiglu(flat[rows] @ exact[1][expert]) @ exact[2][expert]
        total = total.index_add(0, rows, hidden * routing.weights_NK[rows, k, None])
    (total.view_as(ahead) * ahead).sum().backward()
    truth = [total.view_as(ahead), *(t.grad for t in (*exact, scored))]

    for function in (moe.experts, compiled.compiled(moe.experts)):
        first, second = run(function), run(function)
        names = ("y", "x", "gate_up", "down", "shared_up", "shared_down", "logits")
        for name, ours, true in zip(names, first, truth, strict=True):
            assert true is not None
            error = ((ours.float() - true).norm() / true.norm()).item()
            assert error < 0.03, f"{name} is off by {error:.3f}"
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not the same"
        assert not first[2][5].any(), "the idle expert has a gradient"


def trials_leave_nothing(device: torch.device) -> None:
    """Three trials in one process: memory goes back to where it was, and the first one compiles.
    On a GPU each batch is twice what it wants at once: those of fewer tokens have graphs of their
    own."""
    least = 2 * memory.GPU_MICRO_TOKENS // CASE["sequence_length"] if device.type == "cuda" else 16
    train(make(device, experts=8, batch=least), corpus(), threads=1)
    counted, held = graphs(), _held(device)
    for k in range(3):
        outcome = train(make(device, experts=8, batch=least << k), corpus(), threads=1)
        assert outcome.status == "finished", outcome.reason
    assert graphs() == counted, f"{graphs() - counted} graphs more"
    assert _held(device) <= held, f"{_held(device) - held} bytes more"


def the_noise_scale_compiles_nothing(device: torch.device) -> None:
    """Its steps, in the second half of a run, meet graphs that are there."""
    compiled.forget()
    counts: dict[int, int] = {}

    class Counting(Silent):
        def report(self, step: int, tokens: int, loss: float) -> None:
            counts[step] = graphs()

    outcome = train(make(device), corpus(), reporter=Counting(), threads=1)
    assert outcome.noise_trace is not None
    assert counts[1] == counts[outcome.step], counts


def lack_of_memory_is_recovered_from(device: torch.device) -> None:
    """What a step takes beyond the memory there is halves the micro-batch, never the batch."""
    if device.type != "cuda":
        spec = make(device, batch=4, steps=2)
        assert train(spec, corpus(), threads=1).status == "finished"
        return
    large: Any = RandomCorpus(8192)
    spec = make(device, batch=64, vocab_size=8192, recipe={"noise_scale": False})
    whole = train(spec, large, threads=1)
    assert whole.status == "finished", whole.reason
    blocked = []
    try:
        free, _ = torch.cuda.mem_get_info(device)
        needed = max(64 << 20, int(0.4 * whole.peak_memory_bytes))
        blocked.append(torch.empty(max(0, free - needed), dtype=torch.uint8, device=device))
        tight = train(spec, large, threads=1)
    finally:
        blocked.clear()
    assert tight.status == "finished", tight.reason
    assert tight.micro_batch_sequences is not None
    assert whole.micro_batch_sequences is not None
    assert tight.micro_batch_sequences < whole.micro_batch_sequences
    assert tight.loss is not None
    assert whole.loss is not None
    assert abs(tight.loss / whole.loss - 1) < 0.01


def activations_can_be_computed_twice(device: torch.device) -> None:
    """The same gradient with less memory."""
    shape = ModelShape(
        d_model=256, layers=4, heads=2, kv_heads=2, d_ff=512, vocab_size=512, sequence_length=128,
        experts=8, top_k=2, expert_ff=128, moe_layers=(1, 3),
    )  # fmt: skip
    model = build(shape, Architecture(experts=8, top_k=2), rope_base=1e4, seed=0, device=device)
    model.dtype = torch.bfloat16
    tokens = torch.randint(0, 512, (8, 128), device=device)
    gradients, peaks = [], []
    for model.recompute in (False, True):
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model(tokens, tokens).objective.backward()
        peaks.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert device.type != "cuda" or peaks[1] < peaks[0], peaks
    assert memory.passes(model, 1, 0.0, device)


def processes_share_a_card(device: torch.device) -> None:
    """Two trials side by side, each on half a card."""
    case = {**CASE, "compile": "off", "recipe": {"precision": "bfloat16"}}
    if device.type == "cuda":
        case |= {"gpus": 0.5, "steps": 200}
    assert all(finish(process) > 0 for process in [launch(case), launch(case)])


def fsdp_gathers_bfloat16(device: torch.device) -> None:
    """A sharded model, here by one process: what its blocks compute with is gathered in bfloat16,
    but for routers; what it keeps is float32."""
    import torch.distributed as dist

    from raysweep.training.learner import Learner
    from raysweep.training.parallel import Workers

    spec = make(device, experts=8)
    seen: dict[str, torch.dtype] = {}

    def note(module: torch.nn.Module, arguments: Any) -> None:
        name = names[module]
        seen.update({f"{name}.{n}": p.dtype for n, p in module.named_parameters(recurse=False)})

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/meet", rank=0, world_size=1,
        )  # fmt: skip
        try:
            learner = Learner(spec, corpus(), device, Workers(0, 1, sharded=True))
            learner.build()
            model = learner.model
            names = {module: name for name, module in model.named_modules()}
            for module in names:
                module.register_forward_pre_hook(note)
            learner.learn(0, 1e-3, want_trace=False)
        finally:
            dist.destroy_process_group()
    kept = {p.dtype for p in model.parameters()}
    assert kept == {torch.float32}, kept
    routers = {name for name in seen if name.endswith("router.weight")}
    assert routers
    assert len(seen) == len(list(model.parameters()))
    for name, dtype in seen.items():
        assert dtype == (torch.float32 if name in routers else torch.bfloat16), (name, dtype)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


CHECKS = {
    check.__name__: check
    for check in (
        experts_against_a_reference,
        trials_leave_nothing,
        the_noise_scale_compiles_nothing,
        lack_of_memory_is_recovered_from,
        activations_can_be_computed_twice,
        processes_share_a_card,
        fsdp_gathers_bfloat16,
    )
}


def main() -> None:
    """Run the checks of the names given, or all; on the GPU if there is one."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        compiled.BACKEND = "aot_eager"
    os.chdir(Path(__file__).resolve().parent.parent)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name](device)
        print(f"{name}: holds on {device.type}", flush=True)


if __name__ == "__main__":
    main()
