#!/usr/bin/env bash
# Runs every linter, whatever the ones before it found: `bash .ci/lint.sh PYTHON`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="$(dirname "$1")"
failed=()

check() {
  local name="$1"
  shift
  if "$@"; then
    echo "lint: $name passed"
  else
    failed+=("$name")
    echo "lint: $name FAILED"
  fi
}

mapfile -t cpp < <(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort)
mapfile -t shell < <(find .ci bench tests -name '*.sh' | sort)

clang_format() {
  local bad=() file
  for file in "${cpp[@]}"; do
    "$bin/clang-format" --dry-run -Werror "$file" 2>/dev/null || bad+=("$file")
  done
  ((${#bad[@]} == 0)) || printf '  %s: clang-format -i would change it\n' "${bad[@]}"
  ((${#bad[@]} == 0))
}

check "ruff check" "$bin/ruff" check --quiet .
check "ruff format" "$bin/ruff" format --quiet --check .
check "mypy" "$bin/mypy" --no-error-summary
check "clang-format" clang_format
for script in .ci/run "${shell[@]}"; do
  check "bash -n $script" bash -n "$script"
done
if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[*]}"
  exit 1
fi
