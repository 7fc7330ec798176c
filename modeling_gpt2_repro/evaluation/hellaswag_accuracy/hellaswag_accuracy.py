"""HellaSwag's accuracies as a module of the `evaluate` library: `evaluate.load(path of this folder)`, offline too.

`evaluate` copies this file elsewhere before it runs it, hence the import by the package's name: the arithmetic is the
one that `train.py` and `eval_hellaswag.py` report.
"""

import datasets
import evaluate

from modeling_gpt2_repro.evaluation.multiple_choice import compute_accuracies, pick_endings

CITATION = """\
@inproceedings{zellers2019hellaswag,
    title={HellaSwag: Can a Machine Really Finish Your Sentence?},
    author={Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year={2019}
}
"""
DESCRIPTION = "Accuracy of picking the right one of several endings by the probability that a language model gives it."
INPUTS_DESCRIPTION = """
Args:
    predictions: for each question, the summed negative log-probability of each of its endings.
    lengths: for each question, what each sum is divided by for `acc_norm`: tokens, characters or bytes.
    references: for each question, the index of the right ending.

Returns:
    `acc`, by the sum, and `acc_norm`, by the mean over the length, as fractions, with their standard errors
    `acc_stderr` and `acc_norm_stderr` (`None` of a single question).
"""


class HellaSwagAccuracy(evaluate.Metric):
    """`compute(predictions=..., lengths=..., references=...)`, or batch by batch with `add_batch`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "lengths": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], lengths: list[list[int]], references: list[int]
    ) -> dict[str, float | None]:
        return compute_accuracies(list(map(pick_endings, predictions, lengths)), references)
