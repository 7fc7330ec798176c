"""A data folder in one picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.files import follow_links
from modeling_gpt2_repro.data.inspection import Inspection, SplitStatistics
from modeling_gpt2_repro.data.shards import INSPECTION_NAME
from modeling_gpt2_repro.plots.corpus_text import MOST_COMMON, quote_tokens
from modeling_gpt2_repro.plots.figures import (
    SPLIT_COLOURS,
    build_figure,
    default_style,
    finish_axes,
    make_drawable,
    save_figure,
)

BINS_PER_DOUBLING = 4
TOKEN_FONT = "DejaVu Sans Mono"  # comes with matplotlib
LABEL_CHARACTERS = 18
# Zipf: the English word of rank r makes up about a tenth of all words, divided by r.
ZIPF_SHARE = 0.1


def draw_inspection(inspection: Inspection) -> Path:
    """Draw a data folder as `inspection.png` in it, and return the picture's path.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = inspection.folder / INSPECTION_NAME
    save_figure(build_inspection_figure(inspection), path)
    return path


@default_style()
def build_inspection_figure(inspection: Inspection) -> Figure:
    """Build three panels: document lengths, token frequencies by rank, and the most common tokens."""
    splits = sorted(inspection.splits, key=lambda split: -split.tokens)  # the smaller is drawn over the larger
    figure = build_figure(15, 5.6)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.15, 1, 1))
    _draw_lengths(figure.add_subplot(grid[0]), [split for split in splits if split.documents])
    _draw_frequencies(figure.add_subplot(grid[1]), splits)
    _draw_most_common(figure.add_subplot(grid[2]), splits, inspection.tokenizer)
    tokens, documents = (sum(getattr(split, unit) for split in splits) for unit in ("tokens", "documents"))
    title = f"{follow_links(inspection.folder).name}: {tokens:,} tokens in {documents:,} documents"
    figure.suptitle(make_drawable(title), fontsize=14, parse_math=False)
    return figure


def _draw_lengths(axes: Axes, splits: list[SplitStatistics]) -> None:
    axes.set_title("document lengths", fontsize=11)
    axes.set_xlabel("tokens a document")
    axes.set_ylabel("share of documents")
    finish_axes(axes)
    if not splits:
        axes.text(0.5, 0.5, "no end-of-text id", transform=axes.transAxes, ha="center")
        return
    edges = list_length_edges(min(split.find_length(0) for split in splits), max(s.find_length(100) for s in splits))
    for split in splits:
        colour = SPLIT_COLOURS[split.split]
        shares = split.count_lengths(edges) / split.documents
        label = f"{split.split}: median {split.find_length(50):,}, mean {split.mean_length:,.0f}"
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.18)
        axes.stairs(shares, edges, color=colour, linewidth=1.4, label=label)
        axes.axvline(split.find_length(50), color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(_write_percent)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def list_length_edges(shortest: int, longest: int) -> np.ndarray:
    """Return ascending int64 edges, evenly spaced on a logarithmic axis, that enclose all lengths.

    They are whole numbers, as lengths are: other edges would make bins that no length can fall into.
    """
    first, last = (int(np.floor(BINS_PER_DOUBLING * np.log2(length))) for length in (shortest, longest))
    edges = np.ceil(2.0 ** (np.arange(first - 1, last + 3) / BINS_PER_DOUBLING)).astype(np.int64)
    return np.unique(edges)


def _draw_frequencies(axes: Axes, splits: list[SplitStatistics]) -> None:
    axes.set_title("token frequencies", fontsize=11)
    for split in splits:
        shares = np.sort(split.token_counts[split.token_counts > 0])[::-1] / split.tokens
        label = f"{split.split}: {split.ids_in_use:,} ids in use"
        ranks = np.arange(1, len(shares) + 1)
        axes.plot(ranks, shares, color=SPLIT_COLOURS[split.split], label=label, drawstyle="steps-mid")
    ranks = np.array([1, max(split.ids_in_use for split in splits)])
    axes.plot(ranks, ZIPF_SHARE / ranks, color="grey", linestyle=":", label=f"Zipf's law, {ZIPF_SHARE} / rank")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("share of all tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    finish_axes(axes)


def _draw_most_common(axes: Axes, splits: list[SplitStatistics], tokenizer: PreTrainedTokenizerFast) -> None:
    """Draw the most common tokens of the first split as bars, and their shares of another one as dots."""
    ids = splits[0].list_most_common(MOST_COMMON)
    rows = np.arange(len(ids))
    axes.barh(rows, splits[0].token_counts[ids] / splits[0].tokens, height=0.7, alpha=0.75, **_style(splits[0]))
    for split in splits[1:]:
        axes.plot(split.token_counts[ids] / max(1, split.tokens), rows, "o", markersize=4, **_style(split))
    font = FontProperties(family=TOKEN_FONT, size=9)
    labels = [make_drawable(token, font) for token in quote_tokens(tokenizer, ids)]
    axes.set_yticks(rows, [_shorten(label) for label in labels], fontproperties=font, parse_math=False)
    axes.invert_yaxis()
    axes.set_title("most common tokens", fontsize=11)
    axes.set_xlabel("share of all tokens")
    axes.xaxis.set_major_formatter(_write_percent)
    axes.legend(loc="lower right", fontsize=9, edgecolor="none", framealpha=0.8)
    finish_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _style(split: SplitStatistics) -> dict[str, str]:
    return {"color": SPLIT_COLOURS[split.split], "label": split.split}


def _write_percent(share: float, _: int) -> str:
    return f"{100 * share:.3g}%"


def _shorten(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else f"{label[: LABEL_CHARACTERS - 4]}...{label[-1]}"
