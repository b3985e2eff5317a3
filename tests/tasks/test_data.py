"""Data files as people have them: taken where the meaning is clear, else one line with file, row and column."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import saap.texts
from saap import ACCURACY
from storage.keys import Fingerprints
from tasks.data import (
    DATA,
    SHUFFLED_AT_ONCE,
    benchmark_file,
    calibration_texts,
    check_file,
    data_file,
    find_data,
)
from tasks.data import read_data as read
from tasks.toml import ConfigError

ARC = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
PAIRS = [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]
ROWS = {
    "calibration": {"text": "once"},
    "recovery": {"instruction": "Say b.", "input": "", "output": "b"},
    "arc_easy": ARC,
    "boolq": {"question": "is it", "passage": "It is.", "label": 1},
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"},
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 0},
    "winogrande": {"sentence": "It was _ .", "option1": "a", "option2": "b", "answer": "2"},
    "openbookqa": {"question_stem": "Which?", "choices": ARC["choices"], "answerKey": "A"},
    "wikitext2": {"text": ""},
    "ptb": {"sentence": "a b"},
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def put(tmp_path):
    """Write a role's file: rows as JSON lines, or bytes as they are."""

    def put(role, content, suffix=".jsonl"):
        file = tmp_path / f"{DATA[role].place}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".parquet":
            pq.write_table(content if isinstance(content, pa.Table) else pa.Table.from_pylist(content), file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else lines(content))
        return file

    return put


@pytest.mark.parametrize("role", sorted(DATA))
def test_the_mini_pack_has_every_role_as_it_should_be(role, mini):
    rows = mini(DATA[role].place)
    assert check_file(data_file("mini", role), role) == len(rows)
    assert read("mini", role) == [{column: row[column] for column in DATA[role].columns} for row in rows]


def test_the_limit_that_changes_a_key_is_the_librarys():
    assert saap.texts.SHUFFLED_AT_ONCE == SHUFFLED_AT_ONCE


ALPACA = [{"instruction": f"Say {i}.", "input": "as ä\u2028digit", "output": str(i)} for i in range(3)]


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_alpaca_as_it_was_published_is_one_array(tmp_path, put, indent, mark, suffix):
    put("recovery", mark + json.dumps(ALPACA, indent=indent, ensure_ascii=False).encode(), suffix)
    assert read(str(tmp_path), "recovery") == ALPACA
    put("recovery", mark + lines(ALPACA), ".jsonl")
    assert read(str(tmp_path), "recovery") == ALPACA


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_an_instruction_without_input_has_an_empty_one(tmp_path, put, suffix):
    put("recovery", [{**ALPACA[0], "input": None}], suffix)
    assert read(str(tmp_path), "recovery") == [{**ALPACA[0], "input": ""}]
    put("recovery", [{"instruction": "a", "output": "b"}], suffix)
    assert read(str(tmp_path), "recovery") == [{"instruction": "a", "input": "", "output": "b"}]


