"""Columns of a results table as users name them: its own, and the keys of its recipes."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

import pandas as pd

from raysweep.errors import UserError
from raysweep.study.trials import YOUNGER, Recipe


def record_of(text: object) -> dict[str, Any]:
    """What a row keeps as JSON, its recipe say; empty where it is not readable."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def recipe_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """The keys of the recipes as columns, indexed as `frame`; in rows of our own runs, a key that
    the row leaves out has its default (`Recipe.record`)."""
    if "recipe" not in frame:
        return pd.DataFrame(index=frame.index)
    texts = frame["recipe"].astype(object)
    known = {text: record_of(text) for text in texts.dropna().unique()}
    plain = Recipe().model_dump(mode="json", include=set(YOUNGER))
    ours = frame["source"] == "raysweep" if "source" in frame else [False] * len(frame)
    found = [
        {**plain, **known[text]} if own and text in known else known.get(text, {})
        for text, own in zip(texts, ours, strict=True)
    ]
    return pd.DataFrame([{k: _plain(v) for k, v in r.items()} for r in found], index=frame.index)


def _plain(value: object) -> object:
    """A value that can be told from others: of rates by group, say, their text."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def named_column(frame: pd.DataFrame, name: str, option: str) -> pd.Series:
    """A column, or a key of the recipes.

    Raises:
        UserError: there is none, with what is near; `option` is what asked for it.
    """
    if name in frame:
        return frame[name]
    recipes = recipe_columns(frame)
    if name in recipes:
        return recipes[name]
    known = [str(c) for c in (*frame.columns, *recipes.columns)]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f" (near: {', '.join(near)})" if near else ""
    raise UserError(f"{option}: the results table lacks the column {name!r}{hint}")


def with_loss(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table whose `loss` and `loss_se` are those of a named validation set, or with `ema` of
    the averaged weights.

    Raises:
        UserError: no row has that loss.
    """
    columns = {
        str(c).removeprefix("loss."): (str(c), f"loss_se.{str(c).removeprefix('loss.')}")
        for c in frame.columns
        if str(c).startswith("loss.")
    }
    columns.setdefault("ema", ("loss_ema", "loss_ema_se"))
    known = {n: pair for n, pair in columns.items() if pair[0] in frame and frame[pair[0]].any()}
    if name not in known:
        raise UserError(f"--loss {name}: no row has that loss; known: {', '.join(known) or 'none'}")
    loss, error = known[name]
    return frame.assign(loss=frame[loss], loss_se=frame.get(error))


def rows_where(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows for which a condition holds, in the language of `DataFrame.query`, of columns and
    keys of the recipes: `optimizer == "adamw" and tokens > 1e9`.

    Raises:
        UserError: no such condition, one that no row fulfils, or a column that does not exist.
    """
    recipes = recipe_columns(frame)
    own = recipes[[c for c in recipes.columns if c not in frame]]
    wide = pd.concat([frame, own], axis=1).reset_index(drop=True)
    hint = "compare columns, as in 'optimizer == \"adamw\" and tokens > 1e9'"
    if "@" in condition or "__" in condition:
        raise UserError(f"--where {condition}: {hint}")
    try:
        held = wide.eval(condition, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # it raises whatever Python's own parser and operators do
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = re.match("name '(.*)' is not defined", said)
        known = [str(c) for c in wide]
        near = difflib.get_close_matches(name[1], known, n=2, cutoff=0.4) if name else ()
        more = f" (near: {', '.join(near)})" if near else f": {hint}"
        raise UserError(f"--where {condition}: {said}{more}") from None
    if not isinstance(held, pd.Series) or held.dtype.kind not in "bO":
        raise UserError(f"--where {condition}: that is no condition: {hint}")
    found = frame[held.fillna(False).astype(bool).to_numpy()]
    if not len(found):
        raise UserError(f"--where {condition}: it holds for none of the {len(frame)} rows")
    return found.reset_index(drop=True)
