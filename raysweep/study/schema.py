"""The search-space file as typed, validated objects: every key, its meaning, its default."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, model_validator

from raysweep.study.cells import Architecture, Horizon, ModelSettings, Resources, ScaleEntry
from raysweep.study.fields import Count, Name, NonNegative, Positive, Section, Size, TokenIds
from raysweep.study.own import Training
from raysweep.study.serving import ServingSettings
from raysweep.study.trials import Recipe, Search


class Tokenizer(Section):
    """A byte-pair tokenizer trained on the corpus, or one loaded from a tokenizers file."""

    train_vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.train_vocab_size is None) == (self.file is None):
            raise ValueError("a tokenizer is either file or train_vocab_size")
        return self


class Data(Section):
    """What is trained on."""

    source: Literal["machine", "text", "jsonl", "parquet", "tokens"] = "machine"
    """`machine`: the Python sources and documentation installed here. The others read `paths`."""
    paths: tuple[str, ...] = ()
    """Files or folders; a relative path is taken from the search-space file's folder."""
    text_column: str = "text"
    tokenizer: Literal["bytes"] | Tokenizer = "bytes"
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of existing token shards (`source: tokens`)."""
    vocab_size: TokenIds | None = None
    """Needed with `source: tokens`; otherwise the tokenizer's."""
    validation_paths: tuple[str, ...] = ()
    """Held-out files; default: a share of the documents chosen by hash."""
    validation: dict[Name, tuple[str, ...]] = Field(default={})
    """Several validation sets by name: the files or folders of each; none ([]) for a share of the
    corpus, as without. Each gives the columns `loss.NAME` and `loss_se.NAME`."""
    minimise: Name | None = None
    """The named set that gives a trial's `loss`, which the search minimises; default: the first."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    validation_sequences: Count = 4096
    """Size of the one validation slice that all trials of a study are measured on. Losses of texts
    of a thousand tokens scatter by about .3 nats, so 4,096 of them leave a standard error of .005,
    below the .2 % by which another seed moves a loss of 3."""
    max_megabytes: Positive | None = None
    """Stop reading the corpus after this much text."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source != "machine" and not self.paths:
            raise ValueError(f"data source {self.source} needs paths")
        if self.source == "machine" and self.paths:
            raise ValueError(
                "data source machine takes no paths: set source to text, or drop paths"
            )
        if self.validation and self.validation_paths:
            raise ValueError("validation and validation_paths exclude each other: drop one")
        if sum(not paths for paths in self.validation.values()) > 1:
            raise ValueError("only one set of validation can be a share of the corpus ([])")
        if self.minimise is not None and self.minimise not in self.validation:
            known = ", ".join(self.validation) or "none"
            raise ValueError(f"minimise {self.minimise!r} is no set of validation: {known}")
        if self.source == "tokens" and self.vocab_size is None:
            raise ValueError("data source tokens needs vocab_size")
        if self.source != "tokens" and self.vocab_size is not None:
            raise ValueError("vocab_size follows from the tokenizer: drop it")
        return self

    @property
    def validation_sets(self) -> tuple[str, ...]:
        """Names of the validation sets, that which is minimised first; none if there is only one
        set, without a name."""
        return tuple(sorted(self.validation, key=lambda name: name != self.minimise))

    @property
    def held_out(self) -> tuple[tuple[str, ...], ...]:
        """Files and folders of each validation set, in that order; () for a share of the corpus."""
        return tuple(self.validation[n] for n in self.validation_sets) or (self.validation_paths,)


class Target(Section):
    """A run that the report recommends for."""

    architecture: Name
    params: Size
    """Active non-embedding parameters."""
    tokens: Size


LawKey = Literal[
    "step_law",
    "openeurollm",
    "deepseek",
    "moonlight",
    "porian",
    "bjorck",
    "kaplan",
    "mm1",
    "ling",
    "ling_sparsity",
    "ludziejewski",
    "marin_delphi",
    "marin_grug",
    "schaipp",
    "minicpm",
    "power_lines",
    "zhang",
    "merrill",
    "nanochat",
]
"""Keys of `raysweep.scaling.optima.literature.PUBLISHED_LAWS`."""


