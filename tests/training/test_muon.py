"""Muon against a float64 SVD and PyTorch's own; on workers that share a model in test_recipes."""

import math

import pytest
import torch

from raysweep.model import build
from raysweep.training import muon
from raysweep.training.groups import groups_of
from raysweep.training.muon import Muon, cuts_of, newton_schulz
from raysweep.training.optimizer import FlatParameters, Optimizers


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (1, 16, 17)])
def test_singular_values_become_the_quintics_and_vectors_stay(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    a, b, c = muon.COEFFICIENTS
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(muon.STEPS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(x), u @ torch.diag_embed(s) @ v)
    assert (s - 1).abs().max() < 0.35
    # In float32 as it trains, the polar factor within what the quintic leaves of it.
    near = newton_schulz(x.float()).double()
    assert torch.linalg.matrix_norm(near - u @ v, ord=2).max() < 0.36


def test_an_expert_without_a_gradient_does_not_move():
    x = torch.randn(3, 4, 8)
    x[1] = 0
    done = newton_schulz(x)
    assert not done[1].any()
    torch.testing.assert_close(done[:1], newton_schulz(x[:1]))


def test_the_same_steps_as_pytorchs():
    """Which computes in bfloat16, a matrix at a time: ours in bfloat16 as well."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in ((12, 30), (30, 12), (12, 12), (12, 30))]
    ours, theirs = ([t.clone().requires_grad_() for t in start] for _ in "ab")
    own = Muon(
        [{"params": ours, "lr": 0.1, "weight_decay": 0.3}],
        momentum=0.9, cuts={}, dtype=torch.bfloat16,
    )  # fmt: skip
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        own.step()
        reference.step()
    for a, b, begun in zip(ours, theirs, start, strict=True):
        moved = (b - begun).norm()
        assert (a - b).norm() < 0.02 * moved
        assert moved > 0.1


def test_what_lies_side_by_side_is_orthogonalised_apart_and_experts_each(spec):
    trial = spec(
        "moe", moe={"shared_experts": 1, "first_dense": 1}, scale={"kv_heads": 1, "d_ff": 24},
        recipe={"optimizer": "muon", "weight_decay": 0.0},
    )  # fmt: skip
    shape = trial.cell.shape
    model = build(shape, trial.cell.settings, rope_base=1e4, seed=0)
    named = dict(model.named_parameters())
    flat = FlatParameters(model, groups_of(trial))
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = Optimizers(flat, trial.recipe, 64, cuts=cuts_of(model))
    for gradient in flat.gradients():
        gradient.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step(0.01)
    head = shape.head_dim
    parts = {
        "attention.0.qkv": [16, head, head],
        "attention.0.out": [16],
        "feed_forward.0.gate_up": [24, 24],
        "feed_forward.1.gate_up": [shape.expert_ff] * 2,
        "feed_forward.1.down": [16],
        "feed_forward.1.shared_gate_up": [shape.expert_ff] * 2,
    }
    for name, widths in parts.items():
        assert sum(widths) == named[name].shape[-1]
        for part in (named[name] - before[name]).split(widths, -1):
            unit = part / (0.01 * muon.RMS * math.sqrt(max(part.shape[-2:])))
            values = torch.linalg.svdvals(unit)
            assert ((values - 1).abs() < 0.35).all(), name
    # The rest is AdamW's: a first step of the learning rate, whatever the gradient.
    for name in ("embedding", "head", "norm", "feed_forward.1.router.weight"):
        moved = (named[name] - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-6)
