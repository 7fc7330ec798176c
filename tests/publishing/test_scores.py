"""HellaSwag scores in the Hub's two forms, read back by the Hub's own library."""

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, DATASET_REVISION
from modeling_gpt2_repro.publishing.scores import build_eval_results, render_eval_results

SUMMARIES = {
    "original": {"acc": 0.28589, "acc_stderr": 0.00451, "acc_norm": 0.29549, "acc_norm_stderr": 0.00455, "n": 10_042},
    "lm_eval": {"acc": 0.2892, "acc_norm": 0.3114},
}


def test_a_model_card_contains_every_score_with_its_protocol():
    data = ModelCardData(model_name="gpt2", eval_results=build_eval_results(SUMMARIES))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# GPT-2\n")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "gpt2"
    scores = {(result.metric_args["protocol"], result.metric_type): result for result in results}
    assert {key: result.metric_value for key, result in scores.items()} == {
        ("original", "acc"): 0.2859,
        ("original", "acc_norm"): 0.2955,
        ("lm_eval", "acc"): 0.2892,
        ("lm_eval", "acc_norm"): 0.3114,
    }
    assert scores["original", "acc_norm"].metric_args["stderr"] == 0.0046
    assert "stderr" not in scores["lm_eval", "acc"].metric_args
    for (protocol, _), result in scores.items():
        assert f"protocol {protocol}" in result.metric_name
        assert (result.dataset_type, result.dataset_split) == (DATASET_NAME, "validation")
        assert (result.dataset_revision, result.dataset_args) == (DATASET_REVISION, {"num_few_shot": 0})


def test_the_hubs_result_files_contain_one_score_each():
    texts = render_eval_results(SUMMARIES)
    assert list(texts) == [
        ".eval_results/hellaswag_original.yaml",
        ".eval_results/hellaswag_lm_eval.yaml",
    ]
    for text, (protocol, summary) in zip(texts.values(), SUMMARIES.items(), strict=True):
        (entry,) = parse_eval_result_entries(yaml.safe_load(text))
        assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (
            DATASET_NAME,
            "hellaswag",
            DATASET_REVISION,
        )
        assert entry.value == pytest.approx(summary["acc_norm"], abs=1e-4)
        assert f"protocol {protocol}" in entry.notes and "acc_norm" in entry.notes
