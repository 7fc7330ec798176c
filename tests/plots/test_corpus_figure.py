"""The figure of a data folder."""

import warnings

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.inspection import inspect_folder
from modeling_gpt2_repro.plots.corpus_figure import (
    build_inspection_figure,
    draw_inspection,
    list_length_edges,
    quote_tokens,
)
from modeling_gpt2_repro.plots.figures import SPLIT_COLORS

EOT = 50256


@pytest.fixture(autouse=True)
def _no_warnings():
    """Turn Matplotlib's warnings about missing glyphs into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(folder, ids, split="train"):
    np.save(folder / f"x_{split}_000000.npy", np.array(ids, np.uint16))
    return inspect_folder(folder, 0, 0, 10)


def draw(folder, ids):
    return matplotlib.image.imread(draw_inspection(write(folder, ids)))


@pytest.fixture
def panels(tmp_path):
    write(tmp_path, [EOT, 262, 262, 198, EOT, 262], "val")
    figure = build_inspection_figure(write(tmp_path, [EOT, 262, EOT, 198, 447, EOT, *[262] * 4]))
    assert figure.get_suptitle() == f"{tmp_path.name}: 16 tokens in 5 documents"
    return figure.axes


def read_legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_lengths_are_shares_of_each_split(panels):
    assert panels[0].get_xscale() == "log"
    assert read_legend(panels[0]) == ["train: median 3, mean 3", "val: median 2, mean 3"]
    shares = {}
    for patch in panels[0].patches:
        values, edges, _ = patch.get_data()
        shares[patch.get_edgecolor()[:3]] = dict(zip(edges.tolist(), values.tolist(), strict=False))
    train, val = (shares[matplotlib.colors.to_rgb(SPLIT_COLORS[split])] for split in ("train", "val"))
    assert {edge: share for edge, share in train.items() if share} == pytest.approx({2: 1 / 3, 3: 1 / 3, 5: 1 / 3})
    assert {edge: share for edge, share in val.items() if share} == pytest.approx({2: 1 / 2, 4: 1 / 2})


def test_frequencies_fall_with_the_rank(panels):
    assert (panels[1].get_xscale(), panels[1].get_yscale()) == ("log", "log")
    train, val, zipf = panels[1].lines
    assert train.get_ydata() * 10 == pytest.approx([5, 3, 1, 1])
    assert val.get_ydata() * 6 == pytest.approx([3, 2, 1])
    assert train.get_xdata().tolist() == [1, 2, 3, 4]
    assert zipf.get_ydata() == pytest.approx([0.1, 0.025])
    assert read_legend(panels[1])[:2] == ["train: 4 ids in use", "val: 3 ids in use"]


def test_the_most_common_tokens_of_the_larger_split_are_bars(panels):
    assert [bar.get_width() * 10 for bar in panels[2].patches] == pytest.approx([5, 3, 1, 1])
    assert panels[2].lines[0].get_xdata() * 6 == pytest.approx([3, 2, 1, 0])
    names = [label.get_text() for label in panels[2].get_yticklabels()]
    assert names == ["' the'", "'<|endoftext|>'", r"'\n'", r"'\xe2\x80'"]
    assert panels[2].yaxis_inverted()
    assert sorted(read_legend(panels[2])) == ["train", "val"]


def test_tokens_are_quoted_as_text_or_as_bytes(tokenizer):
    assert quote_tokens(tokenizer, [262, 198, 447, 247, 6, EOT]) == [
        "' the'",
        r"'\n'",
        r"'\xe2\x80'",
        r"'\x99'",
        '"\'"',
        "'<|endoftext|>'",
    ]


def test_the_same_folder_gives_the_same_figure(tmp_path):
    inspection = write(tmp_path, [EOT, 1, 2, 3])
    first, second = (draw_inspection(inspection).read_bytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "ids", [[1, 2, 3], [EOT], [EOT, EOT], [EOT, 1], [5] * 300, [EOT, *[7] * 70_000]], ids=lambda ids: f"{len(ids)} ids"
)
def test_odd_folders_are_drawn(tmp_path, ids):
    assert draw(tmp_path, ids).std() > 0


def test_any_token_and_any_folder_name_can_be_drawn(tmp_path, tokenizer):
    folder = tmp_path / "日 $x^$"
    folder.mkdir()
    texts = ["$$", "$", "の", "—", "\x00", "\\", "========================================", " $"]
    ids = [index for text in texts for index in tokenizer(text)["input_ids"]]
    assert draw(folder, [EOT, *ids, 447, 247]).std() > 0


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 2), (2, 3), (7, 8), (15, 16), (1, 10**9), (999, 1025)])
def test_bins_cover_every_length_and_each_contains_an_integer(shortest, longest):
    edges = list_length_edges(shortest, longest)
    assert edges[0] <= shortest
    assert edges[-1] > longest
    assert (np.diff(edges) >= 1).all()
    assert len(edges) < 140


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "inspection.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*inspection\.png: "):
        draw(tmp_path, [EOT, 1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inspection.png", "x_train_000000.npy"]
