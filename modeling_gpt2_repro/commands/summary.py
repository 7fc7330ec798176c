"""A run in a few lines: `python -m modeling_gpt2_repro.commands.summary runs/NAME`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.arguments import expand_home
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.publishing.scores import list_scores
from modeling_gpt2_repro.training.metrics import find_last_validation, format_validation, merge_metrics
from modeling_gpt2_repro.training.run_folder import RunFolder


def describe_run(run_folder: Path) -> list[str]:
    """Return lines that say what a run reached and where its files are.

    Raises:
        UserError: the folder has no metrics.
    """
    folder = RunFolder(run_folder)
    metrics = folder.read_metrics()
    if not metrics:
        raise UserError(f"{run_folder} has no {folder.metrics.name}: give the folder of a run that has begun")
    last, validation = merge_metrics(metrics), find_last_validation(metrics)
    lines = [f"{run_folder}: {last['step']:,} steps, {last.get('train/tokens', 0):,} tokens"]
    if validation is not None:
        when = "" if validation["step"] == last["step"] else f", at step {validation['step']:,}"
        lines.append(f"  validation loss  {format_validation(validation)}{when}")
    lines += [describe_score(score) for score in list_scores(run_folder)]
    samples = folder.read_samples()
    if samples:
        lines.append(f"  sample           {samples[-1].get('text')!r}")
    for path, what in ((folder.final, "model"), (folder.curves, "curves"), (folder.metrics, "numbers")):
        if path.exists():
            lines.append(f"  {what:16} {path}")
    return lines


def describe_score(score: dict[str, Any]) -> str:
    """Write a score that eval_hellaswag.py measured in a line."""
    stderr, dtype = score.get("acc_norm_stderr"), score["dtype"]
    return (
        f"  {score['file']}, protocol {score['protocol']}: acc_norm {score['acc_norm']:.4f}"
        + (f" +- {stderr:.4f}" if isinstance(stderr, float) else "")
        + f", acc {score['acc']:.4f}, {score['n']} items"
        + (f", in {dtype}" if dtype else "")
    )


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print what a run reached."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise UserError("give one run folder: python -m modeling_gpt2_repro.commands.summary runs/NAME")
    print("\n".join(describe_run(Path(expand_home(arguments[0])))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
