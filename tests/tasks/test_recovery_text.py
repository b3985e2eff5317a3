"""Rows of a recovery that are not Alpaca's."""

import json
import shutil
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import saap
from storage.tables import read_table
from tasks.config import load_config
from tasks.data import calibration_texts, read_data
from tasks.how import Compute
from tasks.inputs import Checkpoint, Data, Tokenizer, forget_model
from tasks.recovery import counts
from tasks.stages.calibrate import Calibration, calibrate
from tasks.stages.own_text import own_text
from tasks.stages.recover import _rows, recover
from tasks.stages.recovery_text import OTHER_SEED, recovery_text
from tasks.step import Step
from tasks.toml import ConfigError

SETS = ("recover.examples=12", "recover.prose=0.25", "recover.own=0.5", "recover.max_length=10", "recover.seed=3")


@pytest.fixture
def step(tiny_folder, tmp_path):
    def of(stage, *sets, given=SETS):
        outside = tuple((name, str(tiny_folder)) for name in ("model", "tokenizer"))
        params = json.dumps(stage.params(load_config(None, (*given, *sets))))
        return Step(stage.name, "key", params, (), outside, Compute().model_dump_json(), str(tmp_path))

    yield of
    forget_model()


@pytest.fixture
def text(step, tiny_folder, tmp_path):
    found = recovery_text.make(
        step(recovery_text),
        tmp_path,
        tokenizer=Tokenizer(tiny_folder),
        model=Checkpoint(tiny_folder),
        data=Data("mini"),
    )
    assert found == {"prose": 3, "own": 6}
    return Calibration(tmp_path)


def test_prose_is_drawn_from_the_calibration_set_and_the_rest_written_by_the_model(text, tiny_folder, tiny_tokenizer):
    about = {"length": 10, "seed": 3 + OTHER_SEED}
    drawn, _ = saap.sample_tokens(calibration_texts("mini"), tiny_tokenizer, count=3, **about)
    written = saap.own_text(saap.load(tiny_folder), tiny_tokenizer, count=6, **about)
    assert text.read().tolist() == [*drawn.tolist(), *written.tolist()]


def test_own_text_stands_behind_the_drawn_sequences(text, step, tiny_folder, tiny_tokenizer, tmp_path):
    (tmp_path / "both").mkdir()
    made = own_text.make(
        step(own_text, "calibrate.own=4", "calibrate.seed=7"),
        tmp_path / "both",
        model=Checkpoint(tiny_folder),
        calibration=text,
    )
    assert made == {"drawn": 9, "written": 4}
    written = saap.own_text(saap.load(tiny_folder), tiny_tokenizer, count=4, length=10, seed=7)
    assert Calibration(tmp_path / "both").read().tolist() == [*text.read().tolist(), *written.tolist()]
    before, after = (read_table(folder, "calibration") for folder in (tmp_path, tmp_path / "both"))
    assert after["source_row"].tolist() == [*before["source_row"].tolist(), *[-1] * 40]
    assert after["sample"].tolist() == [number for number in range(13) for _ in range(10)]
    assert after["position"].tolist() == [*range(10)] * 13


def test_text_to_rank_by_begins_as_the_tokenizer_has_it_but_for_llama(step, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "mistral")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    sets = "calibrate.count=4", "calibrate.length=16", "calibrate.own=3"
    drawn, both = (tmp_path / name for name in ("drawn", "both"))
    for made in (drawn, both):
        made.mkdir()
    given = [replace(step(of, *sets), outside=(("tokenizer", str(folder)),)) for of in (calibrate, own_text)]
    calibrate.make(given[0], drawn, tokenizer=Tokenizer(folder), data=Data("mini"))
    own_text.make(given[1], both, model=Checkpoint(folder), calibration=Calibration(drawn))
    tokens = Calibration(both).read()
    assert tokens.shape == (7, 16)
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:4, 1:] != 1).all()  # what the model writes may hold any


def test_the_rows_are_as_many_as_asked_for_and_mixed(text, step):
    rows = _rows(step(recover), Data("mini"), text)
    kinds = ["tokens" in row for row in rows]
    assert (len(rows), sum(kinds)) == (12, 9)
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))
    assert sorted(row["tokens"] for row in rows if "tokens" in row) == sorted(text.read().tolist())
    assert _rows(step(recover), Data("mini"), text) == rows
    assert _rows(step(recover, "recover.seed=4"), Data("mini"), text) != rows
    assert len(_rows(step(recover), None, text)) == 9


