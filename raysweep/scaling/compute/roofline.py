"""What a step of serving a model takes: memory, and latency by roofline or measured profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raysweep.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

BYTES = 2.0  # of a weight, an activation and a cached key or value in 16 bits


@dataclass(frozen=True)
class Gpu:
    """An accelerator as its vendor's data sheet has it: dense 16-bit peak, no sparsity."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    flops: float  # FLOP/s
    link: float  # bytes/s to its neighbours, one way


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-32gb", 32e9, 0.9e12, 125e12, 150e9),
        Gpu("a100-40gb", 40e9, 1.555e12, 312e12, 300e9),
        Gpu("a100-80gb", 80e9, 2.039e12, 312e12, 300e9),
        Gpu("l4", 24e9, 0.3e12, 121e12, 32e9),
        Gpu("l40s", 48e9, 0.864e12, 362e12, 32e9),
        Gpu("h100", 80e9, 3.35e12, 989e12, 450e9),
        Gpu("h200", 141e9, 4.8e12, 989e12, 450e9),
        Gpu("b200", 180e9, 7.7e12, 2250e12, 900e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in GPUS; UserError lists the names."""
    if name.lower() not in GPUS:
        raise UserError(f"no GPU '{name}': choose from {', '.join(GPUS)}")
    return GPUS[name.lower()]


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that a driver calls `device`, as "NVIDIA H100 80GB HBM3"; None if it is not here."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    memory = next((word for word in words if re.fullmatch(r"\d+gb", word)), "")
    for word in words:
        for name in (f"{word}-{memory}", word, f"{word}-80gb"):
            if name in GPUS:
                return GPUS[name]
    return None


@dataclass(frozen=True)
class ServedModel:
    """A decoder with experts in some of its layers, after Yun et al. 2024 (arXiv 2404.02852).

    `params` is the corresponding dense model, N, embeddings aside. Of it a share `fixed_share`
    stays in every token's way (attention, dense FFNs, shared experts, routers), and each routed
    expert adds a share `expert_share`: 2/3 and 1/3 where every second layer holds experts as wide
    as the FFN they replace, as in the source. The shape follows from N = `width_params` layers
    d_model^2 at d_model = `aspect` layers; it need not be whole."""

    params: float
    experts: float = 1.0
    top_k: float = 2.0
    fixed_share: float = 2.0 / 3.0
    expert_share: float = 1.0 / 3.0
    aspect: float = 128.0
    width_params: float = 12.0
    kv_share: float = 1.0  # key-value heads over heads
    granularity: float = 1.0  # FFN width over expert width, for laws that read it
    embedding: float = 0.0  # parameters of embedding and head together, over d_model

    @property
    def used(self) -> float:
        """Experts a token passes through: `top_k`, or all where there are fewer."""
        return min(self.top_k, self.experts)

    @property
    def params_total(self) -> float:
        """(fixed + E expert) N: (1 + (E - 1) / 3) N in the source."""
        return self.params * (self.fixed_share + self.experts * self.expert_share)

    @property
    def params_active(self) -> float:
        """(fixed + K expert) N."""
        return self.params * (self.fixed_share + self.used * self.expert_share)

    @property
    def layers(self) -> float:
        return (self.params / (self.width_params * self.aspect**2)) ** (1.0 / 3.0)

    @property
    def d_model(self) -> float:
        return self.aspect * self.layers

    @property
    def params_embedding(self) -> float:
        """Parameters of embedding and head."""
        return self.embedding * self.d_model

    @property
    def kv_bytes(self) -> float:
        """Bytes of cache a token takes: a key and a value in every layer."""
        return 2.0 * self.layers * self.d_model * self.kv_share * BYTES

    def params_touched(self, tokens: float) -> float:
        """Expected parameters read by a step of `tokens`: experts are read once if any token wants
        them, and E (1 - (1 - K/E)^tokens) of them are wanted when routing is even."""
        wanted = self.experts * (1.0 - (1.0 - self.used / self.experts) ** tokens)
        return self.params * (self.fixed_share + self.expert_share * wanted)


class Latency(Protocol):
    """Seconds that a step takes on `gpus` GPUs that share the model."""

    def prefill(self, model: ServedModel, gpus: int, sequences: float, prompt: float) -> float:
        """Reading `sequences` prompts of `prompt` tokens."""
        ...

    def decode(self, model: ServedModel, gpus: int, sequences: float, context: float) -> float:
        """One new token for each of `sequences` that hold `context` tokens on average."""
        ...


@dataclass(frozen=True)
class Roofline:
    """The slower of arithmetic and memory traffic, plus the exchange between GPUs.

    Tensor parallel: two all-reduces of the activations a layer. The efficiencies are the reachable
    shares of the data sheet's peaks: assumptions, to be replaced by a measured Profile."""

    gpu: Gpu
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.7
    link_efficiency: float = 0.7
    hop_seconds: float = 1e-5  # of an all-reduce, whatever its size

    def prefill(self, model: ServedModel, gpus: int, sequences: float, prompt: float) -> float:
        tokens = sequences * prompt
        # Attention: 4 d_model FLOPs a layer for each earlier token, half the prompt on average.
        attention = 2.0 * prompt * model.layers * model.d_model * tokens
        flops = 2.0 * model.params_active * tokens + attention
        traffic = BYTES * model.params_touched(tokens) + model.kv_bytes * tokens
        return self._seconds(model, gpus, flops, traffic, tokens)

    def decode(self, model: ServedModel, gpus: int, sequences: float, context: float) -> float:
        attention = 4.0 * context * model.layers * model.d_model * sequences
        flops = 2.0 * model.params_active * sequences + attention
        traffic = BYTES * model.params_touched(sequences) + model.kv_bytes * context * sequences
        return self._seconds(model, gpus, flops, traffic, sequences)

    def _seconds(
        self, model: ServedModel, gpus: int, flops: float, traffic: float, tokens: float
    ) -> float:
        arithmetic = flops / (gpus * self.gpu.flops * self.compute_efficiency)
        memory = traffic / (gpus * self.gpu.bandwidth * self.memory_efficiency)
        if gpus == 1:
            return max(arithmetic, memory)
        moved = 2.0 * (gpus - 1) / gpus * tokens * model.d_model * BYTES
        exchange = moved / (self.gpu.link * self.link_efficiency) + self.hop_seconds
        return max(arithmetic, memory) + 2.0 * model.layers * exchange


PROFILE_COLUMNS = ("phase", "experts", "gpus", "params", "sequences", "seconds")


@dataclass(frozen=True)
class Profile:
    """Measured latencies, interpolated linearly in log params and log sequences (and extended past
    their ends), for the numbers of experts and GPUs that were measured.

    Measured at one prompt and context length: those given to `prefill` and `decode` are not
    used."""

    table: pd.DataFrame = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A CSV with the columns PROFILE_COLUMNS; `phase` is prefill or decode, `params` dense."""
        import pandas as pd  # here: a row of a trial needs GPUS alone, and perhaps no pandas

        try:
            table = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a profile: {error}") from None
        missing = [c for c in PROFILE_COLUMNS if c not in table.columns]
        if missing:
            raise UserError(
                f"{path} has no column '{missing[0]}': a profile needs {PROFILE_COLUMNS}"
            )
        columns = list(PROFILE_COLUMNS[1:])
        numbers = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
        bad = ~(np.isfinite(numbers) & (numbers > 0)).all(axis=1)
        if bad.any():
            raise UserError(f"{path}, row {int(np.argmax(bad))}: every number must be positive")
        unknown = ~table["phase"].isin(["prefill", "decode"])
        if unknown.any():
            raise UserError(
                f"{path}, row {int(np.argmax(unknown))}: phase must be 'prefill' or 'decode'"
            )
        return cls(table)

    @property
    def gpus(self) -> tuple[int, ...]:
        """The numbers of GPUs that were measured."""
        return tuple(sorted(int(g) for g in self.table["gpus"].unique()))

    def prefill(self, model: ServedModel, gpus: int, sequences: float, prompt: float) -> float:
        return self._look_up("prefill", model, gpus, sequences)

    def decode(self, model: ServedModel, gpus: int, sequences: float, context: float) -> float:
        return self._look_up("decode", model, gpus, sequences)

    def _look_up(self, phase: str, model: ServedModel, gpus: int, sequences: float) -> float:
        t = self.table
        rows = t[(t["phase"] == phase) & (t["experts"] == model.experts) & (t["gpus"] == gpus)]
        if rows.empty:
            raise UserError(
                f"the profile has no {phase} of {model.experts:g} experts on {gpus} GPUs: "
                "measure it, or leave that case out"
            )
        sizes, seconds = [], []
        for size, group in rows.groupby("params"):
            sizes.append(np.log(float(np.asarray(size))))
            x, y = np.log(group["sequences"].to_numpy()), np.log(group["seconds"].to_numpy())
            seconds.append(_line(np.log(sequences), x, y))
        return float(np.exp(_line(np.log(model.params), np.array(sizes), np.array(seconds))))


def _line(at: float, x: np.ndarray, y: np.ndarray) -> float:
    """Piecewise linear through (x, y), its end pieces extended; constant through a single point."""
    order = np.argsort(x)
    x, y = x[order], y[order]
    if len(x) == 1:
        return float(y[0])
    k = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    return float(y[k] + (y[k + 1] - y[k]) * (at - x[k]) / (x[k + 1] - x[k]))
