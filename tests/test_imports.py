"""Imports go one way: each room imports lower ones and itself, files have no cycle, and none hides in a function."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY_SCRIPTS = ("main", "prune_greedy", "prune_greedy_ad", "inference", "export")
# Lowest first. Rooms of one row do not import each other.
ROWS = (("util",), ("models", "datasets"), ("engine",), ("pruning",), ("weights",), ("tools",), ("reports",),
        ("runs",), ENTRY_SCRIPTS, ("bench",))  # fmt: skip
HEIGHT = {room: height for height, rooms in enumerate(ROWS) for room in rooms}


def modules() -> dict[str, Path]:
    """All modules of the program by name."""
    found = {}
    for room in HEIGHT:
        paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).rglob("*.py"))
        for path in paths:
            if "build" not in path.relative_to(ROOT).parts:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(name: str) -> list[tuple[str, bool]]:
    """The program's modules that a module imports, and whether a function does it."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            names = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module or ""
                     for a in node.names]  # fmt: skip
        found += [(imported, node in inside) for imported in names if imported in MODULES]
    return found


def room_of(name: str) -> str:
    return name.split(".")[0]


def test_every_file_is_in_a_room():
    known = {*HEIGHT, "tests", "checkpoints", "docs", "output"}
    found = {path.stem if path.is_file() else path.name for path in ROOT.iterdir()
             if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}  # fmt: skip
    assert {name for name in found if not name.startswith(".")} <= known


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_lower_rooms_at_the_top_of_the_file(name):
    for imported, inside in imports_of(name):
        assert not inside, f"{name} imports {imported} inside a function"
        same = room_of(imported) == room_of(name)
        assert same or HEIGHT[room_of(imported)] < HEIGHT[room_of(name)], f"{name} imports {imported}"


def test_files_have_no_import_cycle():
    try:
        graphlib.TopologicalSorter({name: {i for i, _ in imports_of(name)} - {name} for name in MODULES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# The two detectors are built of the same parts, which share their names; likewise their modules.
VARIANTS = {"models.dn_dab_detr", "models.dn_dab_deformable_detr"}
# `main` is the entry point of each command, `run` that from Python.
SHARED_NAMES = {"main", "run"}


def test_public_classes_and_functions_mean_one_thing():
    """No two modules define the same public name, but benchmarks, which are scripts of their own."""
    places: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and not node.name.startswith("_") and room_of(name) != "bench":
                places.setdefault(node.name, set()).add(name)
    shared = {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED_NAMES}
    of_variants = {
        name for name, where in shared.items() if {module.rpartition(".")[0] for module in where} == VARIANTS
    }
    assert {name: where for name, where in shared.items() if name not in of_variants} == {}


def test_module_names_mean_one_thing():
    """No two modules of different rooms share a name, but the few that each room may have."""
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        if "." in name and room_of(name) != "bench":  # a benchmark is called what it measures
            rooms.setdefault(name.split(".")[-1], set()).add(".".join(name.split(".")[:-1]))
    shared = {leaf: where for leaf, where in rooms.items() if len(where) > 1}
    variants = {"models", *VARIANTS}  # a part of each variant
    allowed = {"__main__", "config", "cost"}  # tools.cost prints what pruning.cost counts
    assert {leaf: where for leaf, where in shared.items() if leaf not in allowed and not where <= variants} == {}
