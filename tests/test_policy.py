"""Rules of the house that a machine can keep: one direction of imports, sorted public names, safe loading, short parts."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastvlp

SOURCE = Path(fastvlp.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A module may import from its own level and those before it.
LEVELS = [
    {"errors", "batch", "config", "dist", "extensions", "files", "provenance", "random"},
    {"data"},
    {"model"},
    {"objectives"},
    {"convert"},
    {"training"},
    {"recipes"},
    {"eval"},
    {"tasks"},
    {"comparison"},
    {"search", "exporters"},
    {"serve"},
    {"cli", "__main__", "__init__"},
]


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module.split(".")[0] in names)


def runtime_imports(tree: ast.Module) -> set[str]:
    """Modules of fastvlp that are imported when the code runs (not for type checkers alone)."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastvlp"):
            base = (node.module or "").removeprefix("fastvlp").removeprefix(".")
            found |= {base} if base else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("fastvlp.") for a in node.names if a.name.startswith("fastvlp.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path: Path):
    own = level(path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."))
    later = {module for module in runtime_imports(ast.parse(path.read_text())) if level(module) > own}
    assert not later, f"{name(path)} imports {later} of a later part"


def test_public_names_are_sorted_and_exist():
    assert fastvlp.__all__ == sorted(fastvlp.__all__)
    for public in fastvlp.__all__:
        assert getattr(fastvlp, public) is not None
        assert find_spec(f"fastvlp.{public}") is None, f"importing the module {public} would hide the name"
    assert {"Transform", "caption", "official_flm", "recipe"} < {*fastvlp.__all__}
    with pytest.raises(AttributeError, match="public names are"):
        _ = fastvlp.nothing


def test_importing_fastvlp_does_not_import_torch():
    code = "import sys, fastvlp, fastvlp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=name)
def test_loading_is_safe_and_whole(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert said.get("weights_only") == "True", f"{name(path)}:{node.lineno}"
        if ast.unparse(node.func).endswith("load_state_dict"):
            assert said.get("strict", "True") == "True", (
                f"{name(path)}:{node.lineno}: name what is loaded and what is not"
            )
        assert ast.unparse(node.func) not in {"pickle.load", "pickle.loads", "eval", "exec"}, (
            f"{name(path)}:{node.lineno}"
        )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_parts_stay_short(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{name(path)}: is it one thing?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 70, f"{name(path)}:{node.lineno}: {node.name} is {lines} lines"
