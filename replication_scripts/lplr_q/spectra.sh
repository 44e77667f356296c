#!/usr/bin/env bash
# Singular values of every sublayer over the layers, of W and of W as its inputs see it: what rank
# pays (CALDERA, arXiv 2405.18886, section 2).
#
#   SCALE=tiny   random weights, seconds
#   SCALE=small  the built-in model, half a minute on one core
#   SCALE=paper  MODEL with the Hessians in HESSIANS (save_hessians), energy of 256 components
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.sv_profile --config configs/lplr_q/sv_profile.tiny.yaml --root "$ROOT"
    ;;
small)
    # the reader should see the dashed line, W C, fall faster than the plain one in every panel
    "$PYTHON" -m lplr_q.sv_profile --threads 1 --root "$ROOT"
    ;;
paper)
    : "${MODEL:?folder or hub id, e.g. meta-llama/Llama-2-7b-hf}"
    : "${HESSIANS:?folder written by python -m lplr_q.save_hessians for this model}"
    "$PYTHON" -m lplr_q.sv_profile --root "$ROOT" --rank 256 \
        --model "$MODEL" --hessians "$HESSIANS"
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
