#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and no network: build, test, measure, one table.
#
#   bash bench/device.sh            the whole run, at most 8 minutes
#   bash bench/device.sh --help     its options
#
# PYTHON names the interpreter (python3); results go to OUT (reports/) as device.json and device.txt.
# `python -m ppmoe_ops.bench device reports/device.json` keeps them in bench/results. Baselines that
# are not installed (liger_kernel, scattermoe) take part if PYTHONPATH has them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "device: no interpreter '$python'; set PYTHON" >&2
    exit 2
fi
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "device: $python cannot import torch; set PYTHON to one that can" >&2
    exit 2
fi
exec "$python" -u bench/device.py "$@"
