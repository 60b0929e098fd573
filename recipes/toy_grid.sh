#!/usr/bin/env bash
# The study on the toy world: both papers' comparisons, with three seeds; see recipes/toy_grid.py.
#
#   bash recipes/toy_grid.sh [OUT]   OUT: out/toy_grid by default; finished runs are kept, others resumed
#
# On a CPU a run takes one core, with one thread, and all cores are used; on a GPU runs take turns.
# Writes OUT/results.json, OUT/results.md and OUT/results_*.png.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/toy_grid}
export OMP_NUM_THREADS=1
python -m recipes.toy_grid --out "$OUT"
python -m recipes.toy_grid --report "$OUT/results.json"
