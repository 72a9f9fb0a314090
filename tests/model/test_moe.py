"""Routing, dispatch and balance of experts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raysweep.model import build, functional, moe
from raysweep.study import Architecture
from raysweep.study.shape import ModelShape

UNIFORM = torch.full((4,), 0.25)
NO_BIAS = torch.zeros(4)
LOGITS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def route(logits=LOGITS, top_k=2, share=UNIFORM, bias=NO_BIAS, **settings) -> moe.Routing:
    return moe.route(logits, top_k, share, bias, Architecture(experts=4, top_k=top_k, **settings))


def test_best_experts_with_weights_that_sum_to_one():
    routing = route()
    torch.testing.assert_close(routing.weights_NK.sum(1), torch.ones(64))
    torch.testing.assert_close(routing.experts_NK, LOGITS.topk(2).indices)
    ratio = (LOGITS.gather(1, routing.experts_NK)).diff(dim=1).exp().squeeze(1)
    torch.testing.assert_close(routing.weights_NK[:, 1] / routing.weights_NK[:, 0], ratio)


def test_route_scale_multiplies_the_weights_and_nothing_else():
    for scores in ("softmax", "sigmoid"):
        plain, scaled = route(scores=scores), route(scores=scores, route_scale=2.5)
        torch.testing.assert_close(scaled.weights_NK, 2.5 * plain.weights_NK)
        assert torch.equal(scaled.confidence(), plain.confidence())
        assert scaled.loss == plain.loss


def test_one_expert_keeps_its_probability_so_that_the_router_learns():
    routing = route(top_k=1)
    torch.testing.assert_close(routing.weights_NK[:, 0], LOGITS.softmax(1).amax(1))


def test_balance_loss_is_its_weight_when_even_and_more_when_not():
    even = route(torch.zeros(8, 4), balance_loss=0.5, router_z_loss=0.0)
    assert even.loss.item() == pytest.approx(0.5)
    lopsided = torch.tensor([[9.0, 0, 0, 0]]).expand(8, 4)
    share = torch.tensor([1.0, 0, 0, 0])
    routing = route(lopsided, share=share, balance_loss=0.5, router_z_loss=0.0)
    assert routing.loss.item() == pytest.approx(0.5 * 4, rel=0.01)


def test_balance_loss_lowers_the_logits_of_busy_experts():
    logits = torch.zeros(8, 4, requires_grad=True)
    share = torch.tensor([0.7, 0.1, 0.1, 0.1])
    route(logits, share=share, router_z_loss=0.0).loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_router_z_loss():
    routing = route(balance="none", router_z_loss=0.1)
    assert routing.loss.item() == pytest.approx(0.1 * LOGITS.logsumexp(1).square().mean().item())


def test_bias_changes_the_choice_but_not_the_weights():
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    routing = route(bias=bias, balance="bias", router_z_loss=0.0)
    assert (routing.experts_NK == 3).any(1).all()
    chosen = LOGITS.softmax(1).gather(1, routing.experts_NK)
    torch.testing.assert_close(routing.weights_NK, chosen / chosen.sum(1, keepdim=True))
    assert routing.loss == 0


def test_grouped_kernel_equals_the_loop():
    x, weight = torch.randn(24, 16).bfloat16(), torch.randn(4, 16, 32).bfloat16()
    ends = torch.tensor([5, 5, 20, 24], dtype=torch.int32)
    expected = moe.expert_loop(x, weight, ends)
    torch.testing.assert_close(F.grouped_mm(x, weight, offs=ends), expected, rtol=0.02, atol=0.1)
    torch.testing.assert_close(moe.grouped_matmul(x, weight, ends), expected)


def test_no_token_is_dropped():
    routing = route(torch.tensor([[9.0, 8.0, 0, 0]]).expand(64, 4))
    order, ends = moe.dispatch(routing.experts_NK, 4)
    assert moe.loads(ends).tolist() == [64, 64, 0, 0]
    assert sorted(order.tolist()) == list(range(128))


def test_equal_experts_are_one_dense_feed_forward():
    x, gate_up, down = torch.randn(64, 8), torch.randn(8, 16), torch.randn(8, 8)
    y, _ = moe.mix(x, gate_up.expand(4, 8, 16), down.expand(4, 8, 8), route())
    torch.testing.assert_close(y, functional.swiglu(x @ gate_up) @ down, rtol=1e-4, atol=1e-4)


SHAPE = ModelShape(
    d_model=16, layers=1, heads=2, kv_heads=2, d_ff=16, vocab_size=20, sequence_length=8,
    experts=4, top_k=1, expert_ff=8, moe_layers=(0,),
)  # fmt: skip


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_loads_of_a_step_steer_the_next(balance):
    model = build(SHAPE, Architecture(experts=4, balance=balance), rope_base=1e4, seed=0)
    model.expert_load.copy_(torch.tensor([[6.0, 1, 1, 0]]))
    model.finish_step()
    assert model.expert_share.tolist() == [[0.75, 0.125, 0.125, 0]]
    motion = model.expert_bias[0]
    if balance == "bias":
        assert motion[0] < 0 < motion[1] == motion[2] < motion[3]
    else:
        assert not motion.any()
    assert not model.expert_load.any()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_bias_moves_as_far_in_few_large_batches_as_in_many_small_ones(scores):
    def moved(steps: int) -> torch.Tensor:
        settings = Architecture(experts=4, balance="bias", scores=scores)
        model = build(SHAPE, settings, rope_base=1e4, seed=0)
        for _ in range(steps):
            model.expert_load.copy_(torch.tensor([[60.0, 10, 10, 0]]) / steps)
            model.finish_step()
        return model.expert_bias

    torch.testing.assert_close(moved(1), moved(16))
    assert moved(1).abs().max() > 1e-3


def test_sigmoid_scores_are_each_experts_own():
    routing = route(scores="sigmoid", balance="bias", bias=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert (routing.experts_NK == 3).any(1).all()
    chosen = LOGITS.sigmoid().gather(1, routing.experts_NK)
    torch.testing.assert_close(routing.weights_NK, chosen / chosen.sum(1, keepdim=True))
    torch.testing.assert_close(routing.probs_NE.sum(1), torch.ones(64))
    alone = route(top_k=1, scores="sigmoid")
    torch.testing.assert_close(alone.weights_NK[:, 0], LOGITS.sigmoid().amax(1))


class Accumulates(TorchDispatchMode):
    """Notes operations that add to places by index: on GPUs their order, hence the sum, varies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        adds = name in ("_index_put_impl", "index_put") and (len(args) > 3 and args[3])
        if adds or name in ("scatter_add", "index_add", "scatter_reduce"):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_gather_and_never_scatter(dtype):
    """Against the plain rule: each token through each of its experts, in float64. One is idle."""
    torch.manual_seed(0)
    logits = torch.randn(48, 4)
    logits[:, 2] = -50.0
    x, weights = torch.randn(2, 48, 16)
    gate_up, down = torch.randn(4, 16, 16) / 4, torch.randn(4, 8, 16) / 3
    given = [t.to(dtype).detach().requires_grad_() for t in (x, gate_up, down)]
    scored = logits.clone().requires_grad_()
    with Accumulates() as watched:
        routing = route(scored, balance="none", router_z_loss=0.0)
        y, load = moe.mix(given[0], given[1], given[2], routing)
        (y.float() * weights).sum().backward()
    assert watched.seen == set()
    assert load[2] == 0

    exact = [t.detach().double().requires_grad_() for t in given]
    exact_logits = logits.double().requires_grad_()
    chosen = route(exact_logits, balance="none", router_z_loss=0.0)
    total = torch.zeros(48, 16, dtype=torch.float64)
    for k in range(2):
        for expert in range(4):
            rows = (chosen.experts_NK[:, k] == expert).nonzero()[:, 0]
            hidden = functional.swiglu(exact[0][rows] @ exact[1][expert]) @ exact[2][expert]
            total = total.index_add(0, rows, hidden * chosen.weights_NK[rows, k, None])
    (total * weights).sum().backward()
    atol = 0.1 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(y.double(), total, rtol=0.03, atol=atol)
    for ours, true in zip((*given, scored), (*exact, exact_logits), strict=True):
        assert ours.grad is not None
        assert true.grad is not None
        error = (ours.grad.double() - true.grad).norm() / true.grad.norm()
        assert error < (0.02 if dtype is torch.bfloat16 else 1e-5)


def test_garbage_for_idle_experts_becomes_zero():
    weight = torch.randn(3, 2, 2, requires_grad=True)
    kept = moe._OfBusyExperts.apply(weight, torch.tensor([5, 0, 1]))
    kept.backward(torch.full((3, 2, 2), math.nan))
    assert weight.grad is not None
    assert weight.grad[1].tolist() == [[0, 0], [0, 0]]
    assert weight.grad[::2].isnan().all()
