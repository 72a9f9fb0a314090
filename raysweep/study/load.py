"""Reading a search-space file: safe YAML, overrides, and errors that name file, line and mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raysweep.errors import UserError
from raysweep.study.schema import SearchSpace

MAX_FILE = 50_000
"""Bytes: shipped files have about a thousand, and safe YAML is slow."""
DEEPEST_NESTING = 20
MAX_ERRORS = 100
"""Errors of one file that are looked at to choose the one to show."""

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses aliases and depth: no search space needs them, both can explode."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        problem = None
        if self.check_event(yaml.AliasEvent):
            problem = "aliases are not allowed"
        elif self.depth > DEEPEST_NESTING:
            problem = "nested too deeply: flatten it"
        if problem:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def load_search_space(path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> SearchSpace:
    """The validated search space in `path`, with overrides: {"dotted.key": value}, or texts
    `dotted.key=value`.

    Raises UserError: one line with file and line number, or the override; culprit and mend.
    """
    text = _read(path)
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a search space is a mapping that starts with 'study: NAME'")
    given = overrides.items() if isinstance(overrides, Mapping) else map(_override, overrides)
    changed: dict[tuple[str, ...], Any] = {}
    for dotted, value in given:
        changed[_apply(values, dotted, value)] = value
    return check(values, str(path), lines, changed)


def check(
    values: Any,
    source: str,
    lines: Mapping[Location, int] | None = None,
    changed: Mapping[tuple[str, ...], Any] | None = None,
) -> SearchSpace:
    """The search space that plain values are, of a source with lines or without.

    Raises UserError: one line with the source, culprit and mend."""
    try:
        return SearchSpace.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, source, values, lines or {}, changed or {})) from None


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Location, int]]:
    """Plain values of a YAML text, and the 1-based line on which each of them stands."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Location, int] = {}
            _index(node, (), lines, source)
            return (loader.construct_document(node) if node is not None else None), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: not valid YAML: {reason}") from None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:  # a size asked for first would be 0 for a device or a pipe
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise UserError(f"{path} is over {MAX_FILE} bytes: that is no search-space file")
        return data.decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise UserError(f"search-space file {path} not found: {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 YAML") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {reason}") from None


def _siblings(path: Path) -> list[Path]:
    try:
        return [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")]
    except OSError:
        return []


def _index(node: Any, at: Location, lines: dict[Location, int], source: str) -> None:
    """Record each value's line; refuse duplicate keys, which YAML would silently overwrite."""
    if node is None:
        return
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*at, str(key_node.value))
            if key in lines:
                raise UserError(
                    f"{source}:{key_node.start_mark.line + 1}: {key[-1]!r} is given twice "
                    f"(first on line {lines[key]}): remove one"
                )
            lines[key] = key_node.start_mark.line + 1
            _index(value_node, key, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _index(item, (*at, i), lines, source)


def _override(text: str) -> tuple[str, Any]:
    """The key and the value, read as YAML, of `dotted.key=value`."""
    dotted, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r}: write it as key.subkey=value")
    return dotted, parse_yaml(value, f"--set {dotted}")[0]


def _apply(values: dict[str, Any], dotted: str, value: Any) -> tuple[str, ...]:
    """Set the value at a dotted key, whose parts are returned; numbers index lists."""
    keys = dotted.strip().split(".")
    if not all(keys):
        raise UserError(f"--set {dotted!r}: write it as key.subkey=value")
    target: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                raise UserError(f"--set {dotted}: {key!r} is no index of {len(target)} entries")
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
        else:
            raise UserError(f"--set {dotted}: {'.'.join(keys[:depth])} holds a single value")
        if last:
            target[index] = value
        elif isinstance(target, list):
            target = target[index]
        else:
            target = target.setdefault(index, {})
            if target is None:
                raise UserError(f"--set {dotted}: {'.'.join(keys[: depth + 1])} is empty")
    return tuple(keys)


def _explain(
    error: ValidationError,
    source: str,
    values: Any,
    lines: Mapping[Location, int],
    changed: Mapping[tuple[str, ...], Any],
) -> str:
    """The first error in one line; how many more there are."""
    found: dict[Location, Any] = {}
    for item in error.errors(include_url=False)[:MAX_ERRORS]:
        at = _locate(tuple(item["loc"]), values)
        # A union reports once for each of its members: keep the most telling one a place.
        root = next((k for k in found if at[: len(k)] == k or k[: len(at)] == at), None)
        if root is None:
            found[at] = item
        elif _RANK.get(item["type"], 1) < _RANK.get(found[root]["type"], 1):
            del found[root]
            found[at] = item
    # An unknown key first: what it was meant to be is often what is missing.
    (where, item), *others = sorted(found.items(), key=lambda f: _RANK.get(f[1]["type"], 1))
    dotted = ".".join(str(part) for part in where)
    blamed = _blamed(where, changed)
    if item["type"] == "extra_forbidden":
        message = f"unknown key {dotted!r}: {_meant(where, blamed, changed)}"
    elif item["type"] == "missing":
        message = f"{dotted} is missing: add it"
    else:
        said = _SAID.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if item["type"] == "model_type" and (known := _known_keys(where)):
            said += f" ({', '.join(known)})"
        message = f"{dotted}: {said}" if dotted else said
        given = item.get("input")
        if item["type"] != "value_error" and isinstance(given, str | int | float | bool | None):
            shown = repr(given)
            message += f" (got {shown if len(shown) < 60 else shown[:57] + '...'})"
        if item["type"] == "literal_error" and isinstance(given, str):
            choices = re.findall("'([^']*)'", str(item["ctx"]["expected"]))
            near = difflib.get_close_matches(given, choices, n=1)
            message += f": did you mean {near[0]!r}?" if near else ""
    more = f" (and {len(others)} more)" if others else ""
    if blamed is not None:
        return f"--set {'.'.join(blamed)}={_short(changed[blamed])}: {message}{more}"
    line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), None)
    return f"{source}:{line}: {message}{more}" if line else f"{source}: {message}{more}"


