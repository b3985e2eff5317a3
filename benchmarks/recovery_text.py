"""What a recovery brings back, by its text, recipe and schedule: one command for the trials of docs/recovery.md.

    python benchmarks/recovery_text.py --data FOLDER                     # a data folder (docs/data.md); 240 steps a row
    python benchmarks/recovery_text.py --data FOLDER --minutes 15 --rows mixed mixed:recipe=lora --ratios 0.2 0.5
    python benchmarks/recovery_text.py --data FOLDER --rows own:distill=0.9 alpaca=0.2+prose=0.8:learning_rate=3e-3

A model is pruned by `--criterion`, a row of benchmarks/criteria.py, once for each seed and ratio, and each row recovers
a copy of it. A row names its texts with their shares (equal ones where it gives none): `alpaca` (its first rows),
`prose` (of the calibration set, apart from what ranks), `own` (written by the dense model), or `wikitext2`, passages of
the test set behind those that are measured: how far text of the tested kind would bring it, no recovery to use. `mixed`
stands for the pipeline's default, alpaca=0.4+prose=0.3+own=0.3. After a colon come the recipe (`recipe=lora`; groupwise
where it says none), its options and those of the training; the learning rate is 1e-3 where it says none (the pipeline's
is 5e-4). The row `untrained` is the codes alone: what quantising costs. Its feedback reads all tokens that rank, a
recovery's 8,192 of its examples; with `start=mean` the zeros take the mean error of their quantisation group, the most
that an adapter could start from. The rows of Alpaca and of the prose are the first ones, or of three times as many:
with `choose=gap` those on which the pruned model has lost most, with `choose=long` Alpaca's with the longest answers,
no answer twice.

Shown are perplexities, and how much of ln(pruned / dense) is closed, on WikiText-2 and PTB, which only report, and on
text held out: novels, Alpaca's last rows, and text of the model's own with another seed. "Held out" is the mean share
closed on these three, by which rows are to be chosen; a text that the model now knows better than the dense one counts
as closed, no more. Prints a table and, as its last line, one JSON object.
"""

import argparse
import copy
import itertools
import json
import math
import random
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from common import embedded, most_held, where
from criteria import Cost, calibrated_on, cut, parse, texts_of
from pruning_peers import losses

import saap
from saap.recovery.order import Order
from saap.texts import chosen_rows, training_example
from tasks.data import read_data

OTHER_SEED = 1_000_003  # added: text that is neither what ranks nor what is measured
HELD_OUT_ROWS = 64
LEARNING_RATE = 1e-3  # of rows that name none, as most of the tables were made
MIXED = "alpaca=0.4+prose=0.3+own=0.3"
ROWS = [
    "untrained",
    "untrained:rounding=feedback",
    "untrained:start=mean",
    "alpaca",
    "prose",
    "own",
    "mixed",
    "mixed:rounding=feedback",
    "mixed:recipe=lora:learning_rate=3e-4",
    "mixed:recipe=qlora:learning_rate=3e-4",
    "wikitext2",
]
TRAINED_ON = {"alpaca", "prose", "own", "wikitext2"}
TEXTS = ("wikitext2", "ptb", "novels", "alpaca", "own")  # measured on; the last three are held out


def parse_row(row: str) -> tuple[dict[str, float], dict[str, Any]]:
    """'text=share+text:option=value' → (share of each text, options)."""
    texts, _, rest = row.partition(":")
    _, options, _ = parse(f"random:{rest}" if rest else "random")
    texts = MIXED if texts == "mixed" else texts
    if texts == "untrained":
        _refuse(row, set(options) - {"rounding", "start"}, ["rounding", "start"])
        return {}, options
    named = [part.partition("=") for part in texts.split("+")]
    shares = {name: float(share) if share else 1 / len(named) for name, _, share in named}
    _refuse(row, set(shares) - TRAINED_ON, sorted(TRAINED_ON))
    _refuse(row, {options.get("recipe", "groupwise")} - set(saap.RECIPES), sorted(saap.RECIPES))
    _refuse(row, {options.get("choose", "first")} - {"first", "gap", "long"}, ["first", "gap", "long"])
    kind = saap.RECIPES[options.get("recipe", "groupwise")]
    known = {"recipe", "choose", "steps", *(field.name for made in (kind, saap.Training) for field in fields(made))}
    _refuse(row, set(options) - known, sorted(known))
    return shares, options


def _refuse(row: str, unknown: set[str], known: list[str]) -> None:
    if unknown:
        raise SystemExit(f"{row}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")


