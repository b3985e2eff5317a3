#!/usr/bin/env bash
# DuckDB finds no NaN in a Parquet file that pyarrow wrote, and says that its largest value is a number.
# Statistics of a Parquet column leave NaN out. DuckDB takes them for bounds of all values: isnan() is false in every row, even in
# the one it shows as nan. Without statistics, or in a file that DuckDB wrote, the same rows give the right answers.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q duckdb==2.0.0 pyarrow==26.0.1
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
from importlib.metadata import version

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

losses = pa.table({"step": [1, 2, 3], "loss": [2.5, float("nan"), 1.5]})
pq.write_table(losses, "pyarrow.parquet")
pq.write_table(losses, "no_statistics.parquet", write_statistics=False)
duckdb.sql("copy (from 'no_statistics.parquet') to 'duckdb.parquet'")


def answers(file):
    """(the step whose loss is not a number, the number of losses above 3, the highest loss)."""
    broken = duckdb.sql(f"select step from '{file}' where isnan(loss)").fetchall()
    above = duckdb.sql(f"select count(*) from '{file}' where loss > 3").fetchall()
    highest = duckdb.sql(f"select max(loss) from '{file}'").fetchall()
    return broken, above[0][0], str(highest[0][0])


seen = {file: answers(file) for file in ("pyarrow.parquet", "no_statistics.parquet", "duckdb.parquet")}
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("duckdb", "pyarrow")))
print("expected: in every file one step is broken, one loss is above 3 (DuckDB orders NaN last), the highest is nan")
for file, (broken, above, highest) in seen.items():
    print(f"seen: {file}: broken steps {broken}, losses above 3: {above}, highest {highest}")
print("the rows it shows:", duckdb.sql("select loss, isnan(loss) from 'pyarrow.parquet'").fetchall())
assert seen.pop("pyarrow.parquet") == ([], 0, "2.5")
assert all(found == ([(2,)], 1, "nan") for found in seen.values())
PY
