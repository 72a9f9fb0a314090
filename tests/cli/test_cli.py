"""The command line: light to start, one line for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from raysweep.cli import app, main

REPO = Path(__file__).resolve().parents[2]
SMOKE = str(REPO / "search_spaces/smoke.yaml")
LAPTOP = str(REPO / "reports/examples/laptop/results")
RUN = ["--params", "1M", "--tokens", "20M"]


def raysweep(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raysweep", *args],
        capture_output=True,
        text=True,
        cwd=cwd or REPO,
        timeout=120,
        check=False,
    )


def here(*args: str) -> Result:
    """A command in this process: starting one takes seconds."""
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    return done


HEAVY = """
import sys
from raysweep.cli import main
for command in {commands!r}:
    sys.argv = ["raysweep", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    loaded = {{"torch", "ray", "optuna"}} & set(sys.modules)
    assert not loaded, f"{{command}} loaded {{loaded}}"
"""


def assert_light(*commands: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(commands=commands)],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_light_commands_load_neither_torch_nor_ray() -> None:
    assert_light(["--help"], ["fit", "--help"], ["plan", SMOKE, "--no-calibrate"], ["schema"])


@pytest.mark.slow
def test_fit_recommend_and_report_load_neither_torch_nor_ray(tmp_path: Path, shared_data) -> None:
    uri, page = str(tmp_path / "r"), str(tmp_path / "page")
    table = tmp_path / "sweep.csv"
    lines = (shared_data / "steplaw_dense.csv").read_text().splitlines()
    table.write_text("\n".join(lines[:1] + lines[1::40]))
    assert_light(
        ["import", "steplaw", str(table), "--results", uri],
        ["fit", uri],
        ["recommend", uri, "--params", "1e9", "--tokens", "2e10"],
        ["report", uri, "-o", page],
    )
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000


def test_package_import_is_light() -> None:
    code = (
        "import sys, raysweep; heavy = {'torch', 'ray', 'numpy', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'Study' in dir(raysweep); "
        "from raysweep import Study; assert Study.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=60)


@pytest.mark.slow
def test_plan_prints_every_cell_and_the_same_as_json() -> None:
    text = here("plan", SMOKE)
    plan = json.loads(here("plan", SMOKE, "--json", "--no-calibrate").stdout)
    assert len(plan["cells"]) == 4
    for cell in plan["cells"]:
        assert cell["name"] in text.stdout
    assert f"{plan['trials']} trials" in text.stdout
    assert plan["this_machine"] is None
    assert "on this machine" in text.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["plan", "nope.yaml"], "search-space file nope.yaml not found"),
        (["plan", SMOKE, "--set", "scales=[]"], "scales"),
        (["plan", SMOKE, "--set", "search.learning_rate.low=5"], "must be below high"),
        (["fit", "no-results"], "does not exist"),
        (["fit", SMOKE], "is a search-space file, no results folder"),
        (["fit", "reports/examples/laptop/result"], "did you mean"),
        (["plan", SMOKE, "--set", "n_trials=3"], "--set search.trials_per_cell=3"),
        (["plan", SMOKE, "--set", "lr=0.1"], "did you mean 'learning_rate' in search"),
        (["plan", SMOKE, "--set", "literature=[steplaw]"], "did you mean 'step_law'?"),
        (["fit", LAPTOP, "--without", "kaplen"], "did you mean kaplan?"),
        (["fit", LAPTOP, "--group", "optimiser"], "near: optimizer"),
        (["recommend", LAPTOP, *RUN, "--of", "muon"], "no group 'muon' in the results"),
        (["recommend", LAPTOP, *RUN, "--within", "200%"], "within must be a share"),
        (["report", LAPTOP, "--for", "7B"], "write it as PARAMS@TOKENS"),
        (["report", "tests", "-o", "x"], "holds no raysweep results"),
        (["recommend", "no-results", "--params", "1e9", "--tokens", "1e9"], "does not exist"),
        (
            ["train", SMOKE, "--cell", "nope", "--lr", "1e-2", "--batch-tokens", "64"],
            "unknown cell 'nope' in study smoke; known: ",
        ),
        (
            ["train", SMOKE, "--cell", "dense-a-20ktok", "--lr", "1e-2", "--batch-tokens", "65"],
            "no multiple of the sequence length 32: use 64",
        ),
        (
            ["train", SMOKE, "--cell", "dense-a-20ktok", "--lr", "-1", "--batch-tokens", "64"],
            "must be a positive number",
        ),
        (["import", "wandb", "x.csv", "--results", "r"], "W&B project"),
        (["run", SMOKE, "--set", "data.paths=[/x]"], "data source machine takes no paths"),
        (
            ["run", SMOKE, "--set", "data={source: text, paths: [no-such-folder]}"],
            "no-such-folder",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    args: list[str], expected: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    if args[0] == "run":
        args = [*args, "--results", str(tmp_path / "r")]
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["raysweep", *args])
    with pytest.raises(SystemExit) as stop:  # in this process: starting one takes seconds
        main()
    said = capfd.readouterr().err
    assert stop.value.code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert expected in errors[0]
    assert "Traceback" not in said


@pytest.mark.slow
def test_too_little_validation_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 50)
    data = f"data={{source: text, paths: [{tmp_path}], validation_sequences: 4000}}"
    done = raysweep("run", SMOKE, "--set", data, "--results", str(tmp_path / "r"))
    assert done.returncode == 2, done.stderr
    assert "validation" in done.stderr.splitlines()[-1]


def test_debug_shows_the_traceback() -> None:
    done = raysweep("--debug", "plan", "nope.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_one_trial_without_tune_keeps_its_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "r")
    args = ["--cell", "dense-a-20ktok", "--lr", "1e-2", "--batch-tokens", "512", "--results", uri]
    done = raysweep("train", SMOKE, *args)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)

    from raysweep.results import Results

    row = Results.open(uri).find(said["trial_key"], "smoke")
    assert row is not None
    assert row["status"] == "finished"
    assert row["loss"] == said["loss"] < 5.5
    assert row["tokens_seen"] == pytest.approx(20_000, rel=0.05)


@pytest.mark.slow
def test_a_number_missing_in_one_imported_row_hides_no_other(tmp_path: Path) -> None:
    table, uri = tmp_path / "sweep.csv", str(tmp_path / "r")
    grid = [(rate, batch) for rate in (1, 3, 10, 30) for batch in (4096, 16384, 65536)]
    lines = [f"{rate}e-3,{batch},1e6,2e7,{3 + abs(rate - 4) / 50}" for rate, batch in grid]
    lines[1], lines[4] = lines[1].replace("2e7", ""), lines[4].replace("1e6", "")
    table.write_text("\n".join(["lr,bs,N,tokens,val", *lines]))
    columns = "learning_rate=lr,batch_tokens=bs,params_active_non_embedding=N,loss=val"
    done = here("import", "csv", str(table), "--results", uri, "--map", columns)
    assert "1 kept out of fits: tokens is missing" in done.stdout
    for command in (
        ["fit", uri, "--all"],
        ["status", uri],
        ["report", uri, "-o", str(tmp_path / "page")],
    ):
        done = here(*command)
        assert not done.stderr
        if command[0] != "report":
            assert re.search(r"^ *dense-1M-20Mtok +(– +)?10 ", done.stdout, re.MULTILINE), (
                done.stdout
            )


@pytest.mark.slow
def test_import_says_what_it_did(tmp_path: Path) -> None:
    lines = ["loss,D,params_active_non_embedding,learning_rate,batch_tokens,note"]
    for tokens in ("2", "4"):
        for k, rate in enumerate((5e-4, 1e-3, 2e-3)):
            lines.append(f"{3 + 0.01 * k},{tokens},1e8,{rate},262144,x")
    table, uri = tmp_path / "mine.csv", str(tmp_path / "r")
    table.write_text("\n".join(lines))
    refused = raysweep("import", "csv", str(table), "--results", uri, "--map", "tokens=D")
    assert refused.returncode == 2
    assert "tokens is below 10000 in 6 of 6 rows" in refused.stderr
    assert not (tmp_path / "r").exists()
    done = raysweep("import", "csv", str(table), "--results", uri, "--map", "tokens=D*1e9")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == f"6 new rows of 6 in {uri}; 0 kept out of fits"
    assert "6 rows count, in 2 cells of 3 trials each (dense)" in done.stdout
    assert "no cell varies its batch" in done.stdout
    assert "D 2B to 4B tokens" in done.stdout
    assert "learning rate 0.0005 to 0.002" in done.stdout
    assert "columns ignored: note" in done.stdout
    assert f"next: raysweep fit {uri}" in done.stdout
    table.write_text("\n".join(line.replace("1e8", "2e8") for line in lines))
    again = ("import", "csv", str(table), "--results", uri, "--map", "tokens=D*1e9")
    other = raysweep(*again, "--study", "other")
    assert "the folder now holds 2 sets of data (mine, other)" in other.stdout
    assert "kept as they are, though data_hash" in raysweep(*again, "--study", "other", "--data",
                                                            "web").stdout  # fmt: skip
    table.write_text("\n".join(line.rpartition(",")[0] for line in table.read_text().split("\n")))
    assert "6 of these runs stand here twice" in raysweep(*again, "--study", "other").stdout
    from raysweep.results import Results

    assert set(Results.open(uri).to_pandas()["study"]) == {"mine", "other"}
