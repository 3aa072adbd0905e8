#!/usr/bin/env bash
# The operators' tests against kernels built with Address- and UndefinedBehaviourSanitizer.
#
# `bash tests/sanitize.sh [pytest arguments]`; PYTHON names the Python, SANITIZE_DIR the build folder,
# SANITIZE_ISA the instruction set (the best of this CPU), WORKERS the processes that share the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
out="${SANITIZE_DIR:-$PWD/build/sanitize}"
cxx="${CXX:-c++}"

isa="${SANITIZE_ISA:-$("$python" -c "from ppmoe_ops import _host; print(_host.cpu_capability())")}"

PPMOE_OPS_CUDA=0 "$python" csrc/build.py --out "$out" --sanitize address,undefined --isa "$isa"

# Python is not built with the runtimes, so they come in before it. libstdc++ goes with them: the
# runtime looks up its throw function when the process starts, before any library has brought it.
preload=""
for library in libasan.so libubsan.so libstdc++.so; do
  preload+="$(realpath "$("$cxx" -print-file-name="$library")") "
done

# Python and torch keep what they allocate to the end, so leaks are not looked for. Fresh memory is
# all NaN, as poison_memory makes it where malloc is glibc's.
export ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
arguments=("$@")
# What a test of memory measures, the sanitizer's own memory hides. At -O1 sums are contracted in other
# places than at -O3, and one gradient then has 4 times the error of plain PyTorch, where 3 is allowed.
((${#arguments[@]})) || arguments=(
  -n "${WORKERS:-2}" --dist worksteal
  tests/equilibrium tests/expert_slice tests/ladder_attention
  --ignore=tests/expert_slice/test_expert_ffn_memory.py
  --ignore=tests/ladder_attention/test_ladder_memory.py
  "--deselect=tests/ladder_attention/test_ladder_ffn.py::test_eps[1.0-training-float32]" -q
)
# A report goes straight to the terminal: neither captured by pytest nor preceded by its fault handler.
PPMOE_OPS_LIBRARY_DIR="$out" PPMOE_OPS_CPU_CAPABILITY="$isa" LD_PRELOAD="$preload" \
  exec "$python" -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys "${arguments[@]}"
