"""One measurement of `benchmarks.throughput`, in a process of its own: prints tokens per second,
or two figures of it, with the noise scale measured and without, where the case has `noise_rounds`.

Ours is `raysweep.training.loop.train` as a study runs it, data loading and noise scale included;
the peer is the plain loop of Hugging Face's model with clipping and PyTorch's fused AdamW on a
batch made beforehand. Both leave out a warm-up. On CPUs the clock is the CPU time of the one
thread: what the wall clock shows on an idle machine, and fair on a shared one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch

from raysweep.model import fused
from raysweep.study import Study, TrialSpec
from raysweep.training.loop import train
from raysweep.training.outcome import Silent

WARM_UP = 5
"""Steps before the clock starts."""


class RandomCorpus:
    """Uniform tokens: speed does not depend on what they say."""

    bytes_per_token = 1.0

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self.train = rng.integers(0, vocab_size, 1 << 22, dtype=np.uint16)
        self.validation = self.train[: 1 << 14]


class Clock(Silent):
    """A reporter that notes the time after each step."""

    def __init__(self, on_cpu: bool) -> None:
        self.now = time.process_time if on_cpu else time.perf_counter
        self.at: dict[int, float] = {}

    def report(self, step: int, tokens: int, loss: float) -> None:
        self.at[tokens] = self.now()

    def tokens_per_second(self, warm_up_tokens: int) -> float:
        times = [(tokens, at) for tokens, at in self.at.items() if tokens >= warm_up_tokens]
        (first, start), (last, end) = times[0], times[-1]
        return (last - first) / (end - start)


def make_spec(case: dict[str, Any]) -> TrialSpec:
    """A trial of the case's shape."""
    d = case["d_model"]
    d_ff = case.get("d_ff") or 8 * d // 3 // 8 * 8
    experts = case.get("experts", 1)
    architecture = {"experts": experts, "top_k": 2, "expert_size": 0.5} if experts > 1 else {}
    length, batch = case["sequence_length"], case["batch"]
    study = Study.from_dict(
        {
            "study": "throughput",
            "architectures": {"a": architecture},
            "model": {"sequence_length": length, "qk_norm": case.get("qk_norm", True)},
            "scales": [
                {"d_model": d, "layers": case["layers"], "heads": case["heads"], "d_ff": d_ff}
            ],
            "horizons": [{"tokens": length * batch * case["steps"]}],
            "data": {
                "source": "tokens",
                "vocab_size": case["vocab_size"],
                "paths": ["none"],
                "validation_sequences": 1,
            },
            "recipe": {"compile": case.get("compile", "off"), **case.get("recipe", {})},
            "resources": {"gpus_per_worker": case.get("gpus", 0)},
        }
    )
    return study.trial(study.cells[0], "random", 1e-3, batch, 0)


def ours(case: dict[str, Any]) -> float:
    spec = make_spec(case)
    if case.get("plain"):  # without the hand-written blocks
        fused.usable = lambda x: False
    clock = Clock(not case.get("gpus") and not case.get("wall"))
    corpus: Any = RandomCorpus(case["vocab_size"])
    outcome = train(spec, corpus, reporter=clock, threads=1)
    assert outcome.status == "finished", outcome.reason
    return clock.tokens_per_second(WARM_UP * spec.batch_tokens)


def with_and_without_noise(case: dict[str, Any]) -> list[tuple[float, float]]:
    """Rounds of one run each that measures the noise scale and that does not, in turn: within one
    process, since processes on one machine differ in speed by more than what is to be seen."""
    rounds: list[tuple[float, float]] = []
    for index in range(case["noise_rounds"]):
        speeds: dict[bool, float] = {}
        for on in (True, False) if index % 2 else (False, True):
            speeds[on] = ours(case | {"recipe": {"noise_scale": on}})
        rounds.append((speeds[True], speeds[False]))
    return rounds


def peer(case: dict[str, Any]) -> float:
    import transformers

    d, heads = case["d_model"], case["heads"]
    d_ff = 8 * d // 3 // 8 * 8
    common = {
        "vocab_size": case["vocab_size"],
        "hidden_size": d,
        "num_hidden_layers": case["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": case["sequence_length"],
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    torch.manual_seed(0)
    if case.get("experts"):
        config = transformers.MixtralConfig(
            intermediate_size=d_ff // 2,
            num_local_experts=case["experts"],
            num_experts_per_tok=2,
            output_router_logits=True,
            **common,
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.LlamaConfig(intermediate_size=d_ff, **common)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, case["vocab_size"], (case["batch"], case["sequence_length"]))
    start = 0.0
    for step in range(case["steps"]):
        if step == WARM_UP:
            start = time.process_time()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (case["steps"] - WARM_UP) * tokens.numel() / (time.process_time() - start)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    measure = peer if given.get("peer") else ours
    if given.get("noise_rounds"):
        measure = with_and_without_noise
    print(json.dumps({"tokens_per_second": measure(given)}))