def test_instruction_rows_may_be_chosen_by_the_length_of_their_answers(text, step):
    """Three rows are wanted here: of the first nine, those of the longest answers."""
    first = read_data("mini", "recovery")[:9]
    wanted = sorted(first, key=lambda row: len(row["output"]))[-3:]
    for choose, rows in (("long", wanted), ("first", first[:3])):
        found = _rows(step(recover, "recover.max_length=4096", f"recover.choose={choose}"), Data("mini"), text)
        assert sorted(row["output"] for row in found if "output" in row) == sorted(row["output"] for row in rows)
    assert wanted != first[:3]


def test_which_rows_are_chosen_counts_where_there_are_any(step):
    for sets, differ in (((), True), (("recover.prose=0.5", "recover.own=0.5"), False)):
        given = {step(recover, *sets, f"recover.choose={choose}").params for choose in ("long", "first")}
        assert (len(given) == 2) == differ


def test_the_longest_answers_are_not_in_order_of_length(step):
    """The last rows are held out."""
    alone = "recover.prose=0", "recover.own=0"
    rows = _rows(step(recover, "recover.max_length=4096", *alone), Data("mini"), None)
    lengths = [len(row["output"]) for row in rows]
    assert len(lengths) == 12
    assert lengths != sorted(lengths, reverse=True)


def test_counts_never_exceed_the_examples():
    for examples in range(8, 60):
        for prose in (0.0, 0.125, 0.25, 0.5):
            sets = f"recover.examples={examples}", f"recover.prose={prose}", f"recover.own={1 - prose}"
            more = "recover.held_out=0", "recover.micro_batch_size=1"
            assert sum(counts(load_config(None, (*sets, *more)).recover.shares, examples).values()) == examples


def test_without_a_number_of_examples_there_are_as_many_as_instruction_rows(
    step, tiny_folder, tiny_tokenizer, tmp_path
):
    novels = tmp_path / "novels.jsonl"
    texts = [f"Chapter {n}. " + "The sea was calm. " * 9 for n in range(5)]
    novels.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sets = *SETS[1:], f"recover.prose_from={novels}"
    there = read_data("mini", "recovery")
    (tmp_path / "text").mkdir()
    made = recovery_text.make(
        step(recovery_text, given=sets),
        tmp_path / "text",
        tokenizer=Tokenizer(tiny_folder),
        model=Checkpoint(tiny_folder),
        data=Data(str(novels)),
        instructions=Data("mini"),
    )
    wanted = round(0.25 * len(there))  # more than the novels hold
    own = round(0.75 * len(there)) - wanted
    assert made == {"prose": 5, "prose_wanted": wanted, "own": own}
    text = Calibration(tmp_path / "text")
    about = {"count": 5, "length": 10, "seed": 3 + OTHER_SEED}
    assert text.read()[:5].tolist() == saap.sample_tokens(texts, tiny_tokenizer, **about)[0].tolist()
    rows = _rows(step(recover, given=sets), Data("mini"), text)
    instructions = [row for row in rows if "tokens" not in row]
    assert (len(rows), len(instructions)) == (len(there), len(there) - 5 - own)
    assert all(row in there[: len(instructions)] for row in instructions)


def test_shares_of_too_few_instruction_rows_are_an_error(step, tiny_folder, tmp_path):
    sets = "recover.prose=0.001", "recover.own=0"
    with pytest.raises(ConfigError, match=r"recover\.prose and recover\.own of \d+ instruction rows are less than one"):
        recovery_text.make(
            step(recovery_text, given=sets),
            tmp_path,
            tokenizer=Tokenizer(tiny_folder),
            data=Data("mini"),
            instructions=Data("mini"),
        )


def test_too_few_passages_or_instruction_rows_for_the_examples_are_an_error(step, text, tiny_folder, tmp_path):
    novels = tmp_path / "novels.jsonl"
    novels.write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(ConfigError, match=r"novels\.jsonl: the text holds only 0 sequences of 10 tokens, 3 are asked"):
        recovery_text.make(step(recovery_text), tmp_path, tokenizer=Tokenizer(tiny_folder), data=Data(str(novels)))
    with pytest.raises(ConfigError, match=r"recover\.examples = 300 asks for 291 instruction rows .* the data has"):
        _rows(step(recover, "recover.examples=300"), Data("mini"), text)
