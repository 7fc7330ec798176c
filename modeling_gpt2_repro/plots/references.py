"""What GPT-2 and GPT-3 are known to reach, and on which runs' data that may be compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.shards import BASELINES_NAME, Manifest, list_checksums, load_manifest
from modeling_gpt2_repro.evaluation.baseline import GPT2_124M_NAMES, Baseline, load_baselines
from modeling_gpt2_repro.evaluation.hellaswag_data import identify_items, is_full_validation_split, load_hellaswag
from modeling_gpt2_repro.evaluation.published_scores import PUBLISHED_SCORES

GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
# Of OpenAI's 124M on the first 10,485,760 tokens of FineWeb-Edu's sample-10BT in windows of 1,024: build-nanogpt,
# play.ipynb.
FINEWEB_EDU_LOSS = 3.2924
FINEWEB_EDU_TOKENS, FINEWEB_EDU_SEQUENCE_LENGTH = 10_485_760, 1024
GPT2_VOCABULARY = (50257, 50256)  # ids, and the end-of-text one


@dataclass(frozen=True)
class Reference:
    """A result of a known model.

    Attributes:
        origin: where the number is from.
    """

    model: str
    value: float
    origin: str

    @property
    def label(self) -> str:
        """The result in two lines."""
        return f"{self.model} {self.value:.4f}\n({self.origin})"


def list_loss_references(settings: dict[str, Any]) -> list[Reference]:
    """Return GPT-2's validation loss where it was measured on the very windows that a run is validated on.

    The original's figure takes its place where those windows are its own. Nothing is compared across data.
    """
    wanted = settings["eval_tokens"], settings["sequence_length"]
    for baseline in read_gpt2_baselines(settings):
        if baseline.validation is not None and (baseline.eval_tokens, baseline.sequence_length) == wanted:
            return [Reference(GPT2, baseline.validation["val/loss"], "measured on these tokens")]
    if wanted == (FINEWEB_EDU_TOKENS, FINEWEB_EDU_SEQUENCE_LENGTH) and is_validated_on_fineweb_edu(settings):
        return [Reference(GPT2, FINEWEB_EDU_LOSS, "original script's figure")]
    return []


def list_score_references(settings: dict[str, Any]) -> list[Reference]:
    """Return `acc_norm` in the `original` protocol of GPT-2 where it was measured on the very items of a run.

    On the whole validation set the published scores of GPT-2 and of GPT-3 stand in or beside it.
    """
    published = list_validation_split_references() if is_scored_on_validation_split(settings) else []
    measured = [baseline for baseline in read_gpt2_baselines(settings) if baseline.hellaswag is not None]
    try:
        wanted = (identify_items(settings["hellaswag_file"]) if measured else None, settings["hellaswag_limit"])
    except OSError:
        return published
    for baseline in measured:
        if (baseline.hellaswag.get("items"), baseline.hellaswag.get("limit")) == wanted:
            return [Reference(GPT2, baseline.hellaswag["acc_norm"], "measured on these items"), *published[1:]]
    return published


def list_validation_split_references() -> list[Reference]:
    """Return the published `acc_norm` of GPT-2, then of GPT-3, on all of HellaSwag's validation set."""
    published = PUBLISHED_SCORES["original", "acc_norm"]
    return [
        Reference(GPT2, published[GPT2], "original script's figure"),
        Reference(GPT3, published[GPT3], "its paper's figure"),
    ]


def read_gpt2_baselines(settings: dict[str, Any]) -> list[Baseline]:
    """Return what is kept of OpenAI's 124M model beside a run's data, if any; a report does without just as well."""
    path = Path(settings["data_dir"]) / BASELINES_NAME
    if not path.exists():  # spares reading the shards for their checksums
        return []
    try:
        baselines = load_baselines(path, list_checksums(settings["data_dir"], "val"))
    except (UserError, OSError):
        return []
    return [baseline for baseline in baselines if baseline.model in GPT2_124M_NAMES]


def identify_validation(settings: dict[str, Any]) -> tuple | None:
    """Return what tells the tokens of a run's validation, and their windows, from others; `None` without its data."""
    manifest = _read_manifest(settings)
    if manifest is None:
        return None
    checksums = tuple(shard.checksum for shard in manifest.shards if shard.split == "val")
    return (*checksums, settings["eval_tokens"], settings["sequence_length"])


def is_validated_on_fineweb_edu(settings: dict[str, Any]) -> bool:
    """Tell whether a run's first validation tokens are those of the original: the front of FineWeb-Edu's sample."""
    from modeling_gpt2_repro.data.sources.corpus import (  # brings pandas along, half a second
        DEFAULT_CONFIGS,
        FINEWEB_EDU,
    )

    manifest = _read_manifest(settings)
    if manifest is None:
        return False
    source = manifest.source
    is_sample = (source.get("id"), source.get("config")) == (FINEWEB_EDU, DEFAULT_CONFIGS[FINEWEB_EDU])
    is_gpt2_text = (manifest.vocab_size, manifest.eot_id) == GPT2_VOCABULARY
    # The validation split is the front of the source order in every folder of ours.
    return is_sample and is_gpt2_text and manifest.val.tokens > FINEWEB_EDU_TOKENS


def is_scored_on_validation_split(settings: dict[str, Any]) -> bool:
    """Tell whether a run is scored on the whole of HellaSwag's validation set, from the Hub or from a file."""
    if settings["hellaswag_limit"] is not None:
        return False
    if settings["hellaswag_file"] is None:
        return True
    try:
        return is_full_validation_split(load_hellaswag(settings["hellaswag_file"]))
    except (UserError, OSError):
        return False


def _read_manifest(settings: dict[str, Any]) -> Manifest | None:
    try:
        return load_manifest(settings["data_dir"])
    except (UserError, OSError):
        return None
