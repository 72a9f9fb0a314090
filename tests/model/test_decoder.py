"""The decoder: exact counts, causality, weights from the seed alone, and its plain operations."""

import math

import pytest
import torch
import torch.nn.functional as F

from raysweep.model import Parametrization, build, functional
from raysweep.model.transformer import Decoder
from raysweep.study import Architecture, Study
from raysweep.study.shape import ModelShape, count


def shape(**changes) -> ModelShape:
    given = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 4, "d_ff": 24, "vocab_size": 50}
    return ModelShape(**{**given, "sequence_length": 16, **changes})


MOE = {"experts": 4, "top_k": 2, "expert_ff": 16, "moe_layers": (1,)}


@pytest.mark.parametrize(
    "space", ["laptop", "smoke", "dense", "moe", "wang2024", "yun2024"], ids=lambda s: s
)
def test_counts_equal_every_shipped_model(repo, space):
    study = Study.load(repo / "search_spaces" / f"{space}.yaml")
    for cell in study.cells:
        with torch.device("meta"):
            model = Decoder(cell.shape, cell.settings, rope_base=1e4, z_loss=0.0)
        total = sum(p.numel() for p in model.parameters())
        ends = {id(p) for p in (model.embedding, model.head) if p is not None}
        inner = sum(p.numel() for p in model.parameters() if id(p) not in ends)
        assert total == cell.counts.params_total, cell.name
        assert inner == cell.counts.params_total_non_embedding, cell.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "qk_norm": False},
        {"tie_embeddings": True},
        MOE | {"shared_experts": 2},
    ],
    ids=["plain", "gqa", "tied", "shared experts"],
)
def test_counts_equal_odd_shapes(changes):
    odd = shape(**changes)
    settings = Architecture(experts=odd.experts, top_k=odd.top_k, shared_experts=odd.shared_experts)
    model = build(odd, settings, rope_base=1e4, seed=0)
    assert sum(p.numel() for p in model.parameters()) == count(odd).params_total


def test_active_parameters_are_those_a_token_passes():
    moe = shape(**MOE, shared_experts=1)
    model = build(moe, Architecture(experts=4, top_k=2, shared_experts=1), rope_base=1e4, seed=0)
    tokens = torch.randint(0, 50, (1, 16))
    # One token: its experts alone get a gradient.
    losses = model(tokens[:, :1], tokens[:, 1:2])
    losses.objective.backward()
    gradient = model.get_parameter("feed_forward.1.gate_up").grad
    assert gradient is not None
    used = [bool(expert.abs().sum() > 0) for expert in gradient]
    assert sum(used) == moe.top_k
    idle = (moe.experts - sum(used)) * 3 * moe.d_model * moe.expert_ff
    assert count(moe).params_total - idle == count(moe).params_active


def test_future_tokens_change_nothing():
    model = build(
        shape(**MOE, sequence_length=40), Architecture(experts=4, top_k=2), rope_base=1e4, seed=0
    )
    tokens = torch.randint(0, 50, (2, 40))
    other = tokens.clone()
    other[:, 25:] = (other[:, 25:] + 7) % 50
    before, _ = model._stack(tokens)
    after, _ = model._stack(other)
    torch.testing.assert_close(before[:, :25], after[:, :25])
    assert (before[:, 25:] - after[:, 25:]).abs().max() > 0.1


def test_weights_come_from_the_seed_alone():
    def weights(seed):
        return torch.nn.utils.parameters_to_vector(
            build(shape(), Architecture(), rope_base=1e4, seed=seed).parameters()
        )

    torch.manual_seed(1)
    first = weights(3)
    torch.manual_seed(2)
    torch.randn(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_initial_scale():
    wide = shape(d_model=256, d_ff=640, heads=8, kv_heads=8)
    model = build(wide, Architecture(), rope_base=1e4, seed=0)
    fixed = build(
        wide, Architecture(), rope_base=1e4, parametrization=Parametrization(wide, 0.02), seed=0
    )
    for name, expected in (
        ("embedding", 1.0),
        ("attention.0.qkv", 1 / 16),
        ("feed_forward.0.down", 640**-0.5 / 2),
    ):
        assert model.get_parameter(name).std().item() == pytest.approx(expected, rel=0.05)
    assert fixed.get_parameter("attention.0.qkv").std().item() == pytest.approx(0.02, rel=0.05)


def test_evaluation_gives_sequences_and_agrees_with_training():
    model = build(shape(**MOE), Architecture(experts=4, top_k=2), rope_base=1e4, seed=0)
    tokens = torch.randint(0, 50, (6, 17))
    losses, stats = model.evaluate(tokens[:, :-1], tokens[:, 1:])
    assert losses.shape == (6,)
    one, _ = model.evaluate(tokens[2:3, :-1], tokens[2:3, 1:])
    torch.testing.assert_close(losses[2:3], one)
    trained = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(trained.cross_entropy, losses.mean())
    assert trained.objective > trained.cross_entropy
    assert stats is not None
    assert stats.load.sum() == 6 * 16 * 2


class TestPlainOperations:
    """Against PyTorch's own, or a formula written out."""

    def test_rms_norm(self):
        x, gain = torch.randn(3, 5, 8), torch.randn(8)
        expected = F.rms_norm(x, (8,), gain, functional.NORM_EPS)
        torch.testing.assert_close(functional.rms_norm(x, gain), expected)

    def test_rope_depends_on_distance_only(self):
        table = functional.rope_table(32, 8, 100.0)
        q, k = torch.randn(2, 8, dtype=torch.float64)
        turned_q = functional.apply_rope(q.expand(1, 32, 1, 8), table)[0, :, 0]
        turned_k = functional.apply_rope(k.expand(1, 32, 1, 8), table)[0, :, 0]
        scores = turned_q @ turned_k.t()
        torch.testing.assert_close(scores[5, 2], scores[20, 17])
        torch.testing.assert_close(scores[3, 3], q @ k)
        angle = 7 * 100.0 ** (-2 / 8)  # second pair, seventh position
        assert table[7, 1, 0].item() == pytest.approx(math.cos(angle))

    def test_attention(self):
        q, k, v = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 2, 6)
        out = functional.attention(q, k, v).view(2, 5, 4, 6)
        for head in range(4):
            scores = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / math.sqrt(6)
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            expected = scores.softmax(-1) @ v[:, :, head // 2]
            torch.testing.assert_close(out[:, :, head], expected)

    @pytest.mark.parametrize("compile", [False, True])
    def test_head_loss(self, compile):
        """Compiled, it picks targets in another way."""
        head_loss = functional.head_loss
        if compile:
            head_loss = torch.compile(head_loss, backend="aot_eager", dynamic=False)
        x, head, gain = torch.randn(2, 3, 8), torch.randn(8, 11), torch.rand(8)
        head.requires_grad_()
        targets = torch.randint(0, 11, (2, 3))
        objective, losses = head_loss(x, gain, head, targets, 0.5)
        logits = functional.rms_norm(x, gain) @ head
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(losses.flatten(), expected)
        z_loss = 0.5 * logits.logsumexp(-1).square().mean()
        torch.testing.assert_close(objective, expected.mean() + z_loss)
        (ours,) = torch.autograd.grad(objective, head)
        torch.testing.assert_close(ours, torch.autograd.grad(expected.mean() + z_loss, head)[0])