class SearchSpace(Section):
    """One search-space file: a study."""

    study: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    architectures: Annotated[dict[Name, Architecture], Field(min_length=1)] = Field(
        default={"dense": Architecture()}
    )
    scales: Annotated[tuple[ScaleEntry, ...], Field(min_length=1)]
    horizons: tuple[Horizon, ...] = ()
    """Of every scale that names none of its own."""
    model: ModelSettings = ModelSettings()
    search: Search = Search()
    training: Training | None = None
    """Your own training code; default: raysweep's models, trained by `recipe` on `data`."""
    recipe: Recipe = Recipe()
    data: Data = Data()
    resources: Resources = Resources()
    price_per_gpu_hour: NonNegative | None = None
    """What an hour of one GPU costs, in any currency: `status` then tells what a study costs."""
    targets: tuple[Target, ...] = ()
    serving: ServingSettings = ServingSettings()
    literature: Annotated[tuple[LawKey, ...], Field(min_length=1)] | None = None
    """The published laws that the search and the fits start from; default: all."""
    without: tuple[LawKey, ...] = ()
    """Published laws that the search and the fits leave out."""
    logging: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the progress of trials goes besides the results: TensorBoard events in the results
    folder; Weights & Biases and MLflow, where installed, as their own variables say."""

    def as_yaml(self) -> str:
        """All of it, defaults included, as a file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @model_validator(mode="after")
    def _branches_run_to_their_end(self) -> Self:
        if self.recipe.branches and self.search.early_stopping is not None:
            raise ValueError("recipe.branches and search.early_stopping exclude each other")
        return self

    @model_validator(mode="after")
    def _further_ones_are_known(self) -> Self:
        """Names and ranges of `search.also`."""
        if self.search.also and self.recipe.branches:
            raise ValueError("recipe.branches and search.also exclude each other")
        for name, given in self.search.also.items():
            if self.training is None:
                for value in (given.low, given.high):
                    try:
                        self.recipe.with_values({name: value})
                    except ValueError as error:
                        said = str(error).splitlines()
                        reason = said[2].strip() if len(said) > 2 else said[0]
                        raise ValueError(f"search.also.{name} {value:g}: {reason}") from None
        return self

    @model_validator(mode="after")
    def _no_name_stands_for_two(self) -> Self:
        """A function gets its settings apart from the rest; in a command, and by `ask`, what is
        told of every trial would stand in place of a setting."""
        training = self.training
        if training is None:
            return self
        sections = {"search.also": list(self.search.also)}
        if training.function is None:
            sections["training.settings"] = list(training.settings)
            for name, architecture in self.architectures.items():
                sections[f"architectures.{name}.settings"] = list(architecture.settings)
            for index, entry in enumerate(self.scales):
                sections[f"scales.{index}.settings"] = list(entry.settings or ())
        for section, names in sections.items():
            for name in names:
                if name in training.taken:
                    raise ValueError(
                        f"{section}.{name}: every trial has a {name} already: give it another name"
                    )
        return self

    @model_validator(mode="after")
    def _ours_or_own(self) -> Self:
        """What belongs to raysweep's models, and what to a user's training."""
        if self.training is None:
            for index, entry in enumerate(self.scales):
                if entry.is_own:
                    raise ValueError(
                        f"scale {index} has settings or counts of your own models: say who trains "
                        "them, training: {function: module:function}"
                    )
            return self
        for index, entry in enumerate(self.scales):
            if entry.d_model is not None:
                raise ValueError(
                    f"scale {index}: with training, d_model and the like are yours to read: give "
                    "them under settings"
                )
            if entry.name is None and entry.params is None:
                raise ValueError(f"scale {index} needs a name")
        length = self.model.sequence_length
        ours = {
            "recipe": self.recipe != Recipe(),
            "data": self.data != Data(),
            "model": self.model != ModelSettings(sequence_length=length),
        }
        for section, given in ours.items():
            if given:
                kept = ", but for sequence_length" if section == "model" else ""
                raise ValueError(
                    f"{section} is of raysweep's own models{kept}: with training, give it under "
                    "training.settings"
                )
        return self

    @model_validator(mode="after")
    def _every_scale_has_horizons(self) -> Self:
        if not self.horizons and any(scale.horizons is None for scale in self.scales):
            raise ValueError("horizons is missing: add it, or give each scale its own")
        return self

    @model_validator(mode="after")
    def _head_of_its_own(self) -> Self:
        if self.recipe.parametrization != "standard" and self.model.tie_embeddings:
            raise ValueError(
                f"recipe.parametrization {self.recipe.parametrization} has rates of their own for "
                "embedding and head: set model.tie_embeddings to false"
            )
        return self

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        known = ", ".join(self.architectures)
        named = [
            (f"scale {i}", a) for i, s in enumerate(self.scales) for a in s.architectures or ()
        ]
        named += [(f"target {i}", t.architecture) for i, t in enumerate(self.targets)]
        if isinstance(self.serving.reference, str):
            named.append(("serving.reference", self.serving.reference))
        for where, architecture in named:
            if architecture not in self.architectures:
                raise ValueError(f"{where} names architecture {architecture!r}; known: {known}")
        return self
