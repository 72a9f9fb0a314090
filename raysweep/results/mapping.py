"""Which column of somebody else's table holds which of ours: as told, by name, or guessed."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import record_of
from raysweep.results.flags import flags
from raysweep.results.schema import COLUMNS
from raysweep.study.trials import Recipe
from raysweep.text import read_number

RECIPE = "recipe."
"""Before a key of the recipe, where one is mapped."""

OF_ONE_PASS = ("bs", "batch_size", "train_batch_size", "batch")
"""Names of batches that may be what one pass holds, of which a step accumulates several."""

TOKENS_A_BATCH = 10_000
"""A column `batch_size` of larger numbers holds tokens, not sequences."""

COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "loss": (
        "val_loss", "eval_loss", "validation_loss", "final_val_loss", "final_eval_loss",
        "val_ce_loss", "eval_ce_loss", "valid_loss", "test_loss", "final_loss", "loss_final",
        "loss", "smooth_loss",
    ),
    "train_loss": ("train_loss", "training_loss", "final_train_loss"),
    "learning_rate": (
        "lr", "learning_rate", "peak_lr", "max_lr", "lr_max", "peak_learning_rate",
        "max_learning_rate", "base_lr",
    ),
    "batch_tokens": (
        "batch_tokens", "tokens_per_batch", "batch_size_tokens", "global_batch_tokens",
        "tokens_per_step",
    ),
    "batch_sequences": (
        "global_batch_size", "batch_sequences", "total_train_batch_size", "total_batch_size",
        "effective_batch_size", "global_batch", "gbs", "bs", "batch_size", "train_batch_size",
        "batch",
    ),
    "sequence_length": (
        "seq_len", "seq_length", "sequence_len", "sequence_length", "context_length",
        "max_seq_len", "max_seq_length", "max_sequence_length", "block_size", "n_ctx", "ctx_len",
        "context", "ctx",
    ),
    "tokens": (
        "train_tokens", "tokens_total", "total_tokens", "n_tokens", "num_tokens",
        "training_tokens", "num_train_tokens", "token_budget", "max_tokens", "tokens",
    ),
    "tokens_seen": ("tokens_seen", "total_tokens_seen", "seen_tokens", "num_tokens_seen"),
    "accumulation": (
        "gradient_accumulation_steps", "grad_accumulation_steps", "gradient_accumulation",
        "grad_accum_steps", "grad_accum", "grad_acc_steps", "accumulate_grad_batches",
        "accumulation_steps", "accum_steps",
    ),
    "steps": (
        "steps", "total_steps", "max_steps", "num_steps", "n_steps", "num_train_steps",
        "train_steps", "num_iterations", "max_iters",
    ),
    "step": ("step", "global_step", "trainer_global_step", "train_global_step", "last_step"),
    "params_active_non_embedding": (
        "params_active_non_embedding", "n_params_non_embedding", "num_params_non_embedding",
        "params_non_embedding", "non_embedding_params", "non_embedding_parameters",
        "n_non_embedding_params", "n_active_params", "active_params", "params_active",
        "num_active_params", "n_params", "num_params", "params", "n_parameters",
        "num_parameters", "parameters", "param_count", "parameter_count", "model_size",
    ),
    "params_total_non_embedding": ("total_params_non_embedding", "params_total_non_embedding"),
    "params_total": ("total_params", "params_total", "n_params_total"),
    "flops": ("total_flops", "training_flops", "train_flops", "flops"),
    "d_model": (
        "d_model", "hidden_size", "n_embd", "model_dim", "hidden_dim", "embed_dim", "width",
    ),
    "layers": ("n_layers", "num_layers", "n_layer", "num_hidden_layers", "depth", "layers"),
    "heads": ("n_heads", "num_heads", "n_head", "num_attention_heads", "heads"),
    "kv_heads": ("n_kv_heads", "num_key_value_heads", "n_kv_head", "num_kv_heads", "kv_heads"),
    "d_ff": ("d_ff", "intermediate_size", "ffn_dim", "ff_dim", "mlp_dim", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "n_vocab", "vocabulary"),
    "experts": ("n_experts", "num_experts", "num_local_experts", "n_routed_experts", "experts"),
    "top_k": ("top_k", "num_experts_per_tok", "moe_top_k", "experts_per_token"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "shared_experts"),
    "expert_ff": ("moe_intermediate_size", "expert_ff", "d_expert", "expert_dim"),
    "moe_layers": ("n_moe_layers", "num_moe_layers", "moe_layers"),
    "seed": ("seed", "random_seed"),
    "status": ("status",),
    "data_hash": ("dataset", "dataset_name"),
    "recipe.optimizer": ("optimizer", "optimizer_name", "optim", "opt", "optimizer_type"),
    "recipe.schedule": (
        "schedule", "lr_schedule", "lr_scheduler_type", "lr_scheduler", "scheduler",
        "lr_schedule_type",
    ),
    "recipe.weight_decay": ("weight_decay", "wd"),
    "recipe.warmup_steps": ("warmup_steps", "warmup", "num_warmup_steps", "warmup_iters"),
    "recipe.warmup_fraction": ("warmup_fraction", "warmup_ratio"),
    "recipe.beta1": ("beta1", "adam_beta1"),
    "recipe.beta2": ("beta2", "adam_beta2"),
    "recipe.eps": ("eps", "epsilon", "adam_epsilon"),
    "recipe.clip_norm": ("grad_clip", "clip_norm", "max_grad_norm", "gradient_clipping"),
    "recipe.activation": ("activation", "hidden_act", "activation_function"),
    "recipe.final_lr_fraction": ("final_lr_ratio", "final_lr_fraction", "min_lr_ratio"),
}  # fmt: skip
"""Ours, and what others call it, the likeliest first. Names are compared in lower case, with every
run of other characters as one underscore; of a name in parts (`model.n_layers`) the last counts."""

_SYMBOLS = {"params_active_non_embedding": "N", "tokens": "D"}
_WHOLE_NAMES_ONLY = ("loss", "train_loss", "step", "tokens", "data_hash", "status")
"""Their last part alone tells too little: `train/loss` is no validation loss."""
NUMERIC = tuple(n for n, c in COLUMNS.items() if str(c.type) in ("int64", "double"))
FITTED = (
    "params_active_non_embedding", "params_total_non_embedding", "params_active", "params_total",
    "tokens", "tokens_seen", "steps", "step", "loss", "learning_rate", "batch_sequences",
    "batch_tokens", "accumulation", "sequence_length", "d_model", "layers", "heads", "kv_heads",
    "d_ff", "vocab_size", "experts", "top_k", "shared_experts", "expert_ff", "moe_layers",
)  # fmt: skip
"""Columns of numbers that the fits need, or that others are made from."""
_NOT_MAPPED = ("trial_key", "schema_version", "source")


@dataclass(frozen=True)
class Mapped:
    """Columns of ours read from a table: `rows` by name (none counted or checked yet), `recipe` by
    key, `sources` the table's column of each, `guessed` those of them that nobody told, and
    `notes`: in sentences, what a reader must know of them."""

    rows: dict[str, pd.Series]
    recipe: dict[str, pd.Series]
    sources: dict[str, str]
    guessed: dict[str, str]
    notes: tuple[str, ...]


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """`["loss=val_loss,tokens=D", "architecture==dense"]` as a mapping: ours to the file's."""
    mapping = {}
    for part in (p.strip() for text in texts for p in text.split(",")):
        ours, equals, theirs = part.partition("=")
        if not (ours and equals and theirs):
            raise UserError(f"--map: {part!r} is not column=name (or column==constant)")
        mapping[ours.strip()] = theirs.strip()
    return mapping


