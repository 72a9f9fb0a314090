"""Keys of the search-space file for a user's own training code, and what is known of its models."""

from __future__ import annotations

import difflib
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from raysweep.errors import UserError
from raysweep.study.fields import Positive, Section
from raysweep.study.shape import Counts
from raysweep.text import read_number, short

if TYPE_CHECKING:
    from raysweep.study.cells import Architecture, ScaleEntry

SIZE_KEYS = (
    "params",
    "params_active",
    "params_total",
    "params_dense",
    "params_embedding",
    "flops_per_token",
)
"""What a scale, or a size function, says of a model."""
TOLD = (
    *("learning_rate", "batch_tokens", "batch_sequences", "sequence_length", "tokens", "steps"),
    *("seed", "cell", "scale", "architecture", "workers", "gpus"),
)
"""What `TrialSpec.values` tells of every trial, beside its settings."""
SIZES_SECONDS = 300.0
"""What counting the models of a study may take."""
CONTRADICTION = 2.0
"""Parameters and FLOPs that differ by more than this factor from what belongs together."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
MARK = "sizes: "
"""Begins the line that the process which counts models prints its answer on."""

FunctionName = Annotated[
    str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["my_lab.train:train"])
]
"""A Python function, as `module:function`; the module lies beside the search-space file, in the
current folder, or is installed."""
_Word = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v)]
Settings = dict[str, JsonValue]


class CommandResult(Section):
    """Where a command leaves its result: a JSON file, or one of JSON lines, whose last counts."""

    file: str
    """Its path, in which `{folder}` stands for the trial's folder."""
    loss: str = "loss"
    """Key of the final validation loss, nats a token; dots lead into mappings."""


class CommandProgress(Section):
    """A file of JSON lines that a command writes its progress to."""

    file: str
    tokens: str = "tokens"
    """Key of the tokens done."""
    loss: str = "loss"
    """Key of the training loss."""


class Training(Section):
    """Your own training code in place of raysweep's models: a function, a command, or none here, as
    trials are trained elsewhere."""

    function: FunctionName | None = None
    """`module:function`, called as `train(run)` with a `raysweep.TrialRun`. It returns the final
    validation loss in nats a token, or a mapping with `loss` and further columns."""
    command: Annotated[tuple[_Word, ...], Field(min_length=1)] | None = None
    """A program and its arguments, run in the folder of the search-space file. In them
    `{learning_rate}`, `{batch_tokens}`, `{batch_sequences}`, `{sequence_length}`, `{tokens}`,
    `{steps}`, `{seed}`, `{folder}`, `{workers}`, `{gpus}`, `{cell}`, `{scale}`, `{architecture}`
    and every setting stand for the trial's; double braces for a brace."""
    external: bool = False
    """Trials are trained elsewhere: `raysweep ask` hands them out, `raysweep tell` takes losses."""
    result: CommandResult | None = None
    """Where the command leaves its loss."""
    progress: CommandProgress | None = None
    """Where the command tells its progress, if it does."""
    size: FunctionName | None = None
    """A function that is given a scale's settings and returns its counts, a mapping of the keys
    that a scale may have (`params`, `flops_per_token`, ...), or the model itself, a
    torch.nn.Module best built on the meta device, whose parameters and FLOPs are counted."""
    settings: Settings = Field(default={})
    """Settings that all scales share, such as the optimizer: part of the recipe of each row."""
    timeout: Positive | None = None
    """Seconds after which a trial is ended, and counts as crashed. Without it, one that has
    reported progress is given up once it has been silent for six times `search.stall_seconds`; one
    that has not is waited for."""
    data: str | None = None
    """Name of the data that the loss is measured on: studies of one name are fitted together.
    Default: the study's own."""
    keep_folders: bool = False
    """Keep the folder of a trial that has finished; else it is removed once its row stands."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [self.function is not None, self.command is not None, self.external]
        if sum(given) != 1:
            raise ValueError("training is one of function, command and external: true")
        if self.command is not None and self.result is None:
            raise ValueError(
                "a command needs result: {file: ..., loss: KEY}, where it leaves its loss"
            )
        if self.command is None and (self.result or self.progress):
            raise ValueError("result and progress belong to a command")
        if self.external and self.timeout:
            raise ValueError("timeout belongs to a function or a command")
        return self

    @property
    def name(self) -> str:
        """The function, the command as JSON, or `external`: part of a trial's key."""
        return self.function or json.dumps(self.command) if not self.external else "external"

    @property
    def taken(self) -> tuple[str, ...]:
        """Names that stand for something of the trial: in a command, in what `ask` prints."""
        own = ("folder",) if self.command is not None else ("id",) if self.external else ()
        return (*TOLD, *own)


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """One architecture at one scale of a user's own training: its settings and counts."""

    settings: Mapping[str, Any]
    """Of the study, the architecture and the scale together."""
    sequence_length: int
    experts: int
    top_k: int
    counts: Counts
    """NaN stands for what is not known: counts with embeddings."""
    params_dense: float
    params_embedding: float | None
    one_process: bool
    """Whether one process takes the resources of all workers, and starts them itself (a
    command)."""

    @property
    def words(self) -> str:
        """Its settings, for tables."""
        return " ".join(f"{k}={v}" for k, v in self.settings.items())


