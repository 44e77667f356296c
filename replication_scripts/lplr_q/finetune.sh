#!/usr/bin/env bash
# Fine-tuning of a compressed model: CALDERA (arXiv 2405.18886) Tables 3 to 5.
#
#   SCALE=tiny   a layer of random weights, seconds per script
#   SCALE=small  micro-mistral at 2.1 bits: signs first, then L and R of the result; some minutes on
#                one core. Perplexity of library text should fall at each of the two steps.
#   SCALE=paper  MODEL (compressed folder) of BASE (the original): signs, then WikiText-2, RTE and
#                Winogrande from there. GPUS processes per machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
GPUS=${GPUS:-1}

case "$SCALE" in
tiny)
    for script in finetune_rht finetune_wikitext finetune_glue finetune_winogrande; do
        "$PYTHON" -m "lplr_q.$script" --config "configs/lplr_q/$script.tiny.yaml" --root "$ROOT"
    done
    ;;
small)
    "$PYTHON" -m lplr_q.finetune_rht --config configs/lplr_q/finetune_rht.small.yaml \
        --root "$ROOT" --name finetune_rht-small
    "$PYTHON" -m lplr_q.finetune_wikitext --config configs/lplr_q/finetune_wikitext.small.yaml \
        --root "$ROOT" --name finetune_wikitext-small --base-model micro-mistral \
        --model-save-path "$ROOT/lplr_q/finetune_rht-small/model"
    ;;
paper)
    : "${MODEL:?folder of the compressed model}"
    : "${BASE:?folder or hub id of the original}"
    # or: accelerate launch --config_file configs/lplr_q/accelerate.fsdp.yaml --num_processes "$GPUS"
    run() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m "$@"; }
    run lplr_q.finetune_rht --config configs/lplr_q/finetune_rht.paper.yaml --root "$ROOT" \
        --name finetune_rht-paper --base-model "$BASE" --model-save-path "$MODEL"
    for script in finetune_wikitext finetune_glue finetune_winogrande; do
        run "lplr_q.$script" --config "configs/lplr_q/$script.paper.yaml" --root "$ROOT" \
            --base-model "$BASE" --model-save-path "$MODEL"
    done
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac
