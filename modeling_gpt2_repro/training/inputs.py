"""The inputs of a run: token shards, their tokenizer, and HellaSwag items."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..core.optional import not_none
from ..data.dataset import TokenDataset
from ..data.text_bytes import TextBytes, count_text_bytes
from ..data.tokenizer import load_data_tokenizer
from ..evaluation.hellaswag_data import load_hellaswag
from ..evaluation.hellaswag_protocols import HellaSwagQuestions
from ..evaluation.validation import ValidationResult, evaluate_loss
from .config import TrainingConfig


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a run; unused ones are `None`."""

    tokenizer: PreTrainedTokenizerFast
    train_set: TokenDataset | None
    val_set: TokenDataset | None
    eval_bytes: TextBytes | None
    n_eval_windows: int
    hellaswag: HellaSwagQuestions | None

    def evaluate_loss(self, model: nn.Module, batch_size: int, accelerator: Accelerator) -> ValidationResult:
        """Compute a model's loss on the run's `n_eval_windows` validation windows."""
        n_windows, n_bytes = self.n_eval_windows, not_none(self.eval_bytes).count
        return evaluate_loss(
            model, not_none(self.val_set), n_windows, batch_size=batch_size, n_bytes=n_bytes, accelerator=accelerator
        )


def open_inputs(config: TrainingConfig, accelerator: Accelerator) -> Inputs:
    """Open the shards, and load the tokenizer and the HellaSwag items.

    Raises:
        UserError: an input is missing or damaged, or they do not match each other.
    """
    tokenizer = load_data_tokenizer(config.data_dir)
    n_eval_windows = config.eval_tokens // config.sequence_length
    train_set = val_set = eval_bytes = hellaswag = None
    if not config.eval_only:
        train_set = TokenDataset(config.data_dir, "train", config.sequence_length, len(tokenizer))
    if config.eval_every:
        val_set = TokenDataset(config.data_dir, "val", config.sequence_length, len(tokenizer))
        eval_bytes = count_text_bytes(val_set, n_eval_windows, tokenizer)
    if config.hellaswag_every:
        with accelerator.main_process_first():
            items = load_hellaswag(config.hellaswag_file, config.hellaswag_limit)
        hellaswag = HellaSwagQuestions(items, tokenizer, accelerator)
    return Inputs(tokenizer, train_set, val_set, eval_bytes, n_eval_windows, hellaswag)
