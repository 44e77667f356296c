#!/usr/bin/env bash
# Matrices without activations: pictures, embeddings, weights, runtime (LPLR, arXiv 2310.11028, §5).
#
# Expected:  LPLR-SVD below direct SVD in error everywhere, LPLR below direct SVD from two bits per
#            entry on where the singular values fall fast, and many times faster than both; on the
#            flat spectra of weights LPLR is the worst. LPLR-Q has the smallest error but for weights
#            at one bit and the phantom at four.
# Hardware:  SCALE=tiny seconds, small a minute on one core; paper: a GPU for a Llama-size model.
# Resume:    run it again.
#
#   SCALE=tiny|small|paper [MODEL=…] [IMAGE=photo.png] bash replication_scripts/lplr_q/matrix_compression.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/replication}
PYTHON=${PYTHON:-python}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.matrix_compression --config configs/lplr_q/matrix_compression.tiny.yaml \
        --root "$ROOT"
    ;;
small)
    # Phantom, mixture and hidden states, all layers of the built-in model, seconds over ranks.
    "$PYTHON" -m lplr_q.matrix_compression --root "$ROOT"
    ;;
paper)
    # 1. A picture: you should see the structure at one bit per pixel where rounding shows a mask.
    "$PYTHON" -m lplr_q.matrix_compression --task images --naive-bits 1 2 4 --bits 8 --size 1000 \
        ${IMAGE:+--image "$IMAGE"} --root "$ROOT"
    # 2. Neighbours among hidden states of a large model.
    "$PYTHON" -m lplr_q.matrix_compression --task neighbours --naive-bits 1 2 4 --bits 8 \
        --model "${MODEL:?folder or hub id, the paper has Llama-7B}" \
        --text "${TEXT:?text file or data set}" --stored 50000 --queries 10000 --root "$ROOT"
    # 3. Every linear layer: row-sketch, column-sketch and naive errors per budget.
    "$PYTHON" -m lplr_q.matrix_compression --task layers --naive-bits 2 4 8 --bits 8 16 \
        --methods dsvd lsvd lplr --no-affine --model "$MODEL" --root "$ROOT"
    # 4. Seconds and error over ranks.
    "$PYTHON" -m lplr_q.matrix_compression --task curve --width 4096 --ranks 16 64 256 1024 \
        --bits 8 --root "$ROOT"
    ;;
*)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
