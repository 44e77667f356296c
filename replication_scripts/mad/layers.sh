#!/usr/bin/env bash
# Layer primitives on synthetic tasks at a size of your choice.   [arXiv 2403.17844, MAD protocol]
#
# Expected:  SCALE=small: attention recalls nearly everything, multi-head Hyena most, linear attention
#            less, a window of two tokens and a perceptron cannot; every mixer but the perceptron can
#            memorise, linear attention without positions only in part.
#            SCALE=paper: published accuracies in mad/published.csv (Transformer 94.1 % in-context
#            recall, 85.2 % memorization; MH Hyena 99.0 %, 89.4 %, averages over difficulty settings;
#            this runs the baselines only).
# Hardware:  tiny and small: two CPU cores, seconds and one minute. paper: one GPU, hours.
#
#   SCALE=tiny|small|paper bash replication_scripts/mad/layers.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/replication-$SCALE}
case "$SCALE" in
  tiny) KIND=tiny ;;
  small) KIND=tour ;;
  paper) KIND=paper ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac

# 1. You should see one line of training per stack and task, then the accuracies side by side.
python -m mad.compare --config "configs/mad/compare.$KIND.yaml" --root "$ROOT"

# 2. You should see what was drawn: learning curves, bars with intervals, and the tables behind them.
ls "$ROOT"/mad/compare-*/figures "$ROOT"/mad/compare-*/tables
