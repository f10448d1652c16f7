"""Who may import whom: scripts import utils and ldm, ldm neither utils nor argparse, and its folders each
other one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "utils"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "ldm").rglob("*.py")
    if path.name != "__init__.py"
}
# Each may import from itself and from those before it.
ORDER = ["system", "models", "configs", "environment", "data", "diffusion", "losses", "metrics", "figures"]
ORDER += ["training", "planning", "generation", "given_masks", "quality", "export", "editing", "outputs"]
ORDER += ["sampling_memory", "evaluation"]


def names_in(source: str) -> set[str]:
    """Dotted names that a source imports, wherever in it; of `from ldm import x` both `ldm` and `ldm.x`."""
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


def imported(path: Path) -> set[str]:
    return names_in(path.read_text(encoding="utf-8"))


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_what_counts_as_an_import():
    source = "import a.b\nif x:\n    from c import d\n    from . import e\nfrom .g import h\n__import__('i')"
    assert names_in(source) == {"a.b", "c", "c.d", "ldm", "ldm.e", "ldm.g", "ldm.g.h", "i"}


def test_there_is_something_to_look_at():
    assert {"train_autoencoder", "train_diffusion", "inference"} <= set(SCRIPTS)
    assert {"ldm.data.datasets", "ldm.models.autoencoder", "ldm.training.step"} <= set(MODULES)
    assert {"utils", "ldm"} <= packages(SCRIPTS["train_autoencoder"])


@pytest.mark.parametrize("name", sorted({*SCRIPTS, "utils"}))
def test_no_script_is_imported_by_a_script(name):
    assert not packages(ROOT / f"{name}.py") & set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_know_no_scripts_and_no_command_line(name):
    assert not packages(MODULES[name]) & {"utils", "argparse", *SCRIPTS}
    assert "sys.argv" not in MODULES[name].read_text(encoding="utf-8")


def test_slabs_are_imported_only_where_a_budget_is_given():
    outside = {name: path for name, path in MODULES.items() if not name.startswith("ldm.lowmem.")}
    for name, path in {**outside, **SCRIPTS, "utils": ROOT / "utils.py"}.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        first = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "lowmem" not in "\n".join(first), name


def test_folders_import_each_other_one_way_and_no_modules_in_a_circle():
    edges = {name: imported(path) & set(MODULES) for name, path in MODULES.items()}
    assert "ldm.data.preprocessing" in edges["ldm.data.datasets"]  # edges are seen at all

    def place(module: str) -> int:
        return ORDER.index(module.split(".")[1])

    lazy = {name for name in MODULES if name.startswith("ldm.lowmem.")}
    assert not [name for name in lazy if edges[name] - lazy]  # imported where a budget is given
    upward = {
        (name, other)
        for name, others in edges.items()
        for other in others - lazy
        if name not in lazy and place(other) > place(name)
    }
    assert not upward
    while ends := {name for name, needed in edges.items() if not needed & edges.keys()}:
        edges = {name: needed for name, needed in edges.items() if name not in ends}
    assert not edges, f"imports in a circle: {edges}"
