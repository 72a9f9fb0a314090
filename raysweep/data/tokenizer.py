"""Text to token ids: bytes as they are, or a byte-pair tokenizer of the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raysweep.data.spool import Documents
from raysweep.data.tokens import smallest_dtype
from raysweep.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_KNOWN_SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_TRAINING_BYTES = 200_000_000
_CHUNK_BYTES = 4_000_000


class Encoder(Protocol):
    """Encodes documents and puts a separator behind each."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, documents: Sequence[bytes]) -> np.ndarray: ...


@dataclass(frozen=True)
class ByteEncoder:
    """Ids 0 to 255 are the bytes of UTF-8; 0, which no text holds, ends a document."""

    vocab_size: int = 256

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        return np.frombuffer(b"\0".join([*documents, b""]), dtype=np.uint8)


@dataclass(frozen=True)
class PairEncoder:
    """A tokenizer and the id put behind each document (none where it knows no such token)."""

    tokenizer: tokenizers.Tokenizer
    vocab_size: int
    separator: int | None

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        texts = [document.decode("utf-8") for document in documents]
        end = [] if self.separator is None else [self.separator]
        ids: list[int] = []
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += encoding.ids
            ids += end
        return np.array(ids, dtype=smallest_dtype(self.vocab_size))


def train_encoder(documents: Documents, vocab_size: int, path: Path) -> PairEncoder:
    """Train a byte-level BPE on the documents and save it.

    Where they exceed 200 MB, evenly spaced ones of about that size together. A small corpus may
    have fewer merges to learn than asked for: the vocabulary then has ids that are never used.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = documents.every(1 + documents.bytes // _TRAINING_BYTES)

    def texts() -> Iterator[str]:
        for chunk in sample.chunks(_CHUNK_BYTES):
            yield from (document.decode("utf-8") for document in chunk)

    tokenizer.train_from_iterator(texts(), trainer=trainer)
    tokenizer.save(str(path))
    return load_encoder(path, vocab_size)


def load_encoder(path: Path, vocab_size: int) -> PairEncoder:
    """A tokenizer from its JSON file; text that spells a special token is read as plain text."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{path} is no tokenizers JSON file ({error}): save one with Tokenizer.save(path)"
        ) from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    separators = (tokenizer.token_to_id(token) for token in _KNOWN_SEPARATORS)
    return PairEncoder(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        separator=next((token for token in separators if token is not None), None),
    )


def write_tokens(documents: Documents, encoder: Encoder, path: Path) -> int:
    """Encode the documents into a flat file of the narrowest type; returns the token count."""
    dtype = np.dtype(smallest_dtype(encoder.vocab_size)).newbyteorder("<")
    with path.open("wb") as file:
        for chunk in documents.chunks(_CHUNK_BYTES):
            file.write(encoder.encode(chunk).astype(dtype, copy=False).data)
    return path.stat().st_size // dtype.itemsize
