"""Any command line of the three scripts."""

from cases import TINY, answer, cases, open_case, to_flags
from hypothesis import given
from hypothesis import strategies as st
from strategies import draw_arguments, draw_settings, is_in_working_folder

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.training.config import TrainingConfig

TRAIN_CHOICES = {
    "init_from": ["scratch", "../given/model", "../given/data", "../given/run/final"],
    "data_dir": ["../given/data", "../given/corpus"],
    "hellaswag_file": ["../given/items.jsonl", "../given/corpus/a.jsonl"],
    "resume_from_checkpoint": ["auto", "never", "../given/run/checkpoints/step_0000001", "../given/run"],
    "skip_steps": ["1:1", "1:2", "2:2", "1:999999999999999"],
    "model_size": ["124M", "1558M"],
}
# Excluded: settings that contact a service, start a compiler, or allow a long run.
NEVER = frozenset({"report_to", "wandb_project", "compile", "yes"})
GIVEN = ("data", "model", "items.jsonl", "run", "corpus")


@st.composite
def draw_train_arguments(draw, **fixed) -> list[str]:
    base = TINY | fixed
    values = draw(draw_settings(TrainingConfig, TRAIN_CHOICES, NEVER | fixed.keys()))
    values = {name: value for name, value in values.items() if name != "output_dir" or is_in_working_folder(value)}
    if base.get("plan") and draw(st.booleans()):
        del base["max_steps"]
    return draw(draw_arguments(base, values))


@cases(110)
@given(draw_train_arguments(plan=True))
def test_plans(arguments):
    with open_case(*GIVEN) as case:
        answer(train.main, arguments, case)


@cases(80)
@given(draw_train_arguments(plan=False))
def test_training(arguments):
    with open_case(*GIVEN) as case:
        answer(train.main, arguments, case)


PREPARE = {
    **{"files": "../given/corpus/a.jsonl", "tokenizer": "../given/tokenizer", "output_dir": "out", "num_workers": 1},
    **{"val_tokens": 100, "shard_size": 500, "max_tokens": 400},
}
PREPARE_CHOICES = {
    "files": ["../given/corpus", "../given/corpus/*.txt*", "../given/corpus/e.parquet", "../given/data"],
    "output_dir": ["out", "../given/data", "../given/loop"],
    "document_separator": ["\\n", "\\n\\n", "t"],
    "stage": ["tokenize", "write"],
}


@st.composite
def draw_prepare_arguments(draw) -> list[str]:
    # Excluded because they take seconds: the built-in corpus, a folder as a dataset, many workers (tested below).
    left_alone = frozenset({"dataset_name", "num_workers"})
    values = draw(draw_settings(PrepareConfig, PREPARE_CHOICES, left_alone))
    values = {
        name: value
        for name, value in values.items()
        if name not in ("output_dir", "files") or is_in_working_folder(value) or value in PREPARE_CHOICES[name]
    }
    if draw(st.integers(0, 9)) == 0:
        values["num_workers"] = draw(st.sampled_from([0, -1, 10**4, 10**9, "x", "1e9", 2]))
    return draw(draw_arguments(PREPARE, values))


@cases(90)
@given(draw_prepare_arguments())
def test_preparing(arguments):
    with open_case("corpus", "tokenizer", "data", "model", "items.jsonl") as case:
        answer(prepare_data.main, arguments, case)


EVALUATE = {"model": "../given/model", "data_file": "../given/items.jsonl", "limit": 1}
EVALUATE_CHOICES = {
    "model": ["../given/run/final", "../given/run/checkpoints/step_0000002", "../given/data"],
    "output": ["out.json", "a/b/out.json", "../given/items.jsonl", "../given"],
    "per_example": ["out.json", "../given/items.jsonl"],
}


@st.composite
def draw_evaluation_arguments(draw) -> list[str]:
    values = draw(draw_settings(eval_hellaswag.HellaSwagConfig, EVALUATE_CHOICES, frozenset()))
    values = {
        name: value
        for name, value in values.items()
        if name not in ("output", "per_example") or is_in_working_folder(value) or value in EVALUATE_CHOICES[name]
    }
    return draw(draw_arguments(EVALUATE, values))


@cases(70)
@given(draw_evaluation_arguments())
def test_evaluating(arguments):
    with open_case("model", "items.jsonl", "run", "data") as case:
        answer(eval_hellaswag.main, arguments, case)


def test_the_base_cases_succeed():
    with open_case(*GIVEN, "tokenizer") as case:
        for main, values in (
            (train.main, TINY | {"plan": True}),
            (train.main, TINY),
            (prepare_data.main, PREPARE),
            (eval_hellaswag.main, EVALUATE),
        ):
            assert answer(main, to_flags(values), case).code == 0
