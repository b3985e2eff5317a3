"""From a GGUF file to a plain float checkpoint, by transformers' reader; refused where it drops what the file says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import torch

from saap.errors import SaapError
from saap.models.checkpoint import save
from saap.models.families import family_of

LONGEST = 4096  # items of an array that the model itself can need


def convert_gguf(gguf: str | Path, folder: str | Path) -> None:
    """Load a GGUF file, dequantised to float32, and save it with its tokenizer as a plain safetensors checkpoint.

    Raises SaapError for a family we do not know, and for scaled rotary positions or tensors (biases, say) that
    transformers would leave out.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    gguf = Path(gguf)
    with _read_once(gguf) as reader:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        # a model that came from GGUF cannot be saved while its config says it is quantised
        del config.quantization_config
        family_of(config)
        _check_whole(reader, quantised, gguf)
        with torch.device("meta"), no_init_weights():
            plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        cut = reader.get_field("tokenizer.ggml.pre")
    if cut is not None and cut.contents() == "smollm":  # transformers takes every byte-level tokenizer for GPT-2's
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    save(plain, folder, tokenizer)


@contextmanager
def _read_once(file: Path) -> Iterator[Any]:
    """While open, gguf gives the same reader of a file, and the same map of names, to everyone who asks, and makes
    floats of 64 rows at a time, where its own 16 take three times as long.

    The reader leaves long arrays out, which are the vocabulary: gguf's own takes ten seconds for 262,144 tokens, and
    transformers, which reads it again by itself for the tokenizer, wants to know their number only.
    """
    import gguf
    from gguf import quants

    by_rows = quants._apply_over_grouped_rows
    quants._apply_over_grouped_rows = _over_rows
    original, names = gguf.GGUFReader, gguf.get_tensor_name_map
    reader = _short_reader()(file)
    gguf.GGUFReader = lambda path, *_: reader if Path(path).samefile(file) else original(path)  # type: ignore
    gguf.get_tensor_name_map = lru_cache(names)  # transformers asks for each module anew
    try:
        yield reader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original, names  # type: ignore[misc]
        quants._apply_over_grouped_rows = by_rows


def _over_rows(func: Callable[[Any], Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
    """func over the rows of an array, (…, bytes of a row), into one of that dtype and shape; the names are gguf's."""
    rows, out = arr.reshape(-1, arr.shape[-1]), np.empty((prod(oshape[:-1]), oshape[-1]), otype)
    for start in range(0, len(rows), 64):
        out[start : start + 64] = func(rows[start : start + 64]).reshape(-1, oshape[-1])
    return out.reshape(oshape)


def _short_reader() -> Any:
    """gguf's reader, for which an array of more than LONGEST items has none, and the vocabulary a size."""
    from gguf import GGUFReader, GGUFValueType, ReaderField

    class ShortReader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == GGUFValueType.ARRAY:
                kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                if count[0] > LONGEST:
                    size = 12 + self._bytes(orig_offs + 12, int(kind[0]), int(count[0]))
                    return size, [kind, count], [], [GGUFValueType.ARRAY]
            return super()._get_field_parts(orig_offs, raw_type)

        def _bytes(self, start: int, kind: int, count: int) -> int:
            if kind != GGUFValueType.STRING:
                return count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
            data: Any = self.data
            data, length, at = memoryview(data), Struct("<Q").unpack_from, start
            for _ in range(count):
                at += 8 + length(data, at)[0]
            return at - start

    def read(file: Path) -> Any:
        reader = ShortReader(file)
        name = f"{reader.fields['general.architecture'].contents()}.vocab_size"
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        if name not in reader.fields and tokens is not None:
            size = tokens.parts[-1].astype(np.uint32) if not tokens.data else np.array([len(tokens.data)], np.uint32)
            reader.fields[name] = ReaderField(0, name, [size], [0], [GGUFValueType.UINT32])
        return reader

    return read


def _check_whole(reader: Any, model: Any, file: Path) -> None:
    """Raises SaapError when the file holds something that transformers' model lacks."""
    fields = {name.partition(".")[2]: field for name, field in reader.fields.items()}
    scaling = fields.get("rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise SaapError(f"{file.name} scales rotary positions ({scaling.contents()}), which transformers' reader drops")
    names = [tensor.name for tensor in reader.tensors]
    if "rope_freqs.weight" in names:
        raise SaapError(f"{file.name} scales rotary positions (rope_freqs.weight), which transformers' reader drops")
    held, read = sum(int(t.n_elements) for t in reader.tensors), sum(p.numel() for p in model.parameters())
    if held != read:
        biases = sorted({name.split(".")[-2] + ".bias" for name in names if name.endswith(".bias")})
        raise SaapError(
            f"{file.name} holds {held:,} numbers and transformers' {type(model).__name__} {read:,}: some would be lost "
            f"({', '.join(biases) or 'which its class has no place for'}); use the model's safetensors"
        )
