"""A study: a search space expanded into cells, and the trials that run in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.display import InNotebooks
from raysweep.errors import UserError
from raysweep.study.cells import Architecture, Horizon, ModelSettings, Resources, ScaleEntry
from raysweep.study.fields import MAX_LAYERS, MAX_TOKEN_IDS
from raysweep.study.load import check, load_search_space
from raysweep.study.own import OwnModel, Training, fill_in, own_models
from raysweep.study.plan import Plan, make_plan
from raysweep.study.schema import Data, SearchSpace
from raysweep.study.shape import (
    ModelShape,
    count,
    derive_width_depth,
    feed_forward_width,
    round_to,
)
from raysweep.study.spec import Cell, TrialSpec
from raysweep.text import short

BYTE_VOCABULARY = 256
EXPERT_MULTIPLE = 8
"""Experts' widths are multiples of this: their kernel takes rows of 16 bytes, in bfloat16."""
MAX_CELLS = 1_000


class Study(InNotebooks):
    """A validated search space with its cells, smallest first."""

    def __init__(self, space: SearchSpace, folder: Path) -> None:
        self.space = space
        self.folder = folder
        """Where the file lies: relative data paths start here."""
        self.cells: tuple[Cell, ...] = _expand(space, folder)
        if space.training is not None and space.training.command is not None:
            for cell in self.cells:
                _check_command(self, cell, space.training)

    @classmethod
    def load(cls, path: str | Path, set: Mapping[str, object] | Sequence[str] = ()) -> Study:
        """Read a search-space file, with keys set anew: {"search.trials_per_cell": 8}, or texts
        such as "search.trials_per_cell=8", as the command line has them.

        Raises UserError with file, line, culprit and mend.
        """
        path = Path(path)
        return cls(load_search_space(path, set), path.resolve().parent)

    def __repr__(self) -> str:
        names = ", ".join(self.space.architectures)
        return f"<Study {self.name}: {len(self.cells)} cells of {names}>"

    def plan(self) -> Plan:
        """Its cells with their parameters, tokens, trials and FLOPs."""
        return make_plan(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object], folder: str | Path = ".") -> Study:
        """A study from plain values, as a notebook would give them.

        Raises UserError: one line with culprit and mend."""
        return cls(check(data, "the study"), Path(folder).resolve())

    @property
    def name(self) -> str:
        return self.space.study

    def cell(self, name: str) -> Cell:
        """The cell of that name; UserError with the known names."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        known = ", ".join(c.name for c in self.cells)
        raise UserError(f"unknown cell {name!r} in study {self.name}; known: {known}")

    def entry(self, cell: Cell) -> ScaleEntry:
        """The entry of `scales` that a cell is of. Several may share a name, as long as they differ
        in architectures or horizons."""
        found = (
            entry
            for entry in self.space.scales
            if entry.architectures is None or cell.architecture in entry.architectures
            for horizon in entry.horizons or self.space.horizons
            if cell.name == _cell_name(cell.architecture, entry, horizon)
        )
        return next(found)

    def stable_run(self, cell: Cell) -> Cell:
        """The cell whose trials make this one's rows: with WSD branches the longest horizon of its
        architecture and scale, else the cell itself."""
        return max(self._same_run(cell), key=lambda c: c.tokens)

    def branches(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells that trials of this one serve besides, shortest horizon first."""
        if cell != self.stable_run(cell):
            return ()
        return tuple(sorted(self._same_run(cell), key=lambda c: c.tokens)[:-1])

    def flops(self, cell: Cell) -> float:
        """Training FLOPs that one row of a cell costs: of a WSD branch, its decay."""
        if cell == self.stable_run(cell):
            return cell.flops
        lent = min(cell.tokens, self.space.recipe.decay_start(cell.tokens))
        return cell.counts.flops_per_token * (cell.tokens - lent)

    def _same_run(self, cell: Cell) -> list[Cell]:
        if not self.space.recipe.branches:
            return [cell]
        place = cell.architecture, cell.scale
        return [c for c in self.cells if (c.architecture, c.scale) == place]

    @property
    def own_data(self) -> str:
        """The name of the data of a user's own training."""
        training = self.space.training
        return (training and training.data) or self.name

    def resolved(self) -> SearchSpace:
        """The search space with every count written out that a size function gave: it can be read
        where the user's code is not."""
        training = self.space.training
        if training is None or training.size is None:
            return self.space
        scales = {}
        for cell in self.cells:
            assert cell.own is not None
            counts = cell.own.counts
            entry = self.entry(cell)
            scales[cell.architecture, self.space.scales.index(entry)] = ScaleEntry(
                name=cell.scale,
                architectures=(cell.architecture,),
                horizons=entry.horizons,
                resources=entry.resources,
                settings=entry.settings or {},
                params_active=counts.params_active_non_embedding,
                params_total=counts.params_total_non_embedding,
                params_dense=cell.params_dense,
                params_embedding=cell.own.params_embedding,
                flops_per_token=counts.flops_per_token,
            )
        given = training.model_copy(update={"size": None})
        return self.space.model_copy(update={"scales": tuple(scales.values()), "training": given})

    def trial(
        self,
        cell: Cell,
        data_hash: str,
        learning_rate: float,
        batch_sequences: int,
        seed: int,
        also: Mapping[str, float] | None = None,
    ) -> TrialSpec:
        """One trial of a cell under the study's recipe. `also` are further hyperparameters."""
        also = {name: float(value) for name, value in sorted((also or {}).items())}
        ours = also if cell.own is None else {}
        return TrialSpec(
            study=self.name,
            cell=cell,
            recipe=self.space.recipe.with_values(ours) if ours else self.space.recipe,
            model=self.space.model,
            data_hash=data_hash,
            validation_sequences=self.space.data.validation_sequences,
            learning_rate=float(learning_rate),
            batch_sequences=int(batch_sequences),
            seed=int(seed),
            validation_sets=self.space.data.validation_sets,
            least_batch_sequences=self.space.search.batch_sequences.low,
            training=self.space.training,
            also=tuple(also.items()),
        )

    def branch_trials(self, spec: TrialSpec) -> list[TrialSpec]:
        """The trials at shorter horizons that a trial runs besides (WSD branches)."""
        point = spec.learning_rate, spec.batch_sequences, spec.seed
        return [self.trial(cell, spec.data_hash, *point) for cell in self.branches(spec.cell)]

    def trial_of(self, config: Mapping[str, Any], data_hash: str) -> TrialSpec:
        """The trial whose `TrialSpec.config` was given, perhaps with more beside it."""
        return self.trial(
            self.cell(config["cell"]),
            data_hash,
            config["learning_rate"],
            config["batch_sequences"],
            config["seed"],
            config.get("also"),
        )


