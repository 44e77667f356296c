#!/usr/bin/env bash
# Bits × method → perplexity over 16 bit, every method at the same total bits per weight.
#
#   SCALE=tiny   random weights, seconds
#   SCALE=small  micro-mistral and micro-mamba2, about five CPU minutes; MODEL=folder adds a third,
#                judged on text drawn from itself
#   SCALE=paper  MODEL on CALIBRATION and EVALUATION at 2, 3 and 4 bits: one GPU, hours
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
OUTPUT=${OUTPUT:-$ROOT/table.csv}
table() { "$PYTHON" benchmarks/lplr_q/table.py --root "$ROOT" --output "$OUTPUT" "$@"; }

case "$SCALE" in
tiny)
    table --model tiny:mistral --bits 2 --calibration own --evaluation own --threads 1 \
        --calibration-tokens 512 --evaluation-tokens 512 --length 64 --overhead 0.32
    ;;
small)
    # the reader should see the allocated trellis lowest everywhere, RTN highest
    table --model micro-mistral --threads 1
    table --model micro-mamba2 --threads 1
    if [ -n "${MODEL:-}" ]; then
        table --model "$MODEL" --calibration own --evaluation own --overhead 0.32 --threads 1
    fi
    ;;
paper)
    : "${MODEL:?folder or hub id}"
    : "${CALIBRATION:?text file or data set for the Hessians}"
    : "${EVALUATION:?text file or data set, WikiText-2 test for the table}"
    table --model "$MODEL" --calibration "$CALIBRATION" --evaluation "$EVALUATION" --length 4096 \
        --calibration-tokens 1048576 --evaluation-tokens 262144
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
