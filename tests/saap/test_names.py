"""What `import saap` brings at once, and what only when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import saap
from saap import prune, save
from saap.models.families import FAMILIES
from saap.models.registration import DEFINED_IN
from tests.saap.models.families import IDS, build, logits, random_keep


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_what_editors_are_told():
    told = {}
    for part in ast.walk(ast.parse(Path(saap.__file__).read_text())):
        if isinstance(part, ast.ImportFrom) and str(part.module).startswith("saap."):
            told |= {name.name: part.module for name in part.names}
    del told["register_types"]
    assert sorted(told) == saap.__all__
    for name, module in told.items():
        assert getattr(saap, name) is getattr(sys.modules[module], name)
    assert set(saap.__all__) < set(dir(saap))
    with pytest.raises(AttributeError, match="module 'saap' has no attribute 'prunes'"):
        saap.prunes  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prunes' from 'saap'"):
        from saap import prunes  # noqa: F401


def test_drawing_texts_imports_no_model():
    code = """
import sys
from saap import ParquetTexts, SaapError, load_tokenizer, sample_tokens
print(*sorted(name for name in sys.modules if name.startswith(("saap.models.modeling", "saap.models.families"))))
print(*sorted(name for name in sys.modules if "transformers.models." in name and ".modeling_" in name))
"""
    assert python(code).split() == []


def test_every_type_that_is_registered_is_one_of_a_family_and_the_other_way_round():
    known = {name for family in FAMILIES for name in family.model_types if name.startswith("saap_")}
    assert {f"saap_{name}" for kinds in DEFINED_IN.values() for name in kinds} == known


def test_importing_saap_is_enough_for_transformers_to_load_a_checkpoint(tmp_path):
    for case in ("olmo2", "bloom", "llama"):
        model = build(case)
        small = prune(model, random_keep(model))
        save(small, tmp_path / case)
        save_file({"logits": logits(small)}, tmp_path / f"{case}.safetensors")
    code = """
import json, sys, torch, saap
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
kept = AutoConfig.for_model("saap_qwen3_moe").model_type
assert kept == "saap_qwen3_moe", kept
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("saap.models.modeling"), type(model)
    expected = load_file(folder + ".safetensors")["logits"]
    torch.testing.assert_close(model(torch.tensor(json.loads(sys.argv[1]))).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config) is type(saap.load(folder).config)
"""
    python(code, IDS.tolist(), *(tmp_path / case for case in ("olmo2", "bloom", "llama")))
