#!/usr/bin/env bash
# The CPU tests with their whole parameter grids, under every instruction set of this CPU and every
# C++ compiler on the path. Takes hours; `make matrix` runs it before a release.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PPMOE_OPS_FULL=1
passed=0
failed=()

try() {
  local name="$1"
  shift
  echo "matrix: $name"
  if "$@"; then
    passed=$((passed + 1))
  else
    failed+=("$name")
  fi
}

cpu_tests() {
  "$python" -m pytest tests -q --ignore=tests/interpret --ignore=tests/compile --ignore=tests/gpu
}

with_instruction_set() {
  PPMOE_OPS_CPU_CAPABILITY="$1" cpu_tests
}

with_compiler() {
  local out="build/matrix/$1"
  CXX="$1" "$python" csrc/build.py --out "$out" &&
    PPMOE_OPS_LIBRARY_DIR="$PWD/$out" "$python" -m pytest tests/expert_slice -q
}

list="from ppmoe_ops import _host as h; built = h.built_isas(); best = h.cpu_capability()
print(*built[: built.index(best) + 1 if best in built else None])"
for isa in $("$python" -c "$list"); do
  try "instruction set $isa" with_instruction_set "$isa"
  try "sanitizers, $isa" env SANITIZE_ISA="$isa" bash tests/sanitize.sh
done
for compiler in g++-{11,12,13,14,15} clang++ clang++-{14,15,16,17,18,19,20}; do
  if command -v "$compiler" >/dev/null; then
    try "compiler $compiler" with_compiler "$compiler"
  fi
done

((${#failed[@]})) && printf 'matrix: failed: %s\n' "${failed[@]}"
echo "matrix: $passed passed, ${#failed[@]} failed"
((${#failed[@]} == 0))
