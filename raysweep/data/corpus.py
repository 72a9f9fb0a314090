"""The corpus: sources to memory-mapped token shards, built once and kept in the user's cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from raysweep.data import build, cache_folder
from raysweep.data.batches import too_small_for_validation, windows_per_epoch
from raysweep.data.machine import MAX_MEGABYTES
from raysweep.data.tokens import Shard, ShardedTokens, fingerprint, open_shards
from raysweep.errors import UserError
from raysweep.study import Study
from raysweep.study.schema import Data
from raysweep.text import short

VERIFY_BYTES = 256 * 2**20
"""Up to this size the whole content of a cached corpus is checked against its hash."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens. Cheap to pickle: shards are mapped when first used."""

    path: Path
    """Folder of the manifest and, unless they are the user's own, of the shards."""
    manifest: dict[str, Any] = field(repr=False, hash=False)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a prepared corpus. Raises UserError where it is missing, partial or damaged."""
        path = Path(path)
        try:
            manifest = json.loads((path / build.MANIFEST).read_text(encoding="utf-8"))
            corpus = cls(path, manifest)
            whole = manifest["format"] == build.FORMAT and corpus.missing() is None
        except (OSError, ValueError, KeyError, TypeError):
            corpus, whole = None, False
        if corpus is None or not whole:
            raise UserError(f"{path} holds no complete corpus: prepare it again")
        return corpus

    @property
    def hash(self) -> str:
        """Of the tokens and their split: the same on every machine that has the same content."""
        return self.manifest["hash"]

    @property
    def dtype(self) -> str:
        return self.manifest["dtype"]

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def train_tokens(self) -> int:
        return self.manifest["train"]["tokens"]

    @property
    def validation_tokens(self) -> int:
        return self.manifest["validation"]["tokens"]

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of validation text a token, for bits per byte; unknown for token shards.

        Separators between documents count as tokens and not as bytes.
        """
        return self.manifest["bytes_per_token"]

    @cached_property
    def train(self) -> np.ndarray | ShardedTokens:
        return open_shards(self._located(self.manifest["train"]), self.dtype)

    @cached_property
    def validation(self) -> np.ndarray | ShardedTokens:
        return open_shards(self._located(self.manifest["validation"]), self.dtype)

    def named_validation(self, name: str) -> np.ndarray | ShardedTokens:
        """A validation set beside that of `validation`, by its name in the search-space file."""
        return self._named[name]

    @cached_property
    def _named(self) -> dict[str, np.ndarray | ShardedTokens]:
        found = self.manifest.get("named", {})
        return {name: open_shards(self._located(found[name]), self.dtype) for name in found}

    def epochs(self, tokens: float) -> float:
        """How many passes over the training tokens a horizon means."""
        return tokens / self.train_tokens

    def repeat_warning(self, tokens: float) -> str | None:
        """What to tell the user where a horizon is longer than the corpus."""
        if tokens <= self.train_tokens:
            return None
        return _repeats(tokens, f"{self.epochs(tokens):.2f}", f"the {short(self.train_tokens)}")

    def missing(self) -> Path | None:
        """The first shard that is not on this node, or shorter than the manifest says."""
        named = self.manifest.get("named", {}).values()
        splits = (self.manifest["train"], self.manifest["validation"], *named)
        for shard in (shard for split in splits for shard in self._located(split)):
            try:
                if shard.path.stat().st_size < (shard.start + shard.count) * self.item_bytes:
                    return shard.path
            except OSError:
                return shard.path
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def _located(self, split: Mapping[str, Any]) -> list[Shard]:
        return [
            Shard(self.path / shard["path"], shard["start"], shard["count"])
            for shard in split["shards"]
        ]


def _repeats(tokens: float, passes: str, held: str) -> str:
    return (
        f"a horizon of {short(tokens)} tokens is {passes} passes over {held} training tokens: "
        "repeated text teaches less than new text, so laws fitted on it do not hold for fresh data"
    )


BYTES_PER_TOKEN = 4.0
"""Of text in a byte-pair tokenizer, roughly."""
PACKED = 2.5
"""Bytes of text in a byte of Parquet, roughly."""


def expected_repeats(data: Data, folder: Path, tokens: float) -> str | None:
    """What to tell of a horizon before the corpus is built: by the size of its files, roughly.

    Raises UserError where they are missing."""
    files = build.plan(data, folder).files
    size = float(sum(path.stat().st_size for path in files))
    if data.source == "machine":
        size = MAX_MEGABYTES * 1e6
    elif data.source == "parquet":
        size *= PACKED
    if data.max_megabytes is not None:
        size = min(size, data.max_megabytes * 1e6)
    each = 1.0 if data.tokenizer == "bytes" else BYTES_PER_TOKEN
    if data.source == "tokens":
        each = np.dtype(data.token_dtype).itemsize
    held = size / each
    if tokens <= held:
        return None
    return _repeats(tokens, f"about {short(tokens / held, 2)}", f"about {short(held, 2)}")


def prepare(
    data: Data,
    folder: Path,
    *,
    cache: Path | None = None,
    sequence_length: int,
    progress: Callable[[str], None] | None = None,
) -> Corpus:
    """The corpus that the settings describe, from the cache or built into it.

    `folder` is where relative paths start, `cache` overrides the user's cache folder, and
    `progress` receives lines of text while a corpus is built. A cached corpus that is damaged is
    built anew. Any number of processes may prepare the same corpus at once.

    Raises UserError where a source is missing, unreadable or unfit, and where the corpus is too
    small for one training sequence or for the validation slice.
    """
    plan = build.plan(data, folder)

    def find(path: Path) -> Corpus | None:
        try:
            corpus = Corpus.open(path)
        except UserError:
            return None
        return corpus if _sound(corpus) else None

    corpus = cache_folder.get_or_build(
        cache_folder.root(cache) / "corpora",
        plan.key,
        find=find,
        build=lambda work: build.build(plan, work, progress or (lambda line: None)),
    )
    windows_per_epoch(corpus.train_tokens, sequence_length)
    named = corpus.manifest.get("named", {})
    sizes = {name: named[name]["tokens"] for name in named}
    for name, tokens in {"": corpus.validation_tokens, **sizes}.items():
        if tokens <= data.validation_sequences * sequence_length:
            said = too_small_for_validation(tokens, data.validation_sequences, sequence_length)
            raise UserError(f"data.validation.{name}: {said}" if name else said)
    return corpus


def corpus_of(study: Study, progress: Callable[[str], None] | None = None) -> Corpus | None:
    """The corpus of a study, as `prepare` has it; None where the user's own code trains."""
    space = study.space
    if space.training is not None:
        return None
    length = space.model.sequence_length
    return prepare(space.data, study.folder, sequence_length=length, progress=progress)


def data_hash(study: Study, corpus: Corpus | None) -> str:
    """What a study's trials know their data by: the corpus's hash, or the name of the user's."""
    return study.own_data if corpus is None else corpus.hash


def _sound(corpus: Corpus) -> bool:
    """Whether the tokens are those that were written. The user's own shards are known by size
    and time of change, and large corpora by their size alone."""
    size = (corpus.train_tokens + corpus.validation_tokens) * corpus.item_bytes
    if corpus.manifest["in_place"] or size > VERIFY_BYTES:
        return True
    names = tuple(corpus.manifest.get("named", {}))
    others = (corpus.named_validation(name) for name in names)
    digest = fingerprint(corpus.train, corpus.validation, *others)[0]
    return digest == corpus.manifest.get("content", corpus.hash)
