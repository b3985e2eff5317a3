"""Sizes nobody tries: a store of 10,000 artifacts, a 70B's importance, 200,000 rows of recovery, 262,144 tokens.

    python benchmarks/scale.py                          # everything, a quarter of an hour and 3 GB of disk
    python benchmarks/scale.py --parts store --runs 100
    python benchmarks/scale.py --parts importance recovery tokenizer

The store is written through the storage API, small but real: 1,000 runs, each with ten artifacts of its own. Every
measurement is a process of its own; its seconds and its peak memory include what it imports. Prints a table and, as
its last line, one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import scale_store

MINI_ROWS = Path(__file__).parents[1] / "tasks/mini/alpaca"
LAYERS, HEADS, CHANNELS = 80, 8, 28_672  # of a 70B


def nothing(folder: Path, size: int) -> None:
    """What every measurement below carries: the imports."""
    import saap
    from storage.tables import SCHEMAS

    assert saap.fuse
    assert SCHEMAS


def groups_of_70b() -> "saap.Groups":  # type: ignore[name-defined] # noqa: F821
    import saap

    where = scale_store.coordinates(LAYERS, HEADS, CHANNELS)
    parameters = np.where(where["kind"] == "mlp", 3 * 8192, 8192 * 128 * 18).astype(np.int64)
    return saap.Groups(**where, parameters=parameters)


def write(folder: Path, samples: int) -> None:
    from storage.tables import sample_writer

    rng = np.random.default_rng(0)
    where = scale_store.coordinates(LAYERS, HEADS, CHANNELS)
    with sample_writer(folder, "importance", where) as writer:
        for _ in range(samples):
            vector, element = rng.lognormal(-6, 2, (2, 1, len(where["layer"]))).astype(np.float32)
            writer.write(vector=vector, element=element)


def read(folder: Path, samples: int) -> None:
    from storage.tables import read_samples

    assert read_samples(folder, "importance")["vector"].shape[0] == samples


def fuse(folder: Path, samples: int) -> None:
    """As the stage does."""
    import saap
    from storage.tables import read_samples, sample_writer

    table = read_samples(folder, "importance")
    where = {name: table[name] for name in ("layer", "kind", "unit")}
    groups = saap.Groups(**where, parameters=np.zeros(len(where["layer"]), np.int64))
    fused, *_ = saap.fuse(table["vector"], table["element"], groups)
    with sample_writer(folder, "fused", where) as writer:
        writer.write(fused=fused)


def fluctuation(folder: Path, samples: int) -> None:
    """As the stage does, the model aside."""
    import saap
    from storage.tables import read_samples, write_table

    fused = read_samples(folder, "fused")["fused"]
    groups = groups_of_70b()
    norms = np.ones(len(groups))
    moved = saap.fluctuation(fused, norms)
    asi = saap.asi(moved, groups)
    columns = {"weight_norm_sq": norms, "mean_fused": fused.mean(0), "fluctuation": moved, "asi": asi}
    write_table(folder, "groups", {**vars(groups), **columns, "rank_score": asi})


def select(folder: Path, samples: int) -> None:
    import saap
    from storage.tables import read_table

    groups = groups_of_70b()
    keep = saap.select(read_table(folder, "groups")["rank_score"], groups, 0.2)
    assert abs(saap.removed_share(groups, keep) - 0.2) < 0.001


def write_rows(folder: Path, count: int) -> None:
    """A data folder with that many different rows."""
    from tasks.data import read_data

    few = read_data("mini", "recovery")
    (folder / "alpaca").mkdir(exist_ok=True)
    with (folder / "alpaca/train.jsonl").open("w") as file:
        for number in range(count):
            row = few[number % len(few)]
            file.write(json.dumps({**row, "output": f"{row['output']} ({number})"}) + "\n")


def read_rows(folder: Path, count: int) -> None:
    """As a run does: checked and hashed first, then read."""
    from storage.keys import Fingerprints
    from tasks.data import find_data, read_data

    find_data(str(folder), "recovery", Fingerprints(folder, look_only=True))
    assert len(read_data(str(folder), "recovery")) == count


def prepare(folder: Path, count: int) -> None:
    """Read, tokenised, split, and the order of one epoch."""
    from saap.models.tokenizer import load_tokenizer
    from saap.recovery.order import Order
    from saap.recovery.recover import _examples
    from saap.recovery.training import Training
    from tasks.data import read_data

    training = Training()
    rows = read_data(str(folder), "recovery")
    learnt, held_out = _examples(rows, load_tokenizer(folder / "model"), training)
    order = list(Order([example["length"] for example in learnt], training.batch_size, 0))
    assert sorted(order) == list(range(count - len(held_out)))


def order(folder: Path, count: int) -> None:
    from saap.recovery.order import Order

    lengths = np.random.default_rng(0).integers(20, 256, count).tolist()
    assert len(list(Order(lengths, 64, 0))) == count


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A byte-level BPE of that many tokens: each is two of those before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters, merges, known = words[1:], [], set(words)
    for first in words[1:]:
        for second in letters:
            merges.append((first, second))
            known.add(first + second)
            words.append(first + second)
    pairs = words[257:]
    for first in pairs:
        for second in letters:
            if len(words) == tokens:
                break
            if first + second not in known:
                merges.append((first, second))
                words.append(first + second)
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (folder / "tokenizer").mkdir(exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder / "tokenizer")


def load_tokenizer(folder: Path, tokens: int) -> None:
    from saap.models.tokenizer import load_tokenizer as load

    assert len(load(folder / "tokenizer")) == tokens


def hash_tokenizer(folder: Path, tokens: int) -> None:
    from storage.keys import Fingerprints

    files = {file.name: file for file in sorted((folder / "tokenizer").iterdir())}
    assert Fingerprints(folder).files(files)


def embed(folder: Path, _: int) -> None:
    from common import embedded

    (folder / "model").mkdir(exist_ok=True)
    embedded(folder / "model")


Action = Callable[[Path, int], None]
PARTS: dict[str, tuple[Action, ...]] = {
    "store": scale_store.ACTIONS,
    "importance": (nothing, write, read, fuse, fluctuation, select),
    "recovery": (embed, write_rows, read_rows, prepare, order),
    "tokenizer": (write_tokenizer, load_tokenizer, hash_tokenizer),
}


def measured(part: str, action: str, folder: Path, size: int) -> dict[str, float]:
    """Seconds and peak megabytes of one action in a process of its own."""
    arguments = [sys.executable, __file__, "--measure", part, action, str(folder), str(size)]
    began = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, arguments, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{part} {action} failed")
    return {"seconds": round(time.perf_counter() - began, 2), "peak_mb": round(used.ru_maxrss * 1024 / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--runs", type=int, default=1000, help="each has ten artifacts")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--folder", type=Path, help="work here, and leave it there")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        part, action, folder, size = arguments.measure
        next(one for one in PARTS[part] if one.__name__ == action)(Path(folder), int(size))
        return
    sizes = dict(zip(PARTS, (arguments.runs, arguments.samples, arguments.rows, arguments.tokens), strict=True))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for part in arguments.parts:
            folder = (arguments.folder or Path(name)) / part
            folder.mkdir(parents=True, exist_ok=True)
            for action in (one.__name__ for one in PARTS[part]):
                found[f"{part} {action}"] = one = measured(part, action, folder, sizes[part])
                print(f"{part:<12}{action:<18}{one['seconds']:>9.2f} s{one['peak_mb']:>9.0f} MB", flush=True)
    print(json.dumps({"sizes": {part: sizes[part] for part in arguments.parts}, **found}))


if __name__ == "__main__":
    main()
