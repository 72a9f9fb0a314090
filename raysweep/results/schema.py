"""One row a trial: the columns of the results table, their meaning, and their version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

FINISHED = "finished"
STATUSES = (FINISHED, "diverged", "out_of_memory", "crashed", "stopped")
"""`finished` reached its full horizon. `stopped` was ended early on purpose. All but `finished`
stay out of the fits, with their reason."""


def is_loss(value: float | None) -> bool:
    """Whether a number can be a final loss: finite, and positive, as fits take its logarithm."""
    return value is not None and 0 < value < math.inf


@dataclass(frozen=True)
class Column:
    """A column: Arrow type, meaning with unit, and whether every row must have it: what says which
    row it is. A number that an imported row lacks keeps that row out of the fits, no other."""

    type: pa.DataType
    meaning: str
    required: bool = False


_text, _int, _float, _bool = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_time = pa.timestamp("us", tz="UTC")

COLUMNS: dict[str, Column] = {
    # What the row is.
    "schema_version": Column(_int, "version of these columns", True),
    "trial_key": Column(_text, "hash of everything that determines the result", True),
    "study": Column(_text, "name of the study", True),
    "cell": Column(_text, "one scale of one architecture at one horizon", True),
    "architecture": Column(_text, "name of the architecture in the search space", True),
    "architecture_kind": Column(_text, "dense or moe", True),
    "scale": Column(_text, "name of the rung", True),
    "source": Column(_text, "raysweep, own (a user's training code), or import:FORMAT", True),
    # Shape.
    "d_model": Column(_int, "width"),
    "layers": Column(_int, "depth"),
    "heads": Column(_int, "attention heads"),
    "kv_heads": Column(_int, "key-value heads"),
    "d_ff": Column(_int, "hidden width of a dense feed-forward"),
    "vocab_size": Column(_int, "token ids"),
    "sequence_length": Column(_int, "tokens a sequence"),
    "experts": Column(_int, "routed experts a MoE layer; 1 is dense", True),
    "top_k": Column(_int, "experts a token is sent to; 1 is dense", True),
    "shared_experts": Column(_int, "experts every token passes"),
    "expert_ff": Column(_int, "hidden width of one expert; 0 is dense"),
    "moe_layers": Column(_int, "number of MoE layers"),
    "first_dense": Column(_int, "first layers that stay dense"),
    "scores": Column(_text, "how the router scores experts: softmax or sigmoid"),
    "balance": Column(_text, "how expert load is balanced: loss, bias or none"),
    "route_scale": Column(_float, "factor of the routed experts' output"),
    # Counts.
    "params_total": Column(_float, "all parameters"),
    "params_active": Column(_float, "parameters a token passes, with embeddings and head"),
    "params_total_non_embedding": Column(_float, "without input embedding and output head"),
    "params_active_non_embedding": Column(_float, "active, without embedding and head"),
    "params_dense": Column(_float, "non-embedding parameters of the dense twin"),
    "flops_per_token": Column(_float, "training FLOPs a token, exact: matmuls, attention, head"),
    "flops": Column(_float, "training FLOPs of the trial: flops_per_token * tokens_seen"),
    "flops_6nd": Column(_float, "6 * params_active_non_embedding * tokens_seen"),
    # Hyperparameters.
    "tokens": Column(_float, "horizon D: the token budget"),
    "learning_rate": Column(_float, "peak learning rate"),
    "batch_sequences": Column(_int, "global batch in sequences"),
    "batch_tokens": Column(_float, "global batch in tokens"),
    "seed": Column(_int, "of weights and data order"),
    "steps": Column(_int, "optimizer steps planned"),
    "recipe": Column(_text, "training recipe as JSON"),
    "strategy": Column(_text, "search strategy that proposed the trial"),
    # Outcome.
    "status": Column(_text, "finished, diverged, out_of_memory, crashed or stopped", True),
    "reason": Column(_text, "why it did not finish"),
    "excluded": Column(_text, "why the row is kept out of fits although it finished"),
    "step": Column(_int, "last optimizer step"),
    "tokens_seen": Column(_float, "tokens trained on"),
    "tokens_trained": Column(_float, "of these, not lent by the row of a longer horizon"),
    "epochs": Column(_float, "tokens_seen over the corpus"),
    "loss": Column(_float, "final validation loss, nats a token"),
    "loss_se": Column(_float, "its standard error over validation sequences"),
    "loss_ema": Column(_float, "loss of the averaged weights (recipe.ema_tokens), nats a token"),
    "loss_ema_se": Column(_float, "its standard error over validation sequences"),
    "named_losses": Column(_text, "[loss, standard error] by named validation set, as JSON"),
    "train_loss": Column(_float, "smoothed final training loss, nats a token"),
    "bits_per_byte": Column(_float, "validation loss in bits a byte of text"),
    "noise_scale_tokens": Column(_float, "gradient noise scale B_simple = tr S / |G|^2, tokens"),
    "noise_grad_sq": Column(_float, "|G|^2, averaged over the steps measured"),
    "noise_trace": Column(_float, "tr S per sequence, averaged over the steps measured"),
    "noise_quarters": Column(_text, "loss, grad_sq and trace of each quarter of the run, as JSON"),
    "expert_load_entropy": Column(_float, "entropy of expert load over its maximum, 0 to 1"),
    "expert_load_max_over_mean": Column(_float, "load of the busiest expert over the mean"),
    "router_confidence": Column(_float, "mean probability given to the chosen experts"),
    "metrics": Column(_text, "what a user's own training gave besides, as JSON"),
    # Cost.
    "started_at": Column(_time, "start of the trial, UTC"),
    "seconds_wall": Column(_float, "from start to row"),
    "seconds_train": Column(_float, "inside the training loop, evaluation included"),
    "tokens_per_second": Column(_float, "tokens_seen / seconds of the step loop"),
    "gpu_hours": Column(_float, "seconds_train times GPUs, over 3600; 0 on CPUs"),
    "mfu": Column(_float, "model FLOPs a second over the data sheet's peak of its GPUs, 0 to 1"),
    "peak_memory_bytes": Column(_int, "of the device, or of the process on CPUs"),
    "micro_batch_sequences": Column(_int, "sequences a worker holds at once"),
    "accumulation": Column(_int, "micro-batches a step and worker"),
    "world_size": Column(_int, "workers"),
    "worker": Column(_text, "the process that trained it: host:pid"),
    # Provenance.
    "device": Column(_text, "GPU or CPU model"),
    "versions": Column(_text, "library versions as JSON"),
    "git_revision": Column(_text, "of raysweep, with + when modified"),
    "data_hash": Column(_text, "the data: hash of the token shards, or its name in an import"),
    "validation_sequences": Column(_int, "size of the slice that the loss is measured on"),
}

ARROW_SCHEMA = pa.schema([pa.field(name, c.type) for name, c in COLUMNS.items()])

CURVE_SCHEMA = pa.schema(
    [
        pa.field("trial_key", _text),
        pa.field("step", _int),
        pa.field("tokens", _float),
        pa.field("train_loss", _float),
        pa.field("learning_rate", _float),
        pa.field("grad_norm", _float),
    ]
)


def make_row(**values: Any) -> dict[str, Any]:
    """A complete row: columns not given are None. Fails an assertion on an unknown column or
    a required one without a value: both are bugs of the caller."""
    unknown = values.keys() - COLUMNS.keys()
    assert not unknown, f"not columns: {sorted(unknown)}"
    row = {name: values.get(name) for name in COLUMNS}
    row["schema_version"] = SCHEMA_VERSION
    missing = [name for name, c in COLUMNS.items() if c.required and row[name] is None]
    assert not missing, f"required columns without a value: {missing}"
    assert row["status"] in STATUSES, row["status"]
    return row


def row_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of the current schema."""
    return pa.Table.from_pylist(rows, schema=ARROW_SCHEMA)
