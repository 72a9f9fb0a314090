"""muP and CompleteP: coordinate checks, the base shape, and multipliers taken into weights."""

import pytest
import torch

from raysweep.model import Parametrization, build, functional
from raysweep.training.groups import groups_of
from raysweep.training.learner import Learner
from raysweep.training.loop import train
from raysweep.training.parallel import Workers

BASE = {"base_d_model": 32, "base_layers": 2}


def moved(spec, corpus, width: int, layers: int = 2, architecture: str = "dense", **recipe):
    """Root mean squares of what three steps change: the residual stream before the head, and logits
    by the head's own change."""
    if recipe["parametrization"] != "standard":
        recipe |= BASE
    trial = spec(
        architecture,
        scale={"d_model": width, "layers": layers, "heads": width // 16},
        recipe={"weight_decay": 0.0, "noise_scale": False, **recipe},
        learning_rate=0.003,
    )
    learner = Learner(trial, corpus, torch.device("cpu"), Workers())
    learner.build()
    model = learner.model
    assert model.head is not None
    tokens = torch.from_numpy(corpus.validation[: 8 * 16].astype("int64")).view(8, 16)

    def stream() -> torch.Tensor:
        with torch.no_grad():
            return model._stack(tokens)[0]

    before, head = stream(), model.head.detach().clone()
    for step in range(3):
        learner.learn(step, 0.003, want_trace=False)
    after = stream()
    logits = functional.rms_norm(after, model.norm) @ (model.head - head)
    return torch.stack([(after - before).square().mean().sqrt(), logits.square().mean().sqrt()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "architecture", "widest"),
    [("adamw", "dense", 512), ("adamw", "moe", 512), ("muon", "dense", 256)],
)
def test_coordinate_check_over_the_width(spec, corpus, optimizer, architecture, widest):
    def ratio(parametrization: str) -> torch.Tensor:
        narrow, wide = (
            moved(spec, corpus, width, architecture=architecture,
                  optimizer=optimizer, parametrization=parametrization)
            for width in (32, widest)
        )  # fmt: skip
        return wide / narrow

    stream, logits = ratio("mup")
    assert 1 / 1.2 < stream < 1.2
    assert 1 / 1.8 < logits < 1.2, "they fall towards their limit as 1 / sqrt(width)"
    assert (ratio("standard") > 2).all()


def test_coordinate_check_over_16_times_the_depth(spec, corpus):
    """In the base's units of a deep model's change, CompleteP's is flat, muP's grows."""

    def ratio(parametrization: str) -> float:
        shallow, deep = (
            moved(spec, corpus, 32, layers, parametrization=parametrization)[0]
            for layers in (2, 32)
        )
        return (deep / shallow).item()

    assert 1 / 1.2 < ratio("completep") < 1.2
    assert ratio("mup") > 2


@pytest.mark.parametrize("name", ["mup", "completep"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_base_shape_all_are_the_standard(spec, corpus, name, optimizer):
    def loss(**recipe) -> float | None:
        return train(
            spec("moe", tokens=1280, recipe={"optimizer": optimizer, **recipe}), corpus
        ).loss

    base = {"base_d_model": 16, "base_layers": 2}
    assert loss(parametrization=name, **base) == loss()


@pytest.mark.parametrize(
    ("name", "multiplier", "rate", "eps"),
    [  # of the papers' tables, at twice the width and four times the depth
        ("head", 1 / 2, 1, 1 / 2),
        ("attention.0.out", 1 / 4, 1 / 2, 1 / 8),
        ("feed_forward.0.down", 1 / 4, 1 / 2, 1 / 8),
        ("feed_forward.0.gate_up", 1, 1 / 2, 1 / 8),
        ("embedding", 1, 1, 1 / 2),
    ],
)
def test_a_multiplier_in_the_weights_is_one_of_the_output(spec, name, multiplier, rate, eps):
    """A weight m V with V trained as the papers say, and ours: the same values after each step."""
    recipe = {"parametrization": "completep", "base_d_model": 8, "base_layers": 1, "eps": 0.1,
              "weight_decay_on": ("matrices", "head", "embedding")}  # fmt: skip
    trial = spec(scale={"layers": 4}, recipe=recipe)
    model = build(trial.cell.shape, trial.cell.settings, rope_base=1e4, seed=0)
    group = groups_of(trial)(name, model.get_parameter(name))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)
    papers, ours = values.clone().requires_grad_(), (values * multiplier).requires_grad_()
    decay = trial.recipe.weight_decay / rate
    one = torch.optim.AdamW([papers], lr=0.01 * rate, eps=0.1 * eps, weight_decay=decay)
    other = torch.optim.AdamW(
        [ours], lr=0.01 * group.rate, eps=group.eps, weight_decay=group.weight_decay
    )
    for _ in range(4):
        gradient = torch.randn(5, 3, generator=generator)
        papers.grad, ours.grad = gradient * multiplier, gradient.clone()
        one.step()
        other.step()
        torch.testing.assert_close(papers * multiplier, ours)


def test_initial_weights_are_the_papers(spec):
    recipe = {"parametrization": "completep", "base_d_model": 8, "base_layers": 1, "init_std": 0.1}
    trial = spec(scale={"layers": 4, "d_model": 128}, recipe=recipe)
    shape = trial.cell.shape
    scheme = Parametrization.of(trial.recipe, shape)
    model = build(shape, trial.cell.settings, rope_base=1e4, seed=0, parametrization=scheme)
    for name, expected in (
        ("embedding", 0.1),
        ("head", 0.1 / 16),
        ("attention.0.qkv", 0.1 / 4),
        ("feed_forward.0.down", 0.1 / 4 / 4 / 2**0.5),
    ):
        assert model.get_parameter(name).std().item() == pytest.approx(expected, rel=0.05)
