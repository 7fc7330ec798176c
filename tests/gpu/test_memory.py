"""A run on a device whose memory is too small for the first micro-batch size."""

import gc

import pytest
import torch
from small_runs import run_training
from torch._dynamo.eval_frame import OptimizedModule

import train
from gpu.drawn_models import VOCAB_SIZE
from modeling_gpt2_repro.core.devices import ACCELERATOR_MICRO_BATCH_SIZE
from modeling_gpt2_repro.training import batch_fit
from modeling_gpt2_repro.training.memory import StepMemory

LENGTH = 1024


def test_when_memory_runs_out_the_micro_batch_shrinks_and_the_run_stays_compiled(
    scale, corpus, tmp_path, monkeypatch, capsys
):
    if not scale.is_cuda:
        pytest.skip("a CPU's memory cannot be kept from one process")
    memory = StepMemory(
        **{"n_layer": scale.shape["n_layer"], "n_embd": scale.shape["n_embd"], "vocab_size": VOCAB_SIZE},
        **{"n_positions": LENGTH, "sequence_length": LENGTH, "compute_bytes": 2},
        is_checkpointed=False,
        loss_chunk_tokens=1024,
    )
    tried, runs, time_micro_step, update = [], [], batch_fit._time_micro_step, train.update

    def note_size(loss_model, dataset, size, accelerator):
        tried.append(size)
        return time_micro_step(loss_model, dataset, size, accelerator)

    def note_run(run, *arguments):
        runs.append(run)
        update(run, *arguments)

    monkeypatch.setattr(batch_fit, "_time_micro_step", note_size)
    monkeypatch.setattr(train, "update", note_run)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    # Less than the activations of 64 sequences. The driver does not report this limit, so the run starts with 64.
    limit = torch.cuda.memory_reserved() + 0.6 * memory.estimate(ACCELERATOR_MICRO_BATCH_SIZE)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        run_training(
            corpus,
            tmp_path,
            **scale.shape,
            sequence_length=LENGTH,
            tokens_per_step=ACCELERATOR_MICRO_BATCH_SIZE * LENGTH,
            micro_batch_size="auto",
            loss_chunk_tokens=1024,
            mixed_precision="bf16",
            compile="on",
            max_steps=2,
            **{"eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "save_every": 0},
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    size = runs[-1].plan.micro_batch_size
    assert tried[0] == ACCELERATOR_MICRO_BATCH_SIZE and 1 <= size < ACCELERATOR_MICRO_BATCH_SIZE
    assert size in tried and isinstance(runs[-1].loss_model, OptimizedModule)
    output = capsys.readouterr().out
    assert f"x {size} sequence(s)" in output and "torch.compile failed" not in output