def own_models(
    training: Training,
    scales: Sequence[ScaleEntry],
    architectures: Mapping[str, Architecture],
    sequence_length: int,
    folder: Path,
) -> dict[tuple[int, str], OwnModel]:
    """The models of every scale and architecture, by (index of the scale, architecture).

    Raises UserError where counts are missing, contradict each other, or cannot be had from the
    size function.
    """
    places = [
        (index, name)
        for index, entry in enumerate(scales)
        for name in architectures
        if entry.architectures is None or name in entry.architectures
    ]
    settings = {
        (index, name): _settings(training, architectures[name], scales[index])
        for index, name in places
    }
    counted: dict[tuple[int, str], Mapping[str, float]] = {place: {} for place in places}
    if training.size is not None:
        asked = [settings[place] for place in places]
        found = count_models(training.size, asked, sequence_length, folder)
        counted = dict(zip(places, found, strict=True))
    models = {}
    for index, name in places:
        try:
            models[index, name] = _model(
                training,
                architectures[name],
                _merged(scales[index], counted[index, name]),
                settings[index, name],
                sequence_length,
                exact=bool(counted[index, name].get("exact")),
            )
        except UserError as error:
            raise UserError(f"scales.{index} as {name}: {error}") from None
    return models


def _settings(training: Training, architecture: Architecture, entry: ScaleEntry) -> dict[str, Any]:
    routed = {"experts": architecture.experts, "top_k": architecture.top_k}
    return {
        **training.settings,
        **(routed if architecture.experts > 1 else {}),
        **architecture.settings,
        **(entry.settings or {}),
    }


def _merged(entry: ScaleEntry, counted: Mapping[str, float]) -> dict[str, float]:
    """What the file says and what was counted; where both do they must agree."""
    merged = {k: float(v) for k, v in counted.items() if k in SIZE_KEYS}
    for key in SIZE_KEYS:
        given = getattr(entry, key)
        if given is None:
            continue
        other = merged.get(key)
        if other is not None and not 1 / CONTRADICTION <= given / other <= CONTRADICTION:
            raise UserError(
                f"{key} {short(given)} in the file, and {short(other)} by training.size: correct "
                "the one, or leave it out"
            )
        merged[key] = float(given)
    return merged


