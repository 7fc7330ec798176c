"""Where a run starts: at step 0, at its own newest checkpoint, or at another run's; and what may change on resume.

`config.py` declares for each setting whether it may change (`setting`) or not (`experiment`). `choose_start` adds the
model's shape, the run's length, the data and the tokenizer. `load_resumed_state` allows another length if it changes
no update made so far, and supplies values for settings that older checkpoints do not have. Skips are handled in
`skipping.py`, the micro-batch size in `device_fit.choose_sizes`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..core.devices import compute_once
from ..core.errors import UserError
from ..core.optional import not_none
from ..data.shards import fingerprint_split
from ..data.tokenizer import fingerprint_tokenizer
from .building import load_shape, resolve_shape
from .checkpoint import TrainingState, check_experiment, choose_checkpoint, is_own_checkpoint, load_state
from .config import TrainingConfig
from .inputs import Inputs
from .record import RunRecord
from .run_folder import has_content
from .skipping import check_any_left, merge_skips


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        experiment: settings and fingerprints that may not change on resume.
        max_steps: updates of the whole run.
        skips: ranges of updates to skip.
        checkpoint, state: the checkpoint to resume from and its state; `None` for a new run.
        is_own: whether the checkpoint belongs to this run, not to a run that it is forked from.
        is_finished: whether the run has already made all its updates.
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
        """Completed updates of a resumed run; `None` for a new one."""
        return self.state.step if self.state else None


def choose_start(config: TrainingConfig, inputs: Inputs, accelerator: Accelerator, record: RunRecord) -> Start:
    """Lock the run folder, choose where to start, and check that all processes agree.

    Raises:
        UserError: the checkpoint is damaged or belongs to another experiment, the run would overwrite something
            without being asked to, or the processes disagree.
    """
    train_set = not_none(inputs.train_set)
    max_steps = config.derive_max_steps(len(train_set))
    experiment = {
        **config.experiment,
        **resolve_shape(config),
        "max_steps": max_steps,
        "train_tokens": train_set.n_tokens,
        "data": fingerprint_split(config.data_dir, "train"),
        "tokenizer": fingerprint_tokenizer(inputs.tokenizer),
    }
    checkpoint = broadcast_resume_checkpoint(config.resume_from_checkpoint, accelerator, record)
    state = load_resumed_state(checkpoint, experiment, config) if checkpoint else None
    step = state.step if state else 0
    check_agreement(accelerator, [step, max_steps, experiment["data"]])
    skips = merge_skips(state.skips if state else [], config.skips, step)
    check_any_left(skips, step, max_steps)
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
                f"{record.folder} contains a finished run: use another --run_name, or --resume_from_checkpoint never "
                "to replace it"
            )
    return start


def broadcast_resume_checkpoint(requested: str, accelerator: Accelerator, record: RunRecord) -> Path | None:
    """Choose and verify the checkpoint to resume from on rank 0, and broadcast its path.

    Raises:
        UserError: on every rank, if `choose_checkpoint` fails, a link in the run folder is unusable, or another
            process writes to the folder.
    """

    def choose() -> Path | None:
        record.folder.check_links(is_resumed=requested != "never")
        record.claim()
        return choose_checkpoint(requested, record.folder.checkpoints, record.warn)

    return compute_once(choose, accelerator)


def check_agreement(accelerator: Accelerator, facts: list[Any]) -> None:
    """Raise a `UserError` if processes, possibly on several machines, disagree about what they are about to train."""
    for process, other in enumerate(gather_object([facts])):
        if other != facts:
            raise UserError(
                f"process {process} starts at step {other[0]} of {other[1]}, this one at step {facts[0]} of {facts[1]}"
                ", or their data differ: --data_dir must hold the same shards, and --output_dir must be the same "
                "folder, on all machines"
            )


def load_resumed_state(checkpoint: Path, experiment: dict[str, Any], config: TrainingConfig) -> TrainingState:
    """Load the state of a checkpoint, and check that the run resumes the same experiment.

    `max_steps` may change if the learning rates of all updates made so far stay the same: always with the `constant`
    schedule, before the decay with `wsd`, during the warm-up with `cosine`.

    Raises:
        UserError: anything else that determines the weights has changed.
    """
    state = load_state(checkpoint)
    # Older checkpoints do not record `init_from`.
    saved = {"init_from": config.init_from, **state.experiment, **load_shape(str(checkpoint))}
    max_steps, saved_max_steps = experiment["max_steps"], saved.get("max_steps")
    if isinstance(saved_max_steps, int) and saved_max_steps != max_steps and state.step <= max_steps:
        schedules = [config.build_schedule(length) for length in (max_steps, saved_max_steps)]
        if len({tuple(map(schedule, range(state.step))) for schedule in schedules}) == 1:
            saved |= {"max_steps": max_steps}
    check_experiment(checkpoint, saved, experiment)
    return state
