"""`benchmarks/gpu.py` at toy size: the code that a GPU would run, to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks.gpu import classify_kernel, read_report
from benchmarks.measurements import Figure, Recorder, read_entries, read_results


def run_toy(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *arguments, f"--output={output}", "--toy"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def run_parts(output: Path, *arguments: str) -> list[Figure]:
    """Run parts to their end, and return their figures."""
    result = run_toy(output, *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.rstrip().splitlines()[-1] == f"-> {output}"
    content, figures, omissions = read_results(output)
    assert omissions == [] and content["machine"]["cpu"]
    assert all(each.value >= 0 and each.predicted is None for each in figures)  # predictions are for an H100
    return figures


@pytest.mark.slow
def test_parts_run_to_their_end_and_write_their_figures(shards, tmp_path):
    figures = run_parts(tmp_path / "gpu.json", "speed", "sizes", f"--data_dir={shards}")
    assert {each.subject for each in figures if each.part == "speed"} >= {
        "machine",
        "step, first",
        "stock GPT-2, compiled",
        "profile of a micro-step",
        "step, last",
        "validation, eager",
        "validation, compiled",
        "HellaSwag original, second time",
        "checkpoint",
        "attention alone, math",
        "step, eager",
        "step, attention math",
    }
    values = {(each.subject, each.unit): each.value for each in figures}
    assert values["124M", "tokens/s"] > 0
    assert values["step, first", "tokens/s"] > values["step, eager", "tokens/s"] / 3
    assert values["validation, eager", "nats"] == pytest.approx(values["validation, compiled", "nats"], abs=1e-3)


@pytest.mark.slow
def test_a_run_stops_goes_on_and_writes_its_figures(shards, tmp_path):
    figures = run_parts(tmp_path / "gpu.json", "train", f"--data_dir={shards}")
    values = {(each.subject, each.unit): each.value for each in figures}
    assert values["run", "steps"] >= 12
    assert values["run", "nats, last step"] < values["run", "nats, first step"]
    assert values["run", "nats of jump at the resume"] <= values["run", "nats of jump, largest around it"]


def test_a_part_past_its_deadline_is_noted_and_costs_no_other(tmp_path):
    result = run_toy(tmp_path / "gpu.json", "train", "--deadline=-1", f"--data_dir={tmp_path}")
    assert result.returncode == 1
    _, _, omissions = read_results(tmp_path / "gpu.json")
    assert {omission.subject for omission in omissions} == {"first half", "second half, resumed", "run"}
    assert "NOT MEASURED  train" in result.stdout


def test_correctness_counts_tests_and_names_those_that_did_not_pass(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip(reason='no GPU')\n"
        "def test_not_here(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_three.py"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTEST_ADDOPTS": ""}, capture_output=True)
    recorder = Recorder("correct", tmp_path / "entries", 60, {})
    counts = {"passed": 1, "failed": 1, "skipped": 1}
    assert read_report(tmp_path / "report.xml", recorder, skips_fail=True) == counts
    bad, skipped = read_entries(tmp_path / "entries")
    assert (bad.subject, skipped.subject) == ("test_bad", "test_not_here")
    assert bad.reason.startswith("failed") and "no GPU" in skipped.reason
    assert read_report(tmp_path / "report.xml", recorder, skips_fail=False) == counts
    assert len(list(read_entries(tmp_path / "entries"))) == 3


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention)", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "products"),
        ("triton_per_fused_gelu_gelu_backward_view_6", "element-wise"),
        ("triton_poi_fused_addmm_relu_3", "element-wise"),
        ("triton_tem_fused_mm_0", "products"),
        ("void at::native::vectorized_elementwise_kernel<4>", "element-wise"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert classify_kernel(kernel) == kind
