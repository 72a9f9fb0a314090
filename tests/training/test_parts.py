"""The loop's parts: schedules, the optimizer's buffers, monitor, micro-batches."""

import math
import os

import pytest
import torch

from raysweep.model import build
from raysweep.study import Architecture, Recipe, Resources
from raysweep.study.shape import ModelShape
from raysweep.training import calibrate, optimizer, runtime, schedule
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

    def test_constant(self):
        assert self.rate(999, schedule="constant") == 2.0

    def test_fixed_final_rate_never_exceeds_the_peak(self):
        assert self.rate(1000, final_lr=0.01) == pytest.approx(0.01)
        assert self.rate(600, final_lr=5.0) == 2.0

    def test_all_warm_up(self):
        assert self.rate(1000, warmup_fraction=1.0) == pytest.approx(2.0)

    @pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
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
    def test_same_steps_as_one_tensor_a_parameter(self):
        recipe = Recipe(weight_decay=0.1)
        flat_model, model = (build(SHAPE, Architecture(), rope_base=1e4, seed=0) for _ in "ab")
        flat = optimizer.FlatParameters(flat_model)
        steps = optimizer.build_optimizer(flat, recipe, 64)
        plain = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            foreach=False,
        )
        tokens = torch.randint(0, 20, (4, 9))
        for rate in (0.01, 0.02, 0.005):
            for one, opt in ((flat_model, steps), (model, plain)):
                opt.zero_grad() if opt is plain else flat.zero()
                one(tokens[:, :-1], tokens[:, 1:]).objective.backward()
                for group in opt.param_groups:
                    group["lr"] = rate
                opt.step()
        for a, b in zip(flat_model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_clipping(self):
        model = build(SHAPE, Architecture(), rope_base=1e4, seed=0)
        flat = optimizer.FlatParameters(model)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(2.0)
        count = sum(p.numel() for p in model.parameters())
        norm = optimizer.squared_norm(flat.gradients()).sqrt()
        assert norm.item() == pytest.approx(2 * math.sqrt(count))
        optimizer.clip(flat.gradients(), norm, 100.0)  # below the limit: nothing happens
        assert model.embedding.grad is not None
        assert model.embedding.grad[0, 0] == 2.0
        optimizer.clip(flat.gradients(), norm, 1.0)
        assert optimizer.squared_norm(flat.gradients()).item() == pytest.approx(1.0, rel=1e-4)

    def test_norms_of_more_elements_than_one_dot_product_takes(self, monkeypatch):
        gradient = torch.randn(1000)
        whole = optimizer.squared_norm([gradient])
        monkeypatch.setattr(optimizer, "LONGEST_DOT", 300)
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
    def size(self, local: int, **resources) -> int:
        return runtime.micro_batch(SHAPE, Resources(**resources), torch.device("cpu"), local)

    def test_whole_batch_if_it_fits(self):
        assert self.size(8) == 8

    def test_limited_to_what_pays_on_a_cpu(self):
        assert self.size(1 << 20) == runtime.CPU_MICRO_TOKENS // 8

    def test_given_limit_is_rounded_down_to_a_power_of_two(self):
        assert self.size(64, micro_batch_sequences=7) == 4

    def test_odd_batches_are_cut_evenly(self):
        assert self.size(9, micro_batch_sequences=4) == 3


@pytest.mark.parametrize(
    ("error", "is_lack"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `create`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
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


def test_processors_where_the_system_says_nothing_of_affinity(monkeypatch):
    assert 1 <= calibrate._processors() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert calibrate._processors() == os.cpu_count()
