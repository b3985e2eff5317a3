#!/usr/bin/env bash
# int4 weights that torch has packed on one CPU multiply wrong on another.
# The packing follows the vector width of the processor that packs. Nothing in the tensor says which: shape and dtype are
# the same, the multiplication runs, and the numbers are garbage. So packed weights must not go into a checkpoint.
# torch can be told to act as a smaller processor (ATEN_CPU_CAPABILITY), which stands for the other machine here.
set -euo pipefail
grep -qE '^flags.* avx512vl' /proc/cpuinfo || { echo "needs an x86 processor with AVX512: not run"; exit 0; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6
cat > pack.py <<'PY'
import torch

torch.manual_seed(0)
codes = torch.randint(0, 16, (128, 256), dtype=torch.int32)
scale, zero = torch.rand(8, 128) * 0.01 + 0.002, torch.randn(8, 128) * 0.01
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
weight = (codes - 8) * scale.T.repeat_interleave(32, 1) + zero.T.repeat_interleave(32, 1)
torch.save((torch.stack((scale, zero), -1).bfloat16(), packed, weight), "packed.pt")
PY
cat > multiply.py <<'PY'
import torch

scales_and_zeros, packed, weight = torch.load("packed.pt")
x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales_and_zeros)
exact = x.float() @ weight.T
print(f"{((y - exact).norm() / exact.norm()).item():.4f}")
PY
env/bin/python pack.py
same=$(env/bin/python multiply.py)
other=$(ATEN_CPU_CAPABILITY=avx2 env/bin/python multiply.py)
env/bin/python -c 'import torch; print("versions: torch", torch.__version__)'
echo "expected: the same product from the same tensors, or an error"
echo "seen: relative error $same where it was packed (AVX512), $other on a processor with AVX2"
env/bin/python -c "assert $same < 0.01 and $other > 0.5"
