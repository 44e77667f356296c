#!/usr/bin/env bash
# Perplexity and zero-shot accuracy: CALDERA (arXiv 2405.18886) Table 1.
#
#   SCALE=tiny   random weights, seconds
#   SCALE=small  the built-in model as it is, or MODEL; seconds
#   SCALE=paper  MODEL (compressed folder) against BASE (the original) on WikiText-2, C4 and the five
#                tasks; data sets from the hub, one GPU
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.eval_ppl --config configs/lplr_q/eval_ppl.tiny.yaml --root "$ROOT"
    "$PYTHON" -m lplr_q.eval_zeroshot --config configs/lplr_q/eval_zeroshot.tiny.yaml --root "$ROOT"
    ;;
small)
    "$PYTHON" -m lplr_q.eval_ppl --model-save-path "${MODEL:-micro-mistral}" --root "$ROOT"
    "$PYTHON" -m lplr_q.eval_zeroshot --model-save-path "${MODEL:-micro-mistral}" --root "$ROOT"
    ;;
paper)
    : "${MODEL:?folder of the compressed model}"
    : "${BASE:?folder or hub id of the original}"
    "$PYTHON" -m lplr_q.eval_ppl --config configs/lplr_q/eval_ppl.paper.yaml --root "$ROOT" \
        --model-save-path "$MODEL" --base-model "$BASE"
    "$PYTHON" -m lplr_q.eval_zeroshot --config configs/lplr_q/eval_zeroshot.paper.yaml \
        --root "$ROOT" --model-save-path "$MODEL"
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
