#!/usr/bin/env bash
# The experiments of arXiv 2605.16826 at full size: Qwen3-4B and Qwen3-8B teach Qwen3-0.6B-Base on DeepScaleR.
#
#   bash recipes/qwen3.sh --list                                      the rows, with the paper's results
#   bash recipes/qwen3.sh --row table1/student_4b_reverse --dry_run   commands, hours, disk, memory; runs nothing
#   bash recipes/qwen3.sh --row table1/student_4b_reverse             runs it, on one GPU
#   bash recipes/qwen3.sh --row table1 --row table3 --gpus 4          whole tables, on four GPUs
#   bash recipes/qwen3.sh                                             everything
#
# A row first runs what it needs: the teacher's rollouts and scores, the checkpoint that GRPO starts from. Run
# again, it skips what is finished and resumes the rest. Every variable of the next block is a flag, such as
# --steps. None of this has been run at full size yet. Values marked "ours" are not in the paper; the others
# are from it.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;; esac
((BASH_VERSINFO[0] >= 4)) || { echo "error: needs bash 4 or newer" >&2; exit 2; }
cd "$(dirname "$0")/.."

OUT=out/qwen3 GPUS=1
STUDENT=Qwen/Qwen3-0.6B-Base
TEACHER_4B=Qwen/Qwen3-4B TEACHER_8B=Qwen/Qwen3-8B  # section 3 (appendix G.1: -Base). Ours: thinking off
DATA=deepscaler LIMIT=0                            # LIMIT ours: all problems, of which 1000 steps read 32,000
STEPS=1000 BATCH_SIZE=32 SHORT=128 LONG=4096       # steps, responses a step, both limits of tokens
EVAL_DATA=math500 EVAL_EVERY=30 EVAL_TOKENS=4096   # evaluations in training
SAVE_EVERY=40                                      # checkpoints to resume from
EVAL_N=3 KEEP_CHECKPOINTS=2                        # ours: n as after training. The paper keeps 10
BENCHMARKS="aime24 amc23 math500 gsm8k" TEST_TOKENS=8192
# ours: the paper states no horizons, no steps and no floor in nats; the axes of its figures span 0.03 to 0.18
# at 128 tokens, 0 to 0.4 at 4096
HORIZONS=128,256,512,1024,2048,4096 GATE_EVERY=100 ENTROPY_FLOOR=0.05
GRPO_PROBLEMS=4  # ours: its batch of 32 read as 4 groups of 8; --grpo_problems 32 would take 69 hours a run
TEACHER_TOKENS=1500                                # ours, for the plan: mean response of a teacher
# ours, for the plan: at this rate student-prefix rows of tables 1 and 2 take 22.5 hours on average, and GRPO
# rows of tables 5 and 6 14.0; the paper says 16 and 14
TFLOPS_PER_SECOND=25 GPU_GIB=79                    # of one GPU
ENGINE=vllm DTYPE=bfloat16
FLAGS="out gpus student teacher_4b teacher_8b data limit steps batch_size short long eval_data eval_every
  eval_tokens eval_n save_every keep_checkpoints benchmarks test_tokens horizons gate_every entropy_floor
  grpo_problems teacher_tokens tflops_per_second gpu_gib engine dtype"

