"""HellaSwag's accuracies as a module of the `evaluate` library: `evaluate.load(path of this folder)`, offline too.

`evaluate` copies this file elsewhere before running it, hence the absolute import: the arithmetic is the one that
`train.py` and `eval_hellaswag.py` report.
"""

import datasets
import evaluate

from modeling_gpt2_repro.evaluation.multiple_choice import compute_accuracies, pick_endings


class HellaSwagAccuracy(evaluate.Metric):
    """Accuracy of picking the right one of several endings by the probability that a language model gives it.

    Call `compute(predictions=..., lengths=..., references=...)`, or add batches with `add_batch`.

    Args:
        predictions: for each question, the summed negative log-probability of each of its endings.
        lengths: for each question, the divisor of each sum for `acc_norm`: tokens, characters or bytes.
        references: for each question, the index of the right ending.

    Returns:
        `acc`, by the sum, and `acc_norm`, by the mean over the length, as fractions, with their standard errors
        `acc_stderr` and `acc_norm_stderr` (`None` for a single question).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            inputs_description=self.__doc__ or "",
            citation="Zellers et al. (2019), HellaSwag: Can a Machine Really Finish Your Sentence?, arXiv:1905.07830",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("float64")),
                lengths=datasets.Sequence(datasets.Value("int64")),
                references=datasets.Value("int64"),
            ),
        )

    # pyrefly: ignore[bad-override]  `evaluate` passes the features that `_info` names
    def _compute(
        self, predictions: list[list[float]], lengths: list[list[int]], references: list[int]
    ) -> dict[str, float | None]:
        return compute_accuracies(list(map(pick_endings, predictions, lengths)), references)
