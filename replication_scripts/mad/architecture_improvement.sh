#!/usr/bin/env bash
# From Hyena to striped multi-head Hyena with experts, step by step.   [arXiv 2403.17844]
#
# Expected:  SCALE=paper: every step raises the mean score; published .66, .73, .77, .77 (read off a
#            figure, mad/published.csv). SCALE=small: the same steps on the mini benchmark, whose
#            scores are of its own design; the order of neighbouring steps is not certain there.
# Hardware:  tiny: seconds. small: two CPU cores, 4 × 7 runs. paper: GPUs, 4 × 396 runs; GPUS=4
#            spreads them. A killed script goes on where it was.
#
#   SCALE=tiny|small|paper bash replication_scripts/mad/architecture_improvement.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/replication-$SCALE}
case "$SCALE" in
  tiny) FLAGS=(--config configs/mad/architecture_improvement.tiny.yaml) ;;
  small) FLAGS=(--config configs/mad/architecture_improvement.mini.yaml) ;;
  paper) FLAGS=(--preset full --protocol mad-paper) ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
if [ -n "${GPUS:-}" ]; then FLAGS+=(--gpus "$GPUS" --workers "${WORKERS:-$GPUS}"); fi

# 1. You should see the variants with their mean accuracy, lowest first.
python -m mad.architecture_improvement "${FLAGS[@]}" --root "$ROOT" \
  --results-path "$ROOT/results" --figures-path "$ROOT/figures"

# 2. You should see mad_scores_hyena_improvement.csv and the figure of two panels.
ls "$ROOT/results" "$ROOT/figures"
