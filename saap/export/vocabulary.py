"""The `tokenizer.*` part of a GGUF file, from a Hugging Face tokenizer."""

import json
from typing import Any

import gguf

from saap.errors import SaapError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how a byte-level tokenizer cuts text before merging → llama.cpp's name for it, and whether whole words skip the merges
PRE_TOKENIZERS = {
    f"{CONTRACTIONS}|{WORDS}|" + r"\p{N}{1,3}|" + REST: ("llama-bpe", True),
    f"{CONTRACTIONS}|{WORDS}|" + r"\p{N}|" + REST: ("qwen2", False),
    "digits, then GPT-2": ("smollm", False),
    "GPT-2": ("gpt-2", False),
}


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Add tokens, types, merges or scores, special ids and the chat template; `size` is the model's vocabulary.

    Knows byte-level BPE (Llama 3, SmolLM2, Qwen) and SentencePiece-like BPE with bytes as fallback (LLaMA, Vicuna,
    Mistral). Raises SaapError for a tokenizer that llama.cpp would cut differently.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise SaapError("this tokenizer has no tokenizer.json, which GGUF export reads: save it with save_pretrained")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise SaapError(f"GGUF export knows BPE tokenizers, this one is {model['type']}")
    tokens, types = _tokens(tokenizer, parts, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if _steps(parts["pre_tokenizer"])[-1:] == ["ByteLevel"]:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(parts))
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    elif model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(parts))
        writer.add_token_scores(_scores(tokens, merges))
        bytes_ = {f"<0x{value:02X}>" for value in range(256)}
        types = [BYTE if token in bytes_ else kind for token, kind in zip(tokens, types, strict=True)]
        if model["unk_token"] in tokens:
            types[tokens.index(model["unk_token"])] = UNKNOWN
    else:
        raise SaapError("GGUF export knows byte-level BPE and BPE with byte fallback; this tokenizer is neither")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _tokens(tokenizer: Any, parts: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(known) >= size:
        raise SaapError(f"the tokenizer has {max(known) + 1} tokens, the model's vocabulary {size}")
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in parts["added_tokens"]}
    tokens = [known.get(index, f"[PAD{index}]") for index in range(size)]
    return tokens, [added.get(index, NORMAL) if index in known else UNUSED for index in range(size)]


def _steps(step: dict[str, Any] | None) -> list[str]:
    """The kinds of a (pre-tokenizer or normaliser) step and those inside it, in order."""
    if step is None:
        return []
    inside = step.get("pretokenizers") or step.get("normalizers")
    return [kind for one in inside for kind in _steps(one)] if inside else [step["type"]]


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    step = parts["pre_tokenizer"]
    steps = step.get("pretokenizers", [step])
    kinds, last = [one["type"] for one in steps], steps[-1]
    how = "an unknown one"
    if kinds == ["ByteLevel"] and last["use_regex"]:
        how = "GPT-2"
    elif kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
        how = "digits, then GPT-2"
    elif kinds == ["Split", "ByteLevel"] and not last["use_regex"] and steps[0]["behavior"] == "Isolated":
        how = steps[0]["pattern"].get("Regex", how)
    name, whole_words = PRE_TOKENIZERS.get(how, (None, False))
    normalised = [kind for kind in _steps(parts["normalizer"]) if kind != "NFC"]  # llama.cpp expects composed text
    if (
        name is None
        or last["add_prefix_space"]
        or normalised
        or bool(parts["model"].get("ignore_merges")) != whole_words
    ):
        raise SaapError(f"llama.cpp is not known to cut text as this tokenizer does ({', '.join(kinds)}: {how})"[:300])
    return name


def _adds_space(parts: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text. Raises SaapError if it does more."""
    before, cut = parts["normalizer"], parts["pre_tokenizer"]
    if _steps(before) == ["Prepend", "Replace"] and cut is None:
        return True
    if _steps(before) == ["Replace"] and cut is None:
        return False
    if before is None and _steps(cut) == ["Metaspace"] and not cut.get("split", True):
        return bool(cut["prepend_scheme"] != "never")
    raise SaapError(f"llama.cpp is not known to cut text as this tokenizer does ({_steps(before)}, {_steps(cut)})")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result scores highest: minus the rank of the first merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _write_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for index, add in (
        (bos, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    begins, ends = full[:1] == [bos] != plain[:1], full[-1:] == [eos] != plain[-1:]
    if full != [bos] * begins + plain + [eos] * ends:
        raise SaapError("this tokenizer adds other tokens than BOS and EOS to a text, which GGUF cannot say")
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
