#!/usr/bin/env bash
# The experiments of arXiv 2604.13016 at full size: when does on-policy distillation (OPD) work, what helps?
#
#   bash recipes/paper_b.sh --list                              the rows, with the paper's results
#   bash recipes/paper_b.sh --row topk/k16 --dry_run            its commands, hours, disk, memory; runs nothing
#   bash recipes/paper_b.sh --row cold_start/sft [--gpus 8]     runs it, after what it needs
#   bash recipes/paper_b.sh                                     everything
#
# Run again, it skips what is finished and resumes the rest. Every variable of the next block is a flag. None
# of this has been run at full size yet. Values marked "ours" are not in the paper; the others are from the
# paper or its code.
#
# The problems are local .jsonl files, which `python -m recipes.problems NAME --out FILE` writes:
#   --data            dapo: the questions alone (JustRL-1.5B, a teacher below, was trained on it)
#   --original_data   dapo_original: the same questions inside the set's own instructions
#   --far_data        deepmath
#   --sft_data        openthoughts3 --limit 200000
#   --cold_data       openthoughts3 --skip 200000 --limit 30000
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;; esac
((BASH_VERSINFO[0] >= 4)) || { echo "error: needs bash 4 or newer" >&2; exit 2; }
cd "$(dirname "$0")/.."

OUT=out/paper_b GPUS=1
DATA=data/dapo.jsonl ORIGINAL_DATA=data/dapo_original.jsonl FAR_DATA=data/deepmath.jsonl
SFT_DATA=data/openthoughts_sft.jsonl COLD_DATA=data/openthoughts_opd.jsonl
R1=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B R1_LARGE=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
R1_LARGER=deepseek-ai/DeepSeek-R1-Distill-Qwen-14B
JUSTRL=hbx/JustRL-DeepSeek-1.5B SKYWORK=Skywork/Skywork-OR1-Math-7B
BASE=Qwen/Qwen3-1.7B-Base CHAT=Qwen/Qwen3-4B RL=lllyx/Qwen3-4B-Base-GRPO   # thinking off
CHAT_SMALL=Qwen/Qwen3-1.7B RL_MATH=Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500  # RL_MATH ours: this copy
STEPS=200 REVERSE_STEPS=600 HORIZON_STEPS=260      # the text has 200 for horizons, its figures go on to 260
BATCH_SIZE=64 N=4 TOKENS=7168                      # problems in a step, responses to each, their limit
SFT_LIMIT=200000 SFT_TOKENS=12288
SFT_STEPS=6250 SFT_BATCH_SIZE=64                   # two epochs if nothing is dropped; 8 on each of 8 GPUs
DEDUP=semantic                                     # cosine similarity of sentence embeddings from 0.6 on
EVAL_DATA=aime24 EVAL_EVERY=20 EVAL_N=16 EVAL_TOKENS=31744
SAVE_EVERY=20 KEEP_CHECKPOINTS=2                   # KEEP_CHECKPOINTS ours
BENCHMARKS="aime24 minyichen/AIME2025::test amc23"  # ours: the copy of AIME 2025 on the hub
# ours, for the plan: mean responses of the two families, mean prompt; a GPU's rate and memory
R1_LENGTH=8000 QWEN3_LENGTH=2000 PROMPT_LENGTH=120 TFLOPS_PER_SECOND=25 GPU_GIB=79
ENGINE=vllm DTYPE=bfloat16
FLAGS="out gpus data original_data far_data sft_data cold_data r1 r1_large r1_larger justrl skywork base
  chat rl chat_small rl_math steps reverse_steps horizon_steps batch_size n tokens sft_limit sft_tokens
  sft_steps sft_batch_size dedup eval_data eval_every eval_n eval_tokens save_every keep_checkpoints
  benchmarks r1_length qwen3_length prompt_length tflops_per_second gpu_gib engine dtype"

