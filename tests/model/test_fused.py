"""The hand-written functions for CPUs: values and gradients equal the plain code's."""

import pytest
import torch

from raysweep.model import (
    build,
    functional,
    fused,
    fused_attention,
    fused_experts,
    moe,
)
from raysweep.study import Architecture
from raysweep.study.shape import ModelShape

DENSE = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 4, "d_ff": 24, "vocab_size": 20}
EXPERTS = {"experts": 4, "top_k": 2, "expert_ff": 16, "moe_layers": (1,)}
CASES = {
    "plain": {},
    "grouped queries": {"kv_heads": 2},
    "no QK-norm": {"qk_norm": False},
    "tied": {"tie_embeddings": True},
    "heads of 16, cut in blocks": {"heads": 2, "kv_heads": 1, "sequence_length": 200},
    "heads of 8, cut in blocks": {"sequence_length": 170},
    "experts": EXPERTS,
    "one expert a token": EXPERTS | {"top_k": 1, "moe_layers": (0, 1)},
    "shared experts": EXPERTS | {"shared_experts": 2},
    "many experts, some idle": EXPERTS | {"experts": 64, "top_k": 3},
}


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c)
def test_model_equals_plain_code(monkeypatch, case, z_loss):
    shape = ModelShape(**{**DENSE, "sequence_length": 9, **CASES[case]})
    settings = Architecture(
        experts=shape.experts, top_k=shape.top_k, shared_experts=shape.shared_experts
    )
    model = build(shape, settings, rope_base=1e4, z_loss=z_loss, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gain in (p for p in model.parameters() if p.ndim == 1):
            gain.copy_(torch.rand(gain.shape, generator=generator) + 0.5)
    tokens = torch.randint(0, 20, (5, shape.sequence_length + 1), generator=generator)

    def run():
        losses = model(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(losses.objective, list(model.parameters()))
        return losses, gradients, model.evaluate(tokens[:, :-1], tokens[:, 1:])[0]

    assert fused.usable(model.embedding)
    quick, quick_gradients, quick_losses = run()
    loads = model.expert_load.clone()
    monkeypatch.setattr(fused, "usable", lambda x: False)
    plain, plain_gradients, plain_losses = run()
    torch.testing.assert_close(quick, plain)
    torch.testing.assert_close(quick_losses, plain_losses)
    assert torch.equal(2 * loads, model.expert_load)
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, quick_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class TestFiniteDifferences:
    """Gradients against the function itself."""

    def test_attention_block(self):
        rope = functional.rope_table(5, 4, 100.0)
        arguments = double(2, 5, 8), double(8), double(8, 16), double(4), double(4), double(8, 8)

        def block(x, norm, qkv, q_norm, k_norm, out):
            return fused_attention.attention_block(x, norm, qkv, q_norm, k_norm, out, rope, 1)

        assert torch.autograd.gradcheck(block, arguments)

    def test_feed_forward_block(self):
        arguments = double(2, 3, 6), double(6), double(6, 10), double(5, 6)
        assert torch.autograd.gradcheck(fused.feed_forward_block, arguments)

    def test_head_loss(self):
        targets = torch.randint(0, 7, (2, 3))

        def loss(x, norm, head):
            return fused.head_loss(x, norm, head, targets, 0.3)[0]

        assert torch.autograd.gradcheck(loss, (double(2, 3, 6), double(6), double(6, 7)))

    def test_rms_norm(self):
        assert torch.autograd.gradcheck(fused.rms_norm, (double(2, 3, 6), double(6)))

    def test_mix(self):
        experts = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])

        def mix(x, weights, gate_up, down):
            routing = moe.Routing(experts, weights, weights, weights.sum())
            return fused_experts.mix(x, gate_up, down, routing)[0]

        arguments = double(4, 6), double(4, 2), double(3, 6, 10), double(3, 5, 6)
        assert torch.autograd.gradcheck(mix, arguments)


@pytest.mark.parametrize("rows", [64, 4096])
def test_matmul_below_and_above_the_threshold(rows):
    x, w, y = torch.randn(rows, 32), torch.randn(32, 48), torch.randn(rows, 48)
    torch.testing.assert_close(fused.matmul(x, w), x @ w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.matmul_of_transposed(x, y), x.t() @ y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fused.matmul_of_transposed(y, x), y.t() @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [40, 4000], ids=["all at once", "one by one"])
def test_experts_in_float32_one_of_them_idle(tokens):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weights, pull = normal(tokens, 64), torch.rand(tokens, 2), normal(tokens, 64)
    gate_up, down = normal(4, 64, 2 * 48) / 8, normal(4, 48, 64) / 8
    experts = torch.rand(tokens, 3, generator=generator).topk(2).indices + 1
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    found = []
    for mix in (moe.mix, fused_experts.mix):
        y, loads = mix(x, gate_up, down, moe.Routing(experts, weights, x, x.sum()))
        found.append((y, *torch.autograd.grad((y * pull).sum(), leaves)))
        assert loads.tolist()[0] == 0
        assert loads.sum() == 2 * tokens
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-3)


def test_a_hopeless_token_has_a_finite_loss():
    x = torch.full((1, 1, 2), 1.0)
    head = torch.tensor([[500.0, -500.0], [0.0, 0.0]])
    _, losses = fused.head_loss(x, torch.ones(2), head, torch.tensor([[1]]), 0.0)
    assert 80 < losses.item() < 1000
