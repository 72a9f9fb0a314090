"""The device a run trains on: precision, threads, memory, and a clean slate for every run."""

from __future__ import annotations

import contextlib
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from raysweep import allocator
from raysweep.errors import UserError
from raysweep.study.cells import Resources
from raysweep.study.shape import ModelShape
from raysweep.study.trials import Recipe

COMPILE_FLOPS = 1e16
"""A run of fewer floating-point operations is over before a compiled model has paid for itself."""
CPU_MICRO_TOKENS = 2048
"""More tokens at once than this are no faster on a CPU: activations leave its cache."""

_NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN, without room for the kernel that it compiles
)
"""What errors other than PyTorch's own OutOfMemoryError say where memory ran out."""


def choose_device(resources: Resources) -> torch.device:
    """A GPU if the resources ask for one; UserError if there is none."""
    if not resources.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but PyTorch sees no GPU "
            "here: set it to 0, or install a CUDA build"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def clean_slate(device: torch.device, threads: int | None, seed: int) -> Iterator[None]:
    """Global state of PyTorch set for one run, whatever the process ran before.

    float32 means float32 (no TF32); denormals are flushed, for they slow CPUs a hundredfold;
    compiled graphs of earlier models are forgotten. On CPUs freed memory is kept for the next step
    and given back at the end. Thread count and precision are put back.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    allocator.keep_freed()
    _reset_peak_memory(device)
    try:
        yield
    finally:
        allocator.give_back_freed()
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_flush_denormal(False)


def autocast(device: torch.device, recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """The precision of forward passes: bfloat16 autocast on GPUs unless the recipe says other."""
    wanted = recipe.precision
    if wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def compiles(device: torch.device, recipe: Recipe, flops: float) -> bool:
    """Whether a run of so many operations compiles its model: as the recipe says, or on GPUs if
    the run is long enough for that to pay."""
    if recipe.compile == "auto":
        return device.type == "cuda" and flops > COMPILE_FLOPS
    return recipe.compile == "on"


def floor_power_of_two(value: float) -> int:
    """The largest power of two not above the value, at least one."""
    return 1 << max(0, int(value).bit_length() - 1)


def micro_batch(
    shape: ModelShape, resources: Resources, device: torch.device, local_sequences: int
) -> int:
    """Sequences a worker puts through the model at once: a guess that out-of-memory halves."""
    limit = resources.micro_batch_sequences
    if limit is None and device.type == "cpu":
        limit = CPU_MICRO_TOKENS // shape.sequence_length
    elif limit is None:
        free, total = torch.cuda.mem_get_info(device)
        share = resources.gpus_per_worker if resources.gpus_per_worker < 1 else 1.0
        limit = 0.7 * min(free, share * total) / (activation_bytes(shape) * shape.sequence_length)
    micro = min(floor_power_of_two(limit), local_sequences)
    while local_sequences % micro:
        micro -= 1
    return micro


def activation_bytes(shape: ModelShape) -> float:
    """Bytes of activations a token needs while training in mixed precision, roughly.

    Per layer: two bfloat16 copies of what attention and the feed-forward read and write, the
    residual stream in float32; and the logits with their gradient in float32.
    """
    width = shape.d_ff
    if shape.is_moe:
        width = max(width, (shape.top_k + shape.shared_experts) * shape.expert_ff + shape.d_model)
    layer = 2 * 2 * (6 * shape.d_model + 4 * width) + 4 * 2 * shape.d_model
    return shape.layers * layer + 10 * shape.vocab_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU, in its libraries or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the run began: of the device, or of the process on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux only: sets VmHWM back to what is held now
        Path("/proc/self/clear_refs").write_text("5")
