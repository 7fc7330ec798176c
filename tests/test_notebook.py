"""The notebook in examples/, executed from top to bottom."""

import ast
import importlib
import inspect

import nbformat
import pytest
from conftest import REPOSITORY
from nbclient import NotebookClient
from small_runs import run_training

NOTEBOOK = REPOSITORY / "examples" / "results.ipynb"


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def list_code() -> list[str]:
    cells = [cell.source for cell in read_notebook().cells if cell.cell_type == "code"]
    return ["\n".join(line for line in source.splitlines() if not line.startswith("%")) for source in cells]


def test_it_is_stored_without_outputs_and_names_its_run_first():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert cells[0].metadata.tags == ["parameters"]
    assert cells[0].source.startswith('RUN = "runs/demo"')


def test_its_calls_match_the_package():
    nodes = [node for source in list_code() for node in ast.walk(ast.parse(source))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and "gpt2_repro" in node.module]
    used = {
        name.name: getattr(importlib.import_module(each.module), name.name) for each in imports for name in each.names
    }
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", None) in used]
    assert len(calls) > 10
    for call in calls:
        arguments = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(used[call.func.id]).bind(*call.args, **arguments)


@pytest.mark.slow
def test_it_shows_a_run_and_measures_its_model(shards, tmp_path):
    run = run_training(shards, tmp_path)
    other = run_training(shards, tmp_path, "other", tokens_per_step=512)
    notebook = read_notebook()
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nRUN, COMPARE_WITH = {str(run)!r}, [{str(other)!r}]"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    # Ignore the progress bars, which end in the middle of a line.
    text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    measured, recorded = (
        float(line.split()[n]) for line, n in zip(find_lines(text, "validation:", "in the run:"), (1, 3), strict=True)
    )
    assert measured == pytest.approx(recorded, abs=2e-4)
    first, last = find_lines(text, "first 3 items of hellaswag_sample.jsonl, original:", "in the run, original:")
    assert first.split("acc_norm ")[1].split()[0] == last.split("acc_norm ")[1]
    assert "step     12  " in text and "detecting periods needs at least 128 steps" in text
    assert text.count("> Hello, I'm a language model,") == 3


def find_lines(text: str, *starts: str) -> list[str]:
    return [next(line for line in text.splitlines() if line.startswith(start)) for start in starts]
