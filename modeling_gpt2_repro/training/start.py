"""Where a run starts: at step 0, at its own newest checkpoint or at another run's, and what may differ on resume.

`config.py` says it of each setting: what an `experiment(...)` declares may not differ, what a `setting(...)` does may.
`choose_start` adds shape, length, data and tokenizer; `load_resumed_state` lets the length differ where no update made
so far would, and gives new settings their values in older checkpoints. `skipping.py` says it of skips, and
`device_fit.choose_sizes` of the micro-batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..core.devices import compute_once
from ..core.errors import UserError
from ..data.shards import fingerprint_split
from ..data.tokenizer import fingerprint_tokenizer
from .building import load_shape, resolve_shape
from .checkpoint import TrainingState, check_experiment, choose_checkpoint, is_own_checkpoint, load_state
from .config import TrainingConfig
from .inputs import Inputs
from .record import RunRecord
from .run_folder import has_content
from .skipping import check_any_made, merge_skips


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        experiment: what a resumed run may not change.
        max_steps: updates of the whole run.
        skips: updates to pass over.
        checkpoint: the one to resume from, and its `state`; `None` for a run that begins.
        is_own: the checkpoint is the run's own, and not one of a run that it forks off.
        is_finished: the run has reached its end before.
    """

    experiment: dict[str, Any]
    max_steps: int
    skips: list[range]
    checkpoint: Path | None
    state: TrainingState | None
    is_own: bool
    is_finished: bool

    @property
    def step(self) -> int:
        """Completed updates."""
        return self.state.step if self.state else 0

    @property
    def resumed_step(self) -> int | None:
        """Completed updates of a run that is resumed; `None` for one that begins."""
        return self.state.step if self.state else None


def choose_start(config: TrainingConfig, inputs: Inputs, accelerator: Accelerator, record: RunRecord) -> Start:
    """Claim the run folder, choose where to start, and check that all processes start the same experiment there.

    Raises:
        UserError: the checkpoint is damaged or of another experiment, the folder holds something that the run would
            replace unasked, or the processes differ.
    """
    max_steps = config.derive_max_steps(len(inputs.train_set))
    experiment = {
        **config.experiment,
        **resolve_shape(config),
        "max_steps": max_steps,
        "train_tokens": inputs.train_set.n_tokens,
        "data": fingerprint_split(config.data_dir, "train"),
        "tokenizer": fingerprint_tokenizer(inputs.tokenizer),
    }
    checkpoint = broadcast_resume_checkpoint(config.resume_from_checkpoint, accelerator, record)
    state = load_resumed_state(checkpoint, experiment, config) if checkpoint else None
    step = state.step if state else 0
    check_agreement(accelerator, [step, max_steps, experiment["data"]])
    skips = merge_skips(state.skips if state else [], config.skips, step)
    check_any_made(skips, step, max_steps)
    start = Start(
        experiment=experiment,
        max_steps=max_steps,
        skips=skips,
        checkpoint=checkpoint,
        state=state,
        is_own=checkpoint is not None and is_own_checkpoint(checkpoint, record.folder.checkpoints),
        is_finished=checkpoint is not None and min(step, record.folder.get_finished_step()) >= max_steps,
    )
    if not start.is_own:
        record.folder.check_replaceable()
        is_asked_to_replace = config.resume_from_checkpoint == "never" or start.is_finished
        if has_content(record.folder.final) and not is_asked_to_replace:
            raise UserError(
                f"{record.folder} holds a finished run: give another --run_name, or --resume_from_checkpoint never to "
                "replace it"
            )
    return start


def broadcast_resume_checkpoint(requested: str, accelerator: Accelerator, record: RunRecord) -> Path | None:
    """Choose the checkpoint to resume from in the first process, which reads all of it, and send it to the others.

    Raises:
        UserError: as `choose_checkpoint`, or for links in the run folder, or for its other writer; in every process.
    """

    def choose() -> Path | None:
        record.folder.check_links(is_resumed=requested != "never")
        record.claim()
        return choose_checkpoint(requested, record.folder.checkpoints, record.warn)

    return compute_once(choose, accelerator)


def check_agreement(accelerator: Accelerator, facts: list[Any]) -> None:
    """Raise a `UserError` if the processes, on several machines, are about to train different things."""
    for process, other in enumerate(gather_object([facts])):
        if other != facts:
            raise UserError(
                f"process {process} starts at step {other[0]} of {other[1]}, this one at step {facts[0]} of {facts[1]}"
                ", or their data differ: --data_dir has to hold the same shards, and --output_dir to be the same "
                "folder, on all machines"
            )


def load_resumed_state(checkpoint: Path, experiment: dict[str, Any], config: TrainingConfig) -> TrainingState:
    """Read where a run stood, and check that it is resumed as the same experiment.

    Its length may change if that changes none of the updates it has made: with the `constant` schedule always, with
    `wsd` before its decay, with `cosine` in its warm-up.

    Raises:
        UserError: anything else differs that decides the weights.
    """
    state = load_state(checkpoint)
    # A checkpoint that does not say where its first weights came from is older than the question.
    saved = {"init_from": config.init_from, **state.experiment, **load_shape(str(checkpoint))}
    max_steps, saved_max_steps = experiment["max_steps"], saved.get("max_steps")
    if isinstance(saved_max_steps, int) and saved_max_steps != max_steps and state.step <= max_steps:
        schedules = [config.build_schedule(length) for length in (max_steps, saved_max_steps)]
        if len({tuple(map(schedule, range(state.step))) for schedule in schedules}) == 1:
            saved |= {"max_steps": max_steps}
    check_experiment(checkpoint, saved, experiment)
    return state
