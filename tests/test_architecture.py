"""The package's layers: imports go down or stay within a layer, without cycles."""

import ast
import collections
import graphlib
import itertools
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = "modeling_gpt2_repro"
SCRIPTS = ("train", "prepare_data", "eval_hellaswag")
# Former names of commands, printed by older READMEs and model cards.
FORWARDS = ("reporting", "evaluation.sampling", "nanogpt")
# From the bottom up. A layer is a tuple of modules or folders.
LAYERS = (
    # The two files that travel with every checkpoint import only each other.
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
    """Return a module's name in the layers, such as `data.shards` or `train`."""
    root = REPOSITORY / PACKAGE if path.is_relative_to(REPOSITORY / PACKAGE) else REPOSITORY
    return ".".join(path.relative_to(root).with_suffix("").parts)


def list_imports(path: Path) -> set[str]:
    """Return the project's modules that a file imports, anywhere in it."""
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


def find_layer(module: str) -> int:
    """Return the index of a module's layer: by the module's own name if it is listed, else by its folder's."""
    layers = {name: number for number, names in enumerate(LAYERS) for name in names}
    names = list(itertools.accumulate(module.split("."), "{}.{}".format))
    known = [name for name in names if name in layers]
    assert known, f"{module} is in no layer"
    return layers[known[-1]]


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_imports_follow_the_order_of_the_layers(path):
    importer = name_module(path)
    wrong = [imported for imported in list_imports(path) if find_layer(imported) > find_layer(importer)]
    assert not wrong, f"{importer} may not import {wrong}"


def test_the_model_files_import_only_each_other():
    imported = {name: list_imports(REPOSITORY / PACKAGE / f"{name}.py") for (name,) in LAYERS[:2]}
    assert imported == {"configuration_gpt2_repro": set(), PACKAGE: {"configuration_gpt2_repro"}}


def test_scripts_do_not_import_scripts():
    assert not any(list_imports(path) & set(SCRIPTS) for path in MODULES)


def test_imports_have_no_cycles():
    graphlib.TopologicalSorter({name_module(path): list_imports(path) for path in MODULES}).prepare()


# Defined by every command.
SHARED_NAMES = {"main", "run", "__all__", "FOREIGN_FLAGS"}


def list_names(path: Path) -> list[str]:
    """Return the names of a file's top-level functions, classes and constants."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def test_no_two_public_definitions_share_a_name():
    homes = collections.defaultdict(set)  # a module defines an overloaded function several times
    for path in MODULES:
        for name in list_names(path):
            homes[name].add(name_module(path))
    homes = {name: found for name, found in homes.items() if name not in SHARED_NAMES and not name.startswith("_")}
    assert {"build_run", "RunFolder", "SMALL_PANELS"} <= homes.keys()
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_the_scan_finds_imports():
    assert {"__init__", "data.dataset", "training.run", "publishing.model_card"} <= list_imports(
        REPOSITORY / "train.py"
    )
    known = ("core.files", "data.sources.corpus", "data.shards", "data.prepare.pipeline", "model.folder", "train")
    layers = [find_layer(module) for module in known]
    assert layers == sorted(set(layers))
