"""Small corpora for the data tests."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from raysweep.data.corpus import Corpus, prepare
from raysweep.study.schema import Data

settings.register_profile("raysweep", deadline=None)  # machines are slow at times
settings.load_profile("raysweep")

Words = Callable[[int, int], str]


@pytest.fixture(scope="session")
def words() -> Words:
    """words(seed, count): text that is different for every seed."""

    def make(seed: int, count: int) -> str:
        draw = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyzäß"
        drawn = ("".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(count))
        return " ".join(word if i % 12 else f"\n{word}" for i, word in enumerate(drawn)).strip()

    return make


@pytest.fixture
def text_folder(tmp_path: Path, words: Words) -> Path:
    """Sixty text files of about 1 kB."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number in range(60):
        place = folder / "deeper" if number % 3 else folder
        (place / f"{number:02}.txt").write_text(words(number, 150), encoding="utf-8")
    return folder


Build = Callable[..., Corpus]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """prepare() for short sequences, with a cache in the test's own folder."""

    def run(**settings) -> Corpus:
        data = Data.model_validate({"validation_sequences": 4} | settings)
        return prepare(data, tmp_path, cache=tmp_path / "cache", sequence_length=32)

    return run
