"""A run in a few lines."""

from dataclasses import dataclass

from ..core.arguments import Config, setting
from ..core.errors import UserError
from ..publishing.scores import describe_score, list_scores
from ..training.metrics import find_last_validation, format_validation, merge_metrics
from ..training.run_folder import RunFolder


@dataclass
class SummaryConfig(Config):
    """Settings of the command."""

    folder: str = setting("", "a run folder", path=True, positional=True, metavar="RUN")


def run(config: SummaryConfig) -> None:
    """Print what a run reached."""
    print("\n".join(summarize(RunFolder(config.folder))))


def summarize(folder: RunFolder) -> list[str]:
    """Return lines on what a run reached and where its files are.

    Raises:
        UserError: the folder has no metrics.
    """
    metrics = folder.read_metrics()
    if not metrics:
        raise UserError(f"{folder} has no {folder.metrics.name}: give the folder of a run that has begun")
    last, validation = merge_metrics(metrics), find_last_validation(metrics)
    lines = [f"{folder}: {last['step']:,} steps, {last.get('train/tokens', 0):,} tokens"]
    if validation is not None:
        when = "" if validation["step"] == last["step"] else f", at step {validation['step']:,}"
        lines.append(f"  validation loss  {format_validation(validation)}{when}")
    lines += [
        f"  {score['file']}, protocol {score['protocol']}: acc_norm {describe_score(score, 'acc_norm')}, acc "
        f"{score['acc']:.4f}"
        for score in list_scores(folder)
    ]
    samples = folder.read_samples()
    if samples:
        lines.append(f"  sample           {samples[-1].get('text')!r}")
    for path, what in ((folder.final, "model"), (folder.curves, "curves"), (folder.metrics, "numbers")):
        if path.exists():
            lines.append(f"  {what:16} {path}")
    return lines