def vocabulary_size(data: Data, folder: Path) -> int:
    """Number of token ids: 256 for bytes, else the tokenizer's or what the file says."""
    if data.source == "tokens":
        assert data.vocab_size is not None
        return data.vocab_size
    if data.tokenizer == "bytes":
        return BYTE_VOCABULARY
    if data.tokenizer.train_vocab_size is not None:
        return data.tokenizer.train_vocab_size
    path = folder / (data.tokenizer.file or "")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder, or a device without end")
        spec = json.loads(path.read_text(encoding="utf-8"))
        ids = list(spec["model"]["vocab"].values()) + [t["id"] for t in spec["added_tokens"]]
        size = int(max(ids)) + 1
        if not 1 <= size <= MAX_TOKEN_IDS:
            raise ValueError("no token ids")
        return size
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} not found: check data.tokenizer.file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is no tokenizers JSON file: save one with Tokenizer.save(path)"
        ) from None


def build_shape(
    entry: ScaleEntry, architecture: Architecture, model: ModelSettings, vocab_size: int
) -> ModelShape:
    """The decoder of one architecture at one scale."""
    if entry.params is not None:
        d_model, layers = derive_width_depth(
            entry.params,
            head_dim=model.head_dim,
            aspect_ratio=model.aspect_ratio,
            ffn_ratio=model.ffn_ratio,
            ffn_multiple=model.ffn_multiple,
        )
        heads = d_model // model.head_dim
        if layers > MAX_LAYERS:
            raise UserError(
                f"params {short(entry.params)} at head_dim {model.head_dim} and aspect_ratio "
                f"{model.aspect_ratio:g} would be {layers} layers: raise one of the latter"
            )
    else:
        assert entry.d_model is not None
        assert entry.layers is not None
        assert entry.heads is not None
        d_model, layers, heads = entry.d_model, entry.layers, entry.heads
    d_ff = entry.d_ff or feed_forward_width(d_model, model.ffn_ratio, model.ffn_multiple)
    expert_ff = 0
    moe_layers: tuple[int, ...] = ()
    if architecture.kind == "moe":
        active = architecture.top_k + architecture.shared_experts
        size = architecture.expert_size
        width = d_ff / active if size == "matched" else d_ff * size
        expert_ff = round_to(width, math.lcm(model.ffn_multiple, EXPERT_MULTIPLE))
        first = architecture.first_dense
        if first >= layers:
            raise UserError(f"first_dense {first} leaves no MoE layer of {layers}: lower it")
        moe_layers = tuple(
            i for i in range(first, layers) if (layers - 1 - i) % architecture.moe_every == 0
        )
    return ModelShape(
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=entry.kv_heads or heads,
        d_ff=d_ff,
        vocab_size=vocab_size,
        sequence_length=model.sequence_length,
        qk_norm=model.qk_norm,
        tie_embeddings=model.tie_embeddings,
        experts=architecture.experts,
        top_k=architecture.top_k,
        shared_experts=architecture.shared_experts,
        expert_ff=expert_ff,
        moe_layers=moe_layers,
    )