# Rows, what they train, and what the paper reports after it; Avg@16, where it is not said otherwise.
# No top-1: a KL renormalised on one token is 0. The paper's code only weighs, and has .446 .310 .772 for it.
#   row               student <- teacher          AIME24 AIME25 AMC23
ROWS="
topk/sampled          R1-1.5B <- JustRL-1.5B      .454   .327   .782   the one-sample reverse KL
topk/k4               R1-1.5B <- JustRL-1.5B      .473   .331   .793
topk/k16              R1-1.5B <- JustRL-1.5B      .458   .338   .791   the paper's setting
topk/k64              R1-1.5B <- JustRL-1.5B      .463   .338   .785
topk/set_teacher      R1-1.5B <- JustRL-1.5B      -      -      -      no clear difference from topk/k16
topk/set_union        R1-1.5B <- JustRL-1.5B      -      -      -      no clear difference from topk/k16
topk/set_intersection R1-1.5B <- JustRL-1.5B      -      -      -      no clear difference from topk/k16
topk/set_non_overlap  R1-1.5B <- JustRL-1.5B      -      -      -      the symmetric difference; clearly worse
topk/set_difference   R1-1.5B <- JustRL-1.5B      -      -      -      ours: the student's part of it
pattern/chat          Qwen3-1.7B-Base <- Qwen3-4B -      -      -      mean about .15
pattern/rl            Qwen3-1.7B-Base <- 4B-GRPO  -      -      -      mean about .20; closer, but no better
knowledge/r1_7b       R1-1.5B <- R1-7B            -      -      -      gap recovery 5.3%, first overlap .747
knowledge/skywork     R1-1.5B <- Skywork-7B       -      -      -      16.9%, .715: R1-7B after its own RL
knowledge/chat        Qwen3-1.7B <- Qwen3-4B      -      -      -      15.6%, .757
knowledge/rl_math     Qwen3-1.7B <- 4B-RL-Math    -      -      -      58.6%, .703: Qwen3-4B after its own RL
cold_start/direct     Qwen3-1.7B-Base <- Qwen3-4B .07    .05    .26
cold_start/sft        Qwen3-1.7B-Base <- Qwen3-4B .125   .075   .40    off-policy first, then OPD
template/original     R1-1.5B <- JustRL-1.5B      -      -      -      mean about .51
template/aligned      R1-1.5B <- JustRL-1.5B      -      -      -      mean about .54; is topk/k16
problems/near         R1-1.5B <- JustRL-1.5B      -      -      -      DAPO, the teacher's own; is topk/k16
problems/far          R1-1.5B <- JustRL-1.5B      -      -      -      DeepMath without DAPO; worse
reverse/r1_1.5b       JustRL-1.5B <- R1-1.5B      .30    -      -      from .54: back to its teacher's .28
reverse/r1_7b         JustRL-1.5B <- R1-7B        .30    -      -      from .54, although this teacher has .55
size/1.5b_own         R1-1.5B <- JustRL-1.5B      .47    .325   .78    overlap .72 to .91, 80%; is topk/k16
size/1.5b_larger      R1-1.5B <- R1-7B            -      -      -      overlap flat at .78; is knowledge/r1_7b
size/7b_own           R1-7B <- Skywork-7B         -      -      -      works as well: overlap to .96
size/7b_larger        R1-7B <- R1-14B             -      -      -      fails as well
horizon/512           R1-1.5B <- JustRL-1.5B      -      -      -      too short
horizon/1024          R1-1.5B <- JustRL-1.5B      -      -      -      too short
horizon/3072          R1-1.5B <- JustRL-1.5B      -      -      -      best, with 7168
horizon/5120          R1-1.5B <- JustRL-1.5B      -      -      -      only in its code
horizon/7168          R1-1.5B <- JustRL-1.5B      -      -      -      best, with 3072
horizon/10240         R1-1.5B <- JustRL-1.5B      -      -      -      no better; collapse at step 200 to 220
horizon/15360         R1-1.5B <- JustRL-1.5B      -      -      -      the same; entropy rises from the end on
"

