"""Builds one corpus: reads its sources, splits them, encodes them, and writes the manifest."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.data import machine
from raysweep.data.existing_tokens import describe_shards, splits
from raysweep.data.sources import Format, ReadStats, boundary, find_files, read_documents
from raysweep.data.spool import Documents, DocumentSpool
from raysweep.data.tokenizer import (
    ByteEncoder,
    Encoder,
    load_encoder,
    train_encoder,
    write_tokens,
)
from raysweep.data.tokens import Shard, fingerprint, open_shards, smallest_dtype
from raysweep.errors import UserError
from raysweep.study.schema import Data
from raysweep.study.study import vocabulary_size
from raysweep.text import size as bytes_written

FORMAT = 1
"""Raised whenever the same settings would give other tokens, so that old caches are not used."""
MANIFEST = "manifest.json"
_SHOWN = ("source", "paths", "text_column", "validation_paths", "validation", "max_megabytes")
_NOT_OF_THE_TOKENS = {"validation_sequences", "paths", "validation", "minimise"}
"""Settings that say nothing of them, or of files that are listed by themselves."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The settings of a corpus, with the files that their paths name."""

    data: Data
    files: dict[Path, bool]
    """Training files; whether each is named outright."""
    held_out: tuple[dict[Path, bool], ...]
    """Those of each validation set; none for a share of the corpus."""
    tokenizer_file: Path | None
    vocab_size: int
    key: str
    """Of everything that determines the tokens: settings and the files' size and change times."""

    @property
    def held_out_format(self) -> Format:
        return "text" if self.data.source == "machine" else self.data.source


def plan(data: Data, folder: Path) -> Plan:
    """Find the files, and the key under which the corpus is cached. Reads no content."""
    form: Format = "text" if data.source == "machine" else data.source
    keys = [f"data.validation.{name}" for name in data.validation_sets] or ["data.validation_paths"]
    held_out = tuple(
        find_files(paths, folder, form, key) for key, paths in zip(keys, data.held_out, strict=True)
    )
    files = find_files(data.paths, folder, form, "data.paths")
    files = {path: named for path, named in files.items() if not any(path in s for s in held_out)}
    if data.paths and not files:
        raise UserError(f"every file of data.paths is also in {' or '.join(keys)}: add others")
    vocab_size = vocabulary_size(data, folder)
    tokenizer_file = None
    if data.tokenizer != "bytes" and data.tokenizer.file is not None:
        tokenizer_file = folder / data.tokenizer.file
    identity = {
        "format": FORMAT,
        "settings": data.model_dump(mode="json", exclude=_NOT_OF_THE_TOKENS),
        "files": [[*_identity(path), named] for path, named in files.items()],
        "held_out": [[*_identity(path), named] for s in held_out for path, named in s.items()],
        "machine": machine.machine_identity() if data.source == "machine" else None,
        "tokenizer": _identity(tokenizer_file) if tokenizer_file else None,
    }
    if data.validation:
        identity["sets"] = [[n, list(map(str, s))] for n, s in zip(keys, held_out, strict=True)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return Plan(data, files, held_out, tokenizer_file, vocab_size, key)


def build(plan: Plan, work: Path, say: Say) -> None:
    """Fill the folder `work` with token shards and, last, the manifest."""
    began = time.monotonic()
    contents = (
        describe_shards(plan.data, list(plan.files), [list(s) for s in plan.held_out], say)
        if plan.data.source == "tokens"
        else _from_text(plan, work, say)
    )
    shown = plan.data.model_dump(mode="json", include=set(_SHOWN))
    manifest = {"format": FORMAT, "source": shown, "vocab_size": plan.vocab_size} | contents
    text = json.dumps(manifest, indent=1)
    (work / MANIFEST).write_text(text, encoding="utf-8")
    say(
        f"corpus: {manifest['train']['tokens']:,} training and "
        f"{manifest['validation']['tokens']:,} validation tokens "
        f"({time.monotonic() - began:.1f} s)"
    )


def _from_text(plan: Plan, work: Path, say: Say) -> dict[str, Any]:
    stats, held_out_stats = ReadStats(), ReadStats()
    with DocumentSpool(work / "text.bin") as spool:
        for text in _reported(_training_documents(plan, stats), say):
            spool.add(text)
        for number, files in enumerate(plan.held_out, start=1):
            read = read_documents(
                files, plan.held_out_format, plan.data.text_column, held_out_stats
            )
            begun = spool.bytes
            for text in read:
                spool.add(text, held_out=number)
            if files and plan.data.validation and spool.bytes == begun:
                name = plan.data.validation_sets[number - 1]
                raise UserError(f"data.validation.{name} holds no text: name other files")
        if not spool.bytes:
            raise UserError(f"data source {plan.data.source} holds no text: {_hint(plan)}")
        train, held_out = spool.split(plan.data.validation_fraction, len(plan.held_out))
        encoder = _encoder(plan, train, work, say)
        dtype = smallest_dtype(plan.vocab_size)
        entries, arrays = [], []
        for place, documents in enumerate((train, *held_out)):
            file = f"{('train', 'validation')[place] if place < 2 else f'validation{place}'}.bin"
            count = write_tokens(documents, encoder, work / file)
            entry = {
                "tokens": count,
                "documents": len(documents),
                "bytes": documents.bytes,
                "shards": [{"path": file, "start": 0, "count": count}] if count else [],
            }
            entries.append(entry)
            arrays.append(open_shards([Shard(work / file, 0, count)] if count else [], dtype))
    digest, largest = fingerprint(*arrays)
    assert largest < plan.vocab_size
    return {
        "in_place": False,
        "dtype": dtype,
        **splits(plan.data, entries, digest),
        "bytes_per_token": entries[1]["bytes"] / entries[1]["tokens"]
        if entries[1]["tokens"]
        else None,
        "read": stats.as_dict(),
        "held_out": held_out_stats.as_dict() if any(plan.held_out) else None,
    }


def _training_documents(plan: Plan, stats: ReadStats) -> Iterator[bytes]:
    data = plan.data
    megabytes = data.max_megabytes
    if data.source == "machine":
        megabytes = megabytes or machine.MAX_MEGABYTES
        documents = machine.read_machine(stats)
    else:
        documents = read_documents(plan.files, data.source, data.text_column, stats)
    left = float("inf") if megabytes is None else int(megabytes * 1e6)
    for text in documents:
        if len(text) > left:
            text = text[: boundary(text, int(left))]
        left -= len(text)
        if text:
            yield text
        if left < 4:  # shorter than a character may be
            return


def _encoder(plan: Plan, train: Documents, work: Path, say: Say) -> Encoder:
    if plan.data.tokenizer == "bytes":
        return ByteEncoder()
    if plan.tokenizer_file is not None:
        return load_encoder(plan.tokenizer_file, plan.vocab_size)
    say(f"corpus: training a tokenizer of {plan.vocab_size} ids")
    return train_encoder(train, plan.vocab_size, work / "tokenizer.json")


def _reported(documents: Iterator[bytes], say: Say) -> Iterator[bytes]:
    """Pass documents on, with a line of progress every two seconds."""
    count = size = 0
    spoken = time.monotonic()
    for text in documents:
        count, size = count + 1, size + len(text)
        if time.monotonic() - spoken > 2:
            say(f"corpus: read {bytes_written(size)} in {count} documents")
            spoken = time.monotonic()
        yield text


def _hint(plan: Plan) -> str:
    if plan.data.source == "machine":
        return "set data.source to text and give data.paths"
    return f"check data.paths ({', '.join(plan.data.paths)})"


def _identity(path: Path) -> list[object]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