# Rows, and the paper's Avg/Pass/length. In a plan, a response of a row is as long as the paper's on MATH500.
#   row                      GSM8K             MATH500           AMC23             AIME24
ROWS="
reference/student            -                 -                 -                 -
reference/teacher_4b         -                 -                 -                 -
reference/teacher_8b         -                 -                 -                 -
table1/student_4b_forward    62.83/77.26/1396  34.31/55.60/3876  19.00/45.00/6173  0.00/0.00/7838
table1/student_4b_reverse    66.06/79.08/521   42.65/55.34/2482  26.50/47.50/4464  2.67/6.67/7101
table1/student_8b_forward    62.40/78.92/1279  34.43/55.98/3783  19.00/50.50/6244  1.33/6.67/7697
table1/student_8b_reverse    68.03/82.11/469   43.23/55.84/2364  24.00/50.00/4369  2.67/6.67/6496
table1/teacher_4b_forward    63.74/79.08/1012  37.72/54.14/2727  20.00/45.00/4494  2.00/3.33/6607
table1/teacher_4b_reverse    65.13/79.45/450   41.31/54.74/2140  26.00/45.00/3585  0.67/3.33/6432
table1/teacher_8b_forward    62.72/79.30/522   38.18/56.16/2171  19.50/47.50/3943  2.00/6.67/6116
table1/teacher_8b_reverse    65.00/79.45/403   43.01/56.36/2266  20.50/40.00/3800  0.67/3.33/5890
table2/student_4b_forward    68.87/83.40/582   46.42/60.66/2031  27.50/52.50/4109  1.33/3.33/5049
table2/student_4b_reverse    69.83/82.18/8166  47.37/60.04/8189  27.00/47.50/8192  1.33/3.33/8192
table2/student_8b_forward    69.04/82.79/3095  45.71/60.12/6134  24.50/57.50/7138  2.67/6.67/8152
table2/student_8b_reverse    69.60/81.20/8186  46.81/59.64/8191  28.00/52.50/8192  2.00/3.33/8192
table2/teacher_4b_forward    63.79/79.91/4807  42.09/57.08/6257  20.50/42.50/7004  1.33/6.67/7575
table2/teacher_4b_reverse    66.64/78.92/7286  43.51/56.10/7951  21.50/40.00/8079  2.00/6.67/8192
table2/teacher_8b_forward    61.23/79.45/620   41.59/58.18/1962  22.00/47.00/3447  1.33/6.67/5039
table2/teacher_8b_reverse    66.26/78.85/6707  43.76/57.30/7669  21.00/47.50/8046  2.67/6.67/8112
table3/4b_fixed              69.8/82.2/8166    47.4/60.0/8189    27.0/47.5/8192    1.3/3.3/8192
table3/4b_curriculum         68.2/80.3/455     61.4/73.7/1049    26.5/52.5/3695    4.0/10.0/5553
table3/8b_fixed              69.6/81.2/8186    46.8/59.6/8191    28.0/52.5/8192    2.0/3.3/8192
table3/8b_curriculum         70.9/83.3/472     60.7/72.0/946     26.5/45.0/4172    2.7/6.7/5581
table5/student_4b_forward    67.80/81.65/589   42.81/55.18/2299  22.00/40.00/4094  3.33/6.67/6000
table5/student_4b_reverse    66.46/78.39/398   43.53/55.34/2165  26.00/47.50/3220  0.67/3.33/5701
table5/student_8b_forward    66.14/80.29/1375  38.68/51.34/3293  16.50/37.50/5442  0.67/3.33/6576
table5/student_8b_reverse    65.13/78.77/1565  40.63/52.50/3350  21.50/47.50/4515  3.33/6.67/5902
table5/teacher_4b_forward    68.71/83.62/820   42.75/54.94/2613  26.00/52.50/4960  2.00/6.67/7122
table5/teacher_4b_reverse    66.09/79.30/574   41.68/54.20/2207  20.50/42.50/3846  0.00/0.00/5423
table5/teacher_8b_forward    66.52/81.05/658   42.29/55.80/2131  21.50/47.50/3528  0.67/3.33/6030
table5/teacher_8b_reverse    66.34/80.59/620   40.22/53.06/2214  17.50/40.00/3990  2.00/3.33/5932
table6/student_4b_forward    73.01/85.14/6335  47.61/59.64/7764  29.00/47.50/7917  4.00/10.00/7977
table6/student_4b_reverse    61.51/76.50/2046  39.93/52.24/2993  21.00/42.50/4558  0.00/0.00/5815
table6/student_8b_forward    59.54/76.04/8192  37.27/52.04/8192  21.00/40.00/8192  5.33/6.67/8192
table6/student_8b_reverse    61.97/76.57/562   36.32/49.50/3146  16.00/27.50/5303  0.67/3.33/6917
table6/teacher_4b_forward    65.18/78.09/1021  40.55/54.24/2179  25.00/50.00/3419  0.67/3.33/5078
table6/teacher_4b_reverse    62.07/77.41/2328  35.11/48.38/4632  14.00/32.50/5806  0.67/3.33/7210
table6/teacher_8b_forward    67.45/80.44/643   41.63/54.76/1784  24.50/42.50/2662  2.67/6.67/3473
table6/teacher_8b_reverse    68.87/82.26/5623  41.63/55.06/7426  20.50/40.00/7716  0.67/3.33/7727
figure7/student_4b_mix_0.2   -                 -                 -                 -
figure7/student_4b_mix_0.5   -                 -                 -                 -
figure7/student_4b_mix_0.8   -                 -                 -                 -
#   row                      ARC-C             HellaSwag         MMLU              PIQA
table4/base                  44.88             53.50             52.45             70.13
table4/teacher_4b_forward    45.73             53.49             51.87             69.91
table4/teacher_4b_reverse    46.16             53.37             52.41             69.86
table4/student_4b_forward    46.33             53.15             51.82             70.08
table4/student_4b_reverse    46.25             53.27             52.25             70.08
"