def _check_workers(space: SearchSpace, resources: Resources) -> None:
    """Raises UserError where workers would have nothing to do."""
    counts = {"search.batch_sequences.hard_high": space.search.batch_sequences.hard_high}
    if resources.strategy != "ddp":  # workers that share a model evaluate in step
        counts["data.validation_sequences"] = space.data.validation_sequences
    for name, sequences in counts.items():
        if sequences < resources.workers:
            raise UserError(
                f"{name} {sequences} is less than {resources.workers} workers: raise it, or lower "
                "workers"
            )


def _check_command(study: Study, cell: Cell, training: Training) -> None:
    """Raises UserError where the command names what there is not."""
    low = study.space.search.batch_sequences.low
    also = {name: given.low for name, given in study.space.search.also.items()}
    spec = study.trial(cell, "", study.space.search.learning_rate.low, low, 0, also)
    files = [f.file for f in (training.result, training.progress) if f is not None]
    try:
        fill_in([*(training.command or ()), *files], spec.values() | {"folder": ""})
    except UserError as error:
        raise UserError(f"training.command in cell {cell.name}: {error}") from None


def _scale_name(entry: ScaleEntry) -> str:
    shape = f"d{entry.d_model}x{entry.layers}"
    return entry.name or (shape if entry.params is None else short(entry.params))


def _cell_name(architecture: str, entry: ScaleEntry, horizon: Horizon) -> str:
    return f"{architecture}-{_scale_name(entry)}-{horizon.label}"


def _expand(space: SearchSpace, folder: Path) -> tuple[Cell, ...]:
    cells: dict[str, Cell] = {}
    own: dict[tuple[int, str], OwnModel] = {}
    vocab_size = 0
    if space.training is None:
        vocab_size = vocabulary_size(space.data, folder)
    number = sum(
        len(e.architectures or space.architectures) * len(e.horizons or space.horizons)
        for e in space.scales
    )
    if number > MAX_CELLS:
        raise UserError(
            f"the study would have {number} cells, over {MAX_CELLS}: drop scales, architectures or "
            "horizons"
        )
    if space.training is not None:
        length = space.model.sequence_length
        own = own_models(space.training, space.scales, space.architectures, length, folder)
    for index, entry in enumerate(space.scales):
        for name, architecture in space.architectures.items():
            if entry.architectures is not None and name not in entry.architectures:
                continue
            resources = entry.resources or space.resources
            model: ModelShape | OwnModel
            if (index, name) in own:
                model = own[index, name]
                params = model.params_dense
                per_token = model.counts.flops_per_token
            else:
                try:
                    model = build_shape(entry, architecture, space.model, vocab_size)
                    if resources.gpus_per_worker or space.recipe.precision == "bfloat16":
                        model.check_alignment(bytes_each=2)
                    _check_workers(space, resources)
                except UserError as error:
                    raise UserError(f"scales.{index} as {name}: {error}") from None
                params = count(model.dense_twin()).params_active_non_embedding
                per_token = count(model).flops_per_token
            for horizon in entry.horizons or space.horizons:
                tokens = horizon.tokens_of(params, per_token)
                if not model.sequence_length <= tokens < 1e18:
                    raise UserError(
                        f"scales.{index}: a horizon of {short(tokens)} tokens is out of range "
                        f"({model.sequence_length} to 1e18): change horizons"
                    )
                cell = Cell(
                    name=_cell_name(name, entry, horizon),
                    architecture=name,
                    settings=architecture,
                    scale=_scale_name(entry),
                    model=model,
                    tokens=round(tokens),
                    resources=resources,
                )
                if cell.name in cells:
                    raise UserError(
                        f"two cells are called {cell.name}: give the scales different names"
                    )
                cells[cell.name] = cell
    head_dims = sorted({c.shape.head_dim for c in cells.values() if c.own is None})
    if space.recipe.parametrization != "standard" and len(head_dims) > 1:
        raise UserError(  # scores of heads that grow would have to fall
            f"recipe.parametrization {space.recipe.parametrization} wants heads of one size at all "
            f"scales, and they have {', '.join(map(str, head_dims))}: change scales' heads"
        )
    return tuple(sorted(cells.values(), key=_order))


def _order(cell: Cell) -> tuple[float, float, str]:
    """Least compute first; of one budget of FLOPs, which whole tokens only nearly meet, the
    smallest model."""
    return float(f"{cell.flops:.4g}"), float(cell.params_dense), cell.name
