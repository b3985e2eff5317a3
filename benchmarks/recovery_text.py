"""What the rows of the recovery decide: Alpaca's, or passages of WikiText-2 other than those it is measured on.

    python benchmarks/recovery_text.py --data FOLDER        # a data folder (docs/data.md); 25 minutes on two cores

Two runs of configs/recovery.toml at 20 %, of about as many steps: 2,000 rows of Alpaca, and the lines of WikiText-2's
test part from the 1,000th on, cut into 130 words; the perplexities read the first 8,192 tokens, which end long before.
Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flows.commands.run import run
from storage.warehouse import Warehouse

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "recovery.toml"
QUERY = """select steps, pruned_wikitext2, wikitext2, gap_closed, pruned_ptb, ptb, gap_closed_ptb from recovery
    join runs using (run_id) order by started_at desc limit 1"""


def passages(data: Path) -> list[dict[str, str]]:
    """The lines that the perplexity does not read, as rows of the recovery, shuffled."""
    lines = pq.read_table(data / "wikitext2_raw" / "test.parquet")["text"].to_pylist()[1000:]
    words = [line.split() for line in lines]
    cut = [line[start : start + 130] for line in words for start in range(0, len(line), 130)]
    texts = [" ".join(part) for part in cut if len(part) >= 30]
    random.Random(0).shuffle(texts)
    return [{"instruction": "Write a passage.", "input": "", "output": text} for text in texts]


def recovered(data: Path, examples: int, store: Path) -> dict[str, float]:
    """Run the pipeline and return the row of the view `recovery`."""
    sets = [
        f'data="{data}"',
        f"recover.examples={examples}",
        'evaluate.benchmarks=["wikitext2", "ptb"]',
        "speed.runs=0",
    ]
    run(CONFIG, sets, store)
    with Warehouse(store).reading() as connection:
        answer = connection.execute(QUERY)
        return dict(zip([column[0] for column in answer.description], answer.fetchone(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data folder (docs/data.md)")
    parser.add_argument("--store", type=Path, default=Path("saap_store"))
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    found = {"alpaca": recovered(data, 2000, arguments.store)}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        for source in data.iterdir():
            if source.name != "alpaca":
                (own / source.name).symlink_to(source)
        (own / "alpaca").mkdir()
        pq.write_table(pa.Table.from_pylist(passages(data)), own / "alpaca" / "train.parquet")
        found["wikitext2"] = recovered(own, 1920, arguments.store)
    print(f"{'rows of':<12}{'steps':>6}{'WikiText-2':>12}{'closed':>8}{'PTB':>8}{'closed':>8}")
    for name, row in found.items():
        print(
            f"{name:<12}{row['steps']:>6}{row['wikitext2']:>12.1f}{row['gap_closed']:>8.0%}"
            f"{row['ptb']:>8.1f}{row['gap_closed_ptb']:>8.0%}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
