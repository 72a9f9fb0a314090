"""Latencies measured by vLLM's own benchmark, as the profile that `raysweep serving` reads.

    python -m benchmarks.vllm_profile FOLDER -o profile.csv
    raysweep serving RESULTS --profile profile.csv

FOLDER holds the outputs of `vllm bench latency`, named by what was measured:

    e8-g2-n1.2e9-b64-o1.json      8 experts, on 2 GPUs, of a dense model of 1.2e9 parameters without
                                  embedding, 64 sequences at once, 1 token generated

Each case is measured twice: with one generated token, which is the reading of the prompts, and with
more (`o65`), whose latency beyond that, over the tokens more, is a step of decoding. Weights may be
random (`--load-format dummy`): a model is a folder with its config.json (a Mixtral of the study's
shape; dense: a Llama) and a tokenizer. On the GPUs to serve on:

    for b in 1 4 16 64 256; do for o in 1 65; do
      vllm bench latency --model models/e8-n1.2e9 --load-format dummy --tensor-parallel-size 2 \\
        --input-len 161 --output-len $o --batch-size $b --max-num-seqs $b \\
        --output-json FOLDER/e8-g2-n1.2e9-b$b-o$o.json
    done; done

Take the study's mean prompt as input length (161 for ShareGPT), every number of experts and of GPUs
that is to be weighed, and sizes about those of the answers: between them the profile interpolates.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.entry import start
from raysweep.errors import UserError
from raysweep.scaling.compute.roofline import PROFILE_COLUMNS

NAME = re.compile(
    r"^e(?P<experts>\d+)-g(?P<gpus>\d+)-n(?P<params>[0-9.]+(?:e\+?\d+)?)"
    r"-b(?P<sequences>\d+)-o(?P<generated>\d+)\.json$"
)
CASE = ["experts", "gpus", "params", "sequences"]


def profile(folder: Path) -> pd.DataFrame:
    """The profile, columns `PROFILE_COLUMNS`; UserError names the file that does not serve."""
    rows = [_measured(path) for path in sorted(folder.glob("*.json"))]
    if not rows:
        raise UserError(f"{folder} holds no output of vllm bench latency")
    found = []
    for case, own in pd.DataFrame(rows).groupby(CASE):
        seconds = own.set_index("generated")["seconds"].sort_index()
        named = "e{:g}-g{:g}-n{:g}-b{:g}".format(*case)
        if 1 not in seconds.index or len(seconds) < 2:
            raise UserError(f"{named}: measure it with one generated token (o1), and with more")
        prefill, more, last = seconds[1], seconds.index[-1], seconds.iloc[-1]
        if last <= prefill:
            raise UserError(f"{named}: {more} tokens took no longer than one: measure it again")
        found.append(("prefill", *case, prefill))
        found.append(("decode", *case, (last - prefill) / (more - 1)))
    return pd.DataFrame(found, columns=["phase", *CASE, "seconds"])[list(PROFILE_COLUMNS)]


def _measured(path: Path) -> dict[str, float]:
    """What one output says: its case, by the file's name, and its mean latency in seconds."""
    named = NAME.match(path.name)
    if named is None:
        raise UserError(f"{path}: name it as in e8-g2-n1.2e9-b64-o1.json")
    try:
        seconds = float(json.loads(path.read_text(encoding="utf-8"))["avg_latency"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no output of vllm bench latency --output-json") from None
    return {**{name: float(value) for name, value in named.groupdict().items()}, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_profile")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    table = profile(given.folder)
    table.to_csv(given.output, index=False)
    print(f"{len(table)} latencies in {given.output}")


if __name__ == "__main__":
    start(main)
