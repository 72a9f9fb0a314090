"""Published sweeps in the form that their authors released, as rows of the results table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.mapping import near, numbers, outliers
from raysweep.results.rows import finish, read_table, routing
from raysweep.results.schema import COLUMNS

STEP_LAW_SEQUENCE_LENGTH = 2048


def read_steplaw(path: str | os.PathLike[str], study: str = "steplaw") -> pd.DataFrame:
    """Step Law's released grids (arXiv 2503.04715), dense or MoE, one row a run.

    `smooth loss`, the smoothed final training loss, becomes `loss`; `N` is non-embedding and, in
    the MoE file, total with `Na` active; batches are in sequences of 2048 tokens (or `seq_len`).
    Every number of experts and top-k is an architecture of its own. UserError where a column is
    missing.
    """
    table = read_table(path)
    _need(table, ("h", "ffnh", "numh", "numl", "lr", "bs", "ti", "smooth loss", "N", "D"), path)
    moe = "nume" in table
    if moe:
        _need(table, ("nume", "topk", "Na"), path)
    get = _columns(table)
    length = get("seq_len").fillna(STEP_LAW_SEQUENCE_LENGTH)
    experts, top_k = get("nume").fillna(1).clip(lower=1), get("topk").fillna(1).clip(lower=1)
    sparse = experts > 1
    rows = {
        "architecture": "steplaw-" + routing(experts, top_k),
        "d_model": get("h"),
        "layers": get("numl"),
        "heads": get("numh"),
        "d_ff": get("ffnh"),
        "sequence_length": length,
        "experts": experts,
        "top_k": top_k,
        "shared_experts": (get("sed") > 0).astype(float).where(sparse, 0.0),
        "expert_ff": get("moeh").where(sparse, 0.0),
        "params_total_non_embedding": get("N"),
        "params_active_non_embedding": get("Na").where(sparse, get("N")) if moe else get("N"),
        "tokens": get("D"),
        "learning_rate": get("lr"),
        "batch_sequences": get("bs"),
        "batch_tokens": get("bs") * length,
        "steps": get("ti"),
        "tokens_seen": get("ti") * get("bs") * length,
        "loss": get("smooth loss"),
        "train_loss": get("smooth loss"),
        "recipe": json.dumps({"loss": "smoothed final training loss"}),
    }
    return finish(table, rows, "steplaw", study, hyperparameters=True)


def read_chinchilla(path: str | os.PathLike[str], study: str = "chinchilla") -> pd.DataFrame:
    """Chinchilla's points as read off its figure 4 (arXiv 2404.10102): D = FLOPs / (6 N).

    They tell neither learning rate nor batch, so they enter laws of the loss only. How `Model
    Size` was counted is not stated: it fills every count. UserError where a column is missing.
    """
    table = read_table(path)
    _need(table, ("Model Size", "Training FLOP", "loss"), path)
    get = _columns(table)
    params, flops = get("Model Size"), get("Training FLOP")
    rows = {
        "architecture": pd.Series("chinchilla", index=table.index),
        **_every_count(params),
        "tokens": flops / (6 * params),
        "flops": flops,
        "flops_per_token": 6 * params,
        "loss": get("loss"),
    }
    return finish(table, rows, "chinchilla", study)


def read_isoflop(path: str | os.PathLike[str], study: str = "isoflop") -> pd.DataFrame:
    """IsoFLOP runs (arXiv 2603.22339): `tokens, params, budget, loss`, and `outlier, reason` if
    there.

    Flagged outliers stay, excluded with their reason, if any. Experiments do not share data, so
    each `experiment` is an architecture and a set of data of its own. They enter laws of the loss
    only. How `params` were counted is not stated: they fill every count. UserError where a column
    is missing.
    """
    table = read_table(path)
    _need(table, ("tokens", "params", "budget", "loss"), path)
    get = _columns(table)
    params, tokens = get("params"), get("tokens")
    name = table["experiment"] if "experiment" in table else pd.Series("isoflop", index=table.index)
    rows = {
        "architecture": name.astype(object).fillna("isoflop"),
        **_every_count(params),
        "tokens": tokens,
        "flops": get("budget"),
        "flops_per_token": get("budget") / tokens,
        "loss": get("loss"),
        "excluded": outliers(table),
        "data_hash": table.get("experiment"),
    }
    return finish(table, rows, "isoflop", study)


PUBLISHED: dict[str, Callable[..., pd.DataFrame]] = {
    "steplaw": read_steplaw,
    "chinchilla": read_chinchilla,
    "isoflop": read_isoflop,
}
"""By format. Every row of a file becomes a row; what cannot be used is `excluded`."""

USED = {
    "steplaw": (
        "h", "ffnh", "numh", "numl", "lr", "bs", "ti", "smooth loss", "N", "D", "seq_len",
        "nume", "topk", "sed", "moeh", "Na",
    ),
    "chinchilla": ("Model Size", "Training FLOP", "loss"),
    "isoflop": ("tokens", "params", "budget", "loss", "experiment", "outlier", "reason"),
}  # fmt: skip
"""The columns that each of them reads."""


def _need(table: pd.DataFrame, names: Sequence[str], path: str | os.PathLike[str]) -> None:
    missing = [n for n in names if n not in table]
    if missing:
        listed = ", ".join(f"{n!r}{near(n, table.columns)}" for n in missing)
        raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {listed}")


def _columns(table: pd.DataFrame) -> Callable[[str], pd.Series]:
    """A column as numbers, NaN where it holds none or is not there."""

    def get(name: str) -> pd.Series:
        if name not in table:
            return pd.Series(np.nan, index=table.index)
        return numbers(table[name])

    return get


def _every_count(params: pd.Series) -> dict[str, pd.Series]:
    names = [n for n in COLUMNS if n.startswith("params_") and n != "params_dense"]
    return dict.fromkeys(names, params)
