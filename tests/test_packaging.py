"""The wheel, installed away from the checkout: what it brings alone, and with `[search]`."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "raysweep", source / "raysweep", ignore=leave)  # links are followed
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def wanted(name: str, extras: frozenset[str]) -> dict[str, metadata.Distribution]:
    """A distribution and all that it asks for, by its metadata and theirs, where installed."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # the CPU build of PyTorch does without the CUDA libraries
        found[key] = dist
        for text in dist.requires or ():
            one = Requirement(text)
            if any(one.marker is None or one.marker.evaluate({"extra": e}) for e in (*extras, "")):
                waiting.append((one.name, frozenset(one.extras)))
    return found


@dataclass(frozen=True)
class Environment:
    """A fresh environment, in a folder that commands run in."""

    folder: Path

    def raysweep(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "venv/bin/raysweep"), *words],
            cwd=self.folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Environment]:
    """Makes an environment of the wheel and exactly what its metadata asks for with an extra."""

    def make(extra: str) -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
        )
        python = folder / "venv/bin/python"
        pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
        (packages,) = (folder / "venv/lib").glob("python3*/site-packages")
        (about,) = packages.glob("raysweep-*.dist-info")
        own = metadata.Distribution.at(about)
        for text in own.requires or ():
            one = Requirement(text)
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            for dist in wanted(one.name, frozenset(one.extras)).values():
                tops = {file.parts[0] for file in dist.files or () if file.parts[0] != ".."}
                for top in tops - {"__pycache__"}:
                    source, target = Path(str(dist.locate_file(top))), packages / top
                    if source.exists() and not target.exists():
                        target.symlink_to(source)

        return Environment(folder)

    return make


@pytest.mark.slow
def test_alone_it_reads_results_and_says_what_it_lacks(
    installed: Callable[[str], Environment],
) -> None:
    environment = installed("")
    raysweep, where = environment.raysweep, environment.folder
    table = "lr,bs,N,D,loss\n" + "".join(
        f"{lr},{bs},{n},{20 * n},{3.0 + (1e6 / n) ** 0.1 + 0.05 * (k - 1) ** 2 + 0.02 * b**2}\n"
        for n in (1_000_000, 4_000_000)
        for k, lr in enumerate((0.001, 0.003, 0.01))
        for b, bs in enumerate((16384, 65536))
    )
    assert raysweep("init", "--like", "import").returncode == 0
    (where / "sweep.csv").write_text(table)
    columns = "learning_rate=lr,batch_tokens=bs,params_active_non_embedding=N,tokens=D,loss=loss"
    words = ("import", "csv", "sweep.csv", "--results", "results/mine", "--map", columns)
    done = raysweep(*words)
    assert done.returncode == 0, done.stderr
    assert "12 new rows" in done.stdout
    report = raysweep("report", "results/mine")
    assert report.returncode == 0, report.stderr
    assert (where / report.stdout.strip()).stat().st_size > 10_000
    assert raysweep("recommend", "results/mine", "--params", "1B", "--tokens", "20B").stdout
    for words in (("run", "import.yaml"), ("ask", "import.yaml")):
        lacks = raysweep(*words)
        assert lacks.returncode == 2
        said = lacks.stderr.strip().splitlines()
        assert said[-1].startswith(f"error: raysweep {words[0]} needs "), lacks.stderr
        assert said[-1].endswith("which is not installed: pip install 'raysweep[search]'")
        assert len(said) == 1


@pytest.mark.ray
def test_with_search_a_study_of_ones_own_runs(installed: Callable[[str], Environment]) -> None:
    raysweep = installed("search").raysweep
    assert raysweep("init", "--like", "own").stdout.split() == ["own.yaml", "own_train.py"]
    again = raysweep("init", "--like", "own")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: own.yaml is here already")
    small = ("--set", "search.trials_per_cell=1", "--set", "horizons=[{tokens: 20000}]")
    small += "--set", "search.extend_edges=false"
    done = raysweep("run", "own.yaml", *small, "--no-live", timeout=400)
    assert done.returncode == 0, done.stderr
    assert "reports/own/index.html" in done.stdout
    assert "own: 2 trials" in done.stderr
