"""The table of a comparison and the lines below it, of made-up rows."""

from flows.compare import Comparison, Row, headlines, table
from tasks.config import ACCURACIES


def test_the_lines_are_for_each_model_and_name_what_is_varied():
    def row(model, size, variant, perplexity, weight_bytes=8.0):
        ratio = 0.0 if variant == "dense" else 0.2
        means = {"wikitext2": perplexity, "weight_bytes": weight_bytes}
        return Row((model, size), ratio, variant, runs=1, means=means)

    rows = [row("a", "", "dense", 10.0), row("b", "", "dense", 20.0, 32.0)]
    rows += [
        row(m, s, "pruned", p) for m, s, p in (("a", "4", 12.0), ("a", "8", 11.0), ("b", "4", 21.5), ("b", "8", 30.0))
    ]
    rows += [row("a", "4", "recovered", 11.0), row("a", "8", "recovered", 11.0), row("b", "4", "recovered", 9.0)]
    assert headlines(Comparison(["model.path", "calibrate.count"], rows, 0, 4)) == [
        "pruned at 0.2: model a, count 8 is best on WikiText-2, 11.0, where model a, count 4 has 12.0 and the dense "
        "model 10.0; 100% of its bytes",
        "pruned at 0.2: model b, count 4 is best on WikiText-2, 21.5, where model b, count 8 has 30.0 and the dense "
        "model 20.0; 25% of its bytes",
    ]


def test_a_task_has_a_column_of_its_own_where_not_all_seven_were_measured():
    def shown(*rows):
        found = Comparison([], [Row((), 0.0, "dense", means=dict.fromkeys(row, 50.0)) for row in rows], 0, 1)
        columns, (cells, *_) = table(found)
        return dict(zip(columns[2:-1], cells[2:-1], strict=True))

    assert shown(("wikitext2", "piqa", "boolq")) == {"Wiki2↓": "50.0", "BoolQ": "50.0", "PIQA": "50.0"}
    assert shown((*ACCURACIES, "average")) == {"avg": "50.0"}
    assert shown((*ACCURACIES, "average"), ("piqa",)) == {"PIQA": "50.0", "avg": "50.0"}
