"""Criteria, compensations and peers: what each keeps, what it costs and what is left of the model.

    python benchmarks/criteria.py --data FOLDER                # a data folder (docs/data.md); about 20 minutes
    python benchmarks/criteria.py --data FOLDER --texts test --align 1 --criteria llm_pruner wanda_sp flap shortgpt
    python benchmarks/criteria.py --data FOLDER --criteria saap_plus:cuts=[] llm_pruner:kinds=mlp:align=32+least_squares

A row is a criterion, or one of `pruning_peers.py`. After a colon come its options and those of the plan (`cuts`,
`take_heads`, `variant`, `query_heads`, `search`, `kinds`, `align`, `ridge`; of `saap` also `fusion`, `lambda_scope`,
`fluctuation`, `asi_scope`), after a plus the compensation; left out, they are those of its authors. `--own 206` gives
all rows the text that `saap_plus` has by default. Texts are either held out, windows of the last quarter of the
novels, the others being for calibration, and of Alpaca's instructions and answers: choices are made by the geometric
mean of their perplexities. Or they are the test sets, WikiText-2 and PTB, which only report. Seconds and the most
memory held, the model in it, are those of all statistics a row needs, of ranking and of cutting (on a CPU that of the
process, which keeps what rows before it needed). Below a row stands how its perplexities differ from those of the
first row at its ratio, paired window by window, with a standard error. Prints a table and, as its last line, one JSON
object.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import embedded, most_held, where
from pruning_peers import PEERS, losses, torch_pruning_package
from torch.nn import functional as F

import saap
from saap.models.groups import layer_parts
from saap.pruning.plan import PROTECTED
from tasks.config import Criterion, Prune
from tasks.criteria import NEEDS, SAAP
from tasks.data import read_data

SAAP_OPTIONS = (("fusion", "lambda_scope"), ("fluctuation",), ("asi_scope",))  # of its three steps
HEADS = f"{'':<44}{'ratio':>6}{'heads':>7}{'channels':>10}{'layers M':>10}{'all M':>8}"


class Cost:
    """Seconds and bytes of what is made on first use, so that a row can be told all that it needs."""

    def __init__(self, device: str) -> None:
        self.device, self.known, self.spent = device, {}, {}  # type: ignore[var-annotated]

    def make(self, name: str, maker: Callable[[], Any]) -> Any:
        if name not in self.known:
            start, found = time.perf_counter(), []  # type: ignore[var-annotated]
            peak = most_held(lambda: found.append(maker()), self.device)
            self.known[name] = found[0]
            self.spent[name] = time.perf_counter() - start, peak
        return self.known[name]


def statistics_of(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The statistics of criteria, by name."""
    return {
        "score": lambda: saap.score(model, tokens),
        "gradients": lambda: saap.taylor_sums(model, tokens),
        "activations": lambda: saap.input_moments(model, tokens),
        "fisher": lambda: saap.mask_fisher(model, tokens),
        "tokens": lambda: tokens,
    }


def parse(row: str) -> tuple[str, dict[str, Any], str | None]:
    """'name:option=value:…+compensation' → (name, options, compensation). Values are JSON, or strings."""
    spec, _, compensation = row.partition("+")
    name, *settings = spec.split(":")
    options = {}
    for setting in settings:
        option, _, text = setting.partition("=")
        try:
            options[option] = json.loads(text)
        except json.JSONDecodeError:
            options[option] = text
    if name not in {"saap", *NEEDS, *PEERS}:
        raise SystemExit(f"no criterion or peer {name}; known: {', '.join(('saap', *NEEDS, *PEERS))}")
    return name, options, compensation or None


