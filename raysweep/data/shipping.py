"""A corpus for workers on other machines: kept beside the results, fetched by each node once."""

from __future__ import annotations

import platform
from pathlib import Path

from pyarrow import fs

from raysweep.data import build, cache_folder
from raysweep.data.corpus import Corpus
from raysweep.errors import UserError
from raysweep.results.filesystem import Storage, retry

FOLDER = "corpora"


def upload(corpus: Corpus, storage: Storage) -> None:
    """Copy a prepared corpus to `STORAGE/corpora/HASH/`, unless it is there already.

    The manifest goes last: a corpus that has one is whole. Shards that the user keeps elsewhere
    are not copied; every node must see them at the same path. Raises UserError where storage
    cannot be written.
    """
    if corpus.manifest["in_place"] or storage.read(FOLDER, corpus.hash, build.MANIFEST):
        return
    files = sorted(p.name for p in corpus.path.iterdir() if p.name != build.MANIFEST)
    for name in files:
        target = storage.path(FOLDER, corpus.hash, name)
        what = f"write {corpus.hash}/{name} in {storage.uri}"
        _copy(fs.LocalFileSystem(), str(corpus.path / name), storage.filesystem, target, what)
    storage.write((corpus.path / build.MANIFEST).read_bytes(), FOLDER, corpus.hash, build.MANIFEST)


def fetch(corpus: Corpus, storage: Storage) -> Corpus:
    """The corpus on this node: where the driver has it, or fetched once into this node's cache.

    The user's own shards are taken where they lie. Raises UserError where it is in neither place.
    """
    if corpus.manifest["in_place"]:  # the manifest, in the driver's cache, came with the corpus
        missing = corpus.missing()
        if missing is None:
            return corpus
        raise UserError(
            f"token shard {missing} is missing or cut short on node {platform.node()}: keep "
            "data.paths where all nodes see them"
        )
    here = _open(corpus.path, corpus.hash)
    if here is not None:
        return here
    if not storage.read(FOLDER, corpus.hash, build.MANIFEST):
        raise UserError(
            f"corpus {corpus.hash} is neither on this node nor in {storage.uri}: use results that "
            "all nodes reach (a shared folder, s3:// or gs://)"
        )

    def download(work: Path) -> None:
        for info in storage.list(FOLDER, corpus.hash):
            what = f"fetch {info.base_name} of corpus {corpus.hash}"
            target = str(work / info.base_name)
            _copy(storage.filesystem, info.path, fs.LocalFileSystem(), target, what)

    return cache_folder.get_or_build(
        cache_folder.root() / FOLDER,
        f"fetched-{corpus.hash}",
        find=lambda path: _open(path, corpus.hash),
        build=download,
    )


def _open(path: Path, expected: str) -> Corpus | None:
    try:
        corpus = Corpus.open(path)
    except UserError:
        return None
    return corpus if corpus.hash == expected else None


def _copy(
    source: fs.FileSystem, path: str, destination: fs.FileSystem, target: str, what: str
) -> None:
    """Copy a file; `what` says so in errors."""

    def attempt() -> None:
        if isinstance(destination, fs.LocalFileSystem):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, target, source_filesystem=source, destination_filesystem=destination)

    retry(attempt, what)
