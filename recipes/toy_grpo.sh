#!/usr/bin/env bash
# Does GRPO learn, less from a checkpoint that has lost its entropy, and with which --policy? Two starts, two
# policies, three seeds each.
#
#   bash recipes/toy_grpo.sh [OUT]      OUT: a finished one of recipes/toy.sh, out/toy by default
#
#   distilled    the student of the DAgger-style cell
#   collapsed    the same, trained for 64 epochs on 100 responses of its own
#
# Writes OUT/grpo_proof. Prints a table over the 256 test problems, and differences of Avg@4 with 95%
# bootstrap intervals over the problems: after GRPO minus before, for each policy and seed and their mean; the
# truncated policy minus the full one; distilled minus collapsed.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
  -*) echo "error: unknown flag $1; --help shows how to call it" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
OUT=${1:-out/toy}
WORLD=$OUT/world
PROOF=$OUT/grpo_proof
COMMON=(--engine hf --dtype float32 --max_response_tokens 80 --overwrite)
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
mkdir -p "$PROOF"

finish() {  # wait for all that was started; one failure ends the recipe
  for job in $(jobs -p); do wait "$job"; done
}
evaluate() {  # a checkpoint, and where its evaluation goes
  python evaluate.py --model "$1" --data "$WORLD/test.jsonl" --n 4 --k 4 "${COMMON[@]}" --out "$PROOF/$2/eval"
}
three_seeds() {
  for POLICY in full truncated; do
    for SEED in 1 2 3; do
      RUN=$2_${POLICY}_$SEED
      python grpo.py --model "$1" --data "$WORLD/train.jsonl" --n 8 --batch_size 16 --steps 30 --lr 1e-4 \
        --policy $POLICY --seed $SEED --log_every 10 "${COMMON[@]}" --out "$PROOF/$RUN"
      evaluate "$PROOF/$RUN/final" "$RUN"
    done
  done
}

DISTILLED=$OUT/student_forward/final
python rollout.py --model "$DISTILLED" --data "$WORLD/train.jsonl" --limit 100 \
  --temperature 0.6 --top_p 0.95 "${COMMON[@]}" --out "$PROOF/own"
python train.py --prefix teacher --kl forward --vocab sampled --normalize token --student "$DISTILLED" \
  --rollouts "$PROOF/own" --batch_size 32 --steps 200 --lr 1e-3 --log_every 50 \
  "${COMMON[@]}" --out "$PROOF/collapsed"
evaluate "$DISTILLED" distilled &
evaluate "$PROOF/collapsed/final" collapsed &
finish
three_seeds "$DISTILLED" distilled &
three_seeds "$PROOF/collapsed/final" collapsed &
finish

EVALS=()
for RUN in {distilled,collapsed}{,_{full,truncated}_{1,2,3}}; do EVALS+=("$PROOF/$RUN/eval"); done
echo; python evaluate.py --table "${EVALS[@]}"; echo
python - "$PROOF" <<'PYTHON'
import json
import sys

from distil.evaluation import interval


def accuracy(run):
    """Share of correct responses, for each problem in order."""
    rows = [json.loads(line) for line in open(f"{sys.argv[1]}/{run}/eval/samples.jsonl", encoding="utf-8")]
    return [sum(row["correct"] for row in rows[i:i + 4]) / 4 for i in range(0, len(rows), 4)]


def show(name, values):
    low, high = interval(values)
    print(f"{name:50} {sum(values) / len(values):+.3f} [{low:+.3f}, {high:+.3f}]")


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


before, after = {}, {}
for start in ("distilled", "collapsed"):
    before[start] = accuracy(start)
    for policy in ("full", "truncated"):
        seeds = [accuracy(f"{start}_{policy}_{seed}") for seed in (1, 2, 3)]
        after[start, policy] = [sum(problem) / 3 for problem in zip(*seeds)]
        for name, found in zip(("seed 1", "seed 2", "seed 3", "mean"), [*seeds, after[start, policy]]):
            show(f"{start}, {policy}, after GRPO - before, {name}", minus(found, before[start]))
for start in ("distilled", "collapsed"):
    show(f"{start}, after, truncated - full", minus(after[start, "truncated"], after[start, "full"]))
show("distilled - collapsed, before", minus(before["distilled"], before["collapsed"]))
for policy in ("full", "truncated"):
    distilled, collapsed = after["distilled", policy], after["collapsed", policy]
    show(f"distilled - collapsed, {policy}, after", minus(distilled, collapsed))
    gains = minus(distilled, before["distilled"]), minus(collapsed, before["collapsed"])
    show(f"distilled - collapsed, {policy}, after - before", minus(*gains))
PYTHON