def cut(
    row: str, model: Any, tokens: torch.Tensor, ratio: float, seed: int, align: int, cost: Cost
) -> tuple[Any, float, int]:
    """(pruned model, seconds, bytes) of a row of the table."""
    name, options, compensation = parse(row)
    if name in PEERS:
        small = cost.make(f"{row} {ratio}", lambda: PEERS[name](model, tokens, ratio))
        del cost.known[f"{row} {ratio}"]
        return small, *cost.spent.pop(f"{row} {ratio}")
    groups, needs = saap.discover(model), SAAP if name == "saap" else NEEDS[name]
    statistics = ("score",) if name == "saap" else needs.statistics
    makers = statistics_of(model, tokens)
    known = {statistic: cost.make(statistic, makers[statistic]) for statistic in statistics}
    settings = {**Criterion().model_dump(), "ridge": Prune().ridge, "kinds": "pooled", "protect": PROTECTED}
    settings |= {"ratio": ratio, "seed": seed, "align": align, "search": needs.search, **options}
    settings["cuts"] = Criterion(cuts=settings["cuts"], take_heads=settings["take_heads"]).cuts_for(ratio)
    compensation = compensation or needs.compensation
    if compensation == "bias":
        cost.make("activations", makers["activations"])
        statistics = tuple({*statistics, "activations"})

    def ranked_and_cut() -> Any:
        if name == "saap":
            to_fuse, to_fluctuate, to_asi = [
                {name: options[name] for name in names if name in options} for names in SAAP_OPTIONS
            ]
            fused, *_ = saap.fuse(*known["score"], groups, **to_fuse)
            score = saap.asi(saap.fluctuation(fused, saap.weight_norms(model), **to_fluctuate), groups, **to_asi)
        else:
            chosen = {option: settings[option] for option in needs.options}
            score = saap.CRITERIA[name](model, **known, **chosen)
        plan = {key: settings[key] for key in ("search", "kinds", "protect", "align")}
        keep = saap.select(score, groups, ratio, **plan)
        small = saap.prune(model, keep)
        if compensation == "bias":
            saap.add_mean_bias(small, model, keep, cost.known["activations"])
        elif compensation == "least_squares":
            saap.refit(small, model, keep, tokens, ridge=settings["ridge"])
        return small

    small = cost.make(f"{row} {ratio}", ranked_and_cut)
    del cost.known[f"{row} {ratio}"]
    all_of_it = [cost.spent.pop(f"{row} {ratio}"), *(cost.spent[statistic] for statistic in statistics)]
    return small, sum(seconds for seconds, _ in all_of_it), max(peak for _, peak in all_of_it)


def kept(small: Any, model: Any) -> tuple[int, int, int]:
    """(KV heads, channels, parameters of the layers' groups) of a pruned model, from the shapes of its matrices."""
    parts = layer_parts(model)[0]
    counts, parameters = {"attention": 0, "mlp": 0}, 0
    for layer in saap.family_of(small.config).layers(small):
        for kind, members in parts.items():
            for part, _ in members:
                weight = layer.get_submodule(part.matrix).weight
                parameters += weight.numel()
                counts[kind] += weight.shape[1] // part.width if part.axis == 1 else 0
    return counts["attention"], counts["mlp"], parameters


