#!/usr/bin/env bash
# Table 4 of arXiv 2605.16826: what a checkpoint knows beyond mathematics, by lm-evaluation-harness.
#
#   pip install "lm_eval[hf]==0.4.13"               once: the release that this was tested with
#   bash recipes/general.sh out/run/final           writes out/run/general; --help shows the flags
#   python evaluate.py --table out/run/general      its row
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m recipes.general "$@"
