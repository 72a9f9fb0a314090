"""What learns in a run, on one worker: the model, its gradients and its optimizer."""

from __future__ import annotations

from typing import Any

import torch

from raysweep.data.corpus import Corpus
from raysweep.data.tokens import TokenArray
from raysweep.model import Decoder, Parametrization, build, initialise
from raysweep.model.compiled import make_room
from raysweep.study.spec import TrialSpec
from raysweep.training import memory, optimizer, runtime
from raysweep.training.averaging import Average
from raysweep.training.evaluate import Evaluation, Evaluations, evaluate
from raysweep.training.groups import groups_of
from raysweep.training.muon import cuts_of
from raysweep.training.outcome import WorkerOutOfMemory
from raysweep.training.parallel import Workers
from raysweep.training.step import BatchGradient, GradientAccumulator


class Learner:
    """A trial's model and what trains it. There is none before `build`, which may lack memory."""

    def __init__(
        self, spec: TrialSpec, corpus: Corpus, device: torch.device, workers: Workers
    ) -> None:
        self.spec, self.corpus, self.device, self.workers = spec, corpus, device, workers
        self.compiled = runtime.compiles(device, spec.recipe, spec.cell.flops)

    def build(self) -> None:
        """Make the model from the seed, spread it over the workers, and choose a micro-batch.

        Raises torch.OutOfMemoryError where memory does not suffice for one sequence; several
        workers then raise WorkerOutOfMemory, together.
        """
        spec, device, workers = self.spec, self.device, self.workers
        self._make_model()
        self.optimizer = optimizer.Optimizers(
            self.parameters,
            spec.recipe,
            spec.batch_tokens,
            cuts=cuts_of(self.model),
            muon_dtype=self.model.dtype or torch.float32,
        )
        self.average = None
        if spec.recipe.ema_tokens is not None:
            self.average = Average(self.parameters, spec.recipe.ema_tokens, spec.batch_tokens)
        self.gradient = GradientAccumulator(
            model=self.model,
            parameters=self.parameters,
            tokens=self.corpus.train,
            workers=workers,
            device=device,
            seed=spec.seed,
            batch_sequences=spec.batch_sequences,
            micro=memory.wanted_micro_batch(
                spec, device, workers.world_size, compiled=self.compiled
            ),
        )
        if workers.sharded:  # all must make equally many passes: as many as the fullest device
            self.gradient.micro = workers.smallest(self.gradient.micro, device)
        if device.type == "cuda":
            self._fit_memory()
        make_room((spec.cell.shape, self.gradient.micro, self.model.dtype, spec.recipe.z_loss))

    def _make_model(self) -> None:
        spec, device, workers = self.spec, self.device, self.workers
        recipe, shape = spec.recipe, spec.cell.shape
        options: dict[str, Any] = {"rope_base": spec.model.rope_base, "z_loss": recipe.z_loss}
        drawn: dict[str, Any] = {
            "parametrization": Parametrization.of(recipe, shape),
            "seed": spec.seed,
            "threads": spec.cell.resources.threads,
        }
        if workers.sharded:  # no worker ever holds more of it than its own part
            with torch.device("meta"):
                self.model = Decoder(shape, spec.cell.settings, **options)
        else:
            self.model = build(shape, spec.cell.settings, **options, **drawn, device=device)
        self.model.dtype = runtime.compute_dtype(device, recipe)
        self.model.compiled = self.compiled
        self.parameters = workers.distribute(self.model, device, groups_of(spec))
        if workers.sharded:
            self.model.reset_buffers()
            initialise(self.model, **drawn)

    def _fit_memory(self) -> None:
        """Try on this device what it has memory for, beside weights, moments and gradients."""
        spec, device, workers, model = self.spec, self.device, self.workers, self.model
        held = float(sum(value.nbytes for value in self.parameters.values()))
        reserve = held * spec.recipe.noise_scale  # it keeps a copy of the gradient
        tried = model
        if workers.sharded:
            reserve += held  # of the gradient, which there is not yet
            tried, extra = memory.stand_in(model, device)
            reserve += extra
        share = spec.cell.resources.gpus_per_worker
        wanted = max(
            1, min(self.gradient.micro, memory.guess(model.shape, memory.free_bytes(device, share)))
        )
        wanted = runtime.floor_power_of_two(wanted) if wanted < self.gradient.micro else wanted

        def attempt(micro: int, recompute: bool) -> bool:
            tried.recompute = recompute
            passed = memory.passes(tried, micro, reserve, device)
            tried.zero_grad() if tried is not model else self.parameters.zero()
            tried.expert_load.zero_()
            torch.cuda.empty_cache()
            return passed

        found = memory.fit(
            workers.smallest(wanted, device),
            model.shape.sequence_length,
            attempt,
            lambda number: workers.smallest(number, device),
        )
        if not found.micro and workers.world_size > 1:
            raise WorkerOutOfMemory(
                f"{workers.world_size} workers have no memory for one sequence each: "
                + ("raise resources.workers" if workers.sharded else "set strategy to fsdp")
            )
        if not found.micro:
            raise torch.OutOfMemoryError("no memory for one sequence")
        self.gradient.micro, model.recompute = found.micro, found.recompute

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
        self.optimizer.step(rate)
        if self.average is not None:
            self.average.add(step + 1)
        self.model.finish_step()
        return batch

    def evaluate(self) -> Evaluations:
        """Measure the model on the validation slice, and on those of the named sets."""
        main, averaged = self._evaluate(self.corpus.validation), None
        names = self.spec.validation_sets
        named = {
            name: self._evaluate(self.corpus.named_validation(name)) if place else main
            for place, name in enumerate(names)
        }
        if self.average is not None:
            if self.workers.sharded:
                self.workers.reshard(self.model)
            with self.average.in_place():
                averaged = self._evaluate(self.corpus.validation)
                if self.workers.sharded:
                    self.workers.reshard(self.model)
        return Evaluations(main, averaged, named)

    def _evaluate(self, tokens: TokenArray) -> Evaluation:
        return evaluate(
            self.model,
            tokens,
            sequences=self.spec.validation_sequences,
            batch_sequences=self.gradient.micro,
            workers=self.workers,
            device=self.device,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this worker: views, not copies."""
        return {
            "micro": self.gradient.micro,
            "buffers": self.model.routing_state(),
            "parts": self.parts(),
        }

    def parts(self) -> optimizer.Parts:
        """What this worker holds of weights, moments and averages: views, to be read or written."""
        values = self.parameters.named(self.parameters.values())
        return {
            **{f"value/{name}": part for name, part in values.items()},
            **self.parameters.moments(self.optimizer),
            **(self.average.parts() if self.average is not None else {}),
        }

    def load(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state` returned after `step` steps."""
        self.gradient.micro = min(state["micro"], self.gradient.micro)
        if self.workers.sharded:
            self.workers.reshard(self.model)
        buffers = self.model.routing_state()
        with torch.no_grad():
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
            for name, (_, part) in self.parts().items():
                part.copy_(state["parts"][name][1])
        self.optimizer.set_step(step)
