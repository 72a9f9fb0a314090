"""The corpus: split, cache, tokenizers, sizes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from raysweep.data import build as building
from raysweep.data import cache_folder
from raysweep.data.batches import train_batch, validation_batches
from raysweep.data.corpus import Corpus, expected_repeats, prepare
from raysweep.data.spool import DocumentSpool
from raysweep.data.tokenizer import load_encoder
from raysweep.errors import UserError
from raysweep.study.schema import Data
from raysweep.text import short

TEXT = {"source": "text", "paths": ["texts"]}


def split(path: Path, texts: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    with DocumentSpool(path) as spool:
        for text in texts:
            spool.add(text)
        first, (second,) = spool.split(fraction)
        train, validation = ([t for c in p.chunks(100) for t in c] for p in (first, second))
    assert not path.exists()
    return train, validation


def test_split_by_content_keeps_documents_whole_and_apart(tmp_path: Path, words) -> None:
    texts = [words(n % 150, 80).encode() for n in range(200)]  # 50 of them twice
    train, validation = split(tmp_path / "text", texts, 0.1)
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.1 <= share < 0.13
    assert train == [text for text in texts if text in set(train)]  # in the order they came
    _, grown = split(tmp_path / "text", [*texts, words(999, 80).encode()], 0.1)
    assert len(set(grown) ^ set(validation)) <= 2


def test_split_does_not_depend_on_the_order_of_documents(tmp_path: Path, words) -> None:
    texts = [words(n, 80).encode() for n in range(50)]
    _, validation = split(tmp_path / "text", texts, 0.1)
    _, reverse = split(tmp_path / "text", texts[::-1], 0.1)
    assert reverse == validation[::-1]


@pytest.mark.parametrize("breaks", [b"\n", b" ", b""])
def test_one_long_document_is_cut_into_pieces(tmp_path: Path, breaks: bytes) -> None:
    pieces = [
        "naïve ☃".encode() + bytes(np.random.default_rng(n).integers(97, 123, 60))
        for n in range(2000)
    ]
    text = breaks.join(pieces)
    train, validation = split(tmp_path / "text", [text], 0.05)
    assert len(b"".join(train + validation)) == len(text)
    assert 0.05 <= len(b"".join(validation)) / len(text) < 0.07
    for piece in train + validation:
        piece.decode("utf-8")
        assert not breaks or piece.endswith(breaks) or text.endswith(piece)


def test_prepare_is_built_once(build, text_folder: Path, monkeypatch) -> None:
    first = build(**TEXT)
    monkeypatch.setattr(building, "build", lambda *_: pytest.fail("built again"))
    again = build(**TEXT)
    assert again == first
    assert again.hash == first.hash


def test_prepare_notices_changed_files_and_settings(build, text_folder: Path, words) -> None:
    first = build(**TEXT)
    assert build(**TEXT, validation_fraction=0.2).hash != first.hash
    (text_folder / "00.txt").write_text(words(1000, 150), encoding="utf-8")
    changed = build(**TEXT)
    assert changed.hash != first.hash
    (text_folder / "00.txt").write_text(words(0, 150), encoding="utf-8")
    assert build(**TEXT).hash == first.hash  # built anew, of the same content


def test_hash_does_not_depend_on_the_place(build, text_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(text_folder, tmp_path / "copy")
    assert build(source="text", paths=["copy"]).hash == build(**TEXT).hash


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_format(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": -1}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", _cut),
        ("train.bin", _flip),
        ("validation.bin", _flip),
        ("validation.bin", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", _cut),
        ("manifest.json", _other_format),
        ("", shutil.rmtree),
    ],
)
def test_damaged_cache_is_rebuilt(build, text_folder: Path, name: str, damage) -> None:
    first = build(**TEXT)
    tokens = [np.array(part) for part in (first.train, first.validation)]
    damage(first.path / name)
    again = build(**TEXT)
    assert again.hash == first.hash
    assert np.array_equal(again.train, tokens[0])
    assert np.array_equal(again.validation, tokens[1])
    assert visible(again.path.parent) == [again.path]


def test_open_refuses_what_is_no_corpus(build, text_folder: Path, tmp_path: Path) -> None:
    corpus = build(**TEXT)
    assert Corpus.open(corpus.path) == corpus
    _cut(corpus.path / "train.bin")
    for path in (corpus.path, tmp_path):
        with pytest.raises(UserError, match="no complete corpus: prepare it again"):
            Corpus.open(path)


PREPARE = """
import os, signal, sys, time
from pathlib import Path
from raysweep.study.schema import Data
from raysweep.data import build, corpus

