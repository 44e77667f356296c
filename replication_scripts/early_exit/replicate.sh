#!/usr/bin/env bash
# Early exits at three scales: SCALE=tiny (seconds), small (built-in models, minutes), paper (GPU).
#   SCALE=small replication_scripts/early_exit/replicate.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python}"
ROOT="${ROOT:-runs}"
SCALE="${SCALE:-small}"

case "$SCALE" in
tiny)
    "$PYTHON" -m early_exit.train --config configs/early_exit/train.tiny.yaml \
        --root "$ROOT" --name replicate-tiny-train
    "$PYTHON" -m early_exit.sweep_thresholds --config configs/early_exit/sweep_thresholds.tiny.yaml \
        --exits "$ROOT/early_exit/replicate-tiny-train" --accounting dynamax \
        --root "$ROOT" --name replicate-tiny-sweep
    "$PYTHON" -m early_exit.inference --config configs/early_exit/inference.tiny.yaml \
        --exits "$ROOT/early_exit/replicate-tiny-train" --root "$ROOT" --name replicate-tiny-text
    ;;
small)
    for model in micro-mistral micro-mamba2; do
        "$PYTHON" -m early_exit.train --model "$model" --exits 2 3 4 5 6 \
            --root "$ROOT" --name "replicate-$model-train"
        for criterion in gate margin; do
            "$PYTHON" -m early_exit.sweep_thresholds --model "$model" --criterion "$criterion" \
                --exits "$ROOT/early_exit/replicate-$model-train" --accounting dynamax \
                --policies propagate defer skip \
                --root "$ROOT" --name "replicate-$model-$criterion"
        done
        "$PYTHON" -m early_exit.inference --exits "$ROOT/early_exit/replicate-$model-train" \
            --root "$ROOT" --name "replicate-$model-text"
    done
    ;;
paper)
    "$PYTHON" -m early_exit.train --config configs/early_exit/train.published.yaml \
        --root "$ROOT" --name replicate-mistral-7b-train
    "$PYTHON" -m early_exit.sweep_thresholds --model mistralai/Mistral-7B-v0.3 \
        --exits "$ROOT/early_exit/replicate-mistral-7b-train" --accounting dynamax \
        --data HuggingFaceFW/fineweb-edu:sample-10BT --policies propagate copy_token defer \
        --root "$ROOT" --name replicate-mistral-7b-sweep
    ;;
*)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