def map_columns(
    table: pd.DataFrame, mapping: Mapping[str, str], where: str, first_line: int = 1
) -> Mapped:
    """Columns of ours, and keys of the recipe, from a table that `where` names in errors, and whose
    first row is that line of it.

    What `mapping` tells comes first, then columns that bear our names or those of our recipes'
    keys, then what `COMMON_NAMES` guess. Numbers are read as people write them (7B, 1.4T).

    Raises:
        UserError: a column of ours or of the table that does not exist, and what is near it; one
            that the table has twice; or a column of `FITTED`, or one that is told, that mostly
            holds no numbers, as it must, with the first such line.
    """
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise UserError(f"{where} has the column {twice!r} twice: rename or drop one")
    rows: dict[str, pd.Series] = {}
    recipe: dict[str, pd.Series] = {}
    sources: dict[str, str] = {}
    for ours, theirs in mapping.items():
        key = ours.removeprefix(RECIPE)
        if ours not in COLUMNS and (key == ours or not key):
            raise UserError(f"--map: there is no column {ours!r} of results{near(ours, COLUMNS)}")
        name, convert = expression(theirs, table)
        if theirs.startswith("="):
            found = pd.Series(theirs[1:], index=table.index, dtype=object)
        elif name not in table:
            constant = math.isfinite(_number(name))
            mend = f"; one value for all rows is {ours}=={name}" if constant else ""
            raise UserError(f"{where} has no column {name!r}{mend or near(name, table.columns)}")
        else:
            found = table[name]
            sources[ours] = name
        if convert is not None:
            found = convert(numbers(found))
        if ours in COLUMNS:
            rows[ours] = found
        else:
            recipe[key] = found
    for name in (n for n in COLUMNS if n in table and n not in rows and n not in _NOT_MAPPED):
        rows[name], sources[name] = table[name], name
    for name in (n for n in Recipe.model_fields if n in table and n not in recipe):
        recipe[name], sources[RECIPE + name] = table[name], name
    guessed = guess(table, {*rows, *(RECIPE + k for k in recipe)}, set(sources.values()))
    for ours, theirs in guessed.items():
        if ours.startswith(RECIPE):
            recipe[ours.removeprefix(RECIPE)] = table[theirs]
        else:
            rows[ours] = table[theirs]
    sources |= guessed
    notes: list[str] = []
    for ours in (n for n in NUMERIC if n in rows):
        read = numbers(rows[ours])
        bad = read.isna() & _says_something(rows[ours])
        if bad.any():
            at, count = int(np.flatnonzero(bad)[0]), int(bad.sum())
            said = f"line {at + first_line} of {where}: {sources.get(ours, ours)} "
            said += f"{str(rows[ours].iloc[at])!r} is no number"
            if count > read.notna().sum() and (ours in FITTED or ours in mapping):
                raise UserError(f"{said}, as {ours} must be (in {count} rows it is none)")
            notes.append(said + (f" (nor in {count - 1} rows more)" if count > 1 else ""))
        rows[ours] = read
    return Mapped(rows, recipe, sources, guessed, tuple(notes))


