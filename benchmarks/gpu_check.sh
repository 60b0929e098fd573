#!/usr/bin/env bash
# What a new GPU shows within ten minutes and without a network: PASS, FAIL or SKIP for each check.
#
#   bash benchmarks/gpu_check.sh [--out DIR] [--only CHECK ...]        see benchmarks/gpu_check.py
set -euo pipefail
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$REPOSITORY/.venv/bin:$PATH" PYTHONPATH="$REPOSITORY:$REPOSITORY/kernels"
if ! python -c "import importlib.util as u; exit(not u.find_spec('torch'))"; then
  echo "error: python has no torch; run \`make venv\` first" >&2
  exit 2
fi
exec python -m benchmarks.gpu_check "$@"
