"""House rules that a machine can check. Each test loops over the package and lists every place that breaks the rule."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource, isabstract
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import fastvlp
from fastvlp import parts
from fastvlp.extensions import variants

SOURCE = Path(fastvlp.__file__).parent
# A module may import from its own level and from those before it: the order of the data flow (docs/why.md).
LEVELS = [
    {
        "errors",
        "batch",
        "config",
        "dist",
        "extensions",
        "files",
        "plain_json",
        "provenance",
        "random",
        "recipe_options",
        "tensor_files",
        "writer_lock",
    },
    {"data"},
    {"model"},
    {"objectives"},
    {"convert"},
    {"training"},
    {"recipes"},
    {"eval"},
    {"tasks"},
    {"comparison"},
    {"search"},
    {"exporters"},
    {"speed"},
    {"serve"},
    {"cli", "cli_help", "cli_options", "cli_results", "__main__", "__init__", "parts"},
]
# What varies: the abstract class, and the package whose modules hold the variants.
INTERFACES = {
    "fastvlp.model.encoders.interface:ImageEncoderConfig": "fastvlp.model.encoders",
    "fastvlp.model.encoders.interface:ImageEncoder": "fastvlp.model.encoders",
    "fastvlp.model.encoders.interface:TextEncoderConfig": "fastvlp.model.encoders",
    "fastvlp.model.encoders.interface:TextEncoder": "fastvlp.model.encoders",
    "fastvlp.objectives.objective:ObjectiveConfig": "fastvlp.objectives",
    "fastvlp.objectives.objective:Objective": "fastvlp.objectives",
    "fastvlp.tasks.interface:Task": "fastvlp.tasks",
    "fastvlp.data.sources.interface:Source": "fastvlp.data.sources",
    "fastvlp.search.engines.interface:IndexEngine": "fastvlp.search.engines",
    "fastvlp.exporters.interface:ExportTarget": "fastvlp.exporters",
    "fastvlp.convert.interface:Layout": "fastvlp.convert",
}


@cache
def trees() -> dict[Path, ast.Module]:
    """The package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


@cache
def module_names() -> set[str]:
    return {module_name(path) for path in trees()}


def module_name(path: Path) -> str:
    """`data.loader` of .../fastvlp/data/loader.py; a package is called like its folder."""
    return path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"


def nodes(*kinds: type) -> Iterator[tuple[Path, Any]]:
    for path, tree in trees().items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kinds))


@cache
def imports(path: Path) -> set[str]:
    """Modules of the package that `path` imports: when it is loaded, when its functions run, or for type checkers."""
    tree, names = trees()[path], module_names()
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastvlp":
            base = (node.module or "").removeprefix("fastvlp").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                imported.add(inner if inner in names else base)
        if isinstance(node, ast.Import):
            imported |= {a.name.removeprefix("fastvlp.") for a in node.names if a.name.startswith("fastvlp.")}
    return imported - {""}


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if (module.split(".")[0] or "__init__") in names)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{module_name(path)} imports {other}"
        for path in trees()
        for other in imports(path)
        if level(other) > level(module_name(path) if path != SOURCE / "__init__.py" else "__init__")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    cycle = cycle_of({module_name(path): imports(path) - {module_name(path)} for path in trees()})
    assert not cycle, f"a cycle of imports: {' -> '.join(cycle)}"


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_module_name_has_one_meaning() -> None:
    """A format to import and the task on it may share the name of their data set, and an objective and the layout of its
    public checkpoints that of their method; nothing else is called alike."""
    by_name = defaultdict(list)
    for path in trees():
        if path.stem not in ("__init__", "interface"):
            by_name[path.stem].append(path.relative_to(SOURCE).as_posix())
    wrong = {
        name: paths
        for name, paths in by_name.items()
        if len(paths) > 1
        and not all(path.startswith(("data/sources/", "tasks/", "objectives/", "convert/")) for path in paths)
    }
    assert not wrong, wrong


def test_public_names_are_sorted_and_exist() -> None:
    assert fastvlp.__all__ == sorted(fastvlp.__all__)
    for public in fastvlp.__all__:
        assert getattr(fastvlp, public) is not None
        assert find_spec(f"fastvlp.{public}") is None, f"importing the module {public} would hide the name"
    assert parts.__all__ == sorted(parts.__all__) and not {*parts.__all__} & {*fastvlp.__all__}
    assert all(getattr(parts, name).__name__ == name for name in parts.__all__)
    assert (SOURCE / "py.typed").is_file()
    with pytest.raises(AttributeError):
        _ = fastvlp.nothing


