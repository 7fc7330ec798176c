"""Devices and processes: threads, memory, cores."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2_repro.core import devices


def test_fp16_is_suggested_on_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), mixed_precision="no", num_processes=1)
    description = devices.describe_device(accelerator, "bf16")
    assert "Tesla T4" in description and "no bf16" in description and "--mixed_precision fp16" in description
    assert "fp16" not in devices.describe_device(accelerator, "no")


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "all"),  # set by accelerate launch
        ({"OMP_NUM_THREADS": "1"}, "unchanged"),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, "unchanged"),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}, "unchanged"),
    ],
)
def test_a_single_process_uses_all_cores_by_default(environment, threads, monkeypatch):
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


@pytest.mark.heavy
@pytest.mark.skipif(devices.load_glibc() is None, reason="only glibc's allocator is configured to keep freed memory")
def test_freed_memory_is_kept_for_the_next_step_until_it_is_returned():
    result = subprocess.run([sys.executable, "-c", FREE_AND_RETURN], capture_output=True, text=True, check=True)
    kept, left = map(int, result.stdout.split())
    assert kept > 200 and left < 56


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("nonsense", 8), (None, 8)]
)
def test_a_containers_limits_apply(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("modeling_gpt2_repro.core.devices.CGROUP_FOLDER", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert devices.count_cores() == cores
    memory = devices.measure_total_memory()
    (tmp_path / "memory.max").write_text("4096\n")
    assert devices.measure_total_memory() == 4096 != memory
