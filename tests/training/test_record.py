"""What a trial took, in its row: of all GPUs that it had, and only of those."""

import dataclasses

import pytest

from raysweep.training.loop import train
from raysweep.training.record import outcome_columns

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(("workers", "share"), [(1, 0.25), (1, 1.0), (8, 1.0)])
def test_gpu_hours_and_mfu(corpus, spec, workers, share):
    outcome = dataclasses.replace(
        train(spec(tokens=16 * 8 * 4), corpus),
        device=H100,
        world_size=workers,
        seconds_train=3600.0,
    )
    trial = spec(resources={"gpus_per_worker": share, "workers": workers}, batch_sequences=8)
    columns = outcome_columns(trial, outcome, train_tokens=None)
    flops = trial.cell.counts.flops_per_token * outcome.tokens_per_second
    assert columns["gpu_hours"] == pytest.approx(workers * share)
    assert columns["mfu"] == pytest.approx(flops / (989e12 * workers * share))
