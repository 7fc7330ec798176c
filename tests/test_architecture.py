"""The house: an ordered list of floors, imports that go down or stay on one, and no circle."""

import ast
import collections
import graphlib
import itertools
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
    ("data.sources",),
    ("data",),
    ("data.prepare",),
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
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    names = list(itertools.accumulate(module.split("."), "{}.{}".format))
    known = [name for name in names if name in floors]
    assert known, f"{module} is on no floor"
    return floors[known[-1]]


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


# What every command has.
SHARED_NAMES = {"main", "run", "__all__", "FOREIGN_FLAGS"}


def list_names(path: Path) -> list[str]:
    """Return the names of the functions, classes and constants at the top level of a file."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def test_no_two_things_have_one_name():
    homes = collections.defaultdict(list)
    for path in MODULES:
        for name in list_names(path):
            homes[name].append(name_module(path))
    homes = {name: found for name, found in homes.items() if name not in SHARED_NAMES and not name.startswith("_")}
    assert {"build_run", "RunFolder", "SMALL_PANELS"} <= homes.keys()
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_the_walk_sees_imports():
    assert {"__init__", "data.dataset", "training.run", "publishing.model_card"} <= list_imports(
        REPOSITORY / "train.py"
    )
    known = ("core.files", "data.sources.corpus", "data.shards", "data.prepare.pipeline", "model.folder", "train")
    floors = [find_floor(module) for module in known]
    assert floors == sorted(set(floors))
