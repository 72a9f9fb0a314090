"""Nothing that a results folder, an import or a search space holds can run code here."""

import ast
import pickle
from pathlib import Path

import pytest

from raysweep.errors import UserError
from raysweep.results.importers import import_file

PACKAGE = Path(__file__).resolve().parents[1] / "raysweep"

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load"),
    *("pd.read_pickle", "pandas.read_pickle", "pd.read_hdf", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "subprocess.getoutput"),
}
MUST_SAY = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """Every call in the package: where, of what, and its constant keyword arguments."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                constants = {
                    k.arg: k.value.value
                    for k in node.keywords
                    if k.arg and isinstance(k.value, ast.Constant)
                }
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                found.append((place, dotted(node.func), constants))
    return found


@pytest.mark.slow
def test_no_call_that_runs_what_it_reads() -> None:
    everything = calls()
    assert len(everything) > 3000
    for place, name, constants in everything:
        assert name not in FORBIDDEN, f"{place}: {name}"
        assert not constants.get("shell"), f"{place}: {name} through a shell"
        if name in MUST_SAY:
            argument, value = MUST_SAY[name]
            assert constants.get(argument) is value, f"{place}: {name} without {argument}={value}"
    assert "torch.load" in {name for _, name, _ in everything}


@pytest.mark.parametrize("name", ["rows.pkl", "rows.csv", "rows.parquet"])
def test_a_pickle_is_no_table(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        import_file("csv", tmp_path / name)
    assert not marker.exists()
