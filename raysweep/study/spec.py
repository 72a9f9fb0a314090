"""What is trained: a cell of a study, and one trial in it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from raysweep.study.cells import Architecture, ModelSettings, Resources
from raysweep.study.own import OwnModel, Training
from raysweep.study.shape import Counts, ModelShape, RunSize, count
from raysweep.study.trials import Recipe


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One scale of one architecture at one horizon: where one optimum exists."""

    name: str
    architecture: str
    settings: Architecture
    scale: str
    model: ModelShape | OwnModel
    tokens: int
    """The horizon D."""
    resources: Resources

    @property
    def shape(self) -> ModelShape:
        """The decoder's shape; only cells of raysweep's own models have one."""
        assert isinstance(self.model, ModelShape), self.name
        return self.model

    @property
    def own(self) -> OwnModel | None:
        """The user's model where their own code trains it, else None."""
        return self.model if isinstance(self.model, OwnModel) else None

    @property
    def sequence_length(self) -> int:
        return self.model.sequence_length

    @property
    def counts(self) -> Counts:
        return self.model.counts if isinstance(self.model, OwnModel) else count(self.model)

    @property
    def params_dense(self) -> float:
        """Non-embedding parameters of the dense twin: the N that dense and MoE share."""
        if isinstance(self.model, OwnModel):
            return self.model.params_dense
        return count(self.model.dense_twin()).params_active_non_embedding

    @property
    def in_group(self) -> bool:
        """Whether its trials run on several workers that Ray Train keeps together."""
        return self.resources.workers > 1 and not (self.own and self.own.one_process)

    @property
    def flops(self) -> float:
        """Training FLOPs of one trial."""
        return self.counts.flops_per_token * self.tokens

    @cached_property
    def size(self) -> RunSize:
        """The run's size: the inputs of the laws."""
        counts = self.counts
        return RunSize(
            params_active_non_embedding=counts.params_active_non_embedding,
            tokens=self.tokens,
            experts=self.model.experts,
            top_k=self.model.top_k,
            params_total_non_embedding=counts.params_total_non_embedding,
            params_active=counts.params_active,
            params_total=counts.params_total,
            params_dense=self.params_dense,
            head_params=math.nan if self.own else self.shape.d_model * self.shape.vocab_size,
            flops=self.flops,
            name=self.name,
        )


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One training run: everything that determines its result."""

    study: str
    cell: Cell
    recipe: Recipe
    model: ModelSettings
    data_hash: str
    validation_sequences: int
    """Of raysweep's models: a user's own code measures the loss by itself."""
    learning_rate: float
    batch_sequences: int
    seed: int
    validation_sets: tuple[str, ...] = ()
    """Names of the validation sets, that of `loss` first. (The data's hash knows them.)"""
    least_batch_sequences: int | None = None
    """The smallest batch searched in the cell, for its trials to share one micro-batch, and so one
    compiled graph."""
    training: Training | None = None
    """The user's own code, if that trains it."""
    also: tuple[tuple[str, float], ...] = ()
    """Further hyperparameters that are searched; of raysweep's models they are in the recipe."""

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.cell.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps: the horizon in whole batches, at least one."""
        return max(1, round(self.cell.tokens / self.batch_tokens))

    @property
    def horizon(self) -> int:
        """The tokens of its steps together."""
        return self.steps * self.batch_tokens

    @property
    def key(self) -> str:
        """A hash of what determines the result: the study's name and the resources do not. Of
        a user's own code, its name and settings stand for it."""
        parts = self._determined() if self.training is None else self._own_determined()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def config(self) -> dict[str, Any]:
        """Plain values from which `Study.trial_of` makes it again."""
        place = {
            "cell": self.cell.name,
            "learning_rate": self.learning_rate,
            "batch_sequences": self.batch_sequences,
            "seed": self.seed,
        }
        return place | ({"also": dict(self.also)} if self.also else {})

    def recipe_values(self) -> dict[str, Any]:
        """How the model is trained, as plain values: what a row keeps as its recipe."""
        if self.training is None:
            return self.recipe.record()
        return {"training": self.training.name, **self.training.settings, **dict(self.also)}

    def values(self) -> dict[str, Any]:
        """What a user's command or another scheduler is told of the trial, by name."""
        cell = self.cell
        return {
            **(cell.own.settings if cell.own else {}),
            **dict(self.also),
            "learning_rate": self.learning_rate,
            "batch_tokens": self.batch_tokens,
            "batch_sequences": self.batch_sequences,
            "sequence_length": cell.sequence_length,
            "tokens": cell.tokens,
            "steps": self.steps,
            "seed": self.seed,
            "cell": cell.name,
            "scale": cell.scale,
            "architecture": cell.architecture,
            "workers": cell.resources.workers,
            "gpus": int(cell.resources.gpus_per_worker * cell.resources.workers),
        }

    def _point(self) -> dict[str, Any]:
        return {
            "tokens": self.cell.tokens,
            "data": self.data_hash,
            "learning_rate": f"{self.learning_rate:.9e}",
            "batch_sequences": self.batch_sequences,
            "seed": self.seed,
        }

    def _own_determined(self) -> dict[str, Any]:
        assert self.training is not None
        assert self.cell.own is not None
        own = {
            "training": self.training.name,
            "architecture": self.cell.architecture,
            "scale": self.cell.scale,
            "settings": dict(self.cell.own.settings),
            "sequence_length": self.cell.sequence_length,
        }
        if self.also:
            own["also"] = [[name, f"{value:.9e}"] for name, value in self.also]
        return self._point() | own

    def _determined(self) -> dict[str, Any]:
        recipe = self.recipe.record()
        for name in ("branches", "checkpoint_seconds", "compile", "noise_scale"):
            del recipe[name]
        settings = self.cell.settings.model_dump(
            include={"balance", "balance_loss", "router_z_loss"}
        )
        if self.cell.settings.scores != "softmax":
            settings["scores"] = self.cell.settings.scores
        if self.cell.settings.balance == "bias":
            settings["bias_motion"] = "by tokens"
        if self.cell.settings.route_scale != 1:
            settings["route_scale"] = self.cell.settings.route_scale
        if recipe["weight_decay"] and self.recipe.weight_decay_on is None:
            recipe["weight_decay_on"] = "all matrices but embedding and routers"
        return {
            **self._point(),
            "shape": asdict(self.cell.shape),
            "rope_base": self.model.rope_base,
            "routing": settings if self.cell.shape.is_moe else None,
            "recipe": recipe,
            "validation_sequences": self.validation_sequences,
        }