def difference(own: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    """(how much higher the perplexity is, its standard error) as shares, from the losses of the same windows."""
    paired = own - first
    ratio = math.exp(paired.mean())
    return ratio - 1, ratio * float(paired.std(ddof=1)) / math.sqrt(len(paired))


def texts_of(
    which: str, data: str, tokenizer: Any, windows: int, length: int, bos: int | None
) -> tuple[list[str], dict[str, Any]]:
    """(texts to calibrate on, name → windows int64 (n, length) to measure on). Windows begin with bos, if there is one.

    Those of the test sets are a token longer then, so that as many are targets.
    """
    novels = [row["text"] for row in read_data(data, "calibration")]
    if which == "test":
        found = {}
        for name in ("wikitext2", "ptb"):
            text = "\n\n".join(str(row) for item in read_data(data, name) for row in item.values())
            ids = torch.tensor(tokenizer(text, verbose=False, add_special_tokens=bos is None)["input_ids"])
            cut = ids[: min(windows, len(ids) // length) * length].view(-1, length)
            found[name] = cut if bos is None else F.pad(cut, (1, 0), value=bos)
        return novels, found
    end = len(novels) * 3 // 4
    others = {
        "novels": novels[end:],
        "alpaca": ["\n".join(row.values()) + "\n" for row in read_data(data, "recovery")],
    }
    return novels[:end], {
        name: saap.sample_tokens(text, tokenizer, count=windows, length=length, seed=0, bos=bos)[0]
        for name, text in others.items()
    }


def calibrated_on(model: Any, tokenizer: Any, texts: list[str], own: int, seed: int, bos: int | None) -> torch.Tensor:
    """50 sequences of 128 tokens of the texts, and so many that the model writes itself."""
    about = {"length": 128, "seed": seed, "bos": bos}
    tokens, _ = saap.sample_tokens(texts, tokenizer, count=50, **about)
    return torch.cat([tokens, saap.own_text(model, tokenizer, count=own, **about)]) if own else tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; the embedded SmolLM2-135M when absent")
    parser.add_argument("--data", required=True, help="a data folder (docs/data.md), or hub")
    parser.add_argument("--texts", choices=["held-out", "test"], default="held-out")
    parser.add_argument("--criteria", nargs="+", default=["saap_plus", "llm_pruner", "wanda_sp", "flap", "shortgpt"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--align", type=int, default=32, help="channels come in multiples of it; 1 in rivals' code")
    parser.add_argument("--seed", type=int, default=0, help="which calibration sequences, of 50 × 128 tokens")
    parser.add_argument("--own", type=int, default=0, help="sequences that the model writes itself, added to them")
    parser.add_argument("--windows", type=int, default=64, help="of each text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--bare", action="store_true", help="calibrate without BOS where it would begin a sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if "torch_pruning" in {parse(row)[0] for row in arguments.criteria}:
        torch_pruning_package()

    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or embedded(Path(folder))
        model = saap.load(source, dtype="bfloat16", device=arguments.device)
        tokenizer = saap.load_tokenizer(source)
    bos = saap.calibration_bos(model.config.model_type, tokenizer)
    sizes = arguments.windows, arguments.length
    calibration, texts = texts_of(arguments.texts, arguments.data, tokenizer, *sizes, bos)
    begins = None if arguments.bare else bos
    tokens = calibrated_on(model, tokenizer, calibration, arguments.own, arguments.seed, begins)
    cost = Cost(arguments.device)
    figures: dict[str, Any] = {}
    firsts: dict[float, list[np.ndarray]] = {}

    def measure(row: str, ratio: float, small: Any, seconds: float, peak: int) -> None:
        heads, channels, layers = kept(small, model)
        own = [losses(small, windows) for windows in texts.values()]
        found = {name: math.exp(of_windows.mean()) for name, of_windows in zip(texts, own, strict=True)}
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        all_of_it = saap.size_of(small).parameters
        shown = "".join(f"{value:>11.1f}" for value in (*found.values(), mean))
        shape = f"{ratio:>6g}{heads:>7}{channels:>10}{layers / 1e6:>10.2f}{all_of_it / 1e6:>8.1f}"
        print(f"{row:<44}{shape}{seconds:>7.0f}{peak / 1e9:>7.2f}{shown}", flush=True)
        against = [difference(*pair) for pair in zip(own, firsts.setdefault(ratio, own), strict=True)]
        if own is not firsts[ratio]:
            said = (f"{name} {more:+.1%} ± {error:.1%}" for name, (more, error) in zip(texts, against, strict=True))
            print("    against the first row: " + ", ".join(said), flush=True)
        figures[f"{row}, {ratio:g}"] = {
            "against_first": dict(zip(texts, against, strict=True)),
            **{name: round(value, 2) for name, value in (*found.items(), ("mean", mean))},
            **{"kv_heads": heads, "channels": channels, "block_parameters": layers, "parameters": all_of_it},
            **{"seconds": round(seconds, 1), "peak_bytes": peak},
        }

    print(f"{arguments.windows} × {arguments.length} tokens of each text, bfloat16, {where(arguments.device)}")
    print(f"{HEADS}{'s':>7}{'GB':>7}{''.join(f'{name:>11}' for name in (*texts, 'mean'))}", flush=True)
    measure("dense", 0, model, 0, 0)
    for ratio in arguments.ratios:
        for row in arguments.criteria:
            small, seconds, peak = cut(row, model, tokens, ratio, arguments.seed, arguments.align, cost)
            measure(row, ratio, small, seconds, peak)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
