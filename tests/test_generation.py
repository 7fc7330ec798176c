"""Generation, padding, positions and optional outputs, against transformers' own GPT-2."""

import pytest
import torch
from tiny_models import SHAPE, assert_close, build_model, build_pair, draw_ids
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

# Three tokens of padding before the first row. Padding is an id like any other, so only the mask marks it.
LEFT_PADDING = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
MODES = {
    "greedy": {"do_sample": False},
    "greedy, static cache": {"do_sample": False, "cache_implementation": "static"},
    "greedy, no cache": {"do_sample": False, "use_cache": False},
    "sampled": {"do_sample": True, "top_k": 50, "temperature": 1.3},
    "sampled, static cache": {"do_sample": True, "top_p": 0.9, "cache_implementation": "static"},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module")
def pair():
    return build_pair()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [None, LEFT_PADDING], ids=["unpadded", "left-padded"])
def test_generated_ids_equal_stock_gpt2s(pair, mode, padding):
    generated = []
    for model in pair:
        torch.manual_seed(0)  # `generate` draws from the global generator
        generated.append(model.generate(draw_ids(2, 9), attention_mask=padding, max_new_tokens=20, **MODES[mode]))
    assert generated[0].shape == (2, 29)
    assert len(generated[0][0, 9:].unique()) > 5, "repeated tokens would hide a wrong position"
    assert torch.equal(*generated)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_both_caches_match_recomputing_every_token(pair, cache):
    model, expected = pair[0], draw_ids(2, 7)
    generated = model.generate(expected, max_new_tokens=15, do_sample=False, cache_implementation=cache)
    for _ in range(15):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_a_left_padded_row_generates_the_same_as_alone(pair):
    model, ids = pair[0], draw_ids(2, 9)
    together = model.generate(ids, attention_mask=LEFT_PADDING, max_new_tokens=12, do_sample=False)
    for row, start in enumerate((3, 0)):
        alone = model.generate(ids[row : row + 1, start:], max_new_tokens=12, do_sample=False)
        assert torch.equal(together[row, 9:], alone[0, 9 - start :])


def test_logits_of_left_padded_rows(pair):
    (model, stock), ids, tokens = pair, draw_ids(2, 9), LEFT_PADDING.bool()
    position_ids = (LEFT_PADDING.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=LEFT_PADDING, position_ids=position_ids).logits
    assert_close(logits[:1, 3:], model(ids[:1, 3:]).logits)
    assert_close(logits[1:], model(ids[1:]).logits)

    # Without position_ids, GPT-2 counts the padding: the logits match stock GPT-2, not the row without padding.
    logits = model(ids, attention_mask=LEFT_PADDING).logits
    assert_close(logits[tokens], stock(ids, attention_mask=LEFT_PADDING).logits[tokens])
    assert (logits[0, 3:] - model(ids[:1, 3:]).logits[0]).abs().max() > 0.01


def test_right_padding_changes_nothing_before_it(pair):
    model, ids, mask = pair[0], draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    assert_close(model(ids, attention_mask=mask).logits[0, :6], model(ids[:1, :6]).logits[0])


def test_logits_to_keep_selects_from_all_logits(pair):
    model, ids = pair[0], draw_ids(2, 9)
    logits, indices = model(ids).logits, torch.tensor([0, 4, 7])
    assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_close(model(ids, logits_to_keep=4).logits, logits[:, -4:])
    assert_close(model(ids, logits_to_keep=indices).logits, logits[:, indices])
    of_each, mask = torch.tensor([[0, 4], [8, 2]]), torch.arange(18).view(2, 9) % 5 == 1
    assert_close(model(ids, logits_to_keep=of_each).logits, torch.stack([logits[0, [0, 4]], logits[1, [8, 2]]]))
    assert_close(model(ids, logits_to_keep=mask).logits, logits[mask])
    assert model(ids, logits_to_keep=mask).logits.shape == (4, 301)


