"""The house: an ordered list of floors, imports that go down or stay on one, and no circle."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = "modeling_gpt2_repro"
SCRIPTS = ("train", "prepare_data", "eval_hellaswag")
# What README and model cards called commands before they had one entry.
FORWARDS = ("reporting", "evaluation.sampling", "nanogpt")
# From the ground up. A floor is its modules, or the folders of them.
FLOORS = (
    # The two files that travel with every checkpoint import nothing of ours but each other.
    ("configuration_gpt2_repro",),
    (PACKAGE,),
    ("core",),
    ("__init__",),
    ("data",),
    ("model",),
    ("evaluation",),
    ("training",),
    ("plots",),
    ("publishing",),
    ("commands",),
    ("__main__", *SCRIPTS),
    FORWARDS,
)

MODULES = sorted([*(REPOSITORY / PACKAGE).rglob("*.py"), *(REPOSITORY / f"{name}.py" for name in SCRIPTS)])


def name_module(path: Path) -> str:
    """Return what a module of ours is called here, as `data.shards` or `train`."""
    root = REPOSITORY / PACKAGE if path.is_relative_to(REPOSITORY / PACKAGE) else REPOSITORY
    return ".".join(path.relative_to(root).with_suffix("").parts)


def list_imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = [PACKAGE, *name_module(path).split(".")[: -node.level]] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            imported |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    known = {name_module(module) for module in MODULES}
    return known & {name.removeprefix(f"{PACKAGE}.") if name != PACKAGE else "__init__" for name in imported}


def find_floor(module: str) -> int:
    """Return on which floor a module is: where its own name stands, else its folder's."""
    floors = [
        number for name in (module, module.split(".")[0]) for number, names in enumerate(FLOORS) if name in names
    ]
    assert floors, f"{module} is on no floor"
    return floors[0]


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_imports_go_down(path):
    importer = name_module(path)
    wrong = [imported for imported in list_imports(path) if find_floor(imported) > find_floor(importer)]
    assert not wrong, f"{importer} may not import {wrong}"


def test_the_two_files_that_travel_need_nothing_of_ours():
    imported = {name: list_imports(REPOSITORY / PACKAGE / f"{name}.py") for (name,) in FLOORS[:2]}
    assert imported == {"configuration_gpt2_repro": set(), PACKAGE: {"configuration_gpt2_repro"}}


def test_scripts_do_not_import_scripts():
    assert not any(list_imports(path) & set(SCRIPTS) for path in MODULES)


def test_no_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter({name_module(path): list_imports(path) for path in MODULES}).prepare()


def test_the_walk_sees_imports():
    assert {"__init__", "data.dataset", "training.run", "publishing.model_card"} <= list_imports(
        REPOSITORY / "train.py"
    )
    assert find_floor("data.sources.corpus") < find_floor("evaluation.hellaswag") < find_floor("train")
