"""Package metadata: dependencies, their pins, and the files that a wheel contains."""

import ast
import itertools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = REPOSITORY / "modeling_gpt2_repro"
METADATA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = METADATA["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = list(map(Requirement, itertools.chain(PROJECT["dependencies"], *EXTRAS.values())))
# An extra that includes another extra requires this package itself.
OTHERS = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]


def read_pins() -> dict[str, list[Requirement]]:
    """Return the pins of each distribution in constraints.txt: several if they differ by Python version."""
    pins: dict[str, list[Requirement]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_each_dependency_has_a_pin_within_its_bounds(requirement):
    pins = read_pins()[canonicalize_name(requirement.name)]
    versions = [re.fullmatch(r"==([^,*]+)", str(pin.specifier)).group(1) for pin in pins]
    assert versions and all(requirement.specifier.contains(version) for version in versions)


def test_no_distribution_has_two_pins_for_one_interpreter():
    for name, pins in read_pins().items():
        applicable = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
        assert len(applicable) <= 1, f"constraints.txt pins {name} {len(applicable)} times"


def list_imported_modules(path: Path) -> set[str]:
    """Return the top-level names of the modules that a file imports absolutely, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_each_import_of_the_package_is_a_declared_dependency():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    scripts = {path for path in REPOSITORY.glob("*.py") if path.name != "setup.py"}
    imported = set().union(*map(list_imported_modules, [*PACKAGE.rglob("*.py"), *scripts]))
    assert {"torch", "transformers"} <= imported
    undeclared = {
        module
        for module in imported - sys.stdlib_module_names - {PROJECT["name"]}
        if declared.isdisjoint(map(canonicalize_name, distributions.get(module, [module])))
    }
    assert not undeclared


def test_each_file_of_the_package_is_in_the_wheel():
    patterns = METADATA["tool"]["setuptools"]["package-data"][PROJECT["name"]]
    packaged = {path for pattern in ["**/*.py", *patterns] for path in PACKAGE.glob(pattern)}
    found = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert not found - packaged
    assert all(any(PACKAGE.glob(pattern)) for pattern in patterns)
