"""The tokenizer of a checkpoint. Imports no model."""

import json
from pathlib import Path
from typing import Any

from saap.errors import SaapError, first_line


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a local folder, with a padding token; one that names no end-of-text token gets the config's.

    Raises SaapError if there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise SaapError(f"no tokenizer in {folder} that can be read: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _configured_eos(Path(folder), tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _configured_eos(folder: Path, tokenizer: Any) -> str | None:
    """The token of `eos_token_id` in generation_config.json or config.json, the first where there are several."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        number = found[0] if isinstance(found, list) and found else found
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            token: str | None = tokenizer.convert_ids_to_tokens(number)
            return token
    return None
