import tracemalloc

import numpy as np
import pyarrow as pa
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


def test_samples_longer_than_a_row_group_read_back_at_little_more_than_their_size(tmp_path):
    """A 70B has 2.3 million groups; a row group holds a million rows."""
    layers, channels, samples = 2, 530_000, 8
    groups = {
        "layer": np.repeat(np.arange(layers, dtype=np.int32), channels),
        "kind": np.tile(np.where(np.arange(channels) < 9, "attention", "mlp"), layers),
        "unit": np.tile(np.arange(channels, dtype=np.int32), layers),
    }
    fused = np.random.default_rng(0).random((samples, layers * channels))
    with sample_writer(tmp_path, "fused", groups) as writer:
        writer.write(fused=fused)
    assert pq.read_metadata(tmp_path / "fused.parquet").num_row_groups > samples
    tracemalloc.start()  # of numpy's arrays
    back = read_samples(tmp_path, "fused")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert back.keys() == {*groups, "fused"}
    for name, values in {**groups, "fused": fused}.items():
        np.testing.assert_array_equal(back[name], values)
    assert most < 1.05 * (fused.nbytes + back["kind"].nbytes)


@pytest.mark.parametrize("name", ["importance", "fused"])
def test_samples_that_are_no_such_file_are_named(tmp_path, name):
    file = tmp_path / f"{name}.parquet"
    with pytest.raises(StorageError, match=file.name):
        read_samples(tmp_path, name)
    file.write_bytes(b"not parquet")
    with pytest.raises(StorageError, match=file.name):
        read_samples(tmp_path, name)
    pq.write_table(pa.table({"sample": [0]}), file)
    with pytest.raises(StorageError, match="columns"):
        read_samples(tmp_path, name)
    with sample_writer(tmp_path, name, GROUPS) as writer:
        writer.write(**{column: np.ones((3, 5)) for column in SCHEMAS[name].names[4:]})
    whole = file.read_bytes()
    file.write_bytes(b"PAR1" + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])
    with pytest.raises(StorageError, match=file.name):
        read_samples(tmp_path, name)


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
