#!/usr/bin/env bash
# Scores of sequence models on the six synthetic tasks.   [arXiv 2403.17844, MAD protocol]
#
# Expected:  SCALE=small: the mini benchmark; attention and the gated delta rule solve recall, no
#            model without a mixer does. Its scores are of its own design.
#            SCALE=paper: 66 settings × 6 sweep points per model; published means in
#            mad/published.csv (Transformer 74.5 %, Hyena 66.0 %, MH Hyena 73.2 %, Mamba 69.3 %,
#            GLA 60.0 %, DeltaNet 71.8 %). Re-runs of others differ by 0.5 to 3.3 points.
# Hardware:  tiny: seconds. small: two CPU cores, seven runs per model. paper: GPUs, 396 runs per
#            model; GPUS=4 spreads them, SHARD=1/8 makes an eighth (then once without). A killed
#            script goes on where it was.
#
#   SCALE=tiny|small|paper bash replication_scripts/mad/benchmark.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/replication-$SCALE}
case "$SCALE" in
  tiny) CONFIG=configs/mad/benchmark.tiny.yaml ;;
  small) CONFIG=configs/mad/benchmark.mini.yaml ;;
  paper) CONFIG=configs/mad/benchmark.paper.yaml ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
FLAGS=()
if [ -n "${GPUS:-}" ]; then FLAGS+=(--gpus "$GPUS" --workers "${WORKERS:-$GPUS}"); fi

# 1. You should see the number of runs and of training tokens.
python -m mad.benchmark --config "$CONFIG" --root "$ROOT" --dry-run

# 2. You should see one accuracy per model and task; a shard prints the runs it made.
if [ -n "${SHARD:-}" ]; then FLAGS+=(--shard "$SHARD"); fi
python -m mad.benchmark --config "$CONFIG" --root "$ROOT" ${FLAGS[@]+"${FLAGS[@]}"}
if [ -n "${SHARD:-}" ]; then exit 0; fi

# 3. You should see the models ranked, published ones beside those of the full grid.
python -m mad.leaderboard --root "$ROOT"