fail() { echo "error: $*" >&2; exit 2; }
PLAN=() PICKED=()
while [ $# -gt 0 ]; do
  case $1 in
    --list) echo "# row, student <- teacher, the paper's AIME24, AIME25, AMC23$ROWS"; exit ;;
    --dry_run) PLAN+=(--dry_run); shift ;;
    --row) PICKED+=("${2:?--row needs a row or a group of rows}"); shift 2 ;;
    --*) name=${1#--}
         [[ " ${FLAGS//$'\n'/ } " == *" $name "* ]] ||
           fail "unknown flag $1; known are --list, --dry_run, --row and" $FLAGS
         [ $# -ge 2 ] || fail "$1 needs a value"
         printf -v "${name^^}" %s "$2"; shift 2 ;;
    *) fail "unknown flag $1; the head of $0 shows how to call it" ;;
  esac
done

# what the teachers were trained with
SUFFIX=" Please reason step by step, and put your final answer within \\boxed{}."
TOP16=(--vocab topk --k 16 --topk_set student)
MACHINE=(--engine "$ENGINE" --dtype "$DTYPE")
SLEEP=()  # vLLM's memory is the trainer's while it does not sample, or 31,744 tokens would not fit
if [ "$ENGINE" = vllm ]; then SLEEP=(--engine_sleep); fi
# train.py splits its batch over the GPUs; in the other stages vLLM splits the model over them.
# The last -- keeps torchrun from taking --n for a flag of its own
LAUNCH=(python)
if [ "$GPUS" -gt 1 ]; then LAUNCH=(torchrun --standalone --nproc_per_node "$GPUS" --); fi

run() { printf '%q ' "$@"; echo; }  # one command of the plan
begin() { echo "# $1 $2"; }         # ROW TOKENS: a row of the plan, and the mean length of its responses

opd() {  # ROW TOKENS STUDENT TEACHER PROBLEMS SUFFIX STEPS FLAGS: on-policy distillation, and its evaluation
  local out=$OUT/${1//\//_}  # the results show its last part
  begin "$1" "$2"
  # ours: 8192 tokens in a forward pass; temperature 0.6 in train.py's own evaluations (the paper: 0.7)
  run "${LAUNCH[@]}" train.py --prefix student --kl reverse "${@:8}" --student "$3" --teacher "$4" \
    --data "$5" --prompt_suffix "$6" --template teacher --stop_ids both --normalize token \
    --batch_size "$BATCH_SIZE" --n "$N" --temperature 1.0 --top_p 1.0 --top_k 0 \
    --max_response_tokens "$TOKENS" --steps "$7" --lr 1e-6 --warmup 0 --seed 42 --eval_data "$EVAL_DATA" \
    --eval_every "$EVAL_EVERY" --eval_n "$EVAL_N" --eval_max_response_tokens "$EVAL_TOKENS" \
    --save_every "$SAVE_EVERY" --keep_checkpoints "$KEEP_CHECKPOINTS" --micro_batch_tokens 8192 \
    --position_bins 512 "${MACHINE[@]}" "${SLEEP[@]}" --out "$out"
  evaluate "$out/final" "$out/evals"
  [[ " ${RUNS[*]-} " == *" $out "* ]] || RUNS+=("$out")
  RUN=$out
}

evaluate() {  # MODEL PLACE
  run python evaluate.py --model "$1" --benchmarks $BENCHMARKS --prompt_suffix "$SUFFIX" --n 16 \
    --temperature 0.7 --top_p 0.95 --max_response_tokens "$EVAL_TOKENS" --seed 42 --tensor_parallel "$GPUS" \
    "${MACHINE[@]}" --out "$2"
  [[ " ${EVALS[*]-} " == *" $2 "* ]] || EVALS+=("$2")
}

models() {  # TOKENS MODEL...: evaluates students and teachers as they are, for the gap that is recovered
  begin models "$1"
  for model in "${@:2}"; do evaluate "$model" "$OUT/models/${model##*/}"; done
}

justrl() {  # ROW PROBLEMS SUFFIX FLAGS: the pair of most rows
  opd "$1" "$R1_LENGTH" "$R1" "$JUSTRL" "$2" "$3" "$STEPS" "${@:4}"
}

dedup() {  # PROBLEMS AGAINST PLACE
  run python -m recipes.dedup --data "$1" --against "$2" --method "$DEDUP" --out "$OUT/$3"
}

cold_start() {  # hard-label SFT on the teacher's complete, boxed responses without repetition: $OUT/sft/final
  begin sft "$QWEN3_LENGTH"
  run python rollout.py --model "$CHAT" --data "$SFT_DATA" --limit "$SFT_LIMIT" --prompt_suffix "$SUFFIX" \
    --n 1 --temperature 0.7 --top_p 0.95 --max_response_tokens "$SFT_TOKENS" \
    --drop unboxed truncated degenerate --attempts 3 --seed 42 --tensor_parallel "$GPUS" \
    "${MACHINE[@]}" --out "$OUT/sft_rollouts"
  # as in the configuration of the paper's code, of which table 3 has one epoch. Ours: --normalize,
  # --save_every, no validation split
  run "${LAUNCH[@]}" train.py --prefix teacher --kl forward --vocab sampled --student "$BASE" \
    --rollouts "$OUT/sft_rollouts" --prompt_suffix "$SUFFIX" --template teacher --stop_ids both \
    --normalize token --batch_size "$SFT_BATCH_SIZE" --max_response_tokens "$SFT_TOKENS" \
    --steps "$SFT_STEPS" --lr 1e-5 --lr_schedule cosine --warmup 0.05 --seed 42 --save_every 500 \
    --keep_checkpoints "$KEEP_CHECKPOINTS" --micro_batch_tokens 8192 "${MACHINE[@]}" --out "$OUT/sft"
}

emit() {  # ROW: its commands, and before them those of what it needs
  case $1 in
    topk/sampled) justrl "$1" "$DATA" "$SUFFIX" --vocab sampled ;;
    topk/k*) justrl "$1" "$DATA" "$SUFFIX" --vocab topk --k "${1#topk/k}" --topk_set student ;;
    topk/set_non_overlap) justrl "$1" "$DATA" "$SUFFIX" --vocab topk --k 16 --topk_set symmetric_difference ;;
    topk/set_*) justrl "$1" "$DATA" "$SUFFIX" --vocab topk --k 16 --topk_set "${1#topk/set_}" ;;
    pattern/chat) opd "$1" "$QWEN3_LENGTH" "$BASE" "$CHAT" "$DATA" "$SUFFIX" "$STEPS" "${TOP16[@]}" ;;
    pattern/rl) opd "$1" "$QWEN3_LENGTH" "$BASE" "$RL" "$DATA" "$SUFFIX" "$STEPS" "${TOP16[@]}" ;;
    knowledge/r1_7b | knowledge/skywork)
      local teacher=$R1_LARGE
      if [ "$1" = knowledge/skywork ]; then teacher=$SKYWORK; fi
      models "$R1_LENGTH" "$R1" "$teacher"
      opd "$1" "$R1_LENGTH" "$R1" "$teacher" "$DATA" "$SUFFIX" "$STEPS" "${TOP16[@]}" ;;
    knowledge/*)
      local teacher=$CHAT
      if [ "$1" = knowledge/rl_math ]; then teacher=$RL_MATH; fi
      models "$QWEN3_LENGTH" "$CHAT_SMALL" "$teacher"
      opd "$1" "$QWEN3_LENGTH" "$CHAT_SMALL" "$teacher" "$DATA" "$SUFFIX" "$STEPS" "${TOP16[@]}" ;;
    cold_start/*)
      local student=$BASE
      if [ "$1" = cold_start/sft ]; then cold_start; student=$OUT/sft/final; fi
      begin "$1" "$QWEN3_LENGTH"
      dedup "$COLD_DATA" "$SFT_DATA" cold_problems  # none that the cold start has seen
      opd "$1" "$QWEN3_LENGTH" "$student" "$CHAT" "$OUT/cold_problems/problems.jsonl" "$SUFFIX" "$STEPS" \
        "${TOP16[@]}" ;;
    template/original) justrl "$1" "$ORIGINAL_DATA" "" "${TOP16[@]}" ;;
    template/aligned | problems/near) emit topk/k16 ;;
    problems/far)
      begin "$1" "$R1_LENGTH"
      dedup "$FAR_DATA" "$DATA" far_problems
      justrl "$1" "$OUT/far_problems/problems.jsonl" "$SUFFIX" "${TOP16[@]}" ;;
    reverse/r1_1.5b) opd "$1" "$R1_LENGTH" "$JUSTRL" "$R1" "$DATA" "$SUFFIX" "$REVERSE_STEPS" "${TOP16[@]}" ;;
    reverse/r1_7b) opd "$1" "$R1_LENGTH" "$JUSTRL" "$R1_LARGE" "$DATA" "$SUFFIX" "$REVERSE_STEPS" \
      "${TOP16[@]}" ;;
    size/1.5b_own) models "$R1_LENGTH" "$R1" "$JUSTRL"; emit topk/k16 ;;
    size/1.5b_larger) emit knowledge/r1_7b ;;
    size/7b_*)
      local teacher=$SKYWORK
      if [ "$1" = size/7b_larger ]; then teacher=$R1_LARGER; fi
      models "$R1_LENGTH" "$R1_LARGE" "$teacher"
      opd "$1" "$R1_LENGTH" "$R1_LARGE" "$teacher" "$DATA" "$SUFFIX" "$STEPS" "${TOP16[@]}" ;;
    horizon/*) TOKENS=${1#horizon/} STEPS=$HORIZON_STEPS justrl "$1" "$DATA" "$SUFFIX" "${TOP16[@]}" ;;
  esac
}

figures() {  # GROUP RUN of each row: a figure for each group
  local group line found
  for group in $(printf '%s\n' "$@" | awk '!seen[$1]++ { print $1 }'); do
    found=()
    for line in "$@"; do
      if [ "${line%% *}" = "$group" ]; then found+=("${line#* }"); fi
    done
    run python evaluate.py --figure "$OUT/$group.png" --runs "${found[@]}" \
      --y avg pass length overlap_ratio overlap_advantage entropy_gap
  done
}

commands() {
  local known name picked found drawn=()
  known=$(awk '/^[a-z]/ { print $1 }' <<< "$ROWS")
  EVALS=() RUNS=()
  for picked in "${PICKED[@]:-}"; do
    found=$(awk -v picked="$picked" 'picked == "" || $0 == picked || index($0, picked "/") == 1' <<< "$known")
    [ -n "$found" ] || fail "--row $picked: no such row or group of rows; --list shows them"
    for name in $found; do emit "$name"; drawn+=("${name%%/*} $RUN"); done
  done
  begin results 0
  run python evaluate.py --table "${EVALS[@]}"
  run python -m recipes.paper_b "${RUNS[@]}"
  figures "${drawn[@]}"
}

ALL=$(commands)
python -m recipes.plan --prompt_tokens "$PROMPT_LENGTH" --tflops_per_second "$TFLOPS_PER_SECOND" \
  --gpu_gib "$GPU_GIB" "${PLAN[@]}" <<< "$ALL"
