"""The command that begins a study: init."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from raysweep.cli import complete
from raysweep.cli.common import app
from raysweep.errors import UserError

_TEXT = "put your text into corpus/, as its comments say; then raysweep plan and run {}.yaml"
_NEXT = {
    "dense": _TEXT.format("dense"),
    "moe": _TEXT.format("moe"),
    "import": "follow the comments at its top",
    "own": "raysweep run own.yaml as it is; then replace own_train.py by your training code",
}


@app.command("init")
def init_command(
    like: Annotated[
        str,
        typer.Option(
            "--like",
            help="What to start from: laptop, dense, moe, own (your training code) or import.",
            autocompletion=complete.templates,
        ),
    ] = "laptop",
) -> None:
    """Write a short search-space file with comments into this folder."""
    known = complete.templates("")
    if like not in known:
        near = difflib.get_close_matches(like, known, n=1, cutoff=0.0)
        raise UserError(f"--like {like}: did you mean {near[0]}? ({', '.join(known)})")
    shelf = resources.files("raysweep.cli") / "templates"
    names = [f"{like}.yaml", *(["own_train.py"] if like == "own" else [])]
    standing = next((name for name in names if Path(name).exists()), None)
    if standing is not None:
        raise UserError(f"{standing} is here already: move it, or go to another folder")
    for name in names:
        lines = (shelf / name).read_text(encoding="utf-8").splitlines(keepends=True)
        # The schema for editors is a file of the checkout.
        kept = [line for line in lines if not line.startswith("# yaml-language-server:")]
        Path(name).write_text("".join(kept), encoding="utf-8")
        typer.echo(name)
    then = _NEXT.get(like, f"raysweep plan {like}.yaml; raysweep run {like}.yaml")
    typer.echo(f"next: {then}", err=True)
