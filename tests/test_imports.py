"""Who may import whom: scripts import utils and ldm, ldm neither utils nor argparse, and all runs one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "utils"}
NOUNS = {path.stem: path for path in (ROOT / "ldm").glob("*.py")}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; of `from ldm import x` both `ldm` and `ldm.x`."""
    return names_in(path.read_text(encoding="utf-8"))


def names_in(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "ldm" * bool(node.level) + "." * bool(node.level and node.module) + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "__import__":
            names.add(ast.unparse(node.args[0]).strip("'\""))
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_what_counts_as_an_import():
    source = "import a.b\nif x:\n    from c import d\n    from . import e\nfrom .g import h\n__import__('i')"
    assert names_in(source) == {"a.b", "c", "c.d", "ldm", "ldm.e", "ldm.g", "ldm.g.h", "i"}


def test_there_is_something_to_look_at():
    assert {"train_autoencoder", "train_diffusion", "inference"} <= set(SCRIPTS)
    assert {"datasets", "transforms", "checkpoints", "networks"} <= set(NOUNS)
    assert {"utils", "ldm"} <= packages(SCRIPTS["train_autoencoder"])


@pytest.mark.parametrize("name", sorted({*SCRIPTS, "utils"}))
def test_no_script_is_imported_by_a_script(name):
    assert not packages(ROOT / f"{name}.py") & set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(NOUNS))
def test_nouns_know_no_scripts_and_no_command_line(name):
    assert not packages(NOUNS[name]) & {"utils", "argparse", *SCRIPTS}
    text = NOUNS[name].read_text(encoding="utf-8")
    assert "sys.argv" not in text


def test_nouns_import_each_other_one_way():
    edges = {
        name: {other for other in NOUNS if f"ldm.{other}" in imported(path)} - {"__init__"}
        for name, path in NOUNS.items()
    }
    assert not edges.pop("__init__")  # the package itself brings nothing along
    assert edges["datasets"] >= {"transforms"}  # edges are seen at all
    while ends := {name for name, needed in edges.items() if not needed & edges.keys()}:
        edges = {name: needed for name, needed in edges.items() if name not in ends}
    assert not edges, f"imports in a circle: {edges}"
