"""The device a run trains on: precision, threads, memory, and a clean slate for every run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from raysweep import allocator
from raysweep.errors import UserError
from raysweep.study.cells import Resources
from raysweep.study.trials import Recipe
from raysweep.training import machine

COMPILE_FLOPS = 3e15
"""Runs of fewer floating-point operations are over before compiled blocks, which all trials of a
cell share, have paid for themselves."""

_NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL, newer and older
    "Cuda failure 'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
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
    return machine.cpu_name()


@contextlib.contextmanager
def clean_slate(
    device: torch.device,
    threads: int | None,
    seed: int,
    *,
    dtype: torch.dtype | None = None,
    gpu_share: float = 1.0,
) -> Iterator[None]:
    """Set PyTorch's global state for one run, whatever the process ran before.

    float32 means float32 (no TF32); but where all else is bfloat16, the routers' products take
    TF32. Denormals are flushed, for they slow CPUs a hundredfold. A process takes no more of a GPU
    than its share. On CPUs freed memory is kept for the next step and given back at the end. What
    the run leaves is collected; thread count and precision are put back.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if dtype is torch.bfloat16 else "highest")
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(gpu_share, 1.0) or 1.0, device)
    allocator.keep_freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        machine.reset_peak_memory()
    try:
        yield
    finally:
        if device.type == "cuda":
            gc.collect()  # autograd leaves circles that hold activations
            torch.cuda.empty_cache()
        allocator.give_back_freed()
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_flush_denormal(False)


def compute_dtype(device: torch.device, recipe: Recipe) -> torch.dtype | None:
    """Of activations and matrix products: bfloat16 on GPUs that have it unless the recipe says
    other. None is that of the weights, float32."""
    wanted = recipe.precision
    if wanted == "bfloat16":
        return torch.bfloat16
    if wanted == "auto" and device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else None
    return None


def compiles(device: torch.device, recipe: Recipe, flops: float) -> bool:
    """Whether a run of so many operations compiles its model: as the recipe says, or on GPUs if
    the run is long enough for that to pay."""
    if recipe.compile == "auto":
        return device.type == "cuda" and flops > COMPILE_FLOPS
    return recipe.compile == "on"


def floor_power_of_two(value: float) -> int:
    """The largest power of two not above the value, at least one."""
    return 1 << max(0, int(value).bit_length() - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU, in its libraries or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def wait_for(device: torch.device) -> None:
    """Block until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the run began: of the device, or of the process on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()
