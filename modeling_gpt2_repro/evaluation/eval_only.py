"""`train.py --eval_only`: what a model reaches on the tokens and the items that a run is measured on."""

import sys
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_gpt2_repro.core.devices import describe_device, get_largest_micro_batch_size
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.streams import silence_libraries
from modeling_gpt2_repro.data.dataset import TokenDataset, load_data_tokenizer
from modeling_gpt2_repro.data.shards import BASELINES_NAME, list_checksums
from modeling_gpt2_repro.data.text_bytes import NOTE, count_text_bytes
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer
from modeling_gpt2_repro.evaluation.baseline import (
    Baseline,
    format_baseline,
    identify_model,
    read_baselines,
    record_hellaswag,
    record_validation,
    save_baseline,
)
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagQuestions, evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import load_hellaswag
from modeling_gpt2_repro.evaluation.validation import measure_loss
from modeling_gpt2_repro.model.causality import check_causal
from modeling_gpt2_repro.model.limits import check_token_ids, get_max_positions
from modeling_gpt2_repro.model.loading import load_causal_lm


class EvaluationSettings(Protocol):
    """The settings of a run that decide what is measured and how."""

    data_dir: str
    init_from: str
    sequence_length: int
    micro_batch_size: str
    mixed_precision: str
    eval_every: int
    eval_tokens: int
    hellaswag_every: int
    hellaswag_file: str | None
    hellaswag_limit: int | None


def evaluate_only(settings: EvaluationSettings, accelerator: Accelerator) -> None:
    """Print the validation loss and HellaSwag of `init_from`, any causal language model, and keep them with the data.

    Every process has to call this; the numbers do not depend on how many there are.

    Raises:
        UserError: data or model are missing or broken, or the model cannot be measured on the data's tokens.
    """
    silence_libraries()
    path = Path(settings.data_dir) / BASELINES_NAME
    tokenizer = load_data_tokenizer(settings.data_dir)
    read_baselines(path)  # to hear now of a damaged file, and not when there is something to add to it
    val_set = encoded = None
    if settings.eval_every:
        val_set = TokenDataset(settings.data_dir, "val", settings.sequence_length, len(tokenizer))
    if settings.hellaswag_every:
        with accelerator.main_process_first():
            items = load_hellaswag(settings.hellaswag_file, settings.hellaswag_limit)
        encoded = HellaSwagQuestions(items, tokenizer, accelerator).encode("original")
    model = load_fitting_model(settings, tokenizer).to(accelerator.device)
    check_causal(model, settings.init_from, "--init_from")

    validation = hellaswag = None
    if val_set is not None:
        is_automatic = settings.micro_batch_size == "auto"
        largest = get_largest_micro_batch_size(accelerator.device, settings.sequence_length)
        n_windows = settings.eval_tokens // settings.sequence_length
        text_bytes = count_text_bytes(val_set, n_windows, tokenizer)
        if not text_bytes.is_exact and accelerator.is_main_process:
            print(NOTE, flush=True)
        result = measure_loss(
            model,
            val_set,
            n_windows,
            largest_batch_size=largest if is_automatic else int(settings.micro_batch_size),
            n_bytes=text_bytes.count,
            accelerator=accelerator,
        )
        validation = record_validation(result, accelerator.mixed_precision)
    if encoded is not None:
        with accelerator.autocast():
            score = evaluate_hellaswag(model, encoded, accelerator=accelerator)
        hellaswag = record_hellaswag(
            score, settings.hellaswag_file, settings.hellaswag_limit, accelerator.mixed_precision
        )
    if accelerator.is_main_process:
        baseline = Baseline(
            model=identify_model(settings.init_from),
            val_checksums=list_checksums(settings.data_dir, "val"),
            eval_tokens=settings.eval_tokens,
            sequence_length=settings.sequence_length,
            validation=validation,
            hellaswag=hellaswag,
        )
        print(f"{format_baseline(baseline)}\ndevice      {describe_device(accelerator, settings.mixed_precision)}")
        keep(baseline, path)


def load_fitting_model(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load `init_from` where it can read the data's tokens in the windows of a run.

    Raises:
        UserError: it has another tokenizer or fewer positions, or does not load.
    """
    model, own_tokenizer = load_causal_lm(settings.init_from, flag="--init_from")
    has_fast_form = isinstance(own_tokenizer, PreTrainedTokenizerFast)
    if not has_fast_form or fingerprint_tokenizer(own_tokenizer) != fingerprint_tokenizer(tokenizer):
        raise UserError(
            f"--init_from {settings.init_from} has another tokenizer than {settings.data_dir}, whose token ids mean "
            "something else to it: prepare data with prepare_data.py --tokenizer for it"
        )
    check_token_ids(model, len(tokenizer) - 1, settings.init_from, "--init_from")
    n_positions = get_max_positions(model)
    if n_positions is not None and settings.sequence_length > n_positions:
        raise UserError(
            f"--sequence_length {settings.sequence_length} is longer than the {n_positions} positions of "
            f"{settings.init_from}"
        )
    return model


def keep(baseline: Baseline, path: Path) -> None:
    """Put a baseline into its file; where that cannot be, say so, because what was printed stands all the same."""
    try:
        save_baseline(path, baseline)
    except (OSError, UserError) as error:
        reason = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: warning: the result was not kept: {reason}", file=sys.stderr, flush=True)
    else:
        print(f"kept in     {path}", flush=True)