def _model(
    training: Training,
    architecture: Architecture,
    sizes: Mapping[str, float],
    settings: Mapping[str, Any],
    sequence_length: int,
    *,
    exact: bool,
) -> OwnModel:
    active = sizes.get("params_active", sizes.get("params"))
    if active is None:
        what = "params" if architecture.experts == 1 else "params_active"
        raise UserError(
            f"{what} (non-embedding parameters) is missing: give it for the scale, or return it "
            "from a training.size function"
        )
    params = sizes.get("params", active)
    if architecture.experts == 1 and not 1 / CONTRADICTION <= params / active <= CONTRADICTION:
        raise UserError(
            f"params {short(params)} and params_active {short(active)} are one number of a dense "
            "model: correct the one, or leave it out"
        )
    total = sizes.get("params_total", active if architecture.experts == 1 else None)
    if total is None:
        raise UserError("params_total (non-embedding, all experts) is missing: give it")
    if total < active:
        raise UserError(
            f"params_total {short(total)} is below the active {short(active)}: correct one"
        )
    if total > CONTRADICTION * active * architecture.experts / architecture.top_k:
        routed = f"{architecture.experts} experts of which {architecture.top_k} are active"
        raise UserError(
            f"params_total {short(total)} is {_times(total / active)} the active {short(active)}, "
            f"too many for {'a dense model' if architecture.experts == 1 else routed}: correct "
            "one, or the architecture's experts and top_k"
        )
    embedding, flops = sizes.get("params_embedding"), sizes.get("flops_per_token")
    if flops is None:
        raise UserError(
            "flops_per_token (forward and backward) is missing: give it for the scale, or return "
            f"it from a training.size function; 6 N is {6 * active:.3g}, and the output head and "
            "attention come on top"
        )
    if not exact:
        _check_flops(active, embedding, flops, sequence_length)
    return OwnModel(
        settings=settings,
        sequence_length=sequence_length,
        experts=architecture.experts,
        top_k=architecture.top_k,
        counts=Counts(
            params_total=total + (math.nan if embedding is None else embedding),
            params_active=active + (math.nan if embedding is None else embedding),
            params_total_non_embedding=total,
            params_active_non_embedding=active,
            flops_per_token=flops,
        ),
        params_dense=sizes.get("params_dense", active),
        params_embedding=embedding,
        one_process=training.command is not None,
    )


def _check_flops(active: float, embedding: float | None, flops: float, length: int) -> None:
    """Raises UserError where FLOPs a token cannot be those of a transformer of that size.

    From 6 N to 6 (N + embedding and head) and attention over the whole sequence, whose share is
    that of a model 64 times as wide as deep: 12 d^2 parameters and 12 T d FLOPs a layer.
    """
    width = (64 * active / 12) ** (1 / 3)
    low = 6 * active / CONTRADICTION
    high = CONTRADICTION * (6 * (active + (embedding or 0.0)) + active * length / width)
    if low <= flops <= high:
        return
    more = "" if flops < low or embedding is not None else ", or give params_embedding"
    raise UserError(
        f"flops_per_token {flops:.3g} is {_times(flops / (6 * active))} 6 N of {short(active)} "
        f"parameters: correct one{more}; FLOPs are of one token, forward and backward"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.2g} times"


def count_models(
    function: str, settings: Sequence[Mapping[str, Any]], sequence_length: int, folder: Path
) -> list[dict[str, float]]:
    """What a size function says of models, by `SIZE_KEYS`; `exact` where FLOPs were counted.

    It runs in a process of its own, so that no user's import stays here. Raises UserError.
    """
    asked = {
        "function": function,
        "settings": list(settings),
        "sequence_length": sequence_length,
        "folder": str(folder),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "raysweep.training.sizes"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=SIZES_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"training.size {function} took longer than {SIZES_SECONDS:g} s: build the model on "
            "the meta device"
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    answer = json.loads(lines[-1].removeprefix(MARK)) if lines else {}
    if "models" in answer:
        return answer["models"]
    said = done.stderr.strip().splitlines()
    raise UserError(answer.get("error") or f"training.size {function}: {said[-1:] or 'it died'}")


def read_sizes(given: Any) -> dict[str, float]:
    """The mapping that a size function returned, checked. Raises UserError."""
    if not isinstance(given, Mapping):
        raise UserError(
            f"it returned {'None' if given is None else type(given).__name__}: return a mapping "
            "with params and flops_per_token, or a torch.nn.Module"
        )
    found = {}
    for key, value in given.items():
        if key not in SIZE_KEYS:
            near = difflib.get_close_matches(str(key), SIZE_KEYS, n=1, cutoff=0.45)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SIZE_KEYS)}"
            raise UserError(f"it returned the unknown key {key!r}: {hint}")
        found[key] = read_number(value, key)
        if not (math.isfinite(found[key]) and found[key] > 0):
            raise UserError(f"it returned {key} {value}: it must be positive")
    return found


def fill_in(words: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Words with `{name}` replaced by values, `{{` and `}}` by single braces.

    Raises UserError for a name that is not among the values."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"known: {', '.join(values)}"
            raise UserError(f"{{{name}}} stands for nothing: {hint}")
        found = values[name]
        return found if isinstance(found, str) else json.dumps(found)

    filled = []
    for word in words:
        text = word.replace("{{", "\0").replace("}}", "\1")
        filled.append(_PLACEHOLDER.sub(value, text).replace("\0", "{").replace("\1", "}"))
    return filled
