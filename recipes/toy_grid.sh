#!/usr/bin/env bash
# The study on the toy world: both papers' comparisons, over several seeds; see recipes/toy_grid.py.
#
#   bash recipes/toy_grid.sh [OUT]   OUT: out/toy_grid by default; unfinished runs in it are resumed
#
# Runs what results/toy_grid.jsonl lacks and adds it there as runs finish, then writes the tables and figures
# beside it. On a CPU a run takes one core, with one thread, and all cores are used; on a GPU runs take turns.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
  -*) echo "error: unknown flag $1; --help shows how to call it" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
OUT=${1:-out/toy_grid}
export OMP_NUM_THREADS=1
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000  # keep memory that is freed: a third less time
python -m recipes.toy_grid --out "$OUT"
python -m recipes.toy_grid --report results/toy_grid.jsonl
