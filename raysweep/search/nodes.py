"""What may be wrong with the nodes of a cluster, said in a line each before trials start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.study import Cell

WAIT_SECONDS = 30.0
"""A node that says nothing for so long is left alone: it may just be starting."""
STATE_BYTES = 16
"""Of a parameter: its value, gradient and two moments."""


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    name: str
    gpus: float
    """As Ray counts them."""
    fingerprint: str | None = None
    """Of the raysweep that it imports; None where it cannot."""
    error: str | None = None
    """Why it cannot."""
    gpu_bytes: tuple[int, ...] = ()
    """Memory of each GPU that PyTorch can use."""
    mps: bool = False
    """Whether NVIDIA's Multi-Process Service runs there."""


def fingerprint() -> str:
    """A hash of the package's sources: equal where nodes run the same code."""
    package = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package)}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def bytes_needed(cell: Cell) -> float:
    """Memory for what a worker of a cell holds of the model, activations left out."""
    resources = cell.resources
    shared = resources.workers if resources.strategy != "ddp" else 1
    return STATE_BYTES * cell.counts.params_total / shared


def problems(reports: Iterable[NodeReport], cells: Sequence[Cell], own: str) -> list[str]:
    """A line for each node that cannot do its part. `own` is the driver's fingerprint."""
    on_gpus = [c for c in cells if c.resources.gpus_per_worker and c.own is None]
    largest = max(on_gpus, key=bytes_needed, default=None)
    lines = []
    for node in reports:
        if node.error is not None:
            lines.append(f"node {node.name} cannot import raysweep: {node.error}")
        elif node.fingerprint != own:
            lines.append(
                f"node {node.name} has another version of raysweep than this one: install the same"
            )
        elif largest is not None and node.gpus and not node.gpu_bytes:
            lines.append(
                f"node {node.name} offers GPUs, and PyTorch can use none there: install a CUDA "
                "build that suits its driver"
            )
        elif largest is not None and node.gpu_bytes:
            share = min(1.0, largest.resources.gpus_per_worker)
            has, needs = share * min(node.gpu_bytes), bytes_needed(largest)
            if has < needs:
                lines.append(
                    f"node {node.name}: {has / 1e9:.0f} GB of GPU memory a worker, and cell "
                    f"{largest.name} needs {needs / 1e9:.0f} GB: give it more workers and "
                    "strategy: fsdp, or drop its scale"
                )
            elif not node.mps and any(c.resources.gpus_per_worker < 1 for c in on_gpus):
                lines.append(
                    f"node {node.name}: trials that share a GPU take turns on it; start "
                    "nvidia-cuda-mps-control -d there, and they run side by side"
                )
    return lines


def look_at_nodes() -> list[NodeReport]:
    """Have each node that is alive say what it has. Those that do not answer are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(_make_look())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    waiting: dict[Any, Mapping[str, Any]] = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": there, "max_retries": 0}
        waiting[look.options(**options).remote(bool(node["Resources"].get("GPU")))] = node
    answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=WAIT_SECONDS)
    reports = []
    for answer in answered:
        node = waiting[answer]
        try:
            said = ray.get(answer)
        except ray.exceptions.RayError:  # pyright: ignore[reportAttributeAccessIssue]
            continue
        gpus = node["Resources"].get("GPU", 0.0)
        reports.append(NodeReport(name=node["NodeManagerAddress"], gpus=gpus, **said))
    return reports


def _make_look() -> Callable[[bool], dict[str, Any]]:
    """A function that travels by value: a node without raysweep could not look it up. It is told
    whether the node offers GPUs: else it does without PyTorch, which takes long to import."""

    def look(on_gpus: bool) -> dict[str, Any]:
        import os

        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # which Ray empties, as no GPU is asked for
        try:
            from raysweep.search.nodes import fingerprint

            found: dict[str, Any] = {"fingerprint": fingerprint()}
        except ImportError as error:
            return {"error": str(error)}
        if not on_gpus:
            return found
        try:
            import torch

            if torch.cuda.is_available():
                count = torch.cuda.device_count()
                found["gpu_bytes"] = tuple(
                    torch.cuda.get_device_properties(i).total_memory for i in range(count)
                )
            pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
            found["mps"] = os.path.exists(f"{pipes}/control")
        except (ImportError, RuntimeError) as error:
            found["error"] = f"PyTorch: {error}"
        return found

    return look
