"""HellaSwag scores of a finished model, as they lie in its run's folder."""

from pathlib import Path
from typing import Any

from modeling_gpt2_repro.evaluation.hellaswag import ENCODERS
from modeling_gpt2_repro.training.tracking import read_json_object

# What the scores of a run's record are called, and the protocols that they follow.
PROTOCOLS = {"hellaswag": "original", "hellaswag_lm_eval": "lm_eval"}


def list_scores(run_folder: Path, repo_id: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return the HellaSwag scores of the finished model that eval_hellaswag.py wrote into the run folder.

    What is older than the model, or is another model's, is none of them.

    Returns:
        The name of the items and the scores, each with its `protocol`.
    """
    finished = run_folder / "final" / "config.json"
    names = {(run_folder.resolve().name, "final"), tuple((repo_id or "").split("/"))}
    found = []
    for path in sorted(run_folder.glob("hellaswag*.json")) if finished.exists() else ():
        content = read_json_object(path)
        if (
            path.stat().st_mtime < finished.stat().st_mtime
            or Path(str(content.get("model"))).absolute().parts[-2:] not in names
        ):
            continue
        for protocol in (each for each in ENCODERS if isinstance(content.get(each), dict)):
            scores = content[protocol] | {"protocol": protocol}
            accuracies = (scores.get("acc"), scores.get("acc_norm"))
            if type(scores.get("n")) is int and all(type(each) is float and 0 <= each <= 1 for each in accuracies):
                found.append((str(content.get("data")), scores))
    return found
