"""How far a study is, as `status` counts it from the rows alone."""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysweep.results import Results
from raysweep.results.progress import progress, render, status
from raysweep.results.schema import make_row
from raysweep.study import Study

SMOKE = Path(__file__).resolve().parents[2] / "search_spaces/smoke.yaml"


def test_status_of_results_without_ray(tmp_path: Path) -> None:
    store = Results.open(tmp_path / "r", create=True)
    store.save_search_space("smoke", SMOKE.read_text())
    cell = Study.load(SMOKE).cells[0]
    for second, (outcome, loss) in enumerate(
        [("finished", 2.5), ("diverged", None), ("finished", 2.0)], start=5
    ):
        row = make_row(
            trial_key=f"k{second}",
            study="smoke",
            cell=cell.name,
            architecture=cell.architecture,
            architecture_kind="dense",
            scale=cell.scale,
            source="raysweep",
            experts=1,
            top_k=1,
            params_active_non_embedding=1.0,
            tokens=1.0,
            gpu_hours=second / 2,
            mfu=0.1 * second if loss else None,
            status=outcome,
            loss=loss,
            started_at=dt.datetime(2026, 1, 2, 3, 4, second, tzinfo=dt.UTC),
        )
        store.write(row)
    cells = progress(str(tmp_path / "r"))
    assert [c.cell for c in cells] == [c.name for c in Study.load(SMOKE).cells]
    assert cells[0].statuses == {"finished": 2, "diverged": 1}
    assert (cells[0].wanted, cells[0].best_loss) == (2, 2.0)
    assert cells[0].last == "2026-01-02 03:04:07"
    assert (cells[1].statuses, cells[1].best_loss, cells[1].last) == ({}, None, None)
    mfu = (5 * 0.5 + 7 * 0.7) / (5 + 7)
    assert (cells[0].gpu_hours, cells[0].mfu) == (9.0, pytest.approx(mfu))
    _, totals = status(str(tmp_path / "r"))
    assert totals == {"smoke": {"gpu_hours": 9.0, "cost": None, "mfu": pytest.approx(mfu)}}
    assert render(cells, totals).endswith("\nsmoke: 9 GPU-hours so far, MFU 62%")
    text = render(cells)
    assert "1 diverged" in text
    assert text.endswith("smoke: 1 of 4 cells complete, 3 trials concluded")
    now = {"at": "2026-01-02T03:05:00+00:00", "gpu_hours": 3.0, "gpu_hours_to_come": 5.0}
    now |= {"cost": 7.5, "cost_to_come": 12.5, "seconds_left": 7200.0, "gpu_use": 0.5}
    now["cells"] = {cell.name: {"running": 1}}
    store.save_running("smoke", {"trials": [{"trial_key": "k9"}], "now": now})
    cells = progress(str(tmp_path / "r"))
    assert [c.running for c in cells] == [1, None, None, None]
    assert render(*status(str(tmp_path / "r"))).splitlines()[-1] == (
        "smoke: 1 running, about 2h 00m left, 50% of the GPUs in use, 3 GPU-hours for 7.50 so far, "
        "5 GPU-hours for 12.50 to come, MFU 62% (at 2026-01-02T03:05:00+00:00)"
    )
    store.save_running("smoke", {"trials": [{"trial_key": "k9"}], "now": now | {"ended": True}})
    text = render(*status(str(tmp_path / "r")))
    assert "smoke: 1 trials in flight wait for the next run, 3 GPU-hours for 7.50 so far" in text
    code = (
        "import sys; from raysweep.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path / "r"), "--json"],
        capture_output=True,
        text=True,
        cwd=SMOKE.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"][0]["best_loss"] == 2.0
