"""The evaluator of `eval_hellaswag.py` and `train.py --eval_only`: any causal language model, checked and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult, evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import HellaSwagQuestions
from modeling_gpt2_repro.model.causality import check_causal
from modeling_gpt2_repro.model.limits import check_sequence_length, check_token_ids
from modeling_gpt2_repro.model.loading import load_causal_lm


@dataclass(frozen=True)
class Evaluator:
    """A causal language model on the accelerator's device, in evaluation mode, and its tokenizer.

    All processes call each method together, and get the same numbers on any number of processes.

    Attributes:
        name, flag: what the user gave as the model, and by which flag, for error messages.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    name: str
    flag: str

    def check_fits(self, data_dir: str, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> None:
        """Check that the model can read windows of `sequence_length` tokens from shards made with `tokenizer`.

        Raises:
            UserError: it has another tokenizer, or too few embeddings or positions.
        """
        has_fast_form = isinstance(self.tokenizer, PreTrainedTokenizerFast)
        if not has_fast_form or fingerprint_tokenizer(self.tokenizer) != fingerprint_tokenizer(tokenizer):
            raise UserError(
                f"{self.flag} {self.name} has another tokenizer than {data_dir}, whose token ids it would misread: "
                "prepare data with prepare_data.py --tokenizer for it"
            )
        check_token_ids(self.model, len(tokenizer) - 1, self.name, self.flag)
        check_sequence_length(self.model, sequence_length, self.name)

    def evaluate_hellaswag(
        self, questions: HellaSwagQuestions, protocols: Sequence[str], batch_tokens: int | None = None
    ) -> list[HellaSwagResult]:
        """Score the model under each protocol (see `hellaswag.evaluate_hellaswag`).

        Raises:
            UserError: the model cannot read the items, or gives a log-probability that is not finite.
        """
        encoded = [questions.encode(protocol) for protocol in protocols]
        check_token_ids(self.model, max(each.largest_id for each in encoded), self.name, self.flag)
        with self.accelerator.autocast():
            return [
                evaluate_hellaswag(self.model, each, batch_tokens=batch_tokens, accelerator=self.accelerator)
                for each in encoded
            ]


def load_evaluator(name: str, accelerator: Accelerator, flag: str = "--model", **options: Any) -> Evaluator:
    """Load a model and its tokenizer from a folder or a Hub id, and check that the model is causal.

    Args:
        flag: the flag that `name` was given by, for error messages.
        options: of `load_causal_lm`: `dtype` and `trust_remote_code`.

    Raises:
        UserError: either is missing or broken, or the model is not causal.
    """
    model, tokenizer = load_causal_lm(name, flag=flag, **options)
    model = model.to(accelerator.device)
    check_causal(model, name, flag)
    return Evaluator(model, tokenizer, accelerator, name, flag)
