"""A small cluster by discrete events: the figures that judge every change of the scheduling."""

import optuna
import pytest

from benchmarks.simulation import Simulation, make_study


@pytest.mark.parametrize("losses", [0.0, 0.1])
def test_a_small_study_ends_and_is_summed_up(losses: float) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = make_study("random", cells=8, per_cell=4)
    simulation = Simulation(study, nodes=16, losses=losses, checkpoint_seconds=600, seed=0)
    simulation.run()
    figures = simulation.figures()
    assert figures["trials"] == 32
    assert figures["over its bound"] >= 1
    assert 0.3 < figures["busy"] <= 1
    assert figures["fewest nodes"] == {4: 1.0, 64: 1.0}
    assert (figures["nodes lost"] > 0) == (losses > 0)
    assert figures["work done twice"] <= (0.1 if losses else 0.0)
