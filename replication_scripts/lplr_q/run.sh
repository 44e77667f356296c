#!/usr/bin/env bash
# Perplexity against bits per weight: CALDERA (arXiv 2405.18886) Tables 1-2, and the built-in model.
#
#   SCALE=tiny   random weights, seconds: every stage runs
#   SCALE=small  the built-in model at 2, 2.5, 3 and 4 bits, about a minute on two cores
#   SCALE=paper  Llama-2-7B with rank 64, 128 and 256 (2.1, 2.2, 2.4 bits): one GPU, many hours; give
#                MODEL, CALIBRATION and EVALUATION. Expected WikiText-2 perplexity 7.37, 6.76, 6.19.
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}

case "$SCALE" in
tiny)
    "$PYTHON" -m lplr_q.run --config configs/lplr_q/run.tiny.yaml --root "$ROOT"
    ;;
small)
    # the reader should see LPLR-LDLQ below GPTQ and RTN at 2 and 2.5 bits, all near 1 at 4 bits
    "$PYTHON" -m lplr_q.run --config configs/lplr_q/run.tour.yaml --root "$ROOT"
    ;;
paper)
    : "${MODEL:?folder or hub id of Llama-2-7B}"
    : "${CALIBRATION:?text file or data set for the Hessians}"
    : "${EVALUATION:?text file or data set, WikiText-2 test for the table}"
    "$PYTHON" -m lplr_q.run --config configs/lplr_q/run.paper.yaml --root "$ROOT" \
        --model "$MODEL" --calibration "$CALIBRATION" --evaluation "$EVALUATION"
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
