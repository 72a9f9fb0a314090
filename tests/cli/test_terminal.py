"""The terminal: completion in a real bash, amounts as people write them, one line an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raysweep.cli import complete

REPO = Path(__file__).resolve().parents[2]
SMOKE = "search_spaces/smoke.yaml"
START = "import sys; sys.argv[0] = 'raysweep'; from raysweep.cli import main; main()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? ('raysweep -h' shows how)"),
        (["run"], "Missing argument 'SPACE' ('raysweep run -h' shows how)"),
        (["plan", SMOKE, "--foo"], "No such option: --foo ('raysweep plan -h' shows how)"),
        (["train", SMOKE], "Missing option '--cell' ('raysweep train -h' shows how)"),
        (["recommend", "x", "--params", "seven", "--tokens", "1B"], "write 7e9 or 7B"),
        (["recommend", "x", "--params", "7", "--tokens", "1B"], "did you mean 7B?"),
        (["recommend", "x", "--params", "7B", "--tokens", "1,4T"], "write 1.4T"),
        (
            ["report", "reports/examples/laptop/results", "-o", "README.md"],
            "README.md is a file: name a folder",
        ),
        (["compare", "reports/examples/laptop/results#x"], "its studies: laptop"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from raysweep.cli import main

    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["raysweep", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from raysweep.cli import main

    monkeypatch.setattr(sys, "argv", ["raysweep", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("raysweep")


@pytest.mark.slow
def test_completion_in_bash(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    command = tmp_path / "raysweep"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{START}" "$@"\n')
    command.chmod(0o755)
    script = """
        raysweep --install-completion bash >/dev/null && source ~/.bash_completions/raysweep.sh
        try() {
          COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
          _raysweep_completion raysweep; echo "${COMPREPLY[*]}"
        }
        try raysweep comp
        try raysweep run search_spaces/smo
        try raysweep train search_spaces/smoke.yaml --cell de
        try raysweep import step
        try raysweep fit reports/examples/laptop/
    """
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        [bash, "-c", script],
        cwd=REPO,
        env={**os.environ, **path, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "compare",
        "search_spaces/smoke.yaml",
        "dense-a-20ktok dense-b-20ktok",
        "steplaw",
        "reports/examples/laptop/results",
    ]


def test_nothing_to_offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("study: [")
    monkeypatch.setenv("COMP_WORDS", "raysweep train bad.yaml --cell ")
    assert complete.cells("") == []
    monkeypatch.setenv("COMP_WORDS", "raysweep train --cell ")
    assert complete.cells("") == []
    assert complete.spaces("no-such-folder/") == []
    assert "h100" in " ".join(complete.gpus("h"))
    assert complete.export_formats("") == ["optuna"]
