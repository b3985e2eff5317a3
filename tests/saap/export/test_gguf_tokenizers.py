"""Tokenizers in GGUF files: llama.cpp cuts text as they do."""

import copy
import json

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from saap import load_tokenizer
from saap.export.llama_cpp import LlamaCpp
from tests.saap.export.gguf_files import exported, refused
from tests.saap.models.families import build

TEXT = "It's 1984!  And 42 ships — “gone”.\n\n   The keeper’s lamp\tburned… 3,141 times; naïve 中文 🚢 done "


def settings_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_tokens_specials_and_template_of_a_byte_level_tokenizer(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    _, file = exported(build("llama"), tokenizer, tmp_path)
    found = settings_of(file)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    with LlamaCpp(file) as other:
        assert other.tokenize(TEXT) == tokenizer(TEXT)["input_ids"]
        assert other.tokenize("<s>a</s>") == tokenizer("<s>a</s>")["input_ids"]


def llama_regex(digits):
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    return words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cut_by(pattern):
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("name", "cut", "whole_words"),
    [
        ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
        ("qwen2", cut_by(llama_regex(r"\p{N}")), False),
        ("llama-bpe", cut_by(llama_regex(r"\p{N}{1,3}")), True),
    ],
)
def test_text_is_cut_as_the_tokenizer_cuts_it(name, cut, whole_words, tiny_folder, mini, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["pre_tokenizer"] = json.loads(cut.__getstate__())
    parts["model"]["ignore_merges"] = whole_words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="</s>")
    _, file = exported(build("llama"), tokenizer, tmp_path)
    assert settings_of(file)["tokenizer.ggml.pre"] == name
    with LlamaCpp(file) as other:
        for text in (TEXT, *(row["text"] for row in mini("wikitext2_raw/test")[:20])):
            assert other.tokenize(text) == tokenizer(text)["input_ids"]


@pytest.fixture(params=["normaliser", "metaspace"])
def sentencepiece_like(mini, request):
    """A BPE with bytes as fallback, its merges ordered by the piece they make, as LLaMA's conversion orders them."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([row["text"] for row in mini("bookcorpus_like/passages")], trainer)
    parts = json.loads(bpe.to_str())
    vocabulary = parts["model"]["vocab"]
    cuts = (
        (word[:i], word[i:], index) for word, index in vocabulary.items() if index > 258 for i in range(1, len(word))
    )
    merges = sorted((index, vocabulary[a], a, b) for a, b, index in cuts if a in vocabulary and b in vocabulary)
    parts["model"]["merges"] = [[a, b] for _, _, a, b in merges]
    if request.param == "metaspace":  # the same, as newer files of LLaMA say it
        parts["normalizer"] = None
        parts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < 3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_text_is_cut_as_a_sentencepiece_like_tokenizer_cuts_it(sentencepiece_like, mini, tmp_path):
    _, file = exported(build("llama"), sentencepiece_like, tmp_path)
    with LlamaCpp(file) as other:
        for text in (TEXT, *(row["text"] for row in mini("wikitext2_raw/test")[:40])):
            # before a text that begins with a space, SentencePiece and llama.cpp put another, Metaspace does not
            text = text.lstrip()
            assert other.tokenize(text) == sentencepiece_like(text)["input_ids"]


def test_a_tokenizer_that_llama_cpp_would_cut_differently_is_refused(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    for number, cut in enumerate((cut_by(r"\w+|\W+"), pre_tokenizers.ByteLevel(add_prefix_space=True))):
        other = copy.deepcopy(tokenizer)
        other.backend_tokenizer.pre_tokenizer = cut
        refused(build("llama"), other, tmp_path / str(number), "cut text")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    refused(build("llama"), PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "words", "WordLevel")
