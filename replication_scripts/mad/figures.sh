#!/usr/bin/env bash
# Figures and rankings of all benchmarks that are finished.   [arXiv 2403.17844; 2406.06484]
#
# Expected:  without any benchmark the published points alone: mean score against perplexity, rank
#            correlation -1 over five models. With benchmarks a heat map and bars of each design.
# Hardware:  one CPU core, seconds, at every scale: nothing is trained.
#
#   SCALE=tiny|small|paper bash replication_scripts/mad/figures.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/replication-$SCALE}
case "$SCALE" in
  tiny | small | paper) ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac

# 1. You should see the number of benchmarks found and the fit through the published points.
python -m mad.plot --root "$ROOT"

# 2. You should see every model with its score, by design.
python -m mad.leaderboard --root "$ROOT"

# 3. You should see what was drawn.
ls "$ROOT"/mad/plot-*/figures "$ROOT"/mad/leaderboard-*/tables