def guess(table: pd.DataFrame, told: set[str], taken: set[str]) -> dict[str, str]:
    """Our columns that nobody told, to columns of the table by common names.

    `told` are ours that are known, `taken` theirs that are in use."""
    free = [str(c) for c in table.columns if str(c) not in taken]
    whole: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in free:
        whole.setdefault(plain(name), name)
        parts.setdefault(last_part(name), []).append(name)
    found: dict[str, str] = {}
    for ours, names in COMMON_NAMES.items():
        if ours in told:
            continue
        theirs = next((whole[n] for n in names if n in whole), None)
        if theirs is None and ours not in _WHOLE_NAMES_ONLY:
            theirs = next((parts[n][0] for n in names if len(parts.get(n, ())) == 1), None)
        if theirs is None and _SYMBOLS.get(ours) in free:
            theirs = _SYMBOLS[ours]
        if theirs is not None and theirs not in found.values() and _fits(ours, table[theirs]):
            found[ours] = theirs
    theirs = found.get("batch_sequences")
    if theirs is not None and numbers(table[theirs]).median() > TOKENS_A_BATCH:
        del found["batch_sequences"]
        if "batch_tokens" not in told | found.keys():
            found["batch_tokens"] = theirs
    return found


def plain(name: str) -> str:
    """A column's name as `COMMON_NAMES` has it."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def last_part(name: str) -> str:
    """The last part of a column's name, likewise: `batch_size` of `train/Batch Size`."""
    return plain(re.split(r"[./]", name)[-1])


