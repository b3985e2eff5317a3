#!/bin/bash
# What runs on a GPU, on a GPU: one command for a bare machine with a GPU, a recent torch, transformers and Triton, no
# network, in less than eight minutes. Prints JSON lines, most important first; docs/gpu.md says what they mean.
#
#   benchmarks/gpu.sh                          # in the repository
#   benchmarks/gpu.sh --device cpu --tiny      # the same steps at toy sizes, without a GPU
#   benchmarks/gpu.sh --wheels                 # with a network, before: brings the packages a bare machine lacks
#
# PYTHON names the interpreter (python3 if unset); wheels/*.whl are used where they lie, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ "${1:-}" = --wheels ]; then
    "$PYTHON" -m pip download -q --no-deps -d wheels accelerate==1.15.0 peft==0.21.0 psutil
    du -sh wheels
    exit
fi
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] && "$PYTHON" -m zipfile -e "$wheel" "$packages"
done
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # asking for a GPU must not start CUDA in the process that forks the steps
"$PYTHON" benchmarks/gpu.py "$@"
