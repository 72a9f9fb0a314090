"""Models shared by workers in mixed precision: what is gathered and kept, and the same results."""

import pytest
import torch
from workers import run_workers

from raysweep.errors import UserError
from raysweep.model import build, initial
from raysweep.training.loop import train
from raysweep.training.parallel import Workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(of_two, tmp_path_factory):
    """By the number of workers: two share a model; four hold it twice, two a node."""
    four = run_workers("sharded.py", tmp_path_factory.mktemp("four"), world_size=4)
    return {2: of_two[0]["sharded"], 4: four[0]}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_agree_with_one_worker(outcomes, corpus, spec, world_size, architecture, precision):
    one = train(spec(architecture, tokens=16 * 8 * 12, recipe={"precision": precision}), corpus)
    shared = outcomes[world_size][architecture, precision]
    near = 1e-5 if precision == "float32" else 2e-3
    assert shared.loss == pytest.approx(one.loss, rel=near)
    assert shared.curve["grad_norm"] == pytest.approx(
        one.curve["grad_norm"], rel=1e-3 if precision == "float32" else 0.1
    )
    assert shared.noise_trace == pytest.approx(one.noise_trace, rel=0.6)


@pytest.mark.parametrize("architecture", ["dense", "moe"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_are_gathered_in_bfloat16_and_let_go_of(outcomes, world_size, architecture):
    found = outcomes[world_size][architecture, "traffic"]
    assert found["kept"] <= 0.05
    for phase in ("forward", "backward"):
        assert found[phase]["bfloat16"] == pytest.approx(2.0, abs=0.05)
        router = found[phase].get("float32", 0.0)
        assert (router == 0) == (architecture == "dense")
        assert router < 0.05
    assert set(found["reduced"]) == {"float32"}
    assert found["reduced"]["float32"] == pytest.approx(4.0, abs=0.05)


def test_nodes_of_unequal_size_are_refused(monkeypatch):
    def gathered(everywhere, here):
        everywhere[:] = [4, 4, 4, 4, 2, 2]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    with pytest.raises(UserError, match="equally many workers on each node"):
        Workers.of_process_group("hsdp")


def test_a_part_of_a_parameter_is_drawn_alone(spec, monkeypatch):
    """Any stretch of a parameter, from any chunk on, is as in the whole."""
    monkeypatch.setattr(initial, "CHUNK", 50)
    cell = spec().cell
    model = build(cell.shape, cell.settings, rope_base=1e4, seed=3, threads=2)
    monkeypatch.setattr(initial, "local_part", lambda p: (p.detach().view(-1)[70:133], 70))
    part = build(cell.shape, cell.settings, rope_base=1e4, seed=3)
    for name, whole in model.named_parameters():
        if whole.ndim > 1:
            drawn = part.get_parameter(name).view(-1)[70:133]
            assert torch.equal(drawn, whole.view(-1)[70:133])
