"""How cost grows: seconds and peak memory of every stage at several model sizes, with the exponent, and a 70B by it.

    python benchmarks/growth.py                       # four sizes up to 1.2B: a quarter of an hour, 12 GB of memory
    python benchmarks/growth.py --shapes smollm2-135m gemma-270m

Random weights in bfloat16 with SmolLM2's tokenizer: time and memory do not depend on the values. Each stage is a
command of its own (`saap run`, what comes before it cached), so its peak is the largest resident memory of that
process, with its imports; its seconds are those in its manifest, with loading the model. Then the smallest model with
two and four times the tokens. Prints a table and, as its last line, one JSON object. An exponent is the slope of a line
through the logarithms of all sizes; the fixed costs of small models make it small. What a 70B would need, on this
machine, is drawn on from the largest size and one of half of it: a straight line, or a power where it grows faster.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import SHAPES, embedded, processor, random_llama
from whole_job import HERE, Build, stage_seconds

NOTHING = ["evaluate.benchmarks=[]", "speed.runs=0", 'recover.recipe="none"', 'data="mini"', 'model.dtype="bfloat16"']
# `Build` sets heads in one order, a ridge of 1 and no own text: one pass and one refit
PLUS = ['criterion.name="saap_plus"', "criterion.cuts=[]"]
BIG, BIG_GROUPS = 70.6e9, 80 * (8 + 28_672)  # Llama-3-70B: parameters; KV heads and channels
GROWS_WITH_GROUPS = ("fuse",)

Figures = dict[str, tuple[float, float]]  # stage → seconds, peak in bytes


def commands(times: int) -> list[tuple[tuple[str, ...], list[str]]]:
    """The stages a command makes beyond those cached, and what it is told, with so many times the tokens."""
    drawn = [*NOTHING, f"calibrate.count={10 * times}"]
    rows = [f"recover.examples={34 * times}", "recover.prose=0", "recover.own=0"]
    texts = [f"evaluate.max_tokens={2048 * times}", "evaluate.windows=[128]"]
    return [
        (("score", "fuse"), drawn),
        (("prune",), [*drawn, "prune.ratio=0.25"]),
        (("fisher", "refit"), [*drawn, *PLUS, "prune.ratio=0.25"]),
        (("recover",), [*drawn, "prune.ratio=0.25", 'recover.recipe="groupwise"', *rows, "recover.learning_rate=1e-5"]),
        (("evaluate",), [*drawn, 'evaluate.benchmarks=["wikitext2"]', 'evaluate.variants=["dense"]', *texts]),
        (("speed",), [*drawn, "speed.runs=2", "speed.warmup=1", "speed.new_tokens=16"]),
    ]


def measure(model: Path, times: int = 1) -> Figures:
    """Every stage of a run of this checkpoint."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "growth.toml"
        config.write_text(f'name = "growth"\n[model]\npath = "{model}"\n')
        build, store = Build(HERE, Path(sys.executable), config, []), Path(folder) / "store"
        before: dict[str, float] = {}
        for stages, told in commands(times):
            *_, peak = build.run(store, told)
            after = stage_seconds(store)
            for stage in stages:
                name = "prune" if stage == "refit" else stage  # the same stage, which refits for `saap_plus`
                figures[stage] = after[name] - before.get(name, 0.0), peak
            before = after
    return figures


def made(shape: str, tokenizer: Path, folder: Path) -> tuple[int, int]:
    """A checkpoint with random weights in `folder`; its parameters, and its coupled groups."""
    import saap

    model = random_llama(shape, "cpu")
    model.save_pretrained(folder)
    saap.load_tokenizer(tokenizer).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()), len(saap.discover(model))


def exponent(sizes: list[int], taken: list[float]) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])


def drawn_on(sizes: list[int], taken: list[float], big: float) -> float:
    """What the largest size, and the next of half of it or less, say of a bigger one."""
    known = dict(sorted(zip(sizes, taken, strict=True)))
    large = max(known)
    small = max((size for size in known if size <= large / 2), default=min(known))
    less, more = known[small], known[large]
    power = exponent([small, large], [less, more])
    if power > 1:
        return more * (big / large) ** power
    return more + max(0.0, more - less) / (large - small) * (big - large)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["smollm2-135m", "gemma-270m", "qwen-0.5b", "llama-1b"]
    parser.add_argument("--shapes", nargs="+", choices=sorted(set(SHAPES) - {"tiny"}), default=sizes)
    arguments = parser.parse_args()
    if len(arguments.shapes) < 2:
        raise SystemExit("growth.py: an exponent needs two shapes or more")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = embedded(Path(folder) / "embedded")
        parameters, groups, found, tokens = [], [], [], []
        for shape in arguments.shapes:
            place = Path(folder) / shape
            size, count = made(shape, tokenizer, place)
            parameters.append(size)
            groups.append(count)
            found.append(measure(place))
            print(shape, {stage: round(seconds, 1) for stage, (seconds, _) in found[-1].items()}, flush=True)
            if shape == arguments.shapes[0]:
                tokens = [found[0], measure(place, 2), measure(place, 4)]
            shutil.rmtree(place)
    report(arguments.shapes, parameters, groups, found, tokens)


def report(
    shapes: list[str], parameters: list[int], groups: list[int], found: list[Figures], tokens: list[Figures]
) -> None:
    print(f"\n{processor()}; seconds | peak, GB")
    print(f"{'':<12}" + "".join(f"{shape:>19}" for shape in shapes) + f"{'exponent':>17}{'of tokens':>11}{'a 70B':>19}")
    print(f"{'parameters':<12}" + "".join(f"{size / 1e6:>18.0f}M" for size in parameters))
    print(f"{'groups':<12}" + "".join(f"{count:>19}" for count in groups))
    figures: dict[str, dict[str, float]] = {}
    for stage in found[0]:
        axes = [(groups, BIG_GROUPS) if stage in GROWS_WITH_GROUPS else (parameters, BIG), (parameters, BIG)]
        taken = [[at[stage][n] for at in found] for n in (0, 1)]
        slopes = [exponent(sizes, each) for (sizes, _), each in zip(axes, taken, strict=True)]
        seconds, peak = (drawn_on(sizes, each, big) for (sizes, big), each in zip(axes, taken, strict=True))
        of_tokens = exponent([1, 2, 4], [at[stage][0] for at in tokens])
        cells = "".join(f"{f'{at[stage][0]:.1f} | {at[stage][1] / 1e9:.2f}':>19}" for at in found)
        both = f"{slopes[0]:.2f} | {slopes[1]:.2f}"
        print(f"{stage:<12}{cells}{both:>17}{of_tokens:>11.2f}{f'{seconds:.0f} | {peak / 1e9:.0f}':>19}")
        figures[stage] = {
            "exponent": round(slopes[0], 3),
            "peak_exponent": round(slopes[1], 3),
            "tokens_exponent": round(of_tokens, 3),
            "seconds_70b": round(seconds),
            "peak_bytes_70b": round(peak),
        }
    print(f"(against parameters; the seconds of {', '.join(GROWS_WITH_GROUPS)} against groups)")
    print(json.dumps({"parameters": parameters, "groups": groups, "stages": figures, "machine": processor()}))


if __name__ == "__main__":
    main()
