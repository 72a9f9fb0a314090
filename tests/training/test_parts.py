"""The loop's parts: schedules, the optimizer's buffers, monitor, micro-batches."""

import dataclasses
import math
import os
import time
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from raysweep.model import build, compiled
from raysweep.study import Architecture, Recipe, Study
from raysweep.study.shape import ModelShape
from raysweep.training import calibrate, memory, optimizer, runtime, schedule
from raysweep.training.groups import groups_of
from raysweep.training.monitor import Monitor

SHAPE = ModelShape(
    d_model=16, layers=1, heads=2, kv_heads=2, d_ff=16, vocab_size=20, sequence_length=8
)


class TestSchedule:
    def rate(self, tokens: float, **recipe) -> float:
        return schedule.learning_rate(Recipe(**recipe), 2.0, tokens, 1000)

    def test_warm_up_is_linear_in_tokens(self):
        assert self.rate(25, warmup_fraction=0.1) == pytest.approx(0.5)
        assert self.rate(25, warmup_tokens=50) == pytest.approx(1.0)

    def test_cosine(self):
        recipe = {"warmup_fraction": 0.0, "final_lr_fraction": 0.1}
        assert self.rate(500, **recipe) == pytest.approx(1.1)
        assert self.rate(250, **recipe) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
        assert self.rate(1000, **recipe) == pytest.approx(0.2)

    def test_wsd(self):
        recipe = {"schedule": "wsd", "decay_fraction": 0.2, "final_lr_fraction": 0.0}
        assert self.rate(799, **recipe) == 2.0
        assert self.rate(900, **recipe) == pytest.approx(1.0)

    def test_wsd_along_one_minus_the_root(self):
        recipe = {"schedule": "wsd", "decay_shape": "1-sqrt", "final_lr_fraction": 0.0}
        assert self.rate(800, **recipe) == 2.0
        assert self.rate(850, **recipe) == pytest.approx(1.0)
        assert self.rate(1000, **recipe) == 0

    def test_a_line_to_zero(self):
        recipe = {"schedule": "linear", "warmup_fraction": 0.2, "final_lr_fraction": 0.0}
        assert self.rate(600, **recipe) == pytest.approx(1.0)
        assert self.rate(1000, **recipe) == 0

    def test_constant(self):
        assert self.rate(999, schedule="constant") == 2.0

    def test_fixed_final_rate_never_exceeds_the_peak(self):
        assert self.rate(1000, final_lr=0.01) == pytest.approx(0.01)
        assert self.rate(600, final_lr=5.0) == 2.0

    def test_all_warm_up(self):
        assert self.rate(1000, warmup_fraction=1.0) == pytest.approx(2.0)

    @pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
    def test_batch_size_does_not_change_the_learning_rate_spent(self, name):
        def spent(batch: int) -> float:
            middles = range(batch // 2, 1000, batch)
            return sum(batch * self.rate(t, schedule=name, warmup_fraction=0.1) for t in middles)

        assert spent(4) == pytest.approx(spent(50), rel=2e-3)

    def test_beta2_keeps_its_time_in_tokens(self):
        fixed = Recipe(beta2=0.9)
        scaled = Recipe(beta2=0.9, beta2_rule="batch", beta2_reference_tokens=1000)
        assert schedule.beta2(fixed, 10) == 0.9
        assert schedule.beta2(scaled, 1000) == pytest.approx(0.9)
        assert schedule.beta2(scaled, 10) ** 100 == pytest.approx(0.9)


class TestFlatParameters:
    def test_same_steps_as_one_tensor_a_parameter(self, spec):
        trial = spec("moe")
        cell = trial.cell
        flat_model, model = (build(cell.shape, cell.settings, rope_base=1e4, seed=0) for _ in "ab")
        flat = optimizer.FlatParameters(flat_model, groups_of(trial))
        steps = optimizer.Optimizers(flat, trial.recipe, 64)
        decaying, others = [], []
        for name, parameter in model.named_parameters():
            exempt = parameter.ndim == 1 or name == "embedding" or "router" in name
            (others if exempt else decaying).append(parameter)
        plain = torch.optim.AdamW(
            [
                {"params": decaying, "weight_decay": 0.1},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            foreach=False,
        )
        tokens = torch.randint(0, 20, (4, 9))
        for rate in (0.01, 0.02, 0.005):
            for one in (flat_model, model):
                flat.zero() if one is flat_model else plain.zero_grad()
                one(tokens[:, :-1], tokens[:, 1:]).objective.backward()
            for group in plain.param_groups:
                group["lr"] = rate
            steps.step(rate)
            plain.step()
        for a, b in zip(flat_model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_clipping(self, spec):
        trial = spec()
        model = build(trial.cell.shape, Architecture(), rope_base=1e4, seed=0)
        flat = optimizer.FlatParameters(model, groups_of(trial))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(2.0)
        count = sum(p.numel() for p in model.parameters())
        norm = optimizer.squared_norm(flat.gradients()).sqrt()
        assert norm.item() == pytest.approx(2 * math.sqrt(count))
        optimizer.clip(flat.gradients(), norm, 1000.0)  # below the limit: nothing happens
        assert model.embedding.grad is not None
        assert model.embedding.grad[0, 0] == 2.0
        optimizer.clip(flat.gradients(), norm, 1.0)
        assert optimizer.squared_norm(flat.gradients()).item() == pytest.approx(1.0, rel=1e-4)

    def test_norms_of_more_elements_than_one_dot_product_takes(self, monkeypatch):
        gradient = torch.randn(1000)
        whole = optimizer.squared_norm([gradient])
        monkeypatch.setattr(optimizer, "MAX_DOT", 300)
        assert optimizer.squared_norm([gradient]).item() == pytest.approx(whole.item())


class TestMonitor:
    def feed(self, losses: list[float], steps: int) -> tuple[Monitor, str | None]:
        monitor = Monitor(steps, 64)
        reason = None
        for loss in losses:
            reason = reason or monitor.add([loss], [1.0], [0.1])
        return monitor, reason

    def test_final_loss_is_of_the_last_twentieth(self):
        monitor, reason = self.feed([float(100 - i) for i in range(100)], 100)
        assert reason is None
        assert monitor.final_loss == 3.0

    def test_at_most_500_points(self):
        monitor = Monitor(1999, 64)
        assert -(-1999 // monitor.every) <= 500

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite(self, bad):
        assert self.feed([3.0, bad], 100)[1] == "non-finite loss at step 2"
        assert Monitor(10, 64).add([3.0], [bad], [0.1]) == "non-finite gradient at step 1"

    def test_a_rise_is_seen_within_a_hundredth_of_the_run(self):
        steps = 10_000
        monitor, reason = self.feed([5.0] * 3000 + [9.0] * 100, steps)
        assert reason is not None
        assert "far above the first, 5" in reason
        assert monitor.step < 3000 + steps // 100

    def test_one_bad_batch_is_no_divergence(self):
        assert self.feed([5.0] * 300 + [9.0] + [5.0] * 300, 10_000)[1] is None

    def test_state_round_trip(self):
        monitor, _ = self.feed([5.0, 4.0, 3.0], 40)
        other = Monitor(40, 64)
        other.load(monitor.state())
        assert vars(other) == vars(monitor)
        assert other.tail.maxlen == 2


class TestMicroBatch:
    def size(
        self, spec, batch: int, *, compiled=False, on="cpu", world_size=1, **changes: Any
    ) -> int:
        trial = spec(batch_sequences=batch, tokens=16 * batch * 20, **changes)
        trial = dataclasses.replace(trial, least_batch_sequences=changes.get("least", 4))
        device = torch.device(on)
        return memory.wanted_micro_batch(trial, device, world_size, compiled=compiled)

    def test_whole_batch_if_it_fits(self, spec):
        assert self.size(spec, 8) == 8

    def test_limited_to_what_pays_on_a_cpu(self, spec):
        assert self.size(spec, 1 << 12) == memory.CPU_MICRO_TOKENS // 16

    def test_given_limit_is_rounded_down_to_a_power_of_two(self, spec):
        assert self.size(spec, 64, resources={"micro_batch_sequences": 7}) == 4

    def test_odd_batches_are_cut_evenly(self, spec):
        assert self.size(spec, 9, resources={"micro_batch_sequences": 4}) == 3

    def test_one_size_a_compiled_cell_that_leaves_two_for_the_noise_scale(self, spec):
        assert {self.size(spec, batch, compiled=True) for batch in (4, 8, 256)} == {2}
        quiet: Any = {"recipe": {"noise_scale": False}}
        assert {self.size(spec, batch, compiled=True, **quiet) for batch in (4, 256)} == {4}

    def test_a_gpu_is_not_starved_for_it(self, spec):
        most = memory.GPU_MICRO_TOKENS // 16
        assert {self.size(spec, most << k, compiled=True, on="cuda") for k in (1, 2, 3)} == {most}
        assert self.size(spec, 256, compiled=True, on="cuda") == 128, "half of what it has"
        assert self.size(spec, 1 << 12, compiled=True, on="cuda", world_size=8) == 256


class TestMemory:
    """What fits, on devices that are none: attempts pass up to so many sequences."""

    def fit(self, wanted: int, kept: int, recomputed: int = 0, others: int = 1 << 30, length=2048):
        tried = []

        def attempt(micro: int, recompute: bool) -> bool:
            tried.append((micro, recompute))
            return micro <= (recomputed if recompute else kept)

        # The other worker has room for as many as `others`, whatever is tried.
        found = memory.fit(wanted, length, attempt,
                           lambda fits: int(bool(fits) and tried[-1][0] <= others))  # fmt: skip
        return found, tried

    def test_what_is_wanted_if_it_fits(self):
        assert self.fit(8, kept=9) == (memory.Fit(8, False), [(8, False)])

    def test_halves_until_it_fits(self):
        assert self.fit(32, kept=10)[0] == memory.Fit(8, False)

    def test_workers_agree_on_the_fullest(self):
        assert self.fit(32, kept=32, others=8)[0] == memory.Fit(8, False)

    def test_activations_are_computed_again_where_few_tokens_fit_else(self):
        assert self.fit(8, kept=2, recomputed=8)[0] == memory.Fit(8, True)
        assert self.fit(8, kept=2, recomputed=2)[0] == memory.Fit(2, False)
        assert self.fit(8, kept=4, recomputed=8)[0] == memory.Fit(4, False)

    def test_nothing_fits(self):
        assert self.fit(8, kept=0)[0].micro == 0

    def test_free_memory_is_of_the_share_of_the_card(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 80e9))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5e9)
        device = torch.device("cuda")
        assert memory.free_bytes(device, 1.0) == 60e9
        assert memory.free_bytes(device, 0.25) == 15e9, "weights and moments are taken off"
        assert memory.guess(SHAPE, 15e9) == pytest.approx(memory.guess(SHAPE, 60e9) / 4, rel=0.01)

    @pytest.mark.parametrize("experts", [1, 4])
    def test_a_stand_in_takes_what_one_worker_of_many_does(self, experts):
        """Activations as the whole model's, weights of one layer of a kind."""
        routed = {"experts": 4, "top_k": 2, "expert_ff": 8, "moe_layers": (1, 2, 3)}
        shape = dataclasses.replace(SHAPE, layers=4, **(routed if experts > 1 else {}))
        settings = Architecture(experts=experts, top_k=min(2, experts))
        model = build(shape, settings, rope_base=1e4, seed=0)
        model.dtype = torch.bfloat16
        twin, reserve = memory.stand_in(model, torch.device("cpu"))
        names = {name: p.dtype for name, p in twin.named_parameters()}
        assert len(names) == (11 if experts == 1 else 15)
        assert {n for n, d in names.items() if d is torch.float32} == (
            {"feed_forward.1.router.weight"} if experts > 1 else set()
        )
        assert reserve > 0
        assert memory.passes(twin, 2, reserve, torch.device("cpu"))

        def kept(which) -> int:
            """Bytes kept from forward to backward, but for weights: rounded ones, of `model`."""
            storages: dict[int, torch.UntypedStorage] = {}
            weights = {p.untyped_storage().data_ptr() for p in which.parameters()}

            def note(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    storages[storage.data_ptr()] = storage
                return tensor

            tokens = torch.zeros(2, 8, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = which(tokens, tokens).objective
            rounded = sum(2 * p.numel() for p in which.parameters() if p.dtype is torch.float32)
            assert loss.isfinite()
            return sum(s.nbytes() for s in storages.values()) - rounded

        assert kept(twin) == pytest.approx(kept(model), rel=0.1)


@pytest.mark.parametrize(
    ("error", "is_lack"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `create`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("NCCL error: ... Cuda failure 2 'out of memory'"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("could not create a primitive"), True),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_lack_of_memory_is_known_by_its_errors(error, is_lack):
    assert runtime.is_out_of_memory(error) == is_lack


def test_calibration_keeps_to_the_gpus_that_the_user_chose(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert calibrate._gpu(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8932f937")
    assert [calibrate._gpu(k) for k in range(2)] == ["3", "GPU-8932f937"]


@pytest.mark.slow
def test_what_is_timed_is_a_step_and_not_its_compilation(monkeypatch):
    """A compiler that takes half a second a graph; what it makes runs at once."""

    def slow(graph, example):
        time.sleep(0.5)
        return aot_eager(graph, example)

    study = Study.from_dict(
        {
            "study": "timed",
            "model": {"sequence_length": 16},
            "scales": [{"d_model": 16, "layers": 1, "heads": 1}],
            "horizons": [{"tokens": 1e6}],
            "recipe": {"compile": "on"},
        }
    )
    monkeypatch.setattr(compiled, "BACKEND", slow)
    compiled.forget()
    seconds, _ = calibrate._step(study, study.cells[0], 4)
    assert compiled._compiled, "as the cell's own trials are"
    assert seconds < 0.2
    compiled.forget()


def test_processors_where_the_system_says_nothing_of_affinity(monkeypatch):
    assert 1 <= calibrate._processors() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert calibrate._processors() == os.cpu_count()
