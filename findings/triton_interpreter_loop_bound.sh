#!/usr/bin/env bash
# Triton's interpreter cannot run a loop whose bound is an argument, with the numpy that pip chooses beside it.
# It holds every scalar as an array of one element, and numpy 2.4 no longer makes an int of such an array. Triton 3.9 does
# without; Triton 3.6, which torch 2.11 brings, does not, and names no numpy that it needs.
# Hurts: kernels are tested without a GPU in the interpreter, and a kernel that is right fails there.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
cat > loop.py <<'PY'
import triton
import triton.language as tl


@triton.jit
def loop(n):
    total = 0
    for i in range(n):
        total += i


try:
    loop[(1,)](5)
    print("runs")
except Exception as error:
    print("raises", type(error).__name__)
PY
run() {
  python3 -m venv --clear env
  env/bin/pip install -q "triton==$1" "numpy==$2"
  TRITON_INTERPRET=1 env/bin/python loop.py 2> log || { cat log; exit 1; }
}
echo "versions: triton 3.6.0 and 3.9.0, numpy 2.3.5 and 2.4.6"
echo "expected: the loop runs with all"
seen="$(run 3.6.0 2.3.5), $(run 3.6.0 2.4.6), $(run 3.9.0 2.4.6)"
echo "seen: 3.6.0 with 2.3.5, 3.6.0 with 2.4.6, 3.9.0 with 2.4.6: $seen"
test "$seen" = "runs, raises InterpreterError, runs"