class Source:
    """The rows of each text, made on first use."""

    def __init__(self, data: str, model: Any, tokenizer: Any, length: int, seed: int, measured: int) -> None:
        """measured: tokens at the beginning of the test set that are measured on."""
        self.data, self.model, self.tokenizer = data, model, tokenizer
        self.length, self.seed, self.measured = length, seed, measured
        self.known: dict[str, list[dict[str, Any]]] = {}

    def rows(self, shares: dict[str, float], count: int, choose: str, small: Any) -> list[dict[str, Any]]:
        """`count` rows, mixed as the pipeline mixes them. small: the pruned model, to choose them by."""
        found = []
        for name, share in shares.items():
            wanted = round(share * count)
            if choose == "gap" and name != "own":
                found += self._widest_gaps(self._some(name, 3 * wanted), wanted, small)
            elif choose == "long" and name == "alpaca":
                among = self._some(name, 4 * wanted), wanted, self.tokenizer, self.length
                found += chosen_rows(*among, longest=True, whole_text=False)
            else:
                found += self._some(name, wanted)
        random.Random(self.seed).shuffle(found)
        return found

    def _widest_gaps(self, rows: list[dict[str, Any]], wanted: int, small: Any) -> list[dict[str, Any]]:
        """The rows with the largest loss of `small` over the dense one's, a label, without the widest hundredth."""
        examples = [training_example(row, self.tokenizer, self.length) for row in rows]
        labelled = [n for n, example in enumerate(examples) if any(label != -100 for label in example["labels"])]
        ids = {n: torch.tensor([examples[n]["input_ids"]], device=small.device) for n in labelled}
        labels = {n: torch.tensor([examples[n]["labels"]], device=small.device) for n in labelled}

        @torch.no_grad()
        def loss(model: Any, n: int) -> float:
            return float(model(ids[n], labels=labels[n], use_cache=False).loss)

        gaps = {n: loss(small, n) - loss(self.model, n) for n in labelled}
        order = sorted(gaps, key=gaps.__getitem__, reverse=True)[len(gaps) // 100 :]
        return [rows[n] for n in order[:wanted]]

    def _some(self, name: str, count: int) -> list[dict[str, Any]]:
        if len(self.known.get(name, ())) < count:
            self.known[name] = getattr(self, f"_{name}")(count)
        return self.known[name][:count]

    def _alpaca(self, count: int) -> list[dict[str, Any]]:
        return read_data(self.data, "recovery")[:-1000]

    def _prose(self, count: int) -> list[dict[str, Any]]:
        novels = [row["text"] for row in read_data(self.data, "calibration")]
        about = {"count": count, "length": self.length, "seed": self.seed + OTHER_SEED}
        return _sequences(saap.sample_tokens(novels[: len(novels) * 3 // 4], self.tokenizer, **about)[0])

    def _own(self, count: int) -> list[dict[str, Any]]:
        about = {"count": count, "length": self.length, "seed": self.seed + OTHER_SEED}
        return _sequences(saap.own_text(self.model, self.tokenizer, **about))

    def _wikitext2(self, count: int) -> list[dict[str, Any]]:
        text = "\n\n".join(row["text"] for row in read_data(self.data, "wikitext2"))
        ids = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"][max(10_000, self.measured) :])
        return _sequences(ids[: len(ids) // self.length * self.length].view(-1, self.length))


def _sequences(tokens: torch.Tensor) -> list[dict[str, Any]]:
    return [{"tokens": ids} for ids in tokens.tolist()]


def measured_texts(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[str], dict[str, Any]]:
    """(texts to calibrate on, name → windows int64 (n, length)) of TEXTS."""
    windows, length = arguments.windows, arguments.length
    instructions = read_data(arguments.data, "recovery")
    if len(instructions) < 2000:
        raise SystemExit(
            f"--data {arguments.data}: a thousand instruction rows are held out, it has {len(instructions)}"
        )
    bos = saap.calibration_bos(model.config.model_type, tokenizer)
    calibration, held_out = texts_of("held-out", arguments.data, tokenizer, windows, length, bos)
    last = ["\n".join(row.values()) + "\n" for row in instructions[-1000:]]
    held_out["alpaca"], _ = saap.sample_tokens(last, tokenizer, count=windows, length=length, seed=0, bos=bos)
    held_out["own"] = saap.own_text(model, tokenizer, count=windows, length=length, seed=2 * OTHER_SEED, bos=bos)
    _, test = texts_of("test", arguments.data, tokenizer, windows, length, bos)
    return calibration, {name: {**test, **held_out}[name] for name in TEXTS}


def untrained(small: Any, options: dict[str, Any], tokens: torch.Tensor) -> Any:
    """The pruned model in codes, as floats."""
    text_of = {"feedback": tokens, "nearest": None}
    codes = saap.to_groupwise(small, tokens=text_of[options.get("rounding", "nearest")])
    if options.get("start") == "mean":
        for name, layer in codes.named_modules():
            if isinstance(layer, saap.GroupwiseLinear):
                error = small.get_submodule(name).weight.float() - layer.weight()
                counts = layer.pool(torch.ones(1, layer.in_features, device=error.device))
                layer.zero += (layer.pool(error) / counts).half()
    return saap.dequantize(codes)


def recovered(
    small: Any, rows: list[dict[str, Any]], tokenizer: Any, options: dict[str, Any], model: Any, work: str
) -> tuple[Any, int, float]:
    """(the recovered model in floats, its steps, the share of a pass's tokens that is padding)."""
    kind = saap.RECIPES[options.get("recipe", "groupwise")]
    recipe, training = (
        made(**{f.name: options[f.name] for f in fields(made) if f.name in options}) for made in (kind, saap.Training)
    )
    teacher = model if training.distill else None
    done, steps = saap.recover(copy.deepcopy(small), rows, tokenizer, work, recipe, training, teacher)
    lengths = [training_example(row, tokenizer, training.max_length)["length"] for row in rows]
    order = Order(lengths, training.batch_size, training.seed).tokens(training.micro_batch_size)
    a_pass = sum(itertools.islice(order, math.ceil(len(rows) / training.batch_size)))
    return saap.dequantize(done), steps[-1].step, 1 - sum(lengths) / a_pass


class Table:
    """Prints rows, and keeps them as figures."""

    def __init__(self, texts: dict[str, Any]) -> None:
        self.texts, self.figures, self.ends = texts, {}, {}  # type: ignore[var-annotated]
        print(f"{'':<46}{'steps':>6}{'s':>7}{'GB':>6}" + "".join(f"{name:>17}" for name in texts) + f"{'held out':>10}")

    def losses(self, model: Any) -> dict[str, float]:
        return {name: float(losses(model, windows).mean()) for name, windows in self.texts.items()}

    def add(self, name: str, model: Any, steps: int, seconds: float, peak: int, **more: float) -> None:
        """A row. The first one is dense, and those named `pruned …` are what later ones start from."""
        found = self.losses(model)
        if not self.ends:
            self.ends["dense"] = found
        if name.startswith("pruned"):
            self.ends["pruned"] = found
        closed, shown = {}, ""
        for text, loss in found.items():
            shown += f"{math.exp(loss):>10.1f}"
            if name == "dense" or name.startswith("pruned"):
                shown += " " * 7
                continue
            dense, pruned = (self.ends[end][text] for end in ("dense", "pruned"))
            closed[text] = (pruned - loss) / (pruned - dense)
            shown += f"{closed[text]:>7.0%}"
        held_out = sum(min(closed[text], 1.0) for text in TEXTS[2:]) / 3 if closed else math.nan
        print(f"{name:<46}{steps:>6}{seconds:>7.0f}{peak / 1e9:>6.2f}{shown}{held_out:>10.1%}", flush=True)
        self.figures[name] = {
            **{text: round(math.exp(loss), 2) for text, loss in found.items()},
            "closed": {text: round(share, 4) for text, share in closed.items()},
            **{"steps": steps, "seconds": round(seconds, 1), "peak_bytes": peak},
            **more,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; the embedded SmolLM2-135M when absent")
    parser.add_argument("--data", required=True, help="a data folder (docs/data.md), or hub")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--criterion", default="saap_plus")
    parser.add_argument("--own", type=int, default=206, help="sequences of the model's own that the criterion gets")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=240, help="of eight examples")
    parser.add_argument("--minutes", type=float, help="train so long, on as many rows as --steps has")
    parser.add_argument("--windows", type=int, default=64, help="of each text that is measured")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window, and of an example at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    parsed = {row: parse_row(row) for row in arguments.rows}
    device = arguments.device
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or embedded(Path(folder))
        model = saap.load(source, dtype="bfloat16", device=device).requires_grad_(False)
        tokenizer = saap.load_tokenizer(source)
    calibration, texts = measured_texts(arguments, model, tokenizer)
    print(f"{arguments.windows} × {arguments.length} tokens of each text, bfloat16, {where(device)}")
    table = Table(texts)
    table.add("dense", model, 0, 0, 0)
    for seed in arguments.seeds:
        bos = saap.calibration_bos(model.config.model_type, tokenizer)
        tokens = calibrated_on(model, tokenizer, calibration, arguments.own, seed, bos)
        text = Source(
            *(arguments.data, model, tokenizer, arguments.length, seed), measured=arguments.windows * arguments.length
        )
        for ratio in arguments.ratios:
            small, *spent = cut(arguments.criterion, model, tokens, ratio, seed, 32, Cost(device))
            small.requires_grad_(False)
            end = f", {ratio:g}, seed {seed}"
            table.add(f"pruned{end}", small, 0, *spent)
            for row, (shares, options) in parsed.items():
                if not shares:
                    table.add(row + end, untrained(small, options, tokens), 0, 0, 0)
                    continue
                settings = {"batch_size": 8, "minutes": arguments.minutes, "seed": seed, "max_length": arguments.length}
                settings |= {"learning_rate": LEARNING_RATE, "save_steps": 10**6, **options}
                count = settings["batch_size"] * settings.pop("steps", arguments.steps) + HELD_OUT_ROWS
                settings["held_out"] = (HELD_OUT_ROWS + 0.5) / count
                examples = text.rows(shares, count, settings.pop("choose", "first"), small)
                start, made = time.perf_counter(), []  # type: ignore[var-annotated]
                with tempfile.TemporaryDirectory() as work:
                    job = small, examples, tokenizer, settings, model, work
                    peak = most_held(lambda job=job, made=made: made.append(recovered(*job)), device)  # type: ignore[misc]
                (done, steps, padding), seconds = made[0], time.perf_counter() - start
                table.add(row + end, done, steps, seconds, peak, padding=round(padding, 4))
    print(json.dumps(table.figures))


if __name__ == "__main__":
    main()
