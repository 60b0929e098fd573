#!/usr/bin/env bash
# The whole pipeline on the toy world: teacher, base student, the four cells, GRPO, a table, a figure, a report.
#
#   bash recipes/toy.sh [OUT]      OUT: out/toy by default; an unfinished or finished OUT is replaced
#
# On a CPU two runs go side by side, one thread each; on a GPU they take turns. transformers samples (--engine
# hf): models this small are sampled before vLLM has started.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
  -*) echo "error: unknown flag $1; --help shows how to call it" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
OUT=${1:-out/toy}
WORLD=$OUT/world
COMMON=(--engine hf --dtype float32 --max_response_tokens 80 --overwrite)
EVAL=(--eval_data "$WORLD/heldout.jsonl" --log_every 20)
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

start() {  # run beside the others on a CPU, alone on a GPU
  python "$@" &
  if nvidia-smi -L >/dev/null 2>&1; then finish; fi
}
finish() {  # wait for all that was started; one failure ends the recipe
  for job in $(jobs -p); do wait "$job"; done
}
say() { echo; echo "== $*"; }

say "1/6 the toy world: problems, tokenizer, untrained models, gold and hasty solutions"
python -m recipes.toy_world --out "$WORLD" --overwrite

say "2/6 the teacher learns from gold solutions, the base student from hasty ones (hard-label SFT)"
SFT=(--prefix teacher --kl forward --vocab sampled --normalize token --batch_size 64 --lr 3e-3 --eval_every 50
     "${EVAL[@]}" "${COMMON[@]}")
start train.py "${SFT[@]}" --steps 250 \
  --student "$WORLD/teacher_init" --rollouts "$WORLD/gold" --out "$OUT/teacher"
start train.py "${SFT[@]}" --steps 400 \
  --student "$WORLD/student_init" --rollouts "$WORLD/hasty" --out "$OUT/base"
finish

say "3/6 the teacher's responses and its scores, once, on disk"
TEACHER=$OUT/teacher/final
python rollout.py --model "$TEACHER" --data "$WORLD/train.jsonl" --limit 2500 "${COMMON[@]}" \
  --out "$OUT/rollouts"
python score_teacher.py --teacher "$TEACHER" --rollouts "$OUT/rollouts" --dtype float32 --overwrite \
  --out "$OUT/scores"

say "4/6 the four cells: whose prefixes, which KL"
CELL=(--student "$OUT/base/final" --normalize token --batch_size 32 --steps 60 --lr 3e-5 --eval_every 10)
for KL in forward reverse; do
  start train.py --prefix teacher --kl $KL --rollouts "$OUT/rollouts" --scores "$OUT/scores" \
    "${CELL[@]}" "${EVAL[@]}" "${COMMON[@]}" --out "$OUT/teacher_$KL"
  start train.py --prefix student --kl $KL --teacher "$TEACHER" --data "$WORLD/train.jsonl" \
    "${CELL[@]}" "${EVAL[@]}" "${COMMON[@]}" --out "$OUT/student_$KL"
  finish
done

say "5/6 GRPO from the DAgger-style cell, and the final evaluation of all on the test problems"
evaluate() {
  start evaluate.py --model "$OUT/$1/final" --data "$WORLD/test.jsonl" --n 4 --k 4 "${COMMON[@]}" \
    --out "$OUT/$1/eval" "${@:2}"
}
DETAILS=(--teacher "$TEACHER" --token_details 8000)  # for 200 responses in the report
start grpo.py --model "$OUT/student_forward/final" --data "$WORLD/train.jsonl" --n 8 --batch_size 16 \
  --steps 30 --lr 1e-4 --eval_every 10 "${EVAL[@]}" "${COMMON[@]}" --out "$OUT/grpo"
evaluate teacher; finish
for PAIR in "base teacher_forward" "teacher_reverse student_forward" "student_reverse grpo"; do
  for RUN in $PAIR; do evaluate "$RUN" "${DETAILS[@]}"; done
  finish
done

say "6/6 results"
CELLS=("$OUT"/{teacher,student}_{forward,reverse})
RUNS=("$OUT/teacher" "$OUT/base" "${CELLS[@]}" "$OUT/grpo")
python evaluate.py --table "${RUNS[@]}" --figure "$OUT/cells.png" --runs "${CELLS[@]}" | tee "$OUT/table.md"
echo
python -m recipes.toy_claim "$OUT"
cat <<'TEXT'
This is one seed: do not rank the cells by it. On another machine they can end in another order.
recipes/toy_grid.sh compares them over five seeds, with intervals; results/toy_grid.md has its results.

The table, curves over steps and TFLOPs, and the responses, each token shaded by the teacher's KL to it:
TEXT
python evaluate.py --report "$OUT/report.html" "${RUNS[@]}"
