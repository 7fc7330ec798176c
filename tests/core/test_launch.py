"""Starting accelerate: the launcher and the environment place processes; the experiment decides everything else."""

import ast
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import flags, read_series, run_training

import eval_hellaswag
import train
from modeling_gpt2_repro.core import devices, launch
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.launch import FLAGS, KEPT_VARIABLES, REFUSED_VARIABLES
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE

# Variables that launchers set to start processes, and facts about the machine; accelerate reads them too.
SET_BY_LAUNCHERS = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "XDG_CACHE_HOME",
}
MPI_PREFIXES = ("PMI_", "MPI_LOCAL", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
# Not part of a training process: the launcher itself and accelerate's own tests.
EXCLUDED_FOLDERS = ("commands", "test_utils")
SETTINGS = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0, "max_steps": 3}


def list_variables() -> Iterator[str]:
    """Yield the variables that accelerate's source reads, including those composed with a prefix."""
    root = Path(accelerate.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in EXCLUDED_FOLDERS:
            continue
        if "env" not in (text := path.read_text()):
            continue
        tree = ast.parse(text)
        prefixes = {
            node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and is_text(node.value) and node.value.value.endswith("_")
        }
        for node in ast.walk(tree):
            read = []
            if isinstance(node, ast.Call) and ("env" in (called := ast.unparse(node.func)) or "environ" in called):
                read = node.args[:1]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                read = [node.slice]
            for part in read:
                names = part.elts if isinstance(part, ast.List) else [part]
                for name in names:
                    if is_text(name):
                        yield name.value
                    elif isinstance(name, ast.BinOp) and is_text(name.right):
                        yield from (prefix + name.right.value for prefix in prefixes)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isupper()


VARIABLES = sorted(name for name in set(list_variables()) - SET_BY_LAUNCHERS if not name.startswith(MPI_PREFIXES))


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory) -> list[dict]:
    numbers = read_numbers(run_training(shards, tmp_path_factory.mktemp("expected"), **SETTINGS))
    AcceleratorState._reset_state(reset_partial_state=True)  # else the first test would reuse it
    return numbers


def read_numbers(run: Path) -> list[dict]:
    return [read_series(run, name) for name in ("train/loss", "train/grad_norm")]


def test_the_scan_finds_known_variables_of_accelerate():
    assert len(VARIABLES) > 80
    known = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND", "FSDP_SHARDING_STRATEGY"}
    assert known | set(REFUSED_VARIABLES) | set(FLAGS) - {"ACCELERATE_ENABLE_RICH"} <= set(VARIABLES)


@pytest.mark.parametrize("value", ["4", "true", "inductor"])
def test_no_variable_changes_a_run(shards, tmp_path, expected, monkeypatch, value):
    for name in set(VARIABLES) - set(KEPT_VARIABLES) - set(REFUSED_VARIABLES):
        monkeypatch.setenv(name, value)
    assert read_numbers(run_training(shards, tmp_path, **SETTINGS)) == expected


def test_accepted_variables_do_not_change_a_run(shards, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(devices, "count_cores", lambda: 1)  # a launched process uses all cores, `expected` used one
    given = {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_DEBUG_MODE": "1", "ACCELERATE_CPU_AFFINITY": "0"}
    for name, value in (given | dict.fromkeys(REFUSED_VARIABLES, "false")).items():
        monkeypatch.setenv(name, value)
    assert read_numbers(run_training(shards, tmp_path, **SETTINGS)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [*itertools.product(REFUSED_VARIABLES, ["true", "1"]), *itertools.product(sorted(set(FLAGS)), ["perhaps"])],
)
def test_variables_that_would_change_a_run_are_rejected(shards, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert train.main(flags(shards, tmp_path, **SETTINGS)) == 2
    assert f"{name}={value}" in capsys.readouterr().err
    assert eval_hellaswag.main(["--model=gpt2", f"--data_file={SAMPLE_FILE}"]) == 2
    assert f"{name}={value}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_precision_that_the_cpu_lacks_falls_back_to_float32_with_a_notice(monkeypatch):
    accelerator = launch.start_accelerator("fp16")
    assert accelerator.mixed_precision == "no" and accelerator.scaler is None
    assert "float32, because the device has no fp16" in devices.describe_device(accelerator, "fp16")


@pytest.mark.parametrize("supported, precision", [(True, "bf16"), (False, "no")])
def test_bf16_is_used_if_the_device_supports_it(supported, precision, monkeypatch):
    monkeypatch.setattr(launch, "supports_bf16", lambda device: supported)
    assert launch.start_accelerator("bf16").mixed_precision == precision


def test_more_processes_than_gpus_are_rejected(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="started 8 processes, but this machine has 4"):
        launch.start_accelerator("no")


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize("reason, is_refused", [(OLD_DRIVER, True), ("Found no NVIDIA driver on your system.", False)])
def test_a_driver_too_old_for_torch_is_not_mistaken_for_a_missing_gpu(reason, is_refused, monkeypatch):
    def fail():
        raise RuntimeError(reason)

    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn(reason, stacklevel=1)))
    monkeypatch.setattr(torch.cuda, "init", fail)
    with warnings.catch_warnings(action="error"):
        if not is_refused:
            assert launch.check_driver() is None
            return
        with pytest.raises(UserError, match=r"found version 11040\) is too old for torch") as raised:
            launch.start_accelerator("no")
    assert "\n" not in str(raised.value)


def test_determinism_is_set_for_torch_its_compiler_and_cublas(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    launch.start_accelerator("no")  # on a CPU it needs no setting
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    launch.compute_deterministically(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    launch.compute_deterministically(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_processes_that_cannot_connect_suggest_gloo_socket_ifname(monkeypatch):
    def fail(**_):
        raise RuntimeError("Unable to find address for: nonsense0\nException raised from ...")

    monkeypatch.setattr(launch, "PartialState", fail)
    with pytest.raises(RuntimeError, match=r"^Unable"):
        launch.start_accelerator("no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"\(Unable to find address for: nonsense0\).*GLOO_SOCKET_IFNAME"):
        launch.start_accelerator("no")
