"""Every source of text, and what is said where one cannot be used."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.data.corpus import Corpus
from raysweep.data.sources import BLOCK, ReadStats, boundary, find_files, read_documents
from raysweep.errors import UserError

TEXTS = [f"Document {n}: naïve ☃ text, " + "more of it " * (n + 20) for n in range(40)]


def documents(corpus: Corpus) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents of a corpus of bytes."""
    train, validation = (
        bytes(split[0 : len(split)]).split(b"\0") for split in (corpus.train, corpus.validation)
    )
    assert train.pop() == validation.pop() == b""  # a separator ends each document
    return train, validation


def test_text_files_are_documents_of_bytes(build, text_folder: Path) -> None:
    corpus = build(source="text", paths=["texts"])
    train, validation = documents(corpus)
    files = [path.read_bytes() for path in text_folder.rglob("*.txt")]
    assert sorted(train + validation) == sorted(files)
    assert corpus.vocab_size == 256
    assert corpus.dtype == "uint8"
    assert corpus.manifest["read"] == {
        "files": 60,
        "documents": 60,
        "bytes": sum(map(len, files)),
        "dropped": {},
    }


def test_a_folder_may_hold_other_files(build, text_folder: Path) -> None:
    (text_folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (text_folder / "latin").write_bytes("äöü".encode("latin-1"))
    (text_folder / "blank.txt").write_text(" \n")
    (text_folder / ".hidden").write_text("hidden")
    (text_folder / "nowhere.txt").symlink_to("missing")
    (text_folder / "windows.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    corpus = build(source="text", paths=["texts"])
    train, validation = documents(corpus)
    assert b"one\ntwo" in train + validation
    assert corpus.manifest["read"]["files"] == 62
    assert corpus.manifest["read"]["documents"] == 61
    assert corpus.manifest["read"]["dropped"] == {"empty": 1, "not UTF-8 text": 2}


def test_long_files_are_read_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = "some words and ☃\n".encode() * (2 * BLOCK // 19)
    path.write_bytes(text)
    stats = ReadStats()
    blocks = list(read_documents({path: True}, "text", "text", stats))
    assert len(blocks) == stats.documents > 1
    assert stats.files == 1
    assert b"".join(blocks) == text
    assert all(block.endswith(b"\n") and len(block) < BLOCK for block in blocks)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        (b"one\ntwo three", 9, 4),
        (b"one two three", 9, 8),
        (b"onetwothree", 9, 9),
        ("aé☃".encode(), 5, 3),
        (b"short", 9, 5),
        (b"short", 5, 5),
    ],
)
def test_boundary_prefers_lines_then_words_then_characters(text, limit, cut) -> None:
    assert boundary(text, limit) == cut


def test_jsonl_and_parquet_hold_the_same_documents(build, tmp_path: Path) -> None:
    rows = [{"id": n, "body": text} for n, text in enumerate([*TEXTS, None, ""])]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "plain.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    dictionary = pa.table({"body": pa.array([r["body"] for r in rows]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "coded.parquet")
    corpora = [
        build(source=source, paths=[name], text_column="body")
        for source, name in [
            ("jsonl", "plain.jsonl"),
            ("jsonl", "packed.jsonl.gz"),
            ("parquet", "rows.parquet"),
            ("parquet", "coded.parquet"),
        ]
    ]
    train, validation = documents(corpora[0])
    assert sorted(train + validation) == sorted(text.encode() for text in TEXTS)
    assert {corpus.hash for corpus in corpora} == {corpora[0].hash}
    for corpus in corpora:
        assert corpus.manifest["read"]["dropped"] == {"empty": 1, "null": 1}


def test_text_from_json_is_made_valid(build, tmp_path: Path) -> None:
    odd = json.dumps({"text": "a\0b \ud800 c"}) + "\n"
    (tmp_path / "odd.jsonl").write_text(odd + "\n".join(json.dumps({"text": t}) for t in TEXTS))
    train, validation = documents(build(source="jsonl", paths=["odd.jsonl"]))
    assert b"ab ? c" in train + validation


def test_find_files_keeps_order_and_names(tmp_path: Path) -> None:
    for name in ("z/b.jsonl", "z/a.jsonl", "z/skip.txt", "y.data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_files(["z", "y.data", "z/a.jsonl"], tmp_path, "jsonl", "data.paths")
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "y.data"]
    assert list(found.values()) == [True, False, True]


def test_reading_stops_after_max_megabytes(build, text_folder: Path) -> None:
    corpus = build(source="text", paths=["texts"], max_megabytes=0.02)
    kept = corpus.manifest["train"]["bytes"] + corpus.manifest["validation"]["bytes"]
    assert 19_000 < kept <= 20_000


def test_named_validation_sets(build, text_folder: Path) -> None:
    sets = {"own": [], "first": ["texts/03.txt"], "deep": ["texts/deeper/04.txt"]}
    corpus = build(source="text", paths=["texts"], validation=sets, minimise="first")

    def texts(tokens) -> set[bytes]:
        return set(bytes(tokens[0 : len(tokens)]).split(b"\0")) - {b""}

    first, own, deep = (corpus.validation, *map(corpus.named_validation, ("own", "deep")))
    assert texts(first) == {(text_folder / "03.txt").read_bytes()}
    assert texts(deep) == {(text_folder / "deeper" / "04.txt").read_bytes()}
    every = [texts(part) for part in (corpus.train, first, own, deep)]
    assert 1 < len(every[2]) < 10
    assert sum(map(len, every)) == len(set.union(*every)) == 60
    assert pickle.loads(pickle.dumps(corpus)).named_validation("own")[0] == own[0]
    again = build(source="text", paths=["texts"], validation=sets, minimise="first")
    assert again.path == corpus.path, "from the cache, found sound"
    other = {"own": [], "last": ["texts/03.txt"], "deep": ["texts/deeper/04.txt"]}
    renamed = build(source="text", paths=["texts"], validation=other, minimise="last")
    assert renamed.hash != corpus.hash, "columns of rows bear the names"


def test_a_named_set_without_text_or_too_small_is_named(build, text_folder: Path) -> None:
    for text, said in (("", "data.validation.b holds no text"), ("few", "data.validation.b: ")):
        (text_folder.parent / "b.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            build(source="text", paths=["texts"], validation={"a": [], "b": ["b.txt"]})


def test_validation_paths_are_held_out(build, text_folder: Path) -> None:
    twin = (text_folder / "03.txt").read_text(encoding="utf-8")
    (text_folder / "twin.txt").write_text(twin, encoding="utf-8")
    corpus = build(
        source="text", paths=["texts"], validation_paths=["texts/03.txt", "texts/deeper/04.txt"]
    )
    train, validation = documents(corpus)
    assert validation == [(text_folder / name).read_bytes() for name in ("03.txt", "deeper/04.txt")]
    assert len(train) == 58  # neither the two nor the twin
    assert not set(train) & set(validation)


BAD_FILES = {
    "latin.txt": "äöü".encode("latin-1"),
    "nul.txt": b"a\0b",
    "blank.txt": b" \n",
    "list.jsonl": b"[1]\n",
    "broken.jsonl": b'{"text": "a"}\n{"text": \n',
    "other.jsonl": b'{"id": 1, "body": "a"}\n',
    "number.jsonl": b'{"text": 5}\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
    "plain.jsonl.gz": b'{"text": "a"}\n',
    "no.parquet": b"PAR1 but no more",
    "nothing.jsonl": b"",
}
BAD = [
    ("text", "missing.txt", r"data.paths: .*missing.txt not found: check data.paths"),
    ("text", "empty_folder", r"folder .*empty_folder holds no visible file"),
    ("jsonl", "empty_folder", r"holds no .jsonl or .* file"),
    ("text", "latin.txt", r"latin.txt is not UTF-8 text: convert it"),
    ("text", "nul.txt", r"nul.txt is not UTF-8 text: convert it"),
    ("text", "blank.txt", r"source text holds no text: check data.paths \(blank.txt\)"),
    ("jsonl", "nothing.jsonl", r"source jsonl holds no text"),
    ("jsonl", "list.jsonl", r"list.jsonl:1 is no JSON object"),
    ("jsonl", "broken.jsonl", r"broken.jsonl:2 is no JSON object"),
    ("jsonl", "other.jsonl", r"no column text \(it has: id, body\): set data.text_column"),
    ("jsonl", "number.jsonl", r"column text holds int, not text"),
    ("jsonl", "cut.jsonl.gz", r"cut.jsonl.gz is damaged"),
    ("jsonl", "plain.jsonl.gz", r"plain.jsonl.gz cannot be read"),
    ("jsonl", "latin.txt", r"latin.txt is damaged or not UTF-8"),
    ("parquet", "no.parquet", r"no.parquet is no readable Parquet file"),
    ("parquet", "other.parquet", r"no column text \(it has: body\)"),
    ("parquet", "number.parquet", r"column text holds int64, not text"),
]


@pytest.mark.parametrize(("source", "name", "message"), BAD)
def test_bad_sources_are_named_in_one_line(build, tmp_path: Path, source, name, message) -> None:
    (tmp_path / "empty_folder").mkdir()
    for file, content in BAD_FILES.items():
        (tmp_path / file).write_bytes(content)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    with pytest.raises(UserError, match=message) as caught:
        build(source=source, paths=[name])
    assert "\n" not in str(caught.value)
    left = (tmp_path / "cache" / "corpora").glob("*")
    assert all(path.name.startswith(".lock") for path in left)  # nothing half-built stays


def test_held_out_paths_are_checked_too(build, text_folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.validation_paths: .*nothing not found"):
        build(source="text", paths=["texts"], validation_paths=["nothing"])
    with pytest.raises(UserError, match=r"every file of data.paths"):
        build(source="text", paths=["texts"], validation_paths=["texts"])


class TestExistingTokens:
    """Shards of token ids are used where they lie."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        for name, first in (("a.bin", 0), ("b.bin", 4000)):
            np.arange(first, first + 4000, dtype="<u2").tofile(folder / name)
        return folder

    def test_the_tail_is_validation(self, build, shards: Path, tmp_path: Path) -> None:
        settings = {"source": "tokens", "vocab_size": 8000}
        corpus = build(paths=["shards"], **settings)
        assert corpus.train_tokens == len(corpus.train) == 7600
        assert np.array_equal(corpus.train[3990:4010], np.arange(3990, 4010))
        assert np.array_equal(corpus.validation[0:400], np.arange(7600, 8000))
        assert corpus.bytes_per_token is None
        assert [f.name for f in corpus.path.iterdir()] == ["manifest.json"]  # nothing copied
        np.arange(8000, dtype="<u2").tofile(tmp_path / "one.bin")
        assert build(paths=["one.bin"], **settings).hash == corpus.hash

    def test_held_out_shards(self, build, shards: Path) -> None:
        corpus = build(
            source="tokens", paths=["shards"], validation_paths=["shards/b.bin"], vocab_size=8000
        )
        assert (corpus.train_tokens, corpus.validation_tokens) == (4000, 4000)
        assert np.array_equal(corpus.validation, np.arange(4000, 8000))

    def test_named_sets(self, build, shards: Path) -> None:
        settings = {"source": "tokens", "paths": ["shards"], "vocab_size": 8000}
        sets = {"own": [], "b": ["shards/b.bin"]}
        corpus = build(validation=sets, **settings)
        assert corpus.train_tokens == 3800
        assert np.array_equal(corpus.validation, np.arange(3800, 4000))
        assert np.array_equal(corpus.named_validation("b"), np.arange(4000, 8000))
        turned = build(validation=sets, minimise="b", **settings)
        assert np.array_equal(turned.validation, np.arange(4000, 8000))
        assert np.array_equal(turned.named_validation("own"), np.arange(3800, 4000))
        assert len({corpus.hash, turned.hash, build(**settings).hash}) == 3

    def test_uint32_and_a_limit(self, build, tmp_path: Path) -> None:
        np.arange(70_000, 90_000, dtype="<u4").tofile(tmp_path / "wide.bin")
        settings = {"source": "tokens", "token_dtype": "uint32", "vocab_size": 90_000}
        corpus = build(paths=["wide.bin"], max_megabytes=0.04, **settings)
        assert corpus.train_tokens + corpus.validation_tokens == 10_000
        assert corpus.train[0:1].tolist() == [70_000]

    def test_changed_shards_are_checked_again(self, build, shards: Path) -> None:
        settings = {"source": "tokens", "paths": ["shards"], "vocab_size": 8000}
        before = build(**settings).hash
        np.arange(5000, dtype="<u2").tofile(shards / "a.bin")
        assert build(**settings).hash != before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (np.array([1, 2, 900], "<u2").tobytes(), r"bad.bin holds token 900, but .* is 500"),
            (b"abc", r"bad.bin has 3 bytes, no multiple of 2"),
            (b"", r"bad.bin is empty"),
            (b"\x93NUMPY\x01\x00" + b"v" * 100, r"bad.bin is a NumPy file: .* flat uint16"),
        ],
    )
    def test_unfit_shards(self, build, tmp_path: Path, content: bytes, message: str) -> None:
        np.arange(500, dtype="<u2").tofile(tmp_path / "good.bin")
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(UserError, match=message):
            build(source="tokens", paths=["good.bin", "bad.bin"], vocab_size=500)
