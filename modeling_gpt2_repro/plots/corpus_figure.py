"""Figure of a data folder: document lengths, token frequencies and the most common tokens."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter, PercentFormatter
from transformers import PreTrainedTokenizerFast

from ..core.files import follow_links
from ..data.inspection import Inspection, SplitStatistics
from ..data.shards import INSPECTION_NAME
from ..data.tokenizer import spell_tokens
from .figures import SPLIT_COLORS, build_figure, default_style, finish_axes, make_drawable, save_figure

LENGTH_BINS = 48
MOST_COMMON = 20
TOKEN_FONT = "DejaVu Sans Mono"  # shipped with matplotlib
LABEL_CHARACTERS = 18
# Zipf's law: the English word of rank r has a share of about 0.1 / r of all words.
ZIPF_SHARE = 0.1


def draw_inspection(inspection: Inspection) -> Path:
    """Draw a data folder, write the figure to `inspection.png` in it, and return its path.

    Raises:
        UserError: the folder is not writable.
    """
    path = inspection.folder / INSPECTION_NAME
    save_figure(build_inspection_figure(inspection), path)
    return path


@default_style()
def build_inspection_figure(inspection: Inspection) -> Figure:
    """Build three panels: document lengths, token frequencies by rank, and the most common tokens."""
    splits = sorted(inspection.splits, key=lambda split: -split.tokens)  # the smaller split is drawn on top
    figure = build_figure(15, 5.6)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.15, 1, 1))
    _draw_lengths(figure.add_subplot(grid[0]), [split for split in splits if split.documents])
    _draw_frequencies(figure.add_subplot(grid[1]), splits)
    _draw_most_common(figure.add_subplot(grid[2]), splits, inspection.tokenizer)
    tokens, documents = (sum(getattr(split, unit) for split in splits) for unit in ("tokens", "documents"))
    title = f"{follow_links(inspection.folder).name}: {tokens:,} tokens in {documents:,} documents"
    figure.suptitle(make_drawable(title), fontsize=14, parse_math=False)
    return figure


def quote_tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> list[str]:
    """Return the quoted text of each id, or its quoted bytes if they are not whole characters."""

    def quote(spelling: bytes) -> str:
        try:
            return repr(spelling.decode())
        except UnicodeDecodeError:
            return repr(spelling)[1:]

    return [quote(spelling) for spelling in spell_tokens(tokenizer, ids)]


def _draw_lengths(axes: Axes, splits: list[SplitStatistics]) -> None:
    axes.set(title="document lengths", xlabel="tokens per document", ylabel="share of documents", xscale="log")
    finish_axes(axes)
    if not splits:
        axes.text(0.5, 0.5, "no end-of-text id", transform=axes.transAxes, ha="center")
        return
    edges = list_length_edges(min(split.find_length(0) for split in splits), max(s.find_length(100) for s in splits))
    for split in splits:
        color = SPLIT_COLORS[split.split]
        counts, _ = np.histogram(split.lengths, edges, weights=split.length_counts)
        shares = counts / split.documents
        label = f"{split.split}: median {split.find_length(50):,}, mean {split.mean_length:,.0f}"
        axes.stairs(shares, edges, color=color, fill=True, alpha=0.18)
        axes.stairs(shares, edges, color=color, linewidth=1.4, label=label)
        axes.axvline(split.find_length(50), color=color, linestyle=":", linewidth=1)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def list_length_edges(shortest: int, longest: int) -> np.ndarray:
    """Return ascending int64 bin edges, evenly spaced on a logarithmic axis, that cover all lengths.

    The edges are integers, like lengths, because fractional edges would create bins that are always empty.
    """
    return np.unique(np.ceil(np.geomspace(shortest, longest + 1, LENGTH_BINS)).astype(np.int64))


def _draw_frequencies(axes: Axes, splits: list[SplitStatistics]) -> None:
    axes.set(title="token frequencies", xlabel="rank of the token", ylabel="share of all tokens")
    for split in splits:
        shares = np.sort(split.token_counts[split.token_counts > 0])[::-1] / split.tokens
        label = f"{split.split}: {split.ids_in_use:,} ids in use"
        ranks = np.arange(1, len(shares) + 1)
        axes.loglog(ranks, shares, color=SPLIT_COLORS[split.split], label=label, drawstyle="steps-mid")
    ranks = np.array([1, max(split.ids_in_use for split in splits)])
    axes.plot(ranks, ZIPF_SHARE / ranks, color="gray", linestyle=":", label=f"Zipf's law, {ZIPF_SHARE} / rank")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    finish_axes(axes)


def _draw_most_common(axes: Axes, splits: list[SplitStatistics], tokenizer: PreTrainedTokenizerFast) -> None:
    """Draw the shares of the first split's most common tokens as bars, and their shares in other splits as dots."""
    ids = splits[0].list_most_common(MOST_COMMON)
    rows = np.arange(len(ids))
    for split in splits:
        style = {"color": SPLIT_COLORS[split.split], "label": split.split}
        shares = split.token_counts[ids] / max(1, split.tokens)
        if split is splits[0]:
            axes.barh(rows, shares, height=0.7, alpha=0.75, **style)
        else:
            axes.plot(shares, rows, "o", markersize=4, **style)
    font = FontProperties(family=TOKEN_FONT, size=9)
    labels = [make_drawable(token, font) for token in quote_tokens(tokenizer, ids)]
    axes.set_yticks(rows, [label[:LABEL_CHARACTERS] for label in labels], fontproperties=font, parse_math=False)
    axes.invert_yaxis()
    axes.set(title="most common tokens", xlabel="share of all tokens")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower right", fontsize=9, edgecolor="none", framealpha=0.8)
    finish_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
