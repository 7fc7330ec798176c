"""`train.py --eval_only`: evaluate any model as a run would, and store the result as a baseline."""

import math
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.devices import describe_device, get_largest_micro_batch_size, is_out_of_memory
from ..core.environment import report
from ..core.errors import UserError, format_line
from ..core.optional import not_none
from ..core.streams import silence_libraries
from ..data.shards import BASELINES_NAME, list_checksums
from ..data.text_bytes import NOTE
from ..data.tokenizer import fingerprint_tokenizer
from ..evaluation import baseline as baselines
from ..evaluation.hellaswag import evaluate_hellaswag
from ..evaluation.validation import ValidationResult
from ..model.limits import check_sequence_length, check_token_ids
from ..model.loading import load_causal_lm
from .config import TrainingConfig
from .inputs import Inputs, open_inputs

FLAG = "--init_from"  # the model's flag, for error messages


def evaluate_only(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Print the validation loss and the HellaSwag score of `init_from`, and store them in the data folder.

    All ranks call this together; the results do not depend on their number.

    Raises:
        UserError: data or model are missing or broken, or the model has another tokenizer than the data.
    """
    silence_libraries()
    inputs = open_inputs(config, accelerator)
    path = Path(config.data_dir) / BASELINES_NAME
    baselines.read_baselines(path)  # fail on a damaged file now, not when adding the result
    model, tokenizer = load_causal_lm(config.init_from, device=accelerator.device, flag=FLAG)
    check_fits(model, tokenizer, inputs, config)

    precision, validation, hellaswag = accelerator.mixed_precision, None, None
    if inputs.val_set is not None:
        validation = baselines.record_validation(measure_validation(model, inputs, config, accelerator), precision)
    if inputs.hellaswag is not None:
        with accelerator.autocast():
            score = evaluate_hellaswag(model, inputs.hellaswag.encode("original"), accelerator=accelerator)
        hellaswag = baselines.record_hellaswag(score, config.hellaswag_file, config.hellaswag_limit, precision)
    if accelerator.is_main_process:
        baseline = baselines.Baseline(
            model=baselines.identify_model(config.init_from),
            val_checksums=list_checksums(config.data_dir, "val"),
            eval_tokens=config.eval_tokens,
            sequence_length=config.sequence_length,
            validation=validation,
            hellaswag=hellaswag,
        )
        print(baselines.format_baseline(baseline))
        print(f"device      {describe_device(accelerator, config.mixed_precision)}")
        keep(baseline, path)


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, config: TrainingConfig
) -> None:
    """Check that a model and its tokenizer fit the windows of a run with this configuration.

    Raises:
        UserError: the tokenizer differs from the data's, or the model has too few embeddings or positions.
    """
    known = fingerprint_tokenizer(inputs.tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or fingerprint_tokenizer(tokenizer) != known:
        raise UserError(
            f"{FLAG} {config.init_from} has another tokenizer than {config.data_dir}: prepare data for it with "
            "prepare_data.py --tokenizer"
        )
    check_token_ids(model, len(tokenizer) - 1, config.init_from, FLAG)
    check_sequence_length(model, config.sequence_length, config.init_from)


def measure_validation(
    model: PreTrainedModel, inputs: Inputs, config: TrainingConfig, accelerator: Accelerator
) -> ValidationResult:
    """Compute the loss on the validation tokens of a run with this configuration.

    Each rank halves its batch size independently when memory runs out, because the result does not depend on it.

    Raises:
        UserError: a single window does not fit, or the loss is not finite.
    """
    if not not_none(inputs.eval_bytes).is_exact and accelerator.is_main_process:
        print(NOTE, flush=True)
    largest = get_largest_micro_batch_size(accelerator.device, config.sequence_length)
    batch_size = largest if config.micro_batch_size == "auto" else int(config.micro_batch_size)
    while True:
        try:
            result = inputs.evaluate_loss(model, batch_size, accelerator)
            break
        except Exception as error:  # running out of memory raises many types (see `is_out_of_memory`)
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise UserError(
                    "a single sequence does not fit in the device's memory: use a shorter --sequence_length"
                ) from error
        batch_size //= 2
    if not math.isfinite(result.loss):
        raise UserError(
            "the model's validation loss is not finite: its weights are broken, or its precision is too low "
            "(try --mixed_precision no)"
        )
    return result


def keep(baseline: baselines.Baseline, path: Path) -> None:
    """Add a baseline to the file at `path`; if that fails, only warn, because the result has been printed."""
    try:
        baselines.save_baseline(path, baseline)
    except (OSError, UserError) as error:
        report(f"warning: the result was not stored: {format_line(str(error))}")
    else:
        print(f"stored in   {path}", flush=True)
