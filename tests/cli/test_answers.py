"""fit, recommend and compare in a terminal: the headline first, warnings before numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raysweep.cli import app

REPO = Path(__file__).resolve().parents[2]
LAPTOP = str(REPO / "reports/examples/laptop/results")
RUN = ["--params", "1M", "--tokens", "20M"]


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_fit_says_the_laws_first_and_the_rest_on_request() -> None:
    head, everything = said("fit", LAPTOP), said("fit", LAPTOP, "--all")
    starts = ["12 cells", "Optimum", "  learning rate =", "  batch ", "Loss", "Held out"]
    lines = head.splitlines()
    at = [next(i for i, line in enumerate(lines) if line.startswith(s)) for s in starts]
    assert at == sorted(at)
    warnings = [i for i, line in enumerate(lines) if line.startswith("  warning: ")]
    assert max(warnings) < at[1]
    assert "moe over dense" not in head
    for more in ("dense-s-80ktok", "moe over dense", "Prior, of", "Other ways to read"):
        assert more in everything
    assert len(lines) <= 25


@pytest.mark.slow
def test_recommend_names_every_architecture() -> None:
    text = said("recommend", LAPTOP, *RUN)
    dense, moe = text.strip().split("\n\n")
    assert dense.startswith("dense: 1M parameters on 20M tokens")
    assert moe.startswith("moe: 1M active parameters on 20M tokens, 8 experts, top-2")
    for answer in (dense, moe):
        lines = answer.splitlines()
        kinds = [line.split()[0] for line in lines[1:]]
        first = ["warning:", "learning", "batch", "loss", "largest", "verdict", "published"]
        assert kinds[: len(first)] == first
        assert len(set(lines)) == len(lines)
    told = json.loads(said("recommend", LAPTOP, *RUN, "--json"))
    assert [a["architecture"] for a in told] == ["dense", "moe"]
    one = json.loads(said("recommend", LAPTOP, *RUN, "--architecture", "moe", "--json"))
    assert one == told[1]
    assert {
        "learning_rate",
        "learning_rate_interval",
        "batch_tokens",
        "batch_tokens_exact",
        "batch_tokens_interval",
        "batch_sequences",
        "sequence_length",
        "loss",
        "loss_interval",
        "params",
        "tokens",
        "experts",
        "top_k",
        "extrapolation",
        "warnings",
        "published",
        "status",
        "verdict",
        "covariance",
        "directions",
        "largest_batch",
        "within",
        "told_by",
    } <= set(one)


@pytest.mark.slow
def test_laws_may_be_left_out_or_trusted() -> None:
    every = json.loads(said("fit", LAPTOP, "--json"))
    one = json.loads(said("fit", LAPTOP, "--literature", "deepseek", "--json"))
    less = json.loads(said("fit", LAPTOP, "--without", "step_law,kaplan", "--json"))
    assert len({json.dumps(t["prior"]) for t in (every, one, less)}) == 3


@pytest.mark.slow
def test_compare_begins_with_the_table(tmp_path: Path) -> None:
    lines = said("compare", LAPTOP).splitlines()
    assert lines[0].startswith("At ")
    assert [line.split()[0] for line in lines[1:4]] == ["side", "dense", "moe"]
    assert "moe over dense" in lines[5]
    asked = ("--params", "100k", "--tokens", "2M")
    told = json.loads(said("compare", LAPTOP, *asked, "--json", "-o", str(tmp_path)))
    assert (told["params"], told["tokens"]) == (1e5, 2e6)
    page = (tmp_path / "index.html").read_text()
    assert "At 100k active parameters on 2M tokens" in page
    assert "--params 100000 --tokens 2000000" in page
    answer = json.loads(
        said(
            "recommend",
            LAPTOP,
            "--params",
            "100k",
            "--tokens",
            "2M",
            "--json",
            "--architecture",
            "moe",
        )
    )
    assert told["answers"]["moe"]["learning_rate"] == answer["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("largest", ["0.5%", "5%"])
def test_the_largest_batch_may_cost_what_is_said(largest: str) -> None:
    text = said("recommend", LAPTOP, *RUN, "--architecture", "dense", "--within", largest)
    assert f"within {largest.replace('%', '')}\N{NO-BREAK SPACE}% of the best loss" in text
