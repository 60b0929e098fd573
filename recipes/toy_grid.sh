#!/usr/bin/env bash
# The study on the toy world: both papers' comparisons, three seeds each; see recipes/toy_grid.py.
#
#   bash recipes/toy_grid.sh [OUT]      OUT: out/toy_grid by default; what is finished in it is kept, the rest goes on
#
# On a CPU a run goes on each core, one thread each; on a GPU they take turns. Results go to OUT/results.json, and from there to
# OUT/results.md and OUT/results_*.png.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-out/toy_grid}
export OMP_NUM_THREADS=1
python -m recipes.toy_grid --out "$OUT"
python -m recipes.toy_grid --report "$OUT/results.json"
