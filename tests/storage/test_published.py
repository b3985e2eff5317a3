"""The papers' tables as printed, and runs beside them."""

from collections import defaultdict

import pytest

from storage.artifacts import ArtifactStore
from storage.runs import RunRecord
from storage.tables import write_table
from storage.warehouse import Warehouse
from tests.storage.test_warehouse import ask

TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa")


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory):
    """One run named like a published model, with BoolQ and WikiText-2 of the pruned and the dense model."""
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    store.prepare()
    record = RunRecord(store.root, "r", name="n", model="huggyllama/llama-7b", data="hub", ratio=0.2, config="{}")
    for position, (variant, value) in enumerate({"dense": 0.7318, "pruned": 0.6}.items()):
        with store.publish("evaluate", variant) as folder:
            common = {"stderr": 0.01, "n": 3270, "protocol": "p", "papers": True, "data": "hub"}
            write_table(folder, "metrics", [{"benchmark": "boolq", "metric": "acc", "value": value, **common}])
        record.stage(
            position, stage="evaluate", variant=variant, benchmark="boolq", key=variant, cached=False, seconds=1.0
        )
    warehouse = Warehouse(store.root)
    warehouse.load("r")
    return warehouse


def test_the_averages_marked_as_misprints_are_those_that_are_not_the_mean_of_their_row(warehouse):
    rows = defaultdict(dict)
    query = 'select "table", model, ratio, tuned, method, benchmark, value, misprint from published_results'
    for *row, benchmark, value, misprint in ask(warehouse, query):
        rows[tuple(row)][benchmark] = value, misprint
    means = {row: [cells[t][0] for t in TASKS if t in cells] for row, cells in rows.items() if "average" in cells}
    off = {row for row, known in means.items() if abs(sum(known) / len(known) - rows[row]["average"][0]) > 0.1}
    assert off == {row for row in means if rows[row]["average"][1]}
    assert (len(off), len(means)) == (4, 58)


def test_all_twelve_tables_are_there_with_their_types(warehouse):
    assert ask(warehouse, 'select count(distinct "table"), count(*) from published_results') == [(12, 569)]
    query = (
        "select method, value, tuned, misprint from published_results "
        """where "table" = 'I' and ratio = 0.2 and tuned and benchmark = 'wikitext2' order by value limit 1"""
    )
    assert ask(warehouse, query) == [("saap", 14.58, True, False)]


def test_a_run_stands_beside_the_published_rows_of_its_model_ratio_and_tuning(warehouse):
    query = (
        "select variant, method, published, round(difference, 2) from versus_published "
        "where run_id = 'r' and benchmark = 'boolq' order by all"
    )
    assert ask(warehouse, query) == [
        ("dense", "dense (measured)", 73.18, 0.0),
        ("dense", "dense (published)", 76.5, -3.32),
        ("pruned", "llm_pruner", 57.06, 2.94),
        ("pruned", "loraprune", 57.98, 2.02),
        ("pruned", "saap", 63.07, -3.07),
        ("pruned", "wanda_sp", 64.93, -4.93),
    ]


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("/models/llama-7b-hf/", "llama-7b"),
        ("huggyllama/llama-30b", "llama-33b"),
        ("meta-llama/Llama-2-13b-hf", "llama2-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama3-8b"),
        ("lmsys/vicuna-7b-v1.3", "vicuna-7b"),
        ("lmsys/vicuna-7b-v1.5", None),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("meta-llama/Llama-3.1-8B", None),
        ("smollm2-135m", None),
    ],
)
def test_models_are_known_by_the_last_part_of_their_path(warehouse, path, published):
    assert ask(warehouse, "select published_model(?)", path) == [(published,)]