def _fits(ours: str, column: pd.Series) -> bool:
    """Whether a guessed column suits ours: numbers where ours holds numbers, or empty."""
    return ours not in NUMERIC or bool(numbers(column).notna().any() or column.isna().all())


def expression(
    theirs: str, table: pd.DataFrame
) -> tuple[str, Callable[[pd.Series], pd.Series] | None]:
    """The column of "NAME*1e9" or "log(NAME)" and what is done to it; the text itself where that
    is a column."""
    if theirs in table:
        return theirs, None
    if inner := re.fullmatch(r"log\((.+)\)", theirs):
        return inner[1].strip(), _log
    name, _, factor = theirs.rpartition("*")
    try:
        by = float(factor)
    except ValueError:
        return theirs, None
    return (name.strip(), lambda values: values * by) if name else (theirs, None)


def _log(values: pd.Series) -> pd.Series:
    """Natural logarithms, NaN of what has none."""
    return values.where(values > 0).map(math.log, na_action="ignore")


def numbers(column: pd.Series) -> pd.Series:
    """A column as numbers, as people write them; NaN where it holds none."""
    if not pd.api.types.is_numeric_dtype(column):
        column = column.map(_number)
    return column.astype(float)


def _number(value: object) -> float:
    try:
        if isinstance(value, str) and value.strip().lower() in ("inf", "infinity", "-inf"):
            return float(value)
        return read_number(value) if isinstance(value, str | float | int) else math.nan
    except UserError:
        return math.nan


def _says_something(column: pd.Series) -> pd.Series:
    text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    return ~text.str.lower().isin(_NOTHING)


_NOTHING = ("", "nan", "na", "n/a", "none", "null", "<na>", "-")


def recipes(values: pd.DataFrame, given: pd.Series | None) -> list[str | None]:
    """Recipes as JSON, a row each: what the file's own say, and these values."""
    known = list(given) if given is not None else [None] * len(values)
    found = []
    for text, row in zip(known, values.astype(object).to_dict("records"), strict=True):
        own = record_of(text) | {str(k): v for k, v in row.items() if _plain_value(v)}
        found.append(json.dumps(own, sort_keys=True, default=str) if own else None)
    return found


def _plain_value(value: object) -> bool:
    return isinstance(value, str | int | float | np.generic) and value == value


def outliers(table: pd.DataFrame) -> pd.Series:
    """Why flagged rows are excluded: their flag counts, whatever the reason says."""
    if "outlier" not in table:
        return pd.Series(None, index=table.index, dtype=object)
    flagged = flags(table["outlier"])
    why = pd.Series("", index=table.index, dtype=object)
    if "reason" in table:
        why = table["reason"].astype(object).where(flags(table["reason"]), "")
    text = ("outlier: " + why.astype(str)).where(why != "", "outlier")
    return text.astype(object).where(flagged, None)


def reasons(excluded: pd.Series) -> pd.Series:
    """Texts of a column `excluded`, which may hold flags instead."""
    said = flags(excluded)
    text = excluded.astype(str).str.strip()
    bare = (
        text.str.lower().isin(("true", "yes", "y", "t"))
        | pd.to_numeric(text, errors="coerce").notna()
    )
    return text.astype(object).mask(bare, "flagged in the file").where(said, None)


def near(name: str, known: Sequence[str] | pd.Index | Mapping[str, object]) -> str:
    """In brackets, what names are near one that does not exist."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=2, cutoff=0.5)
    return f" (near: {', '.join(found)})" if found else ""
