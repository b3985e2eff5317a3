"""The evaluate stage on texts that hold less than is asked of them, and that change meanwhile."""

import shutil

import pytest
from prefect.logging import disable_run_logger

import saap
from flows.dag import build
from saap.errors import SaapError, TooShort
from storage.tables import read_table
from tasks.config import ConfigError, load_config
from tasks.data import mini_folder
from tasks.running import find_or_publish
from tasks.stage import stage_named

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluate(tiny_folder, tmp_path):
    """The dense model's evaluation on four sentences of PTB, in windows of these lengths: (window of each row)."""
    data = shutil.copytree(mini_folder(), tmp_path / "data")
    file = data / "ptb" / "validation.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    (tmp_path / "store").mkdir()

    def run(windows, bos="never"):
        fields = {"model.path": tiny_folder, "data": data, "store": tmp_path / "store"}
        choice = [
            f"evaluate.windows={windows}",
            f"evaluate.bos={bos}",
            "evaluate.benchmarks=['ptb']",
            "evaluate.variants=['dense']",
        ]
        config = load_config(None, (*(f"{name}='{value}'" for name, value in fields.items()), *choice))
        (step,) = [step for step in build(config) if step.stage == "evaluate"]
        with disable_run_logger():
            reference = find_or_publish(stage_named("evaluate"), step)
        return list(read_table(tmp_path / "store" / "evaluate" / reference["key"], "metrics")["protocol"])

    return run


def test_windows_longer_than_the_text_are_left_out_with_a_line(evaluate, caplog):
    (protocol,) = evaluate([16, 250])
    assert "windows of 16" in protocol
    assert "ptb is not measured in windows of 250: the text has" in caplog.text


def test_a_window_that_a_bos_has_no_place_before_is_left_out_with_a_line(evaluate, caplog):
    (protocol,) = evaluate([16, 256, 2048], bos="always")
    assert "windows of 16" in protocol
    assert "windows of 256 are not measured: a BOS before each is beyond 256 positions" in caplog.text
    assert "2048" not in caplog.text


def test_text_that_is_replaced_while_it_is_read_is_not_published_under_the_old_key(evaluate, tmp_path, monkeypatch):
    perplexity, file = saap.perplexity, tmp_path / "data" / "ptb" / "validation.jsonl"

    def and_replace(*given, **options):
        file.write_text(file.read_text() + '{"sentence": "another"}\n')
        return perplexity(*given, **options)

    monkeypatch.setattr(saap, "perplexity", and_replace)
    with pytest.raises(ConfigError, match=r"validation\.jsonl was changed while the run was at work"):
        evaluate([16])
    assert not list(tmp_path.glob("store/evaluate/*/manifest.json"))
    monkeypatch.setattr(saap, "perplexity", perplexity)
    assert len(evaluate([16])) == 1


def test_a_text_shorter_than_every_window_is_an_error(evaluate):
    with pytest.raises(TooShort, match="fewer than one window of 250"):
        evaluate([250])


def test_a_window_that_has_no_place_behind_a_bos_is_an_error(evaluate):
    """The model has 256 positions."""
    with pytest.raises(SaapError, match="fits the model's 256 positions behind a BOS"):
        evaluate([256], bos="always")
