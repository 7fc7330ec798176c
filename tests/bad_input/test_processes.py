"""The same contract for whole processes: calls from the same strategies, in real interpreters.

Exit codes, streams and interpreter are real there, and so is the output of libraries.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases import CASE_SECONDS, FOLDER_OUTPUTS, TINY, Answer, Case, build_originals, check_answer, hash_tree, open_case
from cases import to_flags as spell
from conftest import REPOSITORY
from hypothesis import HealthCheck, Phase, given, seed, settings
from strategies import damage_bytes, damage_json
from test_config_files import draw_settings_file
from test_flags import EVALUATE, PREPARE, draw_evaluation_arguments, draw_prepare_arguments, draw_train_arguments

NAMES = ("data", "model", "tokenizer", "corpus", "items.jsonl", "run")
TRAIN_SEED, PLAN_SEED, PREPARE_SEED, EVALUATE_SEED, FILE_SEED = range(5)


def draw(strategy, number: int, count: int) -> list:
    """Draw values from a strategy outside of a property test."""
    values: list = []

    @seed(number)
    @settings(max_examples=count + 1, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value):
        values.append(value)

    collect()
    return values[-count:]


def replace(name: str, content: bytes) -> Callable[[Case], None]:
    return lambda case: (case.given / name).write_bytes(content)


def list_calls() -> Iterator[tuple[str, list[str], Callable[[Case], object]]]:
    """Yield twenty calls: the script, its arguments, and the damage to the given files."""
    originals = build_originals()
    leave = replace("unused", b"")
    yield from (("train", argv, leave) for argv in draw(draw_train_arguments(plan=True), PLAN_SEED, 4))
    yield from (("train", argv, leave) for argv in draw(draw_train_arguments(plan=False), TRAIN_SEED, 2))
    yield from (("prepare_data", argv, leave) for argv in draw(draw_prepare_arguments(), PREPARE_SEED, 3))
    yield from (("eval_hellaswag", argv, leave) for argv in draw(draw_evaluation_arguments(), EVALUATE_SEED, 3))
    for content in draw(draw_settings_file(TINY), FILE_SEED, 2):
        yield "train", ["--config=../given/settings.yaml", "--plan"], replace("settings.yaml", content)
    manifest = json.loads((originals / "data" / "manifest.json").read_text())
    for content in draw(damage_json(manifest), FILE_SEED, 2):
        damage = replace("data/manifest.json", json.dumps(content).encode())
        yield "prepare_data", ["--output_dir=../given/data", "--verify"], damage
    shard = (originals / "data" / "a_train_000001.npy").read_bytes()
    for content in draw(damage_bytes(shard), FILE_SEED, 2):
        yield "train", spell(TINY | {"plan": True}), replace("data/a_train_000001.npy", content)
    (items,) = draw(damage_bytes((originals / "items.jsonl").read_bytes()), FILE_SEED, 1)
    yield "eval_hellaswag", spell(EVALUATE), replace("items.jsonl", items)
    yield "prepare_data", spell(PREPARE | {"num_workers": 2}), replace("corpus/a.jsonl", b"null\n")


def run(script: str, arguments: list[str], damage: Callable[[Case], object]) -> int:
    with open_case(*NAMES) as case:
        damage(case)
        before = hash_tree(case.folder)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Longer arguments do not fit a command line.
        arguments = [argument[:100_000] for argument in arguments]
        process = subprocess.run(
            [sys.executable, REPOSITORY / f"{script}.py", *(os.fsencode(argument) for argument in arguments)],
            cwd=case.folder / "cwd",
            env=environment,
            capture_output=True,
            timeout=4 * CASE_SECONDS,
        )
        given = Answer(process.returncode, process.stdout.decode(), process.stderr.decode())
        check_answer(given, before, case, FOLDER_OUTPUTS)
        if given.code == 2:
            assert len(given.err.splitlines()) == 1, given.err
        return given.code


def test_every_sixth_process_keeps_the_contract():
    assert {run(*call) for call in itertools.islice(list_calls(), 0, None, 6)} == {0, 2}


@pytest.mark.slow
def test_twenty_processes_keep_the_contract():
    calls = list(list_calls())
    assert len(calls) == 20
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda call: run(*call), calls)) == {0, 2}
