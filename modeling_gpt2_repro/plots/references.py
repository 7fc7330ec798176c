"""Results of GPT-2 and GPT-3 that a run may be compared with, i.e. on the same tokens and items."""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..data.shards import BASELINES_NAME, Manifest, list_checksums, load_manifest
from ..evaluation.baseline import GPT2_124M_NAMES, Baseline, load_baselines
from ..evaluation.hellaswag_data import identify_items, is_full_validation_split, load_hellaswag
from ..evaluation.published_scores import PUBLISHED_SCORES
from ..training.config import TrainingConfig

GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
# OpenAI's 124M on the first 10,485,760 tokens of FineWeb-Edu's sample-10BT in windows of 1,024, from play.ipynb of
# build-nanogpt.
FINEWEB_EDU_LOSS = 3.2924
FINEWEB_EDU_TOKENS, FINEWEB_EDU_SEQUENCE_LENGTH = 10_485_760, 1024
ORIGINAL_FIGURE = "original script's figure"
GPT2_VOCABULARY = (50257, 50256)  # number of ids, end-of-text id


@dataclass(frozen=True)
class Reference:
    """A result of a known model.

    Attributes:
        origin: source of the number.
    """

    model: str
    value: float
    origin: str


def list_loss_references(config: TrainingConfig) -> list[Reference]:
    """Return GPT-2's validation loss, if it was measured on exactly the run's validation windows.

    If it was not, but these are the original script's windows, return that script's value.
    """
    wanted = config.eval_tokens, config.sequence_length
    for baseline in read_gpt2_baselines(config):
        if baseline.validation is not None and (baseline.eval_tokens, baseline.sequence_length) == wanted:
            return [Reference(GPT2, baseline.validation["val/loss"], "measured on these tokens")]
    if wanted == (FINEWEB_EDU_TOKENS, FINEWEB_EDU_SEQUENCE_LENGTH) and is_validated_on_fineweb_edu(config):
        return [Reference(GPT2, FINEWEB_EDU_LOSS, ORIGINAL_FIGURE)]
    return []


def list_score_references(config: TrainingConfig) -> list[Reference]:
    """Return GPT-2's `acc_norm` under the `original` protocol, if it was measured on exactly the run's items.

    On the full validation split, the published scores of GPT-2 and GPT-3 fill in for missing ones.
    """
    published = list_validation_split_references() if is_scored_on_validation_split(config) else []
    measured = [baseline.hellaswag for baseline in read_gpt2_baselines(config) if baseline.hellaswag is not None]
    try:
        wanted = (identify_items(config.hellaswag_file) if measured else None, config.hellaswag_limit)
    except OSError:
        return published
    for scores in measured:
        if (scores.get("items"), scores.get("limit")) == wanted:
            return [Reference(GPT2, scores["acc_norm"], "measured on these items"), *published[1:]]
    return published


def list_validation_split_references() -> list[Reference]:
    """Return the published `acc_norm` of GPT-2 and GPT-3, in this order, on HellaSwag's full validation split."""
    published = PUBLISHED_SCORES["original", "acc_norm"]
    return [Reference(GPT2, published[GPT2], ORIGINAL_FIGURE), Reference(GPT3, published[GPT3], "its paper's figure")]


def read_gpt2_baselines(config: TrainingConfig) -> list[Baseline]:
    """Return the baselines of OpenAI's 124M model in a run's data folder, or none if they cannot be read."""
    path = Path(config.data_dir) / BASELINES_NAME
    if not path.exists():  # avoids reading all shards for their checksums
        return []
    try:
        baselines = load_baselines(path, list_checksums(config.data_dir, "val"))
    except (UserError, OSError):
        return []
    return [baseline for baseline in baselines if baseline.model in GPT2_124M_NAMES]


def identify_validation(config: TrainingConfig) -> tuple[str | int, ...] | None:
    """Return a key of a run's validation windows, equal for equal windows, or `None` if its data is gone."""
    manifest = read_manifest(config)
    if manifest is None:
        return None
    checksums = tuple(shard.checksum for shard in manifest.shards if shard.split == "val")
    return (*checksums, config.eval_tokens, config.sequence_length)


def is_validated_on_fineweb_edu(config: TrainingConfig) -> bool:
    """Return whether a run's first validation tokens are the original script's: the start of FineWeb-Edu's sample."""
    from ..data.sources import corpus  # imports pandas, which takes half a second

    manifest = read_manifest(config)
    if manifest is None:
        return False
    source = manifest.source
    is_sample = (source.get("id"), source.get("config")) == (
        corpus.FINEWEB_EDU,
        corpus.DEFAULT_CONFIGS[corpus.FINEWEB_EDU],
    )
    is_gpt2_text = (manifest.vocab_size, manifest.eot_id) == GPT2_VOCABULARY
    # In every folder with a manifest, the validation split is the start of the source.
    return is_sample and is_gpt2_text and manifest.val.tokens > FINEWEB_EDU_TOKENS


def is_scored_on_validation_split(config: TrainingConfig) -> bool:
    """Return whether a run is scored on HellaSwag's full validation split, from the Hub or from a file."""
    if config.hellaswag_limit is not None:
        return False
    if config.hellaswag_file is None:
        return True
    try:
        return is_full_validation_split(load_hellaswag(config.hellaswag_file))
    except (UserError, OSError):
        return False


def read_manifest(config: TrainingConfig) -> Manifest | None:
    """Return the manifest of a run's data, or `None` if it is missing or damaged."""
    try:
        return load_manifest(config.data_dir)
    except (UserError, OSError):
        return None
