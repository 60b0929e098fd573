#!/usr/bin/env bash
# On-policy self-distillation: a student without a hint learns from itself with the hint. Three seeds.
#
#   bash recipes/toy_hint.sh [OUT]      OUT: out/toy_hint by default; what is there is replaced
#
#   base        the toy world's model, trained on hasty solutions to problems, and on gold ones to problems
#               that are followed by their result: alone it often stops too early, with the hint it does not
#   self_1..3   the base on its own samples, without hints; its teacher is the base, which sees the hints
#
# Prints a table of the test problems without a hint, and for each seed the difference to the base with a 95%
# bootstrap interval. base/eval_hint is the base with the hints.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
  -*) echo "error: unknown flag $1; --help shows how to call it" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
OUT=${1:-out/toy_hint}
DATA=$OUT/data
COMMON=(--engine hf --dtype float32 --max_response_tokens 80 --overwrite)
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

finish() {  # wait for all that was started; one failure ends the recipe
  for job in $(jobs -p); do wait "$job"; done
}
evaluate() {  # a run, problems, and the name of the evaluation
  python evaluate.py --model "$OUT/$1/final" --data "$2" --limit 128 --n 4 --k 4 "${COMMON[@]}" --out "$OUT/$1/$3"
}
learn() {  # a seed
  python train.py --prefix student --kl reverse --student "$OUT/base/final" --teacher "$OUT/base/final" \
    --data "$DATA/train.jsonl" --teacher_context_column hint --normalize token --batch_size 32 --steps 60 \
    --lr 1e-4 --log_every 20 --seed "$1" "${COMMON[@]}" --out "$OUT/self_$1"
  evaluate "self_$1" "$DATA/test.jsonl" eval
}

python -m recipes.toy_world --out "$OUT/world" --overwrite
python -m recipes.toy_hint --world "$OUT/world" --out "$DATA" --overwrite
python train.py --prefix teacher --kl forward --vocab sampled --normalize token --batch_size 64 --lr 3e-3 \
  --steps 250 --log_every 50 --student "$OUT/world/teacher_init" --rollouts "$DATA/both" "${COMMON[@]}" \
  --out "$OUT/base"
{ evaluate base "$DATA/test.jsonl" eval; evaluate base "$DATA/with_hint/test.jsonl" eval_hint; } &
learn 1 &
finish
learn 2 &
learn 3 &
finish

python evaluate.py --table "$OUT"/base/eval{,_hint} "$OUT"/self_{1,2,3}/eval
for SEED in 1 2 3; do echo; python evaluate.py --compare "$OUT/base/eval" "$OUT/self_$SEED/eval"; done
