#!/usr/bin/env bash
# Which objective moves a prompt into a model, and what the retention guard is worth.
#   [design study in sycomode/published.csv; Cartridges arXiv 2506.06266; prompt distillation 2412.14964]
#
# Expected:  language modelling on the prompt and matching one position recover about nothing; KL
#            self-study recovers nearly everything; without the guard in-context ability is lost.
# Hardware:  tiny and small: two CPU cores, seconds and a quarter of an hour. paper: one GPU, hours.
#
#   SCALE=tiny|small|paper bash replication_scripts/sycomode/objectives.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python}"
SCALE="${SCALE:-small}"
ROOT="${ROOT:-runs/replication-$SCALE}"

run() { echo "\$ $PYTHON -m $*"; "$PYTHON" -m "$@" --root "$ROOT"; }

case "$SCALE" in
tiny)
    run sycomode.consolidate --config configs/sycomode/consolidate.tiny.yaml
    for n in 1 2 3; do
        run "sycomode.experiment$n" --config "configs/sycomode/experiment$n.tiny.yaml"
    done
    ;;
small)
    # 1. the original's three experiments, as published: nothing moves
    for n in 1 2 3; do
        for objective in causal_language_model distill_on_output_logits distill_on_hidden_layer \
            distill_on_all_hidden_layers distill_on_generated_text; do
            run "sycomode.experiment$n" --recipe seed --objective-function "$objective" --n-items 3
        done
    done
    # 2. every student under KL self-study with the guard, beside the baselines
    run sycomode.consolidate --config configs/sycomode/consolidate.default.yaml
    # 3. other objectives for the same student
    for objective in sft_selfstudy last_position_kl hidden_all; do
        run sycomode.consolidate --config configs/sycomode/consolidate.default.yaml --students lora \
            --objective "$objective"
    done
    # 4. the guard taken away: recovery stays, in-context ability goes
    run sycomode.consolidate --config configs/sycomode/consolidate.default.yaml --students lora --guard-weight 0
    ;;
paper)
    MODEL="${MODEL:-meta-llama/Llama-3.1-8B}"
    PROMPT="${PROMPT:?a text file to consolidate}"
    QUESTIONS="${QUESTIONS:?questions on it, JSONL with question and answer}"
    run sycomode.consolidate --config configs/sycomode/consolidate.paper.yaml --model "$MODEL" \
        --prompt-file "$PROMPT" --questions-file "$QUESTIONS"
    ;;
*)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
