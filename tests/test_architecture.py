"""The house: imports go down only, and the two files that travel with a checkpoint import nothing of ours."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = "modeling_gpt2_repro"
SCRIPTS = ("train", "prepare_data", "eval_hellaswag")
FOUNDATIONS = (
    *("environment", "streams", "stop_signals", "refusals", "errors", "file_kinds", "files", "locks", "arguments"),
    *("launch_environment", "devices"),
)
ROOMS = ("data", "training", "evaluation")
COMMANDS = ("nanogpt",)

MODULES = sorted([*(REPOSITORY / PACKAGE).rglob("*.py"), *(REPOSITORY / f"{name}.py" for name in SCRIPTS)])


def list_imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere in it, as `data.shards` or `train`."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{PACKAGE}.{node.module}" if node.level else node.module
            imported |= {module} if node.module != PACKAGE else {f"{module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix(f"{PACKAGE}.") for name in imported if name.startswith(f"{PACKAGE}.")}
    return ours | {name for name in imported if name in SCRIPTS}


def may_import(importer: str, imported: str) -> bool:
    """Tell whether one of our modules may import another."""
    importer_room, imported_room = importer.split(".")[0], imported.split(".")[0]
    if imported in SCRIPTS:
        return False
    if importer in SCRIPTS or importer in ("__init__", *COMMANDS):
        return imported not in COMMANDS
    if importer in ("run", "device_fit"):
        return imported not in COMMANDS and imported_room != "reporting"
    if importer in ("configuration_gpt2_repro", PACKAGE):
        return importer == PACKAGE and imported == "configuration_gpt2_repro"
    if importer == "weights":
        return imported in (*FOUNDATIONS, PACKAGE, "configuration_gpt2_repro")
    if importer == "eval_only":
        return imported_room in ("data", "evaluation") or imported in FOUNDATIONS
    if importer in FOUNDATIONS:
        return imported in FOUNDATIONS[: FOUNDATIONS.index(importer)]
    if importer_room == imported_room or imported in FOUNDATIONS:
        return True
    return importer_room == "reporting" and imported_room in ROOMS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_down(path):
    relative = path.relative_to(REPOSITORY / PACKAGE if path.is_relative_to(REPOSITORY / PACKAGE) else REPOSITORY)
    importer = ".".join(relative.with_suffix("").parts)
    wrong = [imported for imported in list_imports(path) if not may_import(importer, imported)]
    assert not wrong, f"{importer} may not import {wrong}"


def test_the_walk_sees_imports():
    assert {"data.dataset", "run", "reporting.model_card"} <= list_imports(REPOSITORY / "train.py")
    assert not may_import("training.plan", "evaluation.sampling")
    assert not may_import("data.shards", "reporting.plots")
    assert not may_import("evaluation.sampling", PACKAGE)
    assert not may_import("evaluation.baseline", "eval_only")
    assert not may_import("eval_only", PACKAGE)
    assert not may_import("reporting.plots", PACKAGE)
    assert not may_import("training.memory", PACKAGE) and not may_import("training.plan", "device_fit")


def test_scripts_stay_stories():
    assert len((REPOSITORY / "train.py").read_text().splitlines()) <= 300
    assert len((REPOSITORY / PACKAGE / f"{PACKAGE}.py").read_text().splitlines()) <= 350
