"""From a GGUF file to a plain float checkpoint, by transformers' reader; refused where it drops what the file says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saap.errors import SaapError
from saap.models.checkpoint import save
from saap.models.families import family_of


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
        with no_init_weights():
            plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict())
        plain.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        cut = reader.get_field("tokenizer.ggml.pre")
    if cut is not None and cut.contents() == "smollm":  # transformers takes every byte-level tokenizer for GPT-2's
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    save(plain, folder, tokenizer)


@contextmanager
def _read_once(file: Path) -> Iterator[Any]:
    """While open, gguf gives the same reader of a file to everyone who asks: parsing a vocabulary takes seconds."""
    import gguf

    original = gguf.GGUFReader
    reader = original(file)
    gguf.GGUFReader = lambda path, *_: reader if Path(path).samefile(file) else original(path)  # type: ignore
    try:
        yield reader
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


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
