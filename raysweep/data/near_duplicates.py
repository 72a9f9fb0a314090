"""Near-duplicate documents found by MinHash over five-word shingles."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np

PERMUTATIONS = 128
BANDS = 32
THRESHOLD = 0.6
_SHINGLE_WORDS = 5
_BLOCK = 512  # shingles hashed at once: block x permutations x 8 bytes stays in the L2 cache


@cache
def _random_constants() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Odd weights of a shingle's words, odd factors and offsets of the permutations."""
    rng = np.random.Generator(np.random.PCG64(20240501))
    draws = rng.integers(0, 2**64, _SHINGLE_WORDS + 2 * PERMUTATIONS, dtype=np.uint64)
    weights, factors, offsets = np.split(draws, (_SHINGLE_WORDS, _SHINGLE_WORDS + PERMUTATIONS))
    return weights | np.uint64(1), factors | np.uint64(1), offsets


def shingles(text: bytes) -> np.ndarray:
    """64-bit hashes of every run of five words (uint64, at least one); whitespace is ignored."""
    words = text.split()
    missing = _SHINGLE_WORDS - len(words)
    if missing > 0:
        words += [b""] * missing
    codes = np.fromiter(map(zlib.crc32, words), dtype=np.uint64, count=len(words))
    count = len(codes) - _SHINGLE_WORDS + 1
    hashed = np.zeros(count, dtype=np.uint64)
    for position, weight in enumerate(_random_constants()[0]):
        hashed += codes[position : position + count] * weight
    hashed ^= hashed >> np.uint64(31)
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(29)
    return hashed


def signature(text: bytes) -> np.ndarray:
    """MinHash signature (uint64, one value a permutation): the share of equal values in two
    signatures estimates the Jaccard similarity of their shingle sets (Broder 1997)."""
    _, factors, offsets = _random_constants()
    hashed = shingles(text)
    smallest = np.full(PERMUTATIONS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashed), _BLOCK):
        block = hashed[start : start + _BLOCK, None] * factors + offsets
        np.minimum(smallest, block.min(axis=0), out=smallest)
    return smallest


class NearDuplicates:
    """Remembers the documents it let pass, and recognises later ones that resemble them.

    Candidates share at least one of 32 bands of 4 signature values: a pair of similarity s is
    found with probability 1 - (1 - s^4)^32, 0.99 at 0.6. Its estimate then has a standard error
    of at most 0.044, so pairs above 0.7 hardly ever slip through.
    """

    def __init__(self) -> None:
        self._signatures: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def seen(self, text: bytes) -> bool:
        """Whether the text resembles one that passed before; if not, it is remembered."""
        new = signature(text)
        keys = [(band, part.tobytes()) for band, part in enumerate(np.split(new, BANDS))]
        candidates = {index for key in keys for index in self._bands.get(key, ())}
        for index in candidates:
            if np.mean(self._signatures[index] == new) >= THRESHOLD:
                return True
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(new)
        return False
