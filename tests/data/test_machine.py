"""The default corpus: what it takes from this machine and what it leaves out."""

import base64
import random

import numpy as np
import pytest

from raysweep.data.machine import read_machine, unfit
from raysweep.data.near_duplicates import NearDuplicates, shingles, signature
from raysweep.data.sources import ReadStats


def test_small_machine_corpus(build) -> None:
    corpus = build(source="machine", max_megabytes=1.5)
    assert 1_400_000 < corpus.train_tokens + corpus.validation_tokens < 1_600_000
    read = corpus.manifest["read"]
    assert read["files"] == read["documents"] > 40
    splits = [np.asarray(s).tobytes().split(b"\0") for s in (corpus.train, corpus.validation)]
    train, validation = splits
    assert b"import " in b"".join(train)
    assert all(text.decode("utf-8") for text in train[:-1])
    train_signatures = np.array([signature(text) for text in train])
    for text in validation[:-1]:  # nothing held out resembles anything trained on
        alike = (train_signatures == signature(text)).mean(axis=1)
        assert alike.max() < 0.6
    assert build(source="machine", max_megabytes=1.5).hash == corpus.hash


def test_machine_order_is_fixed() -> None:
    first, again = (
        [next(documents) for _ in range(20)]
        for documents in (
            read_machine(ReadStats()),
            read_machine(ReadStats()),
        )
    )
    assert first == again


def lines(make, count: int) -> bytes:
    return "\n".join(make(n) for n in range(count)).encode()


GENERATED = [
    (lambda words: b"x = 1\n", "shorter than 256 bytes"),
    (lambda words: lines(lambda n: words(n, 20), 12_000), "longer than 1 MiB"),
    (lambda words: words(0, 500).replace("\n", "").encode(), "long lines"),
    (lambda words: lines(lambda n: words(n, 40).replace("\n", ""), 50), "long lines"),
    (lambda words: lines(lambda n: f"{n}, {n * n}, {n**3},", 100), "mostly digits"),
    (
        lambda words: lines(
            lambda n: base64.b64encode(random.Random(n).randbytes(54)).decode(), 50
        ),
        "encoded data",
    ),
    (lambda words: lines(lambda n: f"def f{n}(x):\n    return x + {n}\n", 50), None),
    (lambda words: lines(lambda n: f"Chapter {n}\n=========\n" + words(n, 50), 10), None),
]


@pytest.mark.parametrize(("make", "reason"), GENERATED)
def test_generated_data_is_left_out(words, make, reason: str | None) -> None:
    assert unfit(make(words)) == reason


@pytest.fixture
def edited(words):
    """edited(text, share): the text with a share of its words replaced, all in one place."""

    def edit(text: str, share: float) -> str:
        parts = text.split(" ")
        count = int(len(parts) * share)
        parts[100 : 100 + count] = words(10**6 + len(text), count).split(" ")
        return " ".join(parts)

    return edit


def test_signature_estimates_jaccard_similarity(words, edited) -> None:
    for share in (0.05, 0.2, 0.5):
        errors = []
        for seed in range(30):
            text = words(seed, 600)
            other = edited(text, share)
            a, b = (set(shingles(t.encode()).tolist()) for t in (text, other))
            true = len(a & b) / len(a | b)
            errors.append(np.mean(signature(text.encode()) == signature(other.encode())) - true)
        # 128 values: one estimate has a standard error of at most 0.044, the mean of 30 of 0.008.
        assert abs(np.mean(errors)) < 0.025  # three standard errors
        assert np.std(errors) < 0.065


def test_near_duplicates_are_recognised(words, edited) -> None:
    passed = NearDuplicates()
    texts = [words(seed, 600) for seed in range(100)]
    assert not any(passed.seen(text.encode()) for text in texts)
    assert all(passed.seen(text.encode()) for text in texts)
    assert all(passed.seen(text.replace(" ", "\n\t ").encode()) for text in texts)
    assert all(passed.seen(edited(text, 0.05).encode()) for text in texts)
    assert not any(passed.seen(edited(text, 0.6).encode()) for text in texts)


def test_short_texts_have_signatures() -> None:
    passed = NearDuplicates()
    assert not passed.seen(b"")
    assert not passed.seen(b"one two")
    assert passed.seen(b"one  two\n")
    assert not passed.seen(b"one three")
