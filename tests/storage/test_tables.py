import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.errors import StorageError
from storage.tables import SCHEMAS, read_samples, read_table, sample_writer, write_table

GROUPS = {
    "layer": np.array([0, 0, 0, 1, 1], np.int32),
    "kind": np.array(["attention", "mlp", "mlp", "attention", "mlp"]),
    "unit": np.array([0, 0, 1, 0, 0], np.int32),
}


def test_importance_written_in_batches_reads_back_as_samples_by_groups(tmp_path):
    rng = np.random.default_rng(0)
    vector, element = rng.random((2, 7, 5)).astype(np.float32)
    with sample_writer(tmp_path, "importance", GROUPS) as writer:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            writer.write(vector=vector[rows], element=element[rows])
    back = read_samples(tmp_path, "importance")
    np.testing.assert_array_equal(back["vector"], vector)
    np.testing.assert_array_equal(back["element"], element)
    for name, values in GROUPS.items():
        assert back[name].tolist() == values.tolist()
    table = pq.read_table(tmp_path / "importance.parquet")
    row = table.slice(3 * 5 + 2, 1).to_pylist()[0]
    assert row == {"sample": 3, "layer": 0, "kind": "mlp", "unit": 1, "vector": vector[3, 2], "element": element[3, 2]}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_column_of_every_table_says_what_it_is(name):
    for field in SCHEMAS[name]:
        assert field.metadata[b"doc"]


def test_columns_and_rows_write_the_same_file(tmp_path):
    rows = [
        {"step": i, "epoch": i / 2, "loss": 1.5, "learning_rate": 1e-4, "tokens_per_s": 9.0, "held_out_loss": None}
        for i in (1, 2)
    ]
    write_table(tmp_path, "training", rows)
    first = pq.read_table(tmp_path / "training.parquet")
    write_table(tmp_path, "training", {name: [row[name] for row in rows] for name in rows[0]})
    assert pq.read_table(tmp_path / "training.parquet").equals(first)


def test_a_file_that_is_no_such_table_is_named(tmp_path):
    (tmp_path / "groups.parquet").write_bytes(b"not parquet")
    with pytest.raises(StorageError, match=r"groups\.parquet"):
        read_table(tmp_path, "groups")
    write_table(tmp_path, "training", [])
    (tmp_path / "training.parquet").rename(tmp_path / "speed.parquet")
    with pytest.raises(StorageError, match="columns"):
        read_table(tmp_path, "speed")
