"""Facts about devices and processes."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2_repro.core import devices
from modeling_gpt2_repro.core.errors import UserError


def test_precision_that_a_cpu_lacks_becomes_float32_and_is_said(monkeypatch):
    accelerator = devices.start_accelerator("fp16")
    assert accelerator.mixed_precision == "no" and accelerator.scaler is None
    assert "float32, because it has no fp16" in devices.describe_device(accelerator, "fp16")


@pytest.mark.parametrize("supported, precision", [(True, "bf16"), (False, "no")])
def test_bf16_is_used_where_the_device_has_it(supported, precision, monkeypatch):
    monkeypatch.setattr(devices, "supports_bf16", lambda device: supported)
    assert devices.start_accelerator("bf16").mixed_precision == precision


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="started 8 processes, but this machine has 4"):
        devices.start_accelerator("no")


def test_a_gpu_without_bf16_is_said_to_be_faster_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), mixed_precision="no", num_processes=1)
    said = devices.describe_device(accelerator, "bf16")
    assert "Tesla T4" in said and "no bf16" in said and "--mixed_precision fp16" in said
    assert "fp16" not in devices.describe_device(accelerator, "no")


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize("reason, is_refused", [(OLD_DRIVER, True), ("Found no NVIDIA driver on your system.", False)])
def test_a_driver_too_old_for_torch_is_not_taken_for_a_machine_without_a_gpu(reason, is_refused, monkeypatch):
    def fail():
        raise RuntimeError(reason)

    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn(reason, stacklevel=1)))
    monkeypatch.setattr(torch.cuda, "init", fail)
    with warnings.catch_warnings(action="error"):
        if not is_refused:
            assert devices.check_driver() is None
            return
        with pytest.raises(UserError, match=r"found version 11040\) is too old for torch") as raised:
            devices.start_accelerator("no")
    assert "\n" not in str(raised.value)


def test_determinism_is_set_for_torch_its_compiler_and_cublas(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    devices.start_accelerator("no")  # on a CPU nobody has to ask for it
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    devices.compute_deterministically(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    devices.compute_deterministically(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "all"),  # as accelerate launch leaves it
        ({"OMP_NUM_THREADS": "1"}, "as they were"),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, "as they were"),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}, "as they were"),
    ],
)
def test_a_lone_process_uses_all_cores_unless_told_otherwise(environment, threads, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "count_cores", lambda: 7)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    devices.prepare_cpu_process()
    assert chosen == ([7] if threads == "all" else [])


FREE_AND_RETURN = """
import torch
from modeling_gpt2_repro.core.devices import measure_private_memory, prepare_cpu_process, return_freed_memory
prepare_cpu_process()
before = measure_private_memory()
block = torch.ones(2**26)  # 256 MiB
del block
kept = measure_private_memory()
return_freed_memory()
print((kept - before) // 2**20, (measure_private_memory() - before) // 2**20)
"""


@pytest.mark.skipif(devices.load_glibc() is None, reason="only glibc's allocator is told what to keep")
def test_freed_memory_is_kept_for_the_next_step_until_it_is_returned():
    result = subprocess.run([sys.executable, "-c", FREE_AND_RETURN], capture_output=True, text=True, check=True)
    kept, left = map(int, result.stdout.split())
    assert kept > 200 and left < 56


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("nonsense", 8), (None, 8)]
)
def test_a_containers_limits_count(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("modeling_gpt2_repro.core.devices.CGROUP_FOLDER", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert devices.count_cores() == cores
    memory = devices.measure_total_memory()
    (tmp_path / "memory.max").write_text("4096\n")
    assert devices.measure_total_memory() == 4096 != memory


def test_processes_that_do_not_find_each_other_are_told_where_to_look(monkeypatch):
    def fail(**_):
        raise RuntimeError("Unable to find address for: nonsense0\nException raised from ...")

    monkeypatch.setattr(devices, "PartialState", fail)
    with pytest.raises(RuntimeError, match=r"^Unable"):
        devices.start_accelerator("no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"\(Unable to find address for: nonsense0\).*GLOO_SOCKET_IFNAME"):
        devices.start_accelerator("no")
