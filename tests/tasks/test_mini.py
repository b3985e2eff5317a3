from collections import Counter

import pytest

BENCHMARKS = {
    "arc_easy/test": (("id", "question", "choices", "answerKey"), 4),
    "arc_challenge/test": (("id", "question", "choices", "answerKey"), 4),
    "openbookqa/test": (("id", "question_stem", "choices", "answerKey"), 4),
    "boolq/validation": (("question", "passage", "idx", "label"), 2),
    "hellaswag/validation": (
        ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"),
        4,
    ),
    "piqa/validation": (("goal", "sol1", "sol2", "label"), 2),
    "winogrande/validation": (("sentence", "option1", "option2", "answer"), 2),
}


def choices(row):
    if "choices" in row:
        assert list(row["choices"]) == ["text", "label"]
        assert row["choices"]["label"] == list("ABCD")
        return row["choices"]["text"]
    if "endings" in row:
        return row["endings"]
    return (
        ["no", "yes"] if "passage" in row else [row.get(n) for n in ("sol1", "option1", "sol2", "option2") if n in row]
    )


def gold(row):
    """The number of the right choice, from the type each data set keeps it in."""
    if "answerKey" in row:
        return row["choices"]["label"].index(row["answerKey"])
    if "option1" in row:
        return ["1", "2"].index(row["answer"])
    assert type(row["label"]) is (str if "endings" in row else int)
    return int(row["label"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_items_have_the_official_columns_and_balanced_gold_answers(mini, name):
    rows, (columns, ways) = mini(name), BENCHMARKS[name]
    assert len(rows) >= 32
    assert {tuple(row) for row in rows} == {columns}
    assert len({str(row) for row in rows}) == len(rows)
    for row in rows:
        assert len(set(choices(row))) == ways
        assert all(choices(row))
    count = Counter(gold(row) for row in rows)
    assert set(count) == set(range(ways))
    assert max(count.values()) - min(count.values()) <= 1


def test_hellaswag_contexts_are_their_two_parts_and_winogrande_sentences_have_one_gap(mini):
    for row in mini("hellaswag/validation"):
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}".strip()
    assert all(row["sentence"].count("_") == 1 for row in mini("winogrande/validation"))


def test_there_are_sixty_passages_long_enough_for_calibration(mini):
    rows = mini("bookcorpus_like/passages")
    assert {tuple(row) for row in rows} == {("text",)}
    # every word is at least one token
    assert sum(len(row["text"].split()) >= 140 for row in rows) == len(rows) >= 60
    assert len({row["text"] for row in rows}) == len(rows)


def test_there_are_a_hundred_and_twenty_instructions_with_and_without_input(mini):
    rows = mini("alpaca/train")
    assert {tuple(row) for row in rows} == {("instruction", "input", "output")}
    assert len({row["instruction"] + row["input"] for row in rows}) == len(rows) >= 120
    assert all(row["instruction"] and row["output"] for row in rows)
    assert {bool(row["input"]) for row in rows} == {True, False}


@pytest.mark.parametrize(("name", "column"), [("wikitext2_raw/test", "text"), ("ptb/validation", "sentence")])
def test_the_perplexity_texts_hold_three_thousand_words(mini, name, column):
    rows = mini(name)
    assert {tuple(row) for row in rows} == {(column,)}
    assert sum(len(row[column].split()) for row in rows) >= 3000


def test_ptb_is_lower_case_with_N_for_numbers(mini):
    words = {word for row in mini("ptb/validation") for word in row["sentence"].split()}
    assert "N" in words
    assert all(word == word.lower() for word in words - {"N"})
    assert not any(character.isdigit() for word in words for character in word)


def test_wikitext_has_headings_between_empty_rows_as_the_raw_files_do(mini):
    texts = [row["text"] for row in mini("wikitext2_raw/test")]
    assert "" in texts
    assert any(text.startswith(" = ") and text.endswith(" = ") for text in texts)