def test_importing_fastvlp_does_not_import_torch() -> None:
    code = "import sys, fastvlp, fastvlp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_is_safe_and_whole() -> None:
    wrong = []
    for path, call in nodes(ast.Call):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        unsafe = (
            (name == "torch.load" and options.get("weights_only") != "True")
            or (name.endswith("load_state_dict") and options.get("strict", "True") != "True")
            or name in {"pickle.load", "pickle.loads", "eval", "exec"}
        )
        if unsafe:
            wrong.append(f"{place(path, call)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_parts_stay_short() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}: {lines} lines"
        for path in SOURCE.rglob("*")
        if path.suffix in {".py", ".js", ".css", ".html"} and (lines := path.read_text("utf-8").count("\n")) > 400
    ]
    for path, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
            wrong.append(f"{place(path, node)}: {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def all_variants() -> dict[str, Path]:
    """Names of all concrete variants, and the files that they are in."""
    names = {}
    for interface, package in INTERFACES.items():
        module, _, name = interface.partition(":")
        base = getattr(import_module(module), name)
        assert isabstract(base), f"{interface} is an interface: abstract"
        found = [cls for cls in variants(base, package) if cls.__module__.startswith("fastvlp.")]
        assert found, f"no variants of {interface}"
        names |= {cls.__name__: Path(sys.modules[cls.__module__].__file__ or "") for cls in found}
    return names


def test_nobody_asks_a_variant_for_its_class_or_its_name() -> None:
    own = all_variants()
    wrong = []
    # `assert isinstance(...)` tells the type checker what the function itself has built.
    narrowing = {id(inner) for _, node in nodes(ast.Assert) for inner in ast.walk(node)}
    for path, node in nodes(ast.Call, ast.MatchClass, ast.Constant, ast.Compare):
        if id(node) in narrowing:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            classes = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
        elif isinstance(node, ast.MatchClass):
            classes = {ast.unparse(node.cls)}
        elif isinstance(node, ast.Constant):
            # A single word or an acronym, such as Retrieval or CLIP, names the method in prose too.
            prose = not isinstance(node.value, str) or not re.search(r"[a-z][A-Z]", node.value)
            classes = set() if prose else {node.value}
        elif isinstance(node, ast.Call):
            classes = set()
        else:
            types = [part for part in [node.left, *node.comparators] if ast.unparse(part).startswith("type(")]
            classes = {ast.unparse(part) for part in [node.left, *node.comparators]} if types else set()
        # The public names, which __init__ imports when they are first used, are strings by necessity.
        asked = {name for name in classes & {*own} if own[name] != path} if path.name != "__init__.py" else set()
        wrong += [f"{place(path, node)}: {name}" for name in asked]
    assert not wrong, "\n".join(wrong)


def test_the_library_names_parameters_and_only_the_command_line_names_options() -> None:
    docstrings = {
        id(node.body[0].value)
        for _, node in nodes(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    wrong = []
    for path, node in nodes(ast.Constant):
        # `vlp command --option` as a whole is what somebody types, and a string that is an option alone is an argument.
        text = re.sub(r"`vlp [^`]*(`|$)|^--[a-z-]+$", "", node.value) if isinstance(node.value, str) else ""
        if not path.name.startswith("cli") and id(node) not in docstrings and re.search(r"(?<![\w-])--[a-z]", text):
            wrong.append(f"{place(path, node)}: {text.strip()[:80]}")
    assert not wrong, "\n".join(wrong)


def test_every_option_of_a_run_has_help() -> None:
    from fastvlp.training.train_config import TrainConfig

    wrong: list[str] = []
    done: set[type] = set()

    def visit(cls: Any) -> None:
        for part in typing.get_args(cls):
            visit(part)
        if not isinstance(cls, type) or cls in done:
            return
        done.add(cls)
        for interface, package in INTERFACES.items():
            if interface.rpartition(":")[2] == cls.__name__:
                for variant in variants(cls, package):
                    visit(variant)
        if not dataclasses.is_dataclass(cls) or not cls.__module__.startswith("fastvlp."):
            return
        body = typing.cast(ast.ClassDef, ast.parse(dedent(getsource(cls))).body[0]).body
        for node, after in zip(body, [*body[1:], None]):
            if isinstance(node, ast.AnnAssign):
                helped = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                wrong.extend([] if helped else [f"{cls.__module__}.{cls.__name__}.{ast.unparse(node.target)}"])
        for hint in typing.get_type_hints(cls).values():
            visit(hint)

    visit(TrainConfig)
    assert len(done) > 30 and not wrong, "\n".join(wrong)


def test_words_are_those_of_the_field() -> None:
    pattern = re.compile(r"\b(told|untold|yardsticks?|judge[ds]?|whence)\b", re.IGNORECASE)
    wrong = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()[:90]}"
        for path in trees()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)
