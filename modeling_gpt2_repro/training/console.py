"""Console output of a run."""

import sys
import time

from tqdm import tqdm

from ..core.streams import ignoring_stream_errors
from ..core.terminal import fit_lines, get_columns

SECONDS_BETWEEN_LINES = 15
LABEL_INDENT = " " * 12
# A bar leaves room for all numbers from this width on; tqdm's own rate, in steps, says less than tokens/s.
WIDE_COLUMNS = 110
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Console:
    """A progress bar on a terminal; elsewhere, as in a log file, a plain line every 15 seconds.

    A disabled console, as on all ranks but 0, prints nothing. A closed terminal or pipe does not stop the run.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.first_line: float | None = None

    def say(self, *lines: str) -> None:
        """Print lines, above the progress bar if there is one; a terminal gets them wrapped below their labels."""
        if self.enabled:
            with ignoring_stream_errors():
                tqdm.write("\n".join(fit_lines(lines, LABEL_INDENT)))
                sys.stdout.flush()

    def start(self, step: int, max_steps: int) -> None:
        """Start showing progress, from `step` on."""
        self.max_steps = max_steps
        is_hidden = not (self.enabled and sys.stderr.isatty())
        with ignoring_stream_errors():
            self.bar = tqdm(
                initial=step, total=max_steps, bar_format=BAR_FORMAT, dynamic_ncols=True, disable=is_hidden
            )

    def show_step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of update `step`."""
        now = time.monotonic()
        loss, rate = f"loss {metrics['train/loss']:.3f}", f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
        numbers = f"{loss}  lr {metrics['train/lr']:.1e}  grad norm {metrics['train/grad_norm']:.2f}  {rate}"
        if not self.bar.disable:
            is_wide = get_columns() >= WIDE_COLUMNS
            with ignoring_stream_errors():
                self.bar.set_postfix_str(numbers if is_wide else f"{loss}  {rate}", refresh=False)
                self.bar.update()
        elif self.first_line is None or now - self.last_line >= SECONDS_BETWEEN_LINES or step == self.max_steps:
            line = f"step {step}/{self.max_steps}  {numbers}"
            if self.first_line is None:
                self.first_line, self.first_step = now, step
            else:
                seconds = (self.max_steps - step) * (now - self.first_line) / (step - self.first_step)
                line += f"  {format_duration(seconds)} left"
            self.last_line = now
            self.say(line)

    def close(self) -> None:
        """Remove the progress bar."""
        with ignoring_stream_errors():
            self.bar.close()


def format_duration(seconds: float) -> str:
    """Format a duration for people: `45 s`, `12 min`, `3.4 h`, `11 days`, `2.4 years`."""
    for unit, length, least, digits in (
        ("years", 365.25 * 86400, 2, 1),
        ("days", 86400, 2, 0),
        ("h", 3600, 1.5, 1),
        ("min", 60, 1.5, 0),
    ):
        if seconds >= least * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
