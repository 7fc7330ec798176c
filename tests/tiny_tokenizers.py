"""Tiny tokenizers of common families, trained on a few lines, most of them with transformers' own classes."""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    OpenAIGPTTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

LINES = [
    "the tokens of a text are its words and what is left of the others",
    "The quick brown fox jumps over the lazy dog, again and again: 0123456789 times.",
    "naïve café, straße; déjà vu? (yes) [no] <b>bold</b> a/b c|d e_f s> </s <s",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # ok",
] * 4
SENTENCEPIECE_TOKENS = ["<unk>", "<s>", "</s>"]
EOT = "<|endoftext|>"


def build_gpt2() -> PreTrainedTokenizerFast:
    return GPT2Tokenizer(**_train_bytes([EOT]))


def build_qwen() -> PreTrainedTokenizerFast:
    return Qwen2Tokenizer(**_train_bytes([EOT, "<|im_start|>"]), additional_special_tokens=["<|im_start|>"])


def build_gpt_neox(**options) -> PreTrainedTokenizerFast:
    tokenizer = GPTNeoXTokenizer(**_train_bytes([EOT, "<|padding|>"]), **options)
    tokenizer.add_tokens([AddedToken("  ", normalized=True)])
    return tokenizer


def build_roberta() -> PreTrainedTokenizerFast:
    return RobertaTokenizer(**_train_bytes(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def build_llama3() -> PreTrainedTokenizerFast:
    """Build a tokenizer that ignores merges for words in its vocabulary and starts each text from a template."""
    trained = _train_bytes(["<|begin_of_text|>", "<|end_of_text|>"])
    backend = Tokenizer(models.BPE(**trained, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    begin = ("<|begin_of_text|>", trained["vocab"]["<|begin_of_text|>"])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(f"{begin[0]} $A", f"{begin[0]} $A {begin[0]} $B", [begin]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin[0], eos_token="<|end_of_text|>")


def build_clip() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose unknown token is its end-of-text token, and unused: every byte can appear anywhere."""
    trained = _train_bytes(["<|startoftext|>", EOT], end_of_word_suffix="</w>")
    for symbol in pre_tokenizers.ByteLevel.alphabet():
        trained["vocab"].setdefault(f"{symbol}</w>", len(trained["vocab"]))
    return CLIPTokenizer(**trained)


def build_gpt1() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    trained = _train(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())
    return OpenAIGPTTokenizer(**trained, eos_token="</s>")


def build_llama(**options) -> PreTrainedTokenizerFast:
    trained = _train_sentencepiece(SENTENCEPIECE_TOKENS)
    return LlamaTokenizer(**trained, **{"add_bos_token": True, **options})


def build_gemma() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(**_train_sentencepiece(tokens), add_bos_token=True)


def build_merged_end() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose merges form the end-of-text token from letters, as those of SentencePiece do."""
    letters = sorted(set("".join(LINES)))
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *letters, "</", "s>"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def build_t5() -> PreTrainedTokenizerFast:
    return T5Tokenizer(_train_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=3)


def build_xlm_roberta() -> PreTrainedTokenizerFast:
    return XLMRobertaTokenizer(_train_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def build_unigram_nfkc() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose normalizer forms the end-of-text token from full-width characters and from capitals."""
    model = models.Unigram(_train_unigram(SENTENCEPIECE_TOKENS), unk_id=0)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_bert() -> PreTrainedTokenizerFast:
    vocabulary = _train_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return BertTokenizer(vocabulary, eos_token="[SEP]")


def build_word_piece() -> PreTrainedTokenizerFast:
    """Build a tokenizer that splits at whitespace only; special tokens are words in its vocabulary."""
    backend = Tokenizer(models.WordPiece(_train_words(["[UNK]", "</s>"]), unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("@end@", "</s>")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def build_word_level() -> PreTrainedTokenizerFast:
    words = sorted(set(" ".join(LINES).split()))
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(5)
    backend.enable_padding(length=5)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def build_plain_added_end() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose end-of-text token is added but not special, and absorbs the spaces around it."""
    trained = _train_bytes([])
    definition = json.loads(GPT2Tokenizer(**trained).backend_tokenizer.to_str())
    end = {"id": len(trained["vocab"]), "content": "<end>", "single_word": False, "lstrip": True, "rstrip": True}
    definition["added_tokens"] = [end | {"normalized": True, "special": False}]
    backend = Tokenizer.from_str(json.dumps(definition))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer._special_tokens_map["eos_token"] = "<end>"  # the setter would make it special
    return tokenizer


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    build.__name__.removeprefix("build_"): build
    for build in (
        build_gpt2,
        build_qwen,
        build_gpt_neox,
        build_roberta,
        build_llama3,
        build_clip,
        build_gpt1,
        build_llama,
        build_gemma,
        build_merged_end,
        build_t5,
        build_xlm_roberta,
        build_unigram_nfkc,
        build_bert,
        build_word_piece,
        build_word_level,
        build_plain_added_end,
    )
}


def _train(model, trainer, pre_tokenizer, normalizer=None) -> dict:
    """Return the vocabulary, and the merges if there are any, as arguments of a tokenizer's class."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(LINES, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    if isinstance(trained["vocab"], list):
        return {"vocab": [tuple(entry) for entry in trained["vocab"]]}
    return {"vocab": trained["vocab"]} | (
        {"merges": [tuple(merge) for merge in trained["merges"]]} if "merges" in trained else {}
    )


def _train_bytes(special_tokens: list[str], **suffix) -> dict:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **suffix,
    )
    return _train(models.BPE(**suffix), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _train_sentencepiece(special_tokens: list[str]) -> dict:
    tokens = [*special_tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False)
    return _train(models.BPE(), trainer, pre_tokenizers.Metaspace())


def _train_unigram(special_tokens: list[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special_tokens, unk_token="<unk>", show_progress=False
    )
    return _train(models.Unigram(), trainer, pre_tokenizers.Metaspace())["vocab"]


def _train_words(special_tokens: list[str]) -> dict[str, int]:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special_tokens, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return _train(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())["vocab"]