@pytest.mark.parametrize(
    ("role", "given", "taken"),
    [
        ("arc_easy", {"choices": PAIRS}, {}),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": [1, 2]}, "answerKey": 2}, None),
        ("openbookqa", {"answerKey": " A"}, {}),
        ("winogrande", {"answer": 2}, {}),
        ("hellaswag", {"label": 1}, {}),
        ("boolq", {"label": True}, {}),
        ("piqa", {"label": "0"}, {}),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_what_is_clear_is_taken_in_the_official_form(tmp_path, put, role, given, taken, suffix):
    put(role, [{**ROWS[role], **given, "id": 7}], suffix)
    find_data(str(tmp_path), role, Fingerprints(tmp_path / "store"))
    if taken is None:
        taken = {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    with benchmark_file(str(tmp_path), role) as file:
        assert pq.read_table(file).to_pylist() == [{**ROWS[role], **taken, "id": 7}]


def test_the_texts_that_polars_writes_are_taken(tmp_path, put):
    """Its strings are Arrow's large ones."""
    texts = ["a", "", "long " * 5]
    put("calibration", pa.table({"text": pa.array(texts, pa.large_string())}), ".parquet")
    put("ptb", pa.table({"sentence": pa.array(texts, pa.large_string())}), ".parquet")
    assert find_data(str(tmp_path), "calibration", Fingerprints(tmp_path / "store")).place == str(tmp_path)
    assert list(calibration_texts(str(tmp_path))) == texts
    assert [row["sentence"] for row in read(str(tmp_path), "ptb")] == texts


WRONG = [
    ("calibration", {"text": None}, "text"),
    ("calibration", {"text": 3}, "text"),
    ("wikitext2", {"text": None}, "text"),
    ("wikitext2", {"text": ["a"]}, "text"),
    ("ptb", {"sentence": None}, "sentence"),
    ("recovery", {"instruction": None}, "instruction"),
    ("recovery", {"output": None}, "output"),
    ("recovery", {"output": 42}, "output"),
    ("recovery", {"input": 1}, "input"),
    ("arc_easy", {"question": None}, "question"),
    ("arc_easy", {"answerKey": "C"}, "answerKey"),
    ("arc_easy", {"answerKey": None}, "answerKey"),
    ("arc_easy", {"choices": None}, "choices"),
    ("arc_easy", {"choices": "a or b"}, "choices"),
    ("arc_easy", {"choices": {"text": [], "label": []}}, "choices"),
    ("arc_easy", {"choices": {"text": ["a", None], "label": ["A", "B"]}}, "choices"),
    ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices"),
    ("openbookqa", {"question_stem": None}, "question_stem"),
    ("boolq", {"label": -1}, "label"),
    ("boolq", {"label": "yes"}, "label"),
    ("boolq", {"passage": None}, "passage"),
    ("piqa", {"label": 2}, "label"),
    ("piqa", {"sol2": None}, "sol2"),
    ("hellaswag", {"label": ""}, "label"),
    ("hellaswag", {"label": "2"}, "label"),
    ("hellaswag", {"endings": []}, "endings"),
    ("hellaswag", {"ctx_b": None}, "ctx_b"),
    ("winogrande", {"answer": "3"}, "answer"),
    ("winogrande", {"sentence": "no gap"}, "sentence"),
]


@pytest.mark.parametrize(("role", "change", "column"), WRONG, ids=[f"{r} {c}" for r, c, _ in WRONG])
def test_a_row_that_cannot_be_used_is_named_before_anything_runs(tmp_path, put, role, change, column):
    file = put(role, [ROWS[role], ROWS[role], {**ROWS[role], **change}])
    with pytest.raises(ConfigError, match=f"^{file}, row 3, column {column}: .* is expected, found ") as caught:
        find_data(str(tmp_path), role, Fingerprints(tmp_path / "store"))
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("role", ["calibration", "ptb"])
def test_a_null_in_parquet_is_found_whether_or_not_the_file_counts_them(tmp_path, put, role, statistics):
    (column,) = DATA[role].columns
    file = put(role, [ROWS[role]], ".parquet")
    table = pa.table({"other": [1] * 50, column: ["a"] * 41 + [None] + ["b"] * 8})
    pq.write_table(table, file, row_group_size=10, write_statistics=statistics)
    with pytest.raises(ConfigError, match=f"row 42, column {column}: text is expected, found None"):
        find_data(str(tmp_path), role, Fingerprints(tmp_path / "store"))
    pq.write_table(table.slice(0, 41), file, row_group_size=10, write_statistics=statistics)
    assert check_file(file, role) == 41


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"text": "a"}\n3\n', "row 2: an object with text is expected"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "lacks the column text in row 2, needed for calibration or prose"),
        (b'{"text": "a"}\n{"text": \n', "line 2: .*JSON lines or one JSON array"),
        (b'[{"text": "a"}', "line 1: .*JSON lines or one JSON array"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: .*UTF-8 is expected"),
        (b"[" * 100_000, "nested too deep"),
        (b"\n \n", "has no rows"),
        (b"[]", "has no rows"),
    ],
)
def test_a_file_that_is_no_rows_is_one_line(tmp_path, put, content, line):
    put("calibration", content)
    with pytest.raises(ConfigError, match=line) as caught:
        find_data(str(tmp_path), "calibration", Fingerprints(tmp_path / "store"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("role", ["wikitext2", "ptb", "recovery"])
def test_texts_that_are_all_blank_are_one_line(tmp_path, put, role, suffix):
    column = DATA[role].columns[-1]
    file = put(role, [{**ROWS[role], column: " "}, {**ROWS[role], column: "\n"}], suffix)
    with pytest.raises(ConfigError, match=f"the column {column} is blank in every row, needed for {role}"):
        check_file(file, role)
    put(role, [{**ROWS[role], column: " "}, {**ROWS[role], column: "word"}], suffix)
    assert check_file(file, role) == 2


@pytest.mark.parametrize("role", ["calibration", "recovery", "arc_easy"])
def test_a_parquet_file_that_is_damaged_or_has_other_columns_is_one_line(tmp_path, put, role):
    file = put(role, [{"other": "a"}], ".parquet")
    with pytest.raises(ConfigError, match="lacks the column"):
        check_file(file, role)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ConfigError, match=f"cannot read {file}"):
        check_file(file, role)


@pytest.mark.parametrize("role", ["recovery", "wikitext2", "arc_easy"])
def test_text_that_is_no_utf8_is_one_line(tmp_path, put, role):
    columns = DATA[role].columns
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    put(role, pa.table(dict.fromkeys(columns, bad)), ".parquet")
    with pytest.raises(ConfigError, match=r"\.parquet holds text that is no UTF-8 \(.*\): write it again in UTF-8$"):
        find_data(str(tmp_path), role, Fingerprints(tmp_path))


def test_half_of_a_surrogate_pair_is_one_line(tmp_path, put):
    """JSON can spell it, and no tokenizer takes it."""
    half, whole = ALPACA[0] | {"output": "\ud83d"}, ALPACA[0] | {"output": "\U0001f600"}
    for content in (lines([whole, half]), json.dumps([whole, half]).encode()):
        put("recovery", content)
        with pytest.raises(ConfigError, match=r"train\.jsonl, line \d: .*surrogates not allowed; JSON lines or one"):
            find_data(str(tmp_path), "recovery", Fingerprints(tmp_path))
    put("recovery", [whole, whole])
    assert read(str(tmp_path), "recovery") == [whole, whole]


@pytest.mark.parametrize("role", ["calibration", "ptb", "recovery", "boolq"])
def test_a_column_that_is_there_twice_is_one_line(tmp_path, put, role):
    column = DATA[role].columns[-1]
    names = [*DATA[role].columns, column]
    put(role, pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names), ".parquet")
    with pytest.raises(ConfigError, match=f"has the column {column} 2 times: leave one"):
        find_data(str(tmp_path), role, Fingerprints(tmp_path))


def test_what_a_file_has_instead_is_what_it_has(tmp_path, put):
    put("recovery", [{"conversations": []}])
    with pytest.raises(
        ConfigError, match=r"lacks the column instruction, output in row 1.*; it has \['conversations'\]"
    ):
        read(str(tmp_path), "recovery")


def test_other_kinds_of_columns_are_no_text(tmp_path, put):
    file = put("calibration", pa.table({"text": [1, 2]}), ".parquet")
    with pytest.raises(ConfigError, match="column text: text is expected, found int64"):
        check_file(file, "calibration")


def test_the_columns_of_a_benchmark_are_those_the_library_reads():
    assert {name: about.columns for name, about in ACCURACY.items()} == {name: DATA[name].columns for name in ACCURACY}
