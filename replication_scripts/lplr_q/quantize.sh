#!/usr/bin/env bash
# Hessians, then whole models saved by LPLR-LDLQ and by the QuIP# baseline (CALDERA, arXiv
# 2405.18886, Tables 1-2; QuIP#, arXiv 2402.04396).
#
#   SCALE=tiny   one block of random weights, seconds: every stage runs
#   SCALE=small  the built-in model at 2.5 bits and 2-bit QuIP#, about two minutes on one core
#   SCALE=paper  MODEL on CALIBRATION, rank 256, 4-bit factors, 20 rounds: one GPU, many hours;
#                several GPUs with DEVICES="cuda:0 cuda:1"
#
# Hessians and models stay below $ROOT; the same command continues after any interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
HESSIANS=${HESSIANS:-$ROOT/lplr_q/hessians-$SCALE}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.save_hessians --config configs/lplr_q/save_hessians.tiny.yaml \
        --root "$ROOT" --hessian-save-path "$HESSIANS"
    "$PYTHON" -m lplr_q.quantize_save --config configs/lplr_q/quantize_save.tiny.yaml \
        --root "$ROOT" --hessian-save-path "$HESSIANS"
    ;;
small)
    "$PYTHON" -m lplr_q.save_hessians --threads 1 --root "$ROOT" --hessian-save-path "$HESSIANS"
    for method in lplr-ldlq quip-sharp gptq; do
        # the reader should see the mean error rise from lplr-ldlq to gptq at no more bits
        "$PYTHON" -m lplr_q.quantize_save --threads 1 --root "$ROOT" --method "$method" \
            --target-bpw 2.5 --hessian-save-path "$HESSIANS"
    done
    ;;
paper)
    : "${MODEL:?folder or hub id, e.g. meta-llama/Llama-2-7b-hf}"
    : "${CALIBRATION:?text file or data set for the Hessians}"
    "$PYTHON" -m lplr_q.save_hessians --root "$ROOT" --base-model "$MODEL" \
        --hessian-save-path "$HESSIANS" --data.devset "$CALIBRATION" \
        --data.devset-size 256 --data.context-length 4096 --data.batch-size 2
    # shellcheck disable=SC2086
    "$PYTHON" -m lplr_q.quantize_save --root "$ROOT" --base-model "$MODEL" \
        --hessian-save-path "$HESSIANS" --Q-bits 2 --L-bits 4 --R-bits 4 --rank 256 --iters 20 \
        --lplr-iters 50 --hadamard-transform ${DEVICES:+--devices $DEVICES}
    # shellcheck disable=SC2086
    "$PYTHON" -m lplr_q.quantize_save --root "$ROOT" --base-model "$MODEL" \
        --hessian-save-path "$HESSIANS" --method quip-sharp ${DEVICES:+--devices $DEVICES}
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
