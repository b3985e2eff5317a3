"""TOML in and out, and errors in one line about it."""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

MOST_BYTES = 1 << 20  # of a TOML file


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line."""

    exit_code = 2


def toml_value(value: Any) -> str:
    """A value as TOML writes it on one line, so that `parse_value` gives it back."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    # JSON's strings, whole numbers and floats are TOML's, but for one control character
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def read_toml(file: str | Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError when it cannot be read or is none."""
    try:
        if not Path(file).is_file() and Path(file).exists():
            raise OSError(0, "it is no regular file")
        with open(file, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the config {file}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{file} is no configuration: it is larger than {MOST_BYTES:,} bytes")
    try:
        return tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not valid TOML: it is not in UTF-8 (byte {error.start}); save it as that"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{file} is not valid TOML: its brackets are nested too deep") from error
    except ValueError as error:  # TOMLDecodeError, and errors for numbers of thousands of digits
        raise ConfigError(f"{file} is not valid TOML: {one_line(str(error))}") from error


def fields_of(override: str) -> list[str]:
    """What `section.field=value` sets: one field, or those of a whole section."""
    path, _, text = override.partition("=")
    value = parse_value(text.strip())
    return [f"{path.strip()}.{name}" for name in value] if isinstance(value, dict) else [path.strip()]


def parse_value(text: str) -> Any:
    """The TOML value that the text is, or the text itself."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if found.keys() == {"value"} else text


def short(value: Any) -> str:
    """A value as an error message may show it."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: str) -> str:
    """A text without line breaks, shortened if it is long."""
    return " ".join(text.split())[:200]


def sections_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a settings class that are settings classes themselves: the tables of the file."""
    found = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def default_toml(model: type[BaseModel]) -> str:
    """Every field of a settings class with default and description, as a TOML file that reads back to the defaults."""
    lines = ["# Everything a run can be told, with the defaults. Leave out what you do not change."]
    tables = sections_of(model)
    for name, section in {"": model, **tables}.items():
        if name:
            lines += ["", f"[{name}]"]
        for field, about in section.model_fields.items():
            if section is model and field in tables:
                continue
            value = f"{field} = {toml_value(about.default)}" if about.default is not None else f"# {field} ="
            choices = _choices(about.annotation)
            among = f" [{' | '.join(choices)}]" if len(choices) > 1 and about.default != tuple(choices) else ""
            lines.append(f"{value:<40} # {about.description}{among}")
    return "\n".join(lines) + "\n"


def _choices(annotation: Any) -> list[str]:
    """The words that a field takes."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _choices(part)]


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a file for a settings class, with the table that makes it a sweep."""
    schema = model.model_json_schema()
    schema["properties"]["sweep"] = {
        "type": "object",
        "description": "runs of every combination of these lists",
        "minProperties": 1,
        "additionalProperties": {"type": "array", "minItems": 1, "uniqueItems": True},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
