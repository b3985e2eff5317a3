"""Whether layers should lose their last KV head too: what it costs, beside as many parameters of channels.

    python benchmarks/last_heads.py --checkpoint FOLDER --data FOLDER     # a pruned model; a data folder (docs/data.md)

In every layer that has one KV head left, the head's output is set to zero, and what that adds to the loss on held-out
text is compared with what it adds to zero channels of the same number of parameters, those of lowest Fisher
information a parameter over all layers (on 50 calibration sequences). The last row does all such layers at once.
Nothing is refitted on either side. Differences are paired over the windows, with their standard errors. Prints a table
and, as its last line, one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import where
from criteria import calibrated_on, texts_of
from pruning_peers import losses

import saap
from saap.scoring.statistics import output_matrices


def without(model: torch.nn.Module, gone: np.ndarray, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """`measure()` while these groups, bool (N,), write zeros. (`saap.mask` refuses to empty a layer.)"""
    end, kept = 0, []
    with torch.no_grad():
        for *_, part, linear in output_matrices(model):
            start, end = end, end + linear.in_features // part.width
            kept.append((linear.weight, linear.weight.clone()))
            linear.weight.view(len(linear.weight), -1, part.width)[:, torch.from_numpy(gone[start:end])] = 0
        found = measure()
        for weight, before in kept:
            weight.copy_(before)
    return found


def compared(head: np.ndarray, channels: np.ndarray) -> dict[str, float]:
    """Mean rises of the loss over the windows, and their paired difference with its standard error."""
    difference = head - channels
    found = {
        "head": head.mean(),
        "channels": channels.mean(),
        "difference": difference.mean(),
        "standard_error": difference.std(ddof=1) / len(difference) ** 0.5,
    }
    return {name: round(float(value), 5) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a pruned model, as `saap export hf` writes it")
    parser.add_argument("--data", required=True, help="a data folder (docs/data.md), or hub")
    parser.add_argument("--windows", type=int, default=64, help="of each text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    model = saap.load(arguments.checkpoint, dtype="bfloat16", device=arguments.device).requires_grad_(False)
    tokenizer = saap.load_tokenizer(arguments.checkpoint)
    bos = saap.calibration_bos(model.config.model_type, tokenizer)
    calibration, texts = texts_of("held-out", arguments.data, tokenizer, arguments.windows, arguments.length, bos)
    tokens = calibrated_on(model, tokenizer, calibration, 0, 0, bos)
    groups = saap.discover(model)
    last = [(layer, index) for layer, kind, index in groups.structures() if kind == "attention" and len(index) == 1]
    if not last:
        raise SystemExit(f"no layer of {arguments.checkpoint} has a single KV head")
    channels = np.flatnonzero(groups.kind == "mlp")
    worth = saap.mask_fisher(model, tokens)[channels] / groups.parameters[channels]
    cheapest = channels[np.argsort(worth, kind="stable")]
    spent = np.cumsum(groups.parameters[cheapest])

    def all_losses() -> np.ndarray:
        return np.stack([losses(model, windows) for windows in texts.values()])

    before = all_losses()
    rows = [(f"layer {layer}", index) for layer, index in last]
    rows.append((f"all {len(last)}", np.concatenate([index for _, index in last])))
    print(f"{len(texts) * arguments.windows} windows of {arguments.length} tokens, {where(arguments.device)}")
    print(f"{'nats a token':<12}" + "".join(f"{f'{t}: {what}':>20}" for t in texts for what in ("head", "channels")))
    figures = {}
    for name, heads in rows:
        count = int(np.searchsorted(spent, groups.parameters[heads].sum()))
        rises = []
        for index in (heads, cheapest[:count]):
            gone = np.zeros(len(groups), bool)
            gone[index] = True
            rises.append(without(model, gone, all_losses) - before)
        figures[name] = {text: compared(rises[0][i], rises[1][i]) for i, text in enumerate(texts)}
        cells = (figures[name][text][what] for text in texts for what in ("head", "channels"))
        print(f"{name:<12}" + "".join(f"{cell:>20.4f}" for cell in cells), flush=True)
    print(json.dumps({"parameters": int(groups.parameters[last[0][1]].sum()), "rows": figures}))


if __name__ == "__main__":
    main()