fail() { echo "error: $*" >&2; exit 2; }
PLAN=() PICKED=()
while [ $# -gt 0 ]; do
  case $1 in
    --list) echo "# row, then the paper's Avg/Pass/length on GSM8K, MATH500, AMC23, AIME24$ROWS"; exit ;;
    --dry_run) PLAN+=(--dry_run); shift ;;
    --row) PICKED+=("${2:?--row needs a row or a table}"); shift 2 ;;
    --*) name=${1#--}
         [[ " ${FLAGS//$'\n'/ } " == *" $name "* ]] ||
           fail "unknown flag $1; known are --list, --dry_run, --row and" $FLAGS
         [ $# -ge 2 ] || fail "$1 needs a value"
         printf -v "${name^^}" %s "$2"; shift 2 ;;
    *) fail "unknown flag $1; the head of $0 shows how to call it" ;;
  esac
done

declare -A TEACHER=([4b]=$TEACHER_4B [8b]=$TEACHER_8B)
PROBLEMS=(--data "$DATA" --limit "$LIMIT")
MACHINE=(--engine "$ENGINE" --dtype "$DTYPE")
# train.py and grpo.py split their batch over the GPUs; in the other stages vLLM splits the model over them.
# The last -- keeps torchrun from taking --n for a flag of its own
LAUNCH=(python)
if [ "$GPUS" -gt 1 ]; then LAUNCH=(torchrun --standalone --nproc_per_node "$GPUS" --); fi
# ours: the prompt is the problem alone; both models' stop tokens stop; 8192 tokens in a forward pass
TRAINING=(--steps "$STEPS" --warmup 0.05 --seed 42 --eval_data "$EVAL_DATA" --eval_every "$EVAL_EVERY"
          --eval_n "$EVAL_N" --eval_max_response_tokens "$EVAL_TOKENS" --save_every "$SAVE_EVERY"
          --keep_checkpoints "$KEEP_CHECKPOINTS"
          --micro_batch_tokens 8192 "${MACHINE[@]}")

run() { printf '%q ' "$@"; echo; }    # one command of the plan
place() { echo "$OUT/${1//\//_}"; }   # ROW: its directory, whose name the results show

begin() {  # ROW [TOKENS]: begins a row of the plan; by default with the paper's mean length on MATH500
  local length
  length=$(awk -v row="$1" '$1 == row { split($3, of, "/"); print of[3] }' <<< "$ROWS")
  echo "# $1 ${2:-${length:-2031}}"  # ours, if the paper has none: that of table2/student_4b_forward
}

rollouts() {  # SIZE: a teacher's responses to all problems, once. Ours: one to each problem
  begin "rollouts_$1" "$TEACHER_TOKENS"
  run python rollout.py --model "${TEACHER[$1]}" "${PROBLEMS[@]}" --n 1 --temperature 1.0 --top_p 0.95 \
    --top_k 20 --sample_batch 128 --max_response_tokens "$LONG" --seed 42 --tensor_parallel "$GPUS" \
    "${MACHINE[@]}" --out "$OUT/rollouts_$1"
}

scores() {  # SIZE TOKENS: that teacher's hidden states at the first tokens of those responses
  rollouts "$1"
  run python score_teacher.py --teacher "${TEACHER[$1]}" --rollouts "$OUT/rollouts_$1" --signal hidden \
    --max_tokens "$2" --dtype "$DTYPE" --out "$OUT/scores_$1_$2"
}

distil() {  # ROW PREFIX SIZE KL TOKENS [FLAGS]: a cell of the grid, and its evaluation
  local row=$1 prefix=$2 size=$3 kl=$4 tokens=$5
  local source=(--teacher "${TEACHER[$size]}" "${PROBLEMS[@]}")
  source+=(--n 1 --temperature 1.0 --top_p 1.0 --top_k 0)  # ours: exact samples
  if [ "$prefix" = teacher ]; then
    scores "$size" "$tokens"
    source=(--rollouts "$OUT/rollouts_$size" --scores "$OUT/scores_${size}_$tokens")
  fi
  begin "$row"
  run "${LAUNCH[@]}" train.py --prefix "$prefix" --kl "$kl" "${@:6}" --student "$STUDENT" "${source[@]}" \
    --template teacher --stop_ids both --normalize sequence --batch_size "$BATCH_SIZE" --lr 5e-7 \
    --max_response_tokens "$tokens" "${TRAINING[@]}" --out "$(place "$row")"
  evaluate "$(place "$row")/final" "$(place "$row")/evals"
}

grpo() {  # ROW START: GRPO from the checkpoint of row START, which comes first
  emit "$2"
  begin "$1"
  run "${LAUNCH[@]}" grpo.py --model "$(place "$2")/final" "${PROBLEMS[@]}" --n 8 \
    --batch_size "$GRPO_PROBLEMS" --lr 1e-6 --temperature 1.0 --top_p 0.95 --kl_weight 0 --updates 1 \
    --max_response_tokens "$LONG" "${TRAINING[@]}" --out "$(place "$1")"
  evaluate "$(place "$1")/final" "$(place "$1")/evals"
}

evaluate() {  # MODEL OUT. Ours: no top-k
  run python evaluate.py --model "$1" --benchmarks $BENCHMARKS --temperature 0.6 --top_p 0.95 --top_k 0 \
    --max_response_tokens "$TEST_TOKENS" --seed 42 --tensor_parallel "$GPUS" "${MACHINE[@]}" --out "$2"
  [[ " ${EVALS[*]-} " == *" $2 "* ]] || EVALS+=("$2")
}

general() {  # MODEL OUT: general knowledge, by lm-evaluation-harness
  [[ " ${PLAN[*]-} " == *" --dry_run "* ]] || command -v lm_eval > /dev/null ||
    fail 'table 4 needs lm-evaluation-harness: pip install "lm_eval[hf]==0.4.13", or name other rows (--row)'
  run bash recipes/general.sh "$1" --dtype "$DTYPE" --out "$2"
  EVALS+=("$2")
}

emit() {  # ROW: its commands, and before them those of what it needs
  local table prefix size kl
  IFS=/_ read -r table prefix size kl <<< "$1"
  case $1 in
    reference/student) begin "$1"; evaluate "$STUDENT" "$(place "$1")" ;;
    reference/teacher_*) begin "$1" "$TEACHER_TOKENS"; evaluate "${TEACHER[$size]}" "$(place "$1")" ;;
    table1/*) distil "$1" "$prefix" "$size" "$kl" "$SHORT" ;;
    table2/*) distil "$1" "$prefix" "$size" "$kl" "$LONG" ;;
    table3/*_fixed) emit "table2/student_${prefix}_reverse" ;;
    table3/*_curriculum) distil "$1" student "$prefix" reverse "$LONG" --curriculum entropy \
      --horizons "$HORIZONS" --gate_every "$GATE_EVERY" --entropy_floor "$ENTROPY_FLOOR" \
      --on_gate_fail hold ;;
    table4/base) begin "$1" 0; general "$STUDENT" "$(place "$1")" ;;
    table4/*) emit "table1/${1#*/}"
      begin "$1" 0
      general "$(place "table1/${1#*/}")/final" "$(place "$1")" ;;
    table5/*) grpo "$1" "table1/${1#*/}" ;;
    table6/*) grpo "$1" "table2/${1#*/}" ;;
    # the paper's lambda is 1 minus this weight
    figure7/*) distil "$1" student 4b mix "$LONG" --fkl_weight "${1##*_}" ;;
  esac
}

draw() {  # NAME PATTERN [FLAGS]: a figure of the runs whose directories match, if there are any
  local path found=()
  for path in "${EVALS[@]%/evals}"; do
    if [[ ${path##*/} =~ $2 ]]; then found+=("$path"); fi
  done
  [ ${#found[@]} -eq 0 ] ||
    run python evaluate.py --figure "$OUT/$1.png" --runs "${found[@]}" --y avg pass entropy length "${@:3}"
}

figures() {  # those of the paper: training of the cells, then GRPO; FLOPs; mixes; the curriculum
  local size
  for size in 4b 8b; do
    draw "cells_128_$size" "^table1_.*_${size}_"
    draw "cells_4096_$size" "^table2_.*_${size}_"
    draw "grpo_128_$size" "^table5_.*_${size}_"
    draw "grpo_4096_$size" "^table6_.*_${size}_"
  done
  draw figure6 "^table1_.*_4b_reverse" --x tflops
  draw figure7 "^figure7_|^table2_student_4b_"
  draw curriculum "^table3_|^table2_student_.*_reverse"
}

commands() {
  local known name picked found
  known=$(awk '/^[a-z]/ { print $1 }' <<< "$ROWS")
  EVALS=()
  for picked in "${PICKED[@]:-}"; do
    found=$(awk -v picked="$picked" 'picked == "" || $0 == picked || index($0, picked "/") == 1' <<< "$known")
    [ -n "$found" ] || fail "--row $picked: no such row or table; --list shows them"
    for name in $found; do emit "$name"; done
  done
  if [ ${#EVALS[@]} -gt 0 ]; then
    begin results 0
    run python evaluate.py --table "${EVALS[@]}"
    figures
  fi
}

ALL=$(commands)
python -m recipes.plan --prompt_tokens 92 --tflops_per_second "$TFLOPS_PER_SECOND" --gpu_gib "$GPU_GIB" \
  "${PLAN[@]}" <<< "$ALL"