def _blamed(where: Location, changed: Mapping[tuple[str, ...], Any]) -> tuple[str, ...] | None:
    """The override that an error at a place comes from: the last one about it, or within it."""
    place = tuple(str(part) for part in where)
    for keys in reversed(list(changed)):
        least = min(len(keys), len(place))
        if place and keys[:least] == place[:least]:
            return keys
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else text[:37] + "..."


def _meant(
    where: Location, blamed: tuple[str, ...] | None, changed: Mapping[tuple[str, ...], Any]
) -> str:
    """What an unknown key was meant to be: by another name of it, or the nearest one."""
    *section, given = where
    known = _known_keys(tuple(section))
    at, key = _SYNONYMS.get(str(given).lower(), ((), ""))
    if key not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        if near:
            at, key = tuple(str(part) for part in section), near[0]
        elif not key:
            every = dict.fromkeys(_every_key())
            names = difflib.get_close_matches(str(given), [k for _, k in every], n=1, cutoff=0.8)
            found = [(s, k) for s, k in every if names and k == names[0]]
            if not found:
                return f"known here: {', '.join(known)}"
            at, key = found[0]
    elif key:
        at = tuple(str(part) for part in section)
    said = f"did you mean {key!r}"
    if at != tuple(str(part) for part in section):
        said += f" in {'.'.join(at)}" if at else " at the top of the file"
    if blamed is None or {"scales", "horizons", "targets", "architectures"} & set(at):
        return f"{said}?"
    rest = blamed[len(where) :]
    if not rest and (inner := _known_keys((*at, key))):
        return f"{said}, which holds {', '.join(inner)}?"
    return f"{said}? --set {'.'.join((*at, key, *rest))}={_short(changed[blamed])}"


_SYNONYMS = {
    other: (section, key)
    for section, key, others in (
        ((), "study", "name"),
        (("search",), "learning_rate", "lr max_lr peak_lr learning_rates lrs"),
        (("search",), "batch_sequences", "bs batch batch_size batch_sizes global_batch_size"),
        (("search",), "trials_per_cell", "n_trials num_trials trials num_samples"),
        (("search",), "strategy", "sampler search_alg"),
        (("search",), "total_flops", "flops budget compute"),
        (("recipe",), "weight_decay", "wd decay"),
        (("recipe",), "optimizer", "optim"),
        (("recipe",), "schedule", "scheduler lr_schedule lr_scheduler"),
        (("recipe",), "warmup_fraction", "warmup warmup_ratio warmup_steps"),
        (("recipe",), "clip_norm", "clip grad_clip gradient_clipping max_grad_norm"),
        (("recipe",), "precision", "dtype"),
        (("model",), "sequence_length", "seq_len seqlen context context_length block_size"),
        (("resources",), "gpus_per_worker", "gpus gpu num_gpus"),
        (("resources",), "cpus_per_worker", "cpus cpu num_cpus"),
        (("resources",), "workers", "num_workers world_size"),
        (("scales",), "d_model", "width hidden hidden_size d_hidden n_embd"),
        (("scales",), "layers", "depth n_layers num_layers n_layer"),
        (("scales",), "heads", "n_heads num_heads n_head"),
        (("architectures",), "experts", "num_experts n_experts"),
        (("horizons",), "tokens_per_param", "tpp"),
    )
    for other in others.split()
}
"""Other names of keys: where each stands, and what it is called here."""


def _every_key(
    section: type[BaseModel] = SearchSpace, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key of the file, with the section that it stands in."""
    for key, field in section.model_fields.items():
        yield at, key
        inner = _section_in(field.annotation)
        if inner is not None and inner is not section:
            yield from _every_key(inner, (*at, key))


_RANK = {"extra_forbidden": 0, "literal_error": 2, "model_type": 3, "too_short": 3}
"""How little an error of a union says about what the user meant."""

_SAID = dict.fromkeys(("tuple_type", "list_type"), "must be a list") | dict.fromkeys(
    ("dict_type", "model_type"), "must be a mapping of keys to values"
)
"""Where Pydantic's words are Python's, not YAML's."""


def _locate(location: Location, values: Any) -> Location:
    """Pydantic's location without the parts it adds for the members of unions."""
    kept: list[str | int] = []
    for part in location:
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = cast("Any", values)[part]
            kept.append(part)
        elif part in _known_keys(tuple(kept)):
            kept.append(part)
    return tuple(kept)


def _known_keys(location: Location) -> list[str]:
    """Keys that may stand at a place in the file."""
    section: type[BaseModel] = SearchSpace
    in_mapping = False
    for part in location:
        if isinstance(part, int) or in_mapping:  # an entry leads to what its container holds
            in_mapping = False
            continue
        field = section.model_fields.get(part)
        inner = _section_in(field.annotation) if field else None
        if field is None or inner is None:
            return []
        section, in_mapping = inner, get_origin(field.annotation) is dict
    return [] if in_mapping else list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
