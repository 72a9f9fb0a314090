"""What learns in a run, on one worker: the model, its gradients and its optimizer."""

from __future__ import annotations

import functools
from typing import Any

import torch

from raysweep.data.corpus import Corpus
from raysweep.model import build
from raysweep.study.study import TrialSpec
from raysweep.training import optimizer, runtime
from raysweep.training.evaluate import Evaluation, evaluate
from raysweep.training.parallel import Workers
from raysweep.training.step import BatchGradient, GradientMaker


class Learner:
    """A trial's model and what trains it. There is none before `build`, which may lack memory."""

    def __init__(
        self, spec: TrialSpec, corpus: Corpus, device: torch.device, workers: Workers
    ) -> None:
        self.spec, self.corpus, self.device, self.workers = spec, corpus, device, workers

    def build(self) -> None:
        """Make the model from the seed, spread it over the workers, and choose a micro-batch."""
        spec, device, workers = self.spec, self.device, self.workers
        recipe, shape, resources = spec.recipe, spec.cell.shape, spec.cell.resources
        self.model = build(
            shape,
            spec.cell.settings,
            rope_base=spec.model.rope_base,
            init_std=recipe.init_std,
            z_loss=recipe.z_loss,
            seed=spec.seed,
        ).to(device)
        self.parameters = workers.distribute(self.model)
        self.optimizer = optimizer.build_optimizer(self.parameters, recipe, spec.batch_tokens)
        compiled = runtime.compiles(device, recipe, spec.cell.flops)
        local = spec.batch_sequences // workers.world_size
        micro = runtime.micro_batch(shape, resources, device, local)
        if workers.sharded:  # all must make equally many passes: as many as the fullest device
            micro = -workers.largest(-micro, device)
        self.gradient = GradientMaker(
            model=self.model,
            forward=torch.compile(self.model, dynamic=False) if compiled else self.model,
            parameters=self.parameters,
            tokens=self.corpus.train,
            workers=workers,
            device=device,
            precision=functools.partial(runtime.autocast, device, recipe),
            seed=spec.seed,
            batch_sequences=spec.batch_sequences,
            micro=micro,
        )

    @property
    def micro(self) -> int | None:
        """Sequences at once; None before there is a model."""
        return self.gradient.micro if hasattr(self, "gradient") else None

    def learn(self, step: int, rate: float, *, want_trace: bool) -> BatchGradient:
        """Take the step's batch, and one step of the optimizer at this learning rate."""
        batch = self.gradient(step, want_trace=want_trace)
        limit = self.spec.recipe.clip_norm
        if limit is not None:
            optimizer.clip(self.parameters.gradients(), batch.numbers[1].sqrt(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.model.finish_step()
        return batch

    def evaluate(self) -> Evaluation:
        """Measure the model on the validation slice."""
        return evaluate(
            self.model,
            self.corpus.validation,
            sequences=self.spec.validation_sequences,
            batch_sequences=self.gradient.micro,
            workers=self.workers,
            device=self.device,
            precision=self.gradient.precision,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; all workers must call this (`Workers.gather_state`)."""
        return {
            "micro": self.gradient.micro,
            "sharded": self.workers.sharded,
            "learned": self.workers.gather_state(self.model, self.optimizer),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; all workers must call this."""
        self.gradient.micro = min(state["micro"], self.gradient.micro)
        self.workers.scatter_state(self.model, self.optimizer, state["learned"])
