#!/usr/bin/env bash
# Error of every sublayer under every method, step by step: the Frobenius-norm experiment of the
# published package (CALDERA, arXiv 2405.18886, section 6).
#
#   SCALE=tiny   random weights, seconds: every method runs
#   SCALE=small  three layers of the built-in model at 2.5 bits, about a minute on one core
#   SCALE=paper  the published setting on MODEL with the Hessians in HESSIANS (save_hessians): 2-bit
#                Q, rank 256, 4-bit factors, 20 rounds
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.fro_norm_experiment \
        --config configs/lplr_q/fro_norm_experiment.tiny.yaml --root "$ROOT"
    ;;
small)
    # the reader should see medians of LPLR-LDLQ below QuIP# below GPTQ below RTN in every sublayer;
    # where the spectrum is steep (k_proj of layer 0) L R alone does better still
    "$PYTHON" -m lplr_q.fro_norm_experiment --threads 1 --root "$ROOT"
    ;;
paper)
    : "${MODEL:?folder or hub id, e.g. meta-llama/Llama-2-7b-hf}"
    : "${HESSIANS:?folder written by python -m lplr_q.save_hessians for this model}"
    "$PYTHON" -m lplr_q.fro_norm_experiment \
        --config configs/lplr_q/fro_norm_experiment.paper.yaml --root "$ROOT" \
        --model "$MODEL" --hessians "$HESSIANS"
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
