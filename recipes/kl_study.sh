#!/usr/bin/env bash
# Sequence-level KLs of the four cells to their teacher, on a real language model or on the toy world; see
# recipes/kl_study.py. What the committed results have is not run again.
#
#   bash recipes/kl_study.sh smollm2 [--data PROBLEMS] [--test PROBLEMS]   GSM8K from the hub by default
#   bash recipes/kl_study.sh toy
#
# Both take --out OUT (out/kl_smollm2 or out/kl_toy by default), --workers N, runs side by side (one a core), and
# --results FILE: with a new one everything is run again.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
STUDY=${1:-}
case $STUDY in
  smollm2 | toy) shift ;;
  *) echo "error: name a study, smollm2 or toy; --help shows how to call it" >&2; exit 2 ;;
esac
OUT=out/kl_$STUDY FLAGS=() RESULTS=results/kl_$STUDY.jsonl
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  case $1 in
    --out) OUT=$2 ;;
    --results) RESULTS=$2 ;;
    --data | --test | --workers) FLAGS+=("$1" "$2") ;;
    *) echo "error: unknown flag $1; known are --data, --test, --workers, --results, --out" >&2; exit 2 ;;
  esac
  shift 2
done
if [ "$STUDY" = smollm2 ] && [ ! -d "$OUT/models/student" ]; then
  bash recipes/smollm2.sh --until models --out "$OUT"
fi
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
python -m recipes.kl_study "$STUDY" --out "$OUT" --results "$RESULTS" ${FLAGS[@]+"${FLAGS[@]}"}
python -m recipes.kl_study --report "$RESULTS"
