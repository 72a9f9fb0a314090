"""Whether the numbers of a results table can be in the units that their columns say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

MIN_PARAMS = 1e3
"""No language model has fewer parameters: such numbers are billions or millions."""
MIN_TOKENS = 1e4
MIN_TOKENS_PER_PARAM, MAX_TOKENS_PER_PARAM = 1e-2, 1e5
"""D / N of all published sweeps lies well within."""
BUDGET_OFF = 3.0
"""A budget is this many times above or below 6 N D only where N leaves out most of the model."""
BUDGET_WRONG = 100.0
MAX_STEPS = 5e6
MIN_BATCH = 8192
"""Batches of fewer tokens are rare, and numbers of sequences are common there."""
MIN_BATCH_STEPS = 2e5
HIGHEST_RATE = 10.0
HIGHEST_LOSS = 13.0
"""ln of the largest vocabulary in use: guessing costs no more nats a token."""


@dataclass(frozen=True)
class Doubt:
    """A column whose numbers do not fit the others, and the rows (index labels) that show it.

    `impossible`: they cannot be right, whatever was trained. `most`: of the rows that tell, over
    half are such."""

    column: str
    rows: pd.Index
    text: str
    impossible: bool
    most: bool

    def __str__(self) -> str:
        return self.text


def doubts(frame: pd.DataFrame) -> list[Doubt]:
    """What speaks against the units of a results table, one doubt a column at most.

    Rows of `raysweep run` are passed over: their counts are exact. Each doubt names the rows'
    number, the column, and what to do. `frame` has columns of `results.schema`, any of them
    missing.
    """
    rows = frame
    if "source" in rows:
        rows = rows[rows["source"] != "raysweep"]
    found: list[Doubt] = []
    for check in (_size, _horizon, _ratio, _budget, _batch, _rate, _loss):
        doubt = check(rows) if len(rows) else None
        # One wrong unit puts all that is computed from it in doubt: the first one told is enough.
        if doubt is not None and not any(
            d.column in (*_RESTS_ON.get(doubt.column, ()), doubt.column)
            and (d.most or len(d.rows.intersection(doubt.rows)))
            for d in found
        ):
            found.append(doubt)
    return found


_N, _D = "params_active_non_embedding", "tokens"
_RESTS_ON = {_D: (_N,), "flops": (_N, _D), "batch_tokens": (_D,)}


def _get(rows: pd.DataFrame, name: str) -> pd.Series:
    if name not in rows:
        return pd.Series(math.nan, index=rows.index)
    column = pd.to_numeric(rows[name], errors="coerce").astype(float)
    return column.where((column > 0) & np.isfinite(column))


def _typical(column: pd.Series) -> float:
    return float(column.median()) if column.notna().any() else math.nan


def _doubt(
    column: str, bad: pd.Series, known: pd.Series, impossible: bool, text: Callable[[str], str]
) -> Doubt | None:
    n, of = int(bad.sum()), int(known.notna().sum())
    if not n:
        return None
    return Doubt(column, bad.index[bad], text(f"in {n} of {of} rows"), impossible, n > of / 2)


def _unit(rows: pd.DataFrame, column: str, value: float) -> tuple[str, str]:
    """What a number that is too small by far probably counts, and its factor: where N and D are
    known but for that, what brings them nearest to 20 tokens a parameter."""
    billions, millions = ("billions", "1e9"), ("millions", "1e6")
    other = _typical(_get(rows, _D if column == _N else _N))
    if not other >= (MIN_TOKENS if column == _N else MIN_PARAMS):
        return billions if value < 100 else millions

    def off(unit: tuple[str, str]) -> float:
        ratio = value * float(unit[1]) / other
        return abs(math.log((1 / ratio if column == _N else ratio) / 20))

    return min((billions, millions), key=off)


def _size(rows: pd.DataFrame) -> Doubt | None:
    return _too_small(rows, _N, MIN_PARAMS, "parameters")


def _horizon(rows: pd.DataFrame) -> Doubt | None:
    return _too_small(rows, _D, MIN_TOKENS, "tokens")


def _too_small(rows: pd.DataFrame, column: str, least: float, counted: str) -> Doubt | None:
    values = _get(rows, column)
    low = values < least
    typical = _typical(values[low])
    unit, factor = _unit(rows, column, typical)
    return _doubt(
        column,
        low,
        values,
        True,
        lambda where: (
            f"{column} is below {least:g} {where} (median {typical:.3g}): it seems to be in "
            f"{unit}, and must be in {counted}; multiply it (--map {column}=COLUMN*{factor})"
        ),
    )


def _ratio(rows: pd.DataFrame) -> Doubt | None:
    params, tokens = _get(rows, _N), _get(rows, _D)
    ratio = tokens / params
    few, many = ratio < MIN_TOKENS_PER_PARAM, ratio > MAX_TOKENS_PER_PARAM
    if few.sum() >= many.sum():
        column, bad, what = _D, few, f"fewer than one token for {1 / MIN_TOKENS_PER_PARAM:g}"
        what += " parameters"
    else:
        column, bad, what = _N, many, f"more than {MAX_TOKENS_PER_PARAM:g} tokens a parameter"
    wrong = ratio[bad].median() if bad.any() else 1.0
    return _doubt(
        column,
        bad,
        ratio,
        bool(wrong < MIN_TOKENS_PER_PARAM / 100 or wrong > MAX_TOKENS_PER_PARAM * 10),
        lambda where: (
            f"{_D} and {_N} give {what} {where} (median D / N {wrong:.3g}): one is in another "
            f"unit, probably {column}; both must be plain counts (--map {column}=COLUMN*1e9)"
        ),
    )


def _budget(rows: pd.DataFrame) -> Doubt | None:
    flops, params = _get(rows, "flops"), _get(rows, _N)
    trained = _get(rows, "tokens_seen").fillna(_get(rows, _D))
    off = flops / (6 * params * trained)
    bad = (off > BUDGET_OFF) | (off < 1 / BUDGET_OFF)
    typical = _typical(off[bad])
    return _doubt(
        "flops",
        bad,
        off,
        bool(bad.any() and not 1 / BUDGET_WRONG < typical < BUDGET_WRONG),
        lambda where: (
            f"flops is {typical:.3g} times 6 N D {where}: flops, {_N} or {_D} is in another unit, "
            "or N leaves out most of the model; flops must be in FLOPs, the others plain counts "
            "(--map flops=COLUMN*1e18, say, or leave it out)"
        ),
    )


def _batch(rows: pd.DataFrame) -> Doubt | None:
    batch, tokens, steps = _get(rows, "batch_tokens"), _get(rows, _D), _get(rows, "steps")
    length = _get(rows, "sequence_length")
    mend = "map it to batch_sequences with sequence_length, or multiply it (COLUMN*2048)"
    known = batch.notna()

    def of(bad: pd.Series, impossible: bool, what: str) -> Doubt | None:
        return _doubt(
            "batch_tokens", bad & known, batch, impossible, lambda where: f"{what} {where}: {mend}"
        )

    sequences = _get(rows, "batch_sequences")
    torn = (batch - sequences * length).abs() > 0.51 * length  # a batch may be rounded to sequences
    product = of(torn, False, "batch_tokens is not batch_sequences x sequence_length")
    if product and product.most:
        return product
    short = of(
        batch < length, True, "batch_tokens is below the sequence length, so it is in sequences,"
    )
    if short:
        return short
    off = tokens / (batch * steps)
    apart = (off > 1.5) | (off < 1 / 1.5)
    typical = _typical(off[apart])
    if apart.sum() > off.notna().sum() / 2:
        log2 = math.log2(typical)
        of_sequences = log2 > 6.5 and abs(log2 - round(log2)) < 0.03
        if of_sequences:
            return of(
                apart,
                True,
                f"tokens / (batch_tokens * steps) is {typical:.4g}, a sequence length: "
                "batch_tokens is in sequences",
            )
        mend = "one of the three is in another unit: correct it, or leave steps out"
        return of(apart, False, f"tokens / (batch_tokens * steps) is {typical:.3g} and should be 1")
    mend = "give the global batch in tokens, or leave it out"
    wide = of(batch > tokens, True, "batch_tokens is above the tokens of the run")
    if wide:
        return wide
    implied = tokens / batch
    many = (implied > MAX_STEPS) | ((batch < MIN_BATCH) & (implied > MIN_BATCH_STEPS))
    mend = "if it is in sequences, map it to batch_sequences with sequence_length"
    return of(
        many & ~(steps.notna() & ~apart),
        False,
        f"batch_tokens (median {_typical(batch[many]):.4g}) would mean "
        f"{_typical(implied[many]):.2g} steps",
    )


def _rate(rows: pd.DataFrame) -> Doubt | None:
    given = rows["learning_rate"] if "learning_rate" in rows else pd.Series(dtype=float)
    given = pd.to_numeric(given, errors="coerce").astype(float)
    negative = given < 0
    if negative.sum() > given.notna().sum() / 2:
        return _doubt(
            "learning_rate",
            negative,
            given,
            True,
            lambda where: (
                f"learning_rate is negative {where}: it seems to be a logarithm, and must be the "
                "peak learning rate itself"
            ),
        )
    high = given > HIGHEST_RATE
    return _doubt(
        "learning_rate",
        high,
        given,
        False,
        lambda where: (
            f"learning_rate is above {HIGHEST_RATE:g} {where}: it must be the peak learning rate "
            "itself, no multiple of a base rate"
        ),
    )


def _loss(rows: pd.DataFrame) -> Doubt | None:
    loss = _get(rows, "loss")
    if "status" in rows:
        loss = loss[rows["status"].isna() | (rows["status"] == "finished")]
    high = loss > HIGHEST_LOSS
    if high.sum() <= len(loss) / 2:
        return None  # a few are runs that diverged
    return _doubt(
        "loss",
        high,
        loss,
        False,
        lambda where: (
            f"loss is above {HIGHEST_LOSS:g} {where}: it seems to be a perplexity, and must be in "
            "nats a token: --map 'loss=log(NAME)' takes the logarithm"
        ),
    )