data = Data(source="text", paths=("texts",), validation_sequences=4)
def prepare():
    return corpus.prepare(data, Path("."), cache=Path("cache"), sequence_length=32)
"""


def start_python(code: str, folder: Path) -> subprocess.Popen:
    repo = Path(building.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE + code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(repo)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_processes_may_build_at_once(build, text_folder: Path, tmp_path: Path, damaged) -> None:
    if damaged:
        _flip(build(**TEXT).path / "train.bin")
    code = (
        "print('ready', flush=True); sys.stdin.readline(); got = prepare()\n"
        "time.sleep(0.2); assert corpus.Corpus.open(got.path).train[0:9].any()\n"
        "print(got.hash)"
    )
    processes = [start_python(code, tmp_path) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    hashes = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert hashes == [build(**TEXT).hash] * 3
    assert len(visible(tmp_path / "cache" / "corpora")) == 1


def test_killed_builds_leave_nothing_that_counts(build, text_folder: Path, tmp_path: Path) -> None:
    code = (
        "write = build.write_tokens\n"
        "def die(*a):\n    write(*a); os.kill(os.getpid(), signal.SIGKILL)\n"
        "build.write_tokens = die; prepare()"
    )
    killed = start_python(code, tmp_path)
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    (left,) = (tmp_path / "cache" / "corpora").glob(".building-*")
    corpus = build(**TEXT)
    assert corpus.train_tokens > 0
    assert left.exists()  # another process may be at work there
    os.utime(left, (0, 0))
    build(**TEXT, validation_fraction=0.2)
    assert not left.exists()


def test_unwritable_cache(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = Data(source="text", paths=("texts",))
    with pytest.raises(UserError, match=r"cannot write the corpus cache .*RAYSWEEP_CACHE"):
        prepare(data, tmp_path, cache=tmp_path / "file", sequence_length=32)


def test_cache_root(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RAYSWEEP_CACHE", raising=False)
    assert cache_folder.root() == Path("/home/someone/.cache/raysweep")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder.root() == Path("/xdg/raysweep")
    monkeypatch.setenv("RAYSWEEP_CACHE", "/own")
    assert cache_folder.root() == Path("/own")
    assert cache_folder.root(tmp_path) == tmp_path


def test_too_small_a_corpus(build, text_folder: Path) -> None:
    with pytest.raises(UserError, match=r"validation data hold [\d,]+ tokens, but 500 sequences"):
        build(**TEXT, validation_sequences=500)
    (text_folder.parent / "tiny.txt").write_text("tiny")
    with pytest.raises(UserError, match=r"training data hold 5 tokens, fewer than one sequence"):
        build(source="text", paths=["tiny.txt"], validation_sequences=1)


def test_smallest_sufficient_validation(build, text_folder: Path) -> None:
    tokens = build(**TEXT).validation_tokens
    enough = (tokens - 1) // 32
    corpus = build(**TEXT, validation_sequences=enough)
    settings = {"sequence_length": 32, "batch_sequences": enough}
    assert list(validation_batches(corpus.validation, sequences=enough, **settings))
    with pytest.raises(UserError, match=r"lower data.validation_sequences"):
        build(**TEXT, validation_sequences=enough + 1)


def test_repeated_passes_are_said(build, text_folder: Path) -> None:
    corpus = build(**TEXT)
    assert corpus.epochs(corpus.train_tokens) == 1
    assert corpus.repeat_warning(corpus.train_tokens) is None
    warning = corpus.repeat_warning(2.5 * corpus.train_tokens)
    assert warning is not None
    assert "2.50 passes" in warning
    assert f"{short(corpus.train_tokens)} training tokens" in warning


def test_repeated_passes_are_said_before_a_corpus_is_built(build, text_folder: Path) -> None:
    """A plan reads no text: by the size of the files, within the share held out."""
    data, folder = Data.model_validate(TEXT), text_folder.parent
    held = build(**TEXT).train_tokens
    assert expected_repeats(data, folder, held) is None
    warning = expected_repeats(data, folder, 100 * held)
    assert warning is not None
    passes = float(warning.split("about ")[1].split()[0])
    assert 80 < passes <= 100
    less = Data.model_validate({**TEXT, "max_megabytes": held / 2e6})
    assert "about 2" in (expected_repeats(less, folder, held) or "")


def test_pickle_carries_no_tokens(build, text_folder: Path) -> None:
    corpus = build(**TEXT)
    before = train_batch(corpus.train, seed=1, step=3, batch_sequences=4, sequence_length=32)
    packed = pickle.dumps(corpus)
    assert len(packed) < 4000
    loaded = pickle.loads(packed)
    after = train_batch(loaded.train, seed=1, step=3, batch_sequences=4, sequence_length=32)
    assert np.array_equal(before, after)


def test_bytes_per_token_of_bytes(build, text_folder: Path) -> None:
    corpus = build(**TEXT)
    separators = int((np.asarray(corpus.validation) == 0).sum())
    assert separators == corpus.manifest["validation"]["documents"]
    assert corpus.bytes_per_token == 1 - separators / corpus.validation_tokens


class TestTokenizers:
    """Byte-pair tokenizers trained here or loaded from a file."""

    def test_trained_on_the_training_split(self, build, text_folder: Path, tmp_path: Path) -> None:
        # The validation files repeat a word that training never sees: no merge may know it.
        (tmp_path / "held_out.txt").write_text("qqzzxx " * 400)
        corpus = build(
            **TEXT, validation_paths=["held_out.txt"], tokenizer={"train_vocab_size": 400}
        )
        encoder = load_encoder(corpus.path / "tokenizer.json", 400)
        assert "qqzz" not in "".join(encoder.tokenizer.get_vocab())
        assert corpus.dtype == "uint16"
        assert corpus.vocab_size == 400
        assert int(np.max(corpus.train)) < 400
        text = encoder.tokenizer.decode(np.asarray(corpus.train).tolist(), skip_special_tokens=True)
        whole = "".join(p.read_text("utf-8") for p in sorted_files(text_folder))
        assert text == whole
        assert int((np.asarray(corpus.train) == encoder.separator).sum()) == 60
        assert corpus.bytes_per_token == pytest.approx(2800 / corpus.validation_tokens)

    def test_training_is_deterministic(self, build, text_folder: Path) -> None:
        settings = TEXT | {"tokenizer": {"train_vocab_size": 500}}
        first = build(**settings)
        saved = (first.path / "tokenizer.json").read_bytes()
        shutil.rmtree(first.path)
        again = build(**settings)
        assert again.hash == first.hash
        assert (again.path / "tokenizer.json").read_bytes() == saved

    def test_loaded_from_a_file(self, build, text_folder: Path, tmp_path: Path) -> None:
        trained = build(**TEXT, tokenizer={"train_vocab_size": 400})
        file = shutil.copy(trained.path / "tokenizer.json", tmp_path / "mine.json")
        loaded = build(**TEXT, tokenizer={"file": "mine.json"})
        vocabulary = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
        assert loaded.vocab_size == max(vocabulary.values()) + 1
        assert loaded.hash == trained.hash

    def test_text_that_spells_a_special_token_is_text(
        self, build, text_folder: Path, tmp_path: Path
    ) -> None:
        (text_folder / "00.txt").write_text("a <|endoftext|> inside " * 40)
        corpus = build(**TEXT, tokenizer={"train_vocab_size": 400})
        documents = sum(corpus.manifest[s]["documents"] for s in ("train", "validation"))
        ends = sum(int((np.asarray(s) == 0).sum()) for s in (corpus.train, corpus.validation))
        assert ends == documents == 60

    def test_unfit_file(self, build, text_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nothing.json not found"):
            build(**TEXT, tokenizer={"file": "nothing.json"})
        (tmp_path / "no.json").write_text("{}")
        with pytest.raises(UserError, match=r"no.json is no tokenizers JSON file"):
            build(**TEXT, tokenizer={"file": "no.json"})
        half = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
        (tmp_path / "half.json").write_text(json.dumps(half))
        with pytest.raises(UserError, match=r"half.json is no tokenizers JSON file"):
            build(**TEXT, tokenizer={"file": "half.json"})


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".lock")]


def sorted_files(folder: Path) -> list[Path]:
    """In the order that the corpus reads them: a folder's own files before its folders."""
    return [*sorted(folder.glob("*.txt")), *sorted(folder.glob("*/*.txt"))]