def test_embeddings_can_replace_ids(pair):
    (model, stock), ids = pair, draw_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated, stock.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False))
    assert torch.equal(generated, model.generate(ids, max_new_tokens=12, do_sample=False)[:, 9:])


def test_a_cache_can_be_continued_by_several_tokens(pair):
    model, ids = pair[0], draw_ids(2, 33)
    logits = model(ids).logits
    past_key_values = model(ids[:, :20], use_cache=True).past_key_values
    assert past_key_values.get_seq_length() == 20
    assert_close(model(ids[:, 20:], past_key_values=past_key_values).logits, logits[:, 20:])
    assert model(ids, use_cache=False).past_key_values is None


def test_every_position_can_be_used_but_no_more(pair):
    model, ids = pair[0], draw_ids(1, SHAPE["n_positions"] + 1)
    past_key_values = model(ids[:, :40], use_cache=True).past_key_values
    last = model(ids[:, 40:48], past_key_values=past_key_values).logits[:, -1]
    assert_close(last, model(ids[:, :48]).logits[:, -1])
    # The embedding lookup would fail too, but on a GPU with an assertion that ends the process.
    with pytest.raises(ValueError, match=r"n_positions \(48\)"):
        model(ids[:, 48:], past_key_values=past_key_values)
    with pytest.raises(ValueError, match=r"n_positions \(48\)"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=r"n_positions \(48\)"):
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_generation_ends_at_n_positions_and_fails_beyond_like_stock_gpt2(pair):
    ids = draw_ids(1, 40)
    for model in pair:
        # The last new token is not fed back, so one token more than n_positions can be generated.
        assert model.generate(ids, max_new_tokens=9, do_sample=False).shape == (1, 49)
        with pytest.raises((IndexError, ValueError)):
            model.generate(ids, max_new_tokens=10, do_sample=False)


def test_hidden_states_equal_stock_gpt2s(pair):
    (model, stock), ids = pair, draw_ids()
    ours = model(ids, output_hidden_states=True).hidden_states
    theirs = stock(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == SHAPE["n_layer"] + 1
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its)
    assert_close(ours[-1], model.transformer(ids).last_hidden_state)  # the last one after the final layer norm
    assert model(ids).hidden_states is None


def test_attention_weights_equal_stock_gpt2s():
    (model, stock), ids = build_pair(), draw_ids(2, 9)
    # sdpa cannot return them: the outputs are empty, and requesting them in the configuration raises an error.
    assert model(ids, output_attentions=True).attentions == stock(ids, output_attentions=True).attentions == ()
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True

    for each in (model, stock):
        each.set_attn_implementation("eager")
    ours = model(ids, attention_mask=LEFT_PADDING, output_attentions=True).attentions
    theirs = stock(ids, attention_mask=LEFT_PADDING, output_attentions=True).attentions
    assert len(ours) == len(theirs) == SHAPE["n_layer"]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.shape == (2, SHAPE["n_head"], 9, 9)
        assert_close(mine, its)


def test_tuples_instead_of_named_outputs(pair):
    (model, stock), ids = pair, draw_ids(2, 9)
    ours = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    theirs = stock(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert [type(value) for value in ours] == [type(value) for value in theirs]
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("training", [False, True])
def test_losses_respect_num_items_and_ignored_targets(training):
    """Trainer divides by the number of items in the whole accumulated batch, and -100 marks ignored targets."""
    model, ids = build_model().train(training), draw_ids()
    labels = ids.clone()
    labels[0, 5:20] = -100
    shift_labels = labels[:, 1:].contiguous()
    total = cross_entropy(build_model()(ids).logits[:, :-1].flatten(0, 1), shift_labels.flatten(), reduction="sum")
    for expected, n_items in ((total / (2 * 32 - 15), {}), (total / 80, {"num_items_in_batch": torch.tensor(80)})):
        assert_close(model(ids, labels=labels, **n_items).loss, expected)
        assert_close(model(ids[:, :-1], shift_labels=shift_labels, **n_items).loss, expected)
