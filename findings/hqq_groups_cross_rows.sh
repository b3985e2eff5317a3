#!/usr/bin/env bash
# HQQ's quantisation groups run on into the next row where they do not divide one, and silently.
# Its check is on the number of weights of the whole matrix. A row of small weights behind a row of large ones then shares a scale
# with them. Layers of stock models have lengths that hide it; pruned ones do not.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q hqq==0.2.8.post1
env/bin/python -W error::UserWarning - 2> log <<'PY' || { cat log; exit 1; }
from importlib.metadata import version

import torch
from hqq.core.quantize import Quantizer


def errors(width):
    """(number of scales, relative error of the large rows, of the rows a tenth as large between them) at 4 bits, groups of 64."""
    torch.manual_seed(0)
    weight = torch.randn(64, width)
    weight[1::2] *= 0.1
    codes, about = Quantizer.quantize(weight, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    error = (Quantizer.dequantize(codes, about) - weight).norm(dim=1) / weight.norm(dim=1)
    return len(about["scale"]), round(error[0::2].mean().item(), 2), round(error[1::2].mean().item(), 2)


seen = {width: errors(width) for width in (1024, 1008, 1000, 1048)}
print("versions:", ", ".join(f"{name} {version(name)}" for name in ("torch", "hqq")))
print("expected: an error or a warning for rows that 64 does not divide, or a shorter last group; 0.09 in every row")
for width, (scales, large, small) in seen.items():
    print(f"seen: 64 rows of {width}: {scales} scales, error of large rows {large}, of small ones {small}")
assert all(scales == 64 * width / 64 and large < 0.1 for width, (scales, large, _) in seen.items())
assert all((small > 0.15) == (width % 64 != 0) for width, (*_, small) in seen.items())
PY
