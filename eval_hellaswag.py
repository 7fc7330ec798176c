"""Evaluate any causal language model on HellaSwag, under the original script's protocol and lm-evaluation-harness's.

python eval_hellaswag.py --model runs/gpt2_124M/final
accelerate launch --config_file accelerate_config.yaml eval_hellaswag.py --model openai-community/gpt2
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import modeling_gpt2_repro  # noqa: F401  first, to explain bad settings before the libraries reject them

# isort: split
import torch

from modeling_gpt2_repro.core.arguments import Config, parse_arguments, setting
from modeling_gpt2_repro.core.devices import prepare_cpu_process
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_writable, follow_links, make_folder, open_atomically, write_json
from modeling_gpt2_repro.core.launch import start_accelerator
from modeling_gpt2_repro.core.streams import silence_libraries
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult, evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, is_full_validation_split, load_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_protocols import HellaSwagQuestions
from modeling_gpt2_repro.evaluation.multiple_choice import format_score
from modeling_gpt2_repro.evaluation.published_scores import PUBLISHED_MODELS, PUBLISHED_NOTE, PUBLISHED_SCORES
from modeling_gpt2_repro.model.folder import identify_weights
from modeling_gpt2_repro.model.limits import check_token_ids
from modeling_gpt2_repro.model.loading import load_causal_lm


@dataclass
class HellaSwagConfig(Config):
    """Command-line flags."""

    model: str = setting(MISSING, "folder or Hub id of a causal language model and its tokenizer", path=True)
    data_file: str | None = setting(
        None,
        f"HellaSwag items (.jsonl or .parquet) with the dataset's field names; default: the validation split of "
        f"{DATASET_NAME}",
        path=True,
    )
    protocol: Literal["original", "lm_eval", "both"] = setting("both", "how items are rendered and scored")
    limit: int | None = setting(None, "score only the first N items; default: all", least=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "precision of the model; log-softmax is in float32")
    batch_tokens: int | None = setting(
        None, "maximum tokens per forward pass, including padding; default: chosen by free memory", least=1
    )
    output: str | None = setting(None, "also write the scores to this .json file", path=True)
    per_example: str | None = setting(None, "also write the result of each item to this .jsonl file", path=True)
    trust_remote_code: bool = setting(False, "run the model code included with --model")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate any causal language model on HellaSwag, under the protocols of the original script and the harness."""
    config = parse_arguments(HellaSwagConfig, argv, description=main.__doc__)
    check_outputs(config)
    silence_libraries()
    prepare_cpu_process()
    accelerator = start_accelerator("no")

    items = load_hellaswag(config.data_file, config.limit)
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    model, tokenizer = load_causal_lm(config.model, device=accelerator.device, **options)
    questions = HellaSwagQuestions(items, tokenizer, accelerator)
    protocols = ("original", "lm_eval") if config.protocol == "both" else (config.protocol,)
    encoded = [questions.encode(protocol) for protocol in protocols]
    check_token_ids(model, max(each.largest_id for each in encoded), config.model)
    results = [
        evaluate_hellaswag(model, each, batch_tokens=config.batch_tokens, accelerator=accelerator) for each in encoded
    ]
    if accelerator.is_main_process:
        report_scores(config, results, is_validation_split=is_full_validation_split(items))
    accelerator.end_training()
    return 0


def check_outputs(config: HellaSwagConfig) -> None:
    """Create the parent folders of the output files and check that the files are writable, before hours of work.

    Raises:
        UserError: an output is a folder, cannot be created, or would overwrite the items or the other output.
    """
    outputs = [path for path in (config.output, config.per_example) if path is not None]
    for path in outputs:
        if Path(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder; pass the name of a file")
        check_writable(path)
        make_folder(follow_links(path).parent)
    files = [follow_links(path) for path in (config.data_file, *outputs) if path is not None]
    if len(set(files)) < len(files):
        raise UserError("--data_file, --output and --per_example must be different files")


def report_scores(config: HellaSwagConfig, results: Sequence[HellaSwagResult], is_validation_split: bool) -> None:
    """Print the scores and write the requested output files."""
    data_name = Path(config.data_file).name if config.data_file else DATASET_NAME
    print(f"{config.model} ({config.dtype}) on {data_name}\n")
    print(format_scores(results, with_published=is_validation_split))
    if config.output:
        facts = {
            "model": config.model,
            "data": data_name,
            "is_validation_split": is_validation_split,
            "weights": identify_weights(config.model),
            "dtype": config.dtype,
        }
        write_json(config.output, facts | {result.protocol: result.summary() for result in results})
    if config.per_example:
        with open_atomically(config.per_example) as stream:
            for result in results:
                stream.writelines(json.dumps(example) + "\n" for example in result.per_example())


def format_scores(results: Sequence[HellaSwagResult], with_published: bool) -> str:
    """Format a table with one line per protocol and metric, optionally followed by one of published scores."""
    rows = [["protocol", "metric", "score"]]
    for result in results:
        for metric in ("acc", "acc_norm"):
            score = format_score(getattr(result, metric), getattr(result, f"{metric}_stderr"), result.n)
            rows.append([result.protocol, metric, score])
    lines = align(rows)
    for result in results:
        if result.n_truncated:
            lines.append(f"{result.protocol}: {result.n_truncated} contexts truncated on the left to fit the model")
    if with_published:
        lines += ["", *align(list_published([result.protocol for result in results])), PUBLISHED_NOTE]
    return "\n".join(lines)


def list_published(protocols: Sequence[str]) -> list[list[str]]:
    """Return the rows of the published scores: a header, and a row per model."""
    columns = {key: scores for key, scores in PUBLISHED_SCORES.items() if key[0] in protocols}
    rows = [["published", *map(" ".join, columns)]]
    for model in PUBLISHED_MODELS:
        rows.append([model, *(f"{scores[model]:.4f}" if model in scores else "-" for scores in columns.values())])
    return rows


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row, with the cells of each column at the same position."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
