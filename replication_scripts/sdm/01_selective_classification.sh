#!/usr/bin/env bash
# Selective classification with SDM estimators (SDM Activations, Table 1; version 2).
#
# Expected:  the region admits fewer rows than a softmax threshold, at α and above per class, and
#            next to none of the far rows. Published shares: sdm/published.csv.
# Hardware:  SCALE=tiny seconds on one core, small a minute; paper: cached features of a 4 B model.
# Resume:    run it again.
#
#   SCALE=tiny|small|paper [MODEL=…] [DATA=claims.jsonl] bash replication_scripts/sdm/01_selective_classification.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SCALE=${SCALE:-tiny}
ROOT=${ROOT:-runs/replication}
PYTHON=${PYTHON:-python}

case "$SCALE" in
  tiny | small)
    # One command caches the hidden states of the built-in claims and reports on them.
    KIND=$([ "$SCALE" = tiny ] && echo tiny || echo tour)
    "$PYTHON" -m sdm.reexpress --config "configs/sdm/reexpress.$KIND.yaml" --root "$ROOT"
    ;;
  paper)
    # 1. Hidden states of the documents, mean over tokens and last token: once per model.
    "$PYTHON" -m sdm.cache_hidden_states --model "${MODEL:-microsoft/Phi-3.5-mini-instruct}" \
      --data "${DATA:?a JSONL file with id, label, document, split, group}" \
      --answers No Yes --out "$ROOT/features" --root "$ROOT"
    # 2. Ten shuffles, 200 epochs; you should see the shares of the table in report.md.
    "$PYTHON" -m sdm.reexpress --config configs/sdm/reexpress.paper.yaml \
      --input "$ROOT/features" --root "$ROOT"
    ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
