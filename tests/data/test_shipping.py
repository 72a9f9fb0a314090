"""A corpus reaches a node that has only the results URI, over a real S3 server."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysweep.data.corpus import Corpus, prepare
from raysweep.data.shipping import fetch, upload
from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.study import Data


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i}: " + f"{i * 7919} words of it. " * 40)
    data = Data(source="text", paths=(str(text),), validation_sequences=4)
    return prepare(data, tmp_path, cache=tmp_path / "cache", sequence_length=16)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_node_without_the_corpus_fetches_the_same_tokens(
    corpus: Corpus, where: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage.at(tmp_path / "results" if where == "folder" else bucket)
    upload(corpus, storage)
    upload(corpus, storage)
    tokens = np.array(corpus.train[:])
    elsewhere = replace(corpus, path=tmp_path / "not-on-this-node")
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "node-cache"))
    fetched = fetch(elsewhere, storage)
    assert fetched.hash == corpus.hash
    assert str(fetched.path).startswith(str(tmp_path / "node-cache"))
    assert np.array_equal(fetched.train[:], tokens)
    assert fetch(corpus, storage).path == corpus.path


def test_a_corpus_in_neither_place_says_what_to_do(corpus: Corpus, tmp_path: Path) -> None:
    shutil.rmtree(corpus.path)
    with pytest.raises(UserError, match="use results that all nodes reach"):
        fetch(corpus, Storage.at(tmp_path / "results"))


def test_shards_of_the_user_need_no_more_than_their_path(tmp_path: Path) -> None:
    """Another node sees the shards, and not the driver's cache."""
    shard = tmp_path / "shared" / "a.bin"
    shard.parent.mkdir()
    np.arange(1000, dtype=np.uint16).tofile(shard)
    data = Data(source="tokens", paths=(str(shard),), vocab_size=1000, validation_sequences=2)
    corpus = prepare(data, tmp_path, cache=tmp_path / "cache", sequence_length=16)
    storage = Storage.at(tmp_path / "results")
    upload(corpus, storage)
    shutil.rmtree(tmp_path / "cache")
    here = fetch(pickle.loads(pickle.dumps(corpus)), storage)
    assert here.train[:3].tolist() == [0, 1, 2]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{shard} is missing .* on node .*: keep data.paths"):
        fetch(corpus, storage)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing .* on node .*: keep data.paths"):
        fetch(corpus, storage)
