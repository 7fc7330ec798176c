"""The `plots` command: draw the curves of runs from their files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.arguments import Config, setting
from ..plots.curves import LOGGED_TOKENS_PER_STEP, Curves, load_curves
from ..plots.figures import save_figure
from ..plots.run_figure import build_curves_figure, describe_end
from ..plots.spectrum import build_spectrum_figure, describe_spectrum
from ..training.run_folder import RunFolder

COMPARISON, SPECTRUM = "comparison.png", "spectrum.png"


@dataclass
class PlotsConfig(Config):
    """Command-line flags."""

    runs: list[str] = setting(
        [], "run folders, or logs in the original script's format (log.txt)", path=True, positional=True, metavar="RUN"
    )
    hours: bool = setting(False, "use hours since the start as the x-axis, not tokens")
    spectrum: bool = setting(
        False, "draw the power spectrum of the train loss instead: its peaks reveal data in crawl order"
    )
    tokens_per_step: int = setting(
        LOGGED_TOKENS_PER_STEP, "tokens per update in logs of the original script, which do not record it", least=1
    )
    output: str | None = setting(
        None,
        f"output file, .png, .svg or .pdf; default: the curves or {SPECTRUM} in the run folder; for several runs "
        f"{COMPARISON} or {SPECTRUM} in the working folder",
        path=True,
    )


def run(config: PlotsConfig) -> None:
    """Draw the figure and print the results of each run."""
    runs = disambiguate_names([load_curves(path, config.tokens_per_step) for path in config.runs], config.runs)
    first = RunFolder(config.runs[0])
    if config.spectrum:
        name, figure, lines = SPECTRUM, build_spectrum_figure(runs), [describe_spectrum(run) for run in runs]
    else:
        name = first.curves.name if len(runs) == 1 else COMPARISON
        figure, lines = build_curves_figure(runs, config.hours), [describe_end(run) for run in runs]
    folder = first.path if len(runs) == 1 and first.path.is_dir() else Path()
    path = Path(config.output) if config.output else folder / name
    save_figure(figure, path)
    print("\n".join([*lines, f"figure saved as {path}"]))


def disambiguate_names(runs: Sequence[Curves], paths: Sequence[str]) -> list[Curves]:
    """Rename runs that share a name to their paths."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=path) if counts[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]
