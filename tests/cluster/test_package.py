"""What travels to a cluster and what stays; env files; results asked about from anywhere."""

from pathlib import Path

import pytest

from raysweep.cluster import package
from raysweep.cluster.jobs import Jobs, _explain, read_env_file
from raysweep.cluster.package import collect, stage
from raysweep.errors import UserError
from raysweep.study import Study

SMOKE = Path(__file__).resolve().parents[2] / "search_spaces/smoke.yaml"

EVERYTHING = (
    *("pyproject.toml", "README.md", "corpus/a.txt", "search_spaces/mine.yaml"),
    *("raysweep/cluster/package.py", "raysweep/results/store.py", "raysweep/report/page.py"),
    *("raysweep/data/tokenizer.py", "raysweep/id_map.py"),
    # and what must stay where it is
    *(".git/config", ".env", "prod.env", "key.pem", "raysweep/id_rsa", "auth_token"),
    *("id_ed25519", "deploy/.aws/credentials", "kubeconfig.yaml", "key.p12", ".netrc"),
    *("my-service-account.json", "raysweep/credentials", ".ssh/config", ".env.local"),
    *("credentials.json", "raysweep/__pycache__/x.pyc", "env/pyvenv.cfg", "env/lib/big.so"),
    *("results/mine/trials/a.parquet", "reports/mine/index.html", "tests/test_x.py"),
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout as it looks after months of use."""
    root = tmp_path / "checkout"
    for name in EVERYTHING:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (root / "search_spaces/mine.yaml").write_text(SMOKE.read_text())
    (root / "link").symlink_to("/")
    monkeypatch.setattr(package, "__file__", str(root / "raysweep/cluster/package.py"))
    return root


def test_own_code_travels_with_its_study(checkout: Path, tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    (lab / "my_lab").mkdir(parents=True)
    (lab / "my_lab/train.py").write_text("x")
    (lab / "secret.env").write_text("x")
    (lab / "mine.yaml").write_text(
        "study: mine\ntraining: {function: my_lab.train:train}\nhorizons: [{tokens: 1e6}]\n"
        "scales: [{name: s, params: 1e5, flops_per_token: 7e5}]\n"
    )
    files, place = collect(lab / "mine.yaml", Study.load(lab / "mine.yaml"))
    assert place == "submitted/mine.yaml"
    assert files["submitted/my_lab/train.py"] == lab / "my_lab/train.py"
    assert "submitted/secret.env" not in files


def test_code_travels_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    space = checkout / "search_spaces/mine.yaml"
    files, place = collect(space, Study.load(space))
    assert place == "search_spaces/mine.yaml"
    assert sorted(files) == [
        "README.md",
        "corpus/a.txt",
        "pyproject.toml",
        "raysweep/cluster/package.py",
        "raysweep/data/tokenizer.py",
        "raysweep/id_map.py",
        "raysweep/report/page.py",
        "raysweep/results/store.py",
        "search_spaces/mine.yaml",
    ]
    stage(files, tmp_path / "staged")
    staged = [p for p in (tmp_path / "staged").rglob("*") if p.is_file()]
    assert sorted(p.relative_to(tmp_path / "staged").as_posix() for p in staged) == sorted(files)


def test_search_space_from_elsewhere_and_its_data(checkout: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine.yaml"
    outside.write_text(SMOKE.read_text())
    files, place = collect(outside, Study.load(outside))
    assert (place, files[place]) == ("submitted/mine.yaml", outside)

    text = SMOKE.read_text().replace("source: machine", "source: text\n  paths: [../tests]")
    (checkout / "search_spaces/own.yaml").write_text(text)
    files, _ = collect(
        checkout / "search_spaces/own.yaml", Study.load(checkout / "search_spaces/own.yaml")
    )
    assert "tests/test_x.py" in files, "data that the search space names travels from anywhere"
    outside.write_text(text.replace("../tests", "."))
    with pytest.raises(UserError, match="does not travel: name an absolute path"):
        collect(outside, Study.load(outside))


def test_env_file_stays_and_a_large_checkout_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = checkout / "settings.txt"
    secret.write_text("A=1")
    (checkout / "corpus/b.bin").write_bytes(b"x" * 3000)
    space = checkout / "search_spaces/mine.yaml"
    assert "settings.txt" not in collect(space, Study.load(space), leave_out=(secret,))[0]
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 3000)
    with pytest.raises(UserError, match=r"largest: corpus/b.bin .*move them out"):
        collect(space, Study.load(space))


def test_the_real_checkout_is_small() -> None:
    files, _ = collect(SMOKE, Study.load(SMOKE))
    assert "raysweep/results/store.py" in files
    assert "raysweep/report/templates/page.html" in files
    assert not [n for n in files if n.startswith(("tests/", "results/", "reports/", "."))]
    assert sum(p.stat().st_size for p in files.values()) < 5_000_000


def test_env_files(tmp_path: Path) -> None:
    path = tmp_path / "job.env"
    path.write_text("# note\n\nexport A=1\nB = 'two words'\nC=x=y\n")
    assert read_env_file(path) == {"A": "1", "B": "two words", "C": "x=y"}
    path.write_text("A=1\nhunter2\n")
    with pytest.raises(UserError, match=r"job.env:2: write it as KEY=VALUE$") as caught:
        read_env_file(path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        read_env_file(tmp_path / "none")


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://", "http://h:port"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="write it as http://HEAD:8265"):
        Jobs(address)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("Request failed with status code 401: no."), "refuses the token"),
        (RuntimeError("Request failed with status code 500: job 401."), "could not do it"),
        (RuntimeError("cannot write /data/4040"), "could not do it"),
        (ConnectionError("port 401"), "could not do it"),
    ],
)
def test_a_token_is_blamed_only_where_it_was_refused(error: Exception, expected: str) -> None:
    assert expected in str(_explain(error, "http://head"))
