"""The other programs in benchmarks/: what they import is there, and how one of them reads weights."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from saap import prune
from saap.models.families import family_of
from tests.saap.models import families, mixtures

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OURS = ("saap", "storage", "tasks", "flows")


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.py")), ids=lambda file: file.name)
def test_what_a_program_imports_of_ours_is_there(file):
    """Also inside functions, which a start of the program would not reach."""
    for part in ast.walk(ast.parse(file.read_text())):
        if isinstance(part, ast.ImportFrom) and str(part.module).split(".")[0] in OURS:
            module = importlib.import_module(part.module)
            missing = [name.name for name in part.names if not hasattr(module, name.name)]
            if missing and hasattr(module, "__path__"):  # of a package it may be a module
                missing = [name for name in missing if find_spec(f"{part.module}.{name}") is None]
            assert not missing, f"line {part.lineno}: {part.module} has no {', '.join(missing)}"


@pytest.mark.parametrize("case", [*families.CASES, *mixtures.CASES])
def test_heads_are_read_of_the_weights_of_every_family(case, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    heads = importlib.import_module("vllm_config").heads
    made = mixtures if case in mixtures.CASES else families
    model = made.build(case)
    small = prune(model, made.random_keep(model))
    for own, layer in zip(small.config.per_layer_config, family_of(small.config).layers(small), strict=True):
        if (found := heads(layer)) is None:
            assert case == "qwen3_5"
            continue
        kept = getattr(own, "kept_heads", None)
        there = [own.num_attention_heads, own.num_key_value_heads] if kept is None else [len(kept)] * 2
        assert found[:2] == there
