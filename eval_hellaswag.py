"""Measure any causal language model on HellaSwag, under the original script's protocol and lm-evaluation-harness's.

python eval_hellaswag.py --model runs/gpt2_124M/final
accelerate launch --config_file accelerate_config.yaml eval_hellaswag.py --model openai-community/gpt2
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import modeling_gpt2_repro  # noqa: F401  before the libraries, to explain what they do not take

# isort: split
import torch

from modeling_gpt2_repro.core.arguments import parse_arguments, setting
from modeling_gpt2_repro.core.devices import prepare_cpu_process, start_accelerator
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_place, follow_links, make_folder, open_atomically, write_json
from modeling_gpt2_repro.core.streams import silence_libraries
from modeling_gpt2_repro.evaluation.hellaswag import ENCODERS, HellaSwagResult, encode_hellaswag, evaluate_hellaswag
from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, is_full_validation_split, load_hellaswag
from modeling_gpt2_repro.evaluation.published_scores import PUBLISHED_MODELS, PUBLISHED_NOTE, PUBLISHED_SCORES
from modeling_gpt2_repro.model.causality import check_causal
from modeling_gpt2_repro.model.folder import identify_weights
from modeling_gpt2_repro.model.limits import check_token_ids
from modeling_gpt2_repro.model.loading import load_causal_lm


@dataclass
class EvaluationSettings:
    model: str = setting(MISSING, "folder or Hub id of a causal language model with its tokenizer", path=True)
    data_file: str | None = setting(
        None,
        f"HellaSwag items, .jsonl or .parquet, in the dataset's field names; None: {DATASET_NAME}'s validation split",
        path=True,
    )
    protocol: Literal["original", "lm_eval", "both"] = setting("both", "how items are put to the model and scored")
    limit: int | None = setting(None, "score only the first so many items; None: all")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "precision of the model; sums are always in float32")
    batch_tokens: int | None = setting(
        None, "tokens that a forward pass reads at most, padding included; None: as many as free memory holds"
    )
    output: str | None = setting(None, "write the scores to this .json file; None: print only", path=True)
    per_example: str | None = setting(None, "write each item's answer to this .jsonl file; None: don't", path=True)
    trust_remote_code: bool = setting(False, "run the model code that comes with --model")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Measure any causal language model on HellaSwag, under the original script's protocol and the harness's."""
    settings = parse_arguments(EvaluationSettings, argv, description=main.__doc__)
    if settings.batch_tokens is not None and settings.batch_tokens < 1:
        raise UserError(f"--batch_tokens {settings.batch_tokens}: has to be at least 1")
    for path in (settings.output, settings.per_example):
        check_writable(path)
    check_different(settings.data_file, settings.output, settings.per_example)
    silence_libraries()
    prepare_cpu_process()
    accelerator = start_accelerator("no")

    items = load_hellaswag(settings.data_file, settings.limit)
    model, tokenizer = load_causal_lm(settings.model, getattr(torch, settings.dtype), settings.trust_remote_code)
    protocols = list(ENCODERS) if settings.protocol == "both" else [settings.protocol]
    encoded = [encode_hellaswag(items, tokenizer, protocol) for protocol in protocols]
    check_token_ids(model, max(each.largest_id for each in encoded), settings.model)
    check_causal(model.to(accelerator.device), settings.model)
    results = [
        evaluate_hellaswag(model, each, batch_tokens=settings.batch_tokens, accelerator=accelerator)
        for each in encoded
    ]

    if accelerator.is_main_process:
        data = Path(settings.data_file).name if settings.data_file else DATASET_NAME
        print(f"{settings.model} ({settings.dtype}) on {data}\n")
        is_validation_split = is_full_validation_split(items)
        print(format_table(results, with_published=is_validation_split))
        if settings.output:
            scores = {result.protocol: result.summary() for result in results}
            facts = {"model": settings.model, "data": data, "is_validation_split": is_validation_split}
            facts |= {"weights": identify_weights(settings.model), "dtype": settings.dtype}
            write_json(settings.output, facts | scores)
        if settings.per_example:
            with open_atomically(settings.per_example) as stream:
                for example in (example for result in results for example in result.per_example()):
                    stream.write(json.dumps(example) + "\n")
    accelerator.end_training()
    return 0


def check_writable(path: str | None) -> None:
    """Create the folder of an output file before the hours of work whose result it is to hold."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder, and a file's name is needed")
    check_place(path)
    make_folder(follow_links(path).parent)


def check_different(*paths: str | None) -> None:
    """Refuse a file of results that would take the place of the items, or of the other one."""
    resolved = [follow_links(path) for path in paths if path is not None]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is given twice: --data_file, --output and --per_example have to differ")


def format_table(results: Sequence[HellaSwagResult], with_published: bool) -> str:
    """Lay out one line a protocol and metric; beside it, where asked for, what was published for other models."""
    published_models = PUBLISHED_MODELS if with_published else ()
    rows = [["protocol", "metric", "score", "stderr", "n", *published_models]]
    for result in results:
        for metric in ("acc", "acc_norm"):
            published = PUBLISHED_SCORES[result.protocol, metric]
            numbers = [getattr(result, metric), getattr(result, f"{metric}_stderr")]
            score, stderr, *others = map(format_score, [*numbers, *map(published.get, published_models)])
            rows.append([result.protocol, metric, score, stderr, str(result.n), *others])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        if result.n_truncated:
            lines.append(f"{result.protocol}: {result.n_truncated} contexts were cut on the left to fit the model")
    return "\n".join([*lines, *([PUBLISHED_NOTE] if with_published else [])])


def format_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


if __name__ == "__main__":
    sys.exit(main())
