#!/usr/bin/env bash
# The published pipeline in six blocks: Hessians, Frobenius sweep, compression, perplexity,
# zero-shot accuracy, fine-tuning.   [CALDERA, arXiv 2405.18886, Tables 1-5]
#
# Expected:  SCALE=tiny: random weights; every block runs, no figure means anything.
#            SCALE=small: the built-in model; LPLR-LDLQ (2.5 bits) below QuIP#-style (2.0) below
#            GPTQ (2.5) in median error; perplexity over 16 bit 1.00 on documents and 1.10 on
#            library text (QuIP#-style 1.12), there 1.05 after the signs and 0.99 after L and R.
#            SCALE=paper: Llama-2-7B, 2-bit Q, rank 256, 4-bit factors (2.4 bits): WikiText-2
#            perplexity 6.19 in the paper (users get 6.47), QuIP# 8.23, 16 bit 5.12; after
#            fine-tuning 5.55 at 2.7 bits. lplr_q/published.csv has the rest.
# Hardware:  tiny: seconds per block. small: three minutes on one CPU core. paper: one GPU of 40 GB and
#            200 GB of disk, a day. A killed block goes on where it was.
#
#   SCALE=tiny|small|paper bash replication_scripts/lplr_q.sh
#   BLOCKS="hessians quantise ppl" SCALE=paper BASE_MODEL=… bash replication_scripts/lplr_q.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --------------------------------------------------------------------------- to be set for paper
BASE_MODEL=${BASE_MODEL:-SET_ME}            # folder or hub id, e.g. meta-llama/Llama-2-7b-hf
HESSIAN_SAVE_PATH=${HESSIAN_SAVE_PATH:-SET_ME} # folder for the Hessians: some 90 GB for 7 B
MODEL_SAVE_PATH=${MODEL_SAVE_PATH:-SET_ME}  # folder for the compressed models
DATA_DIR=${DATA_DIR:-SET_ME}                # folder with <task>.jsonl, or "hub"
DEVICE=${DEVICE:-cuda}
CONTEXT=4096 DEVSET=rp1t DEVSET_SIZE=256 RANK=256 FT_RANK=64

SCALE=${SCALE:-small}
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs/replication-$SCALE}
BLOCKS=${BLOCKS:-hessians frobenius quantise ppl zeroshot finetune}

case "$SCALE" in
tiny | small)
    BASE_MODEL=micro-mistral
    HESSIAN_SAVE_PATH=$ROOT/hessians
    MODEL_SAVE_PATH=$ROOT/models
    DEVICE=cpu
    COMMON=(--root "$ROOT" --device cpu --threads 1)
    ;;
paper)
    for name in BASE_MODEL HESSIAN_SAVE_PATH MODEL_SAVE_PATH DATA_DIR; do
        if [ "${!name}" = SET_ME ]; then
            echo "$name is not set: SCALE=paper needs BASE_MODEL, HESSIAN_SAVE_PATH," \
                "MODEL_SAVE_PATH and DATA_DIR (see the top of this script)" >&2
            exit 2
        fi
    done
    COMMON=(--root "$ROOT" --device "$DEVICE")
    ;;
*)
    echo "SCALE=$SCALE: choose tiny, small or paper" >&2
    exit 2
    ;;
esac

run() { "$PYTHON" -m "lplr_q.$1" "${@:2}" "${COMMON[@]}"; }
tiny() { run "$1" --config "configs/lplr_q/$1.tiny.yaml"; }

# 1. You should see one file per layer input, and how many tokens each has seen.
hessians() {
    case "$SCALE" in
    tiny) tiny save_hessians ;;
    small) run save_hessians --base-model "$BASE_MODEL" --hessian-save-path "$HESSIAN_SAVE_PATH" ;;
    paper)
        run save_hessians --base-model "$BASE_MODEL" --hessian-save-path "$HESSIAN_SAVE_PATH" \
            --data.devset "$DEVSET" --data.devset-size "$DEVSET_SIZE" --data.context-length "$CONTEXT"
        ;;
    esac
}

# 2. You should see the error of every method step by step, LPLR-LDLQ the lowest on most matrices.
frobenius() {
    case "$SCALE" in
    tiny) tiny fro_norm_experiment ;;
    small) run fro_norm_experiment --model "$BASE_MODEL" --layers 0 --hessians "$HESSIAN_SAVE_PATH" ;;
    paper)
        run fro_norm_experiment --config configs/lplr_q/fro_norm_experiment.paper.yaml \
            --model "$BASE_MODEL" --hessians "$HESSIAN_SAVE_PATH"
        ;;
    esac
}

# 3. You should see two model folders with their bits per weight, the files' bytes included.
quantise() {
    local common=(--base-model "$BASE_MODEL" --hessian-save-path "$HESSIAN_SAVE_PATH")
    case "$SCALE" in
    tiny) tiny quantize_save ;;
    small)
        run quantize_save "${common[@]}" --target-bpw 2.5 --ft-rank 0 \
            --model-save-path "$MODEL_SAVE_PATH/lplr"
        run quantize_save "${common[@]}" --method quip-sharp --model-save-path "$MODEL_SAVE_PATH/quip"
        ;;
    paper)
        run quantize_save "${common[@]}" --Q-bits 2 --L-bits 4 --R-bits 4 --rank "$RANK" \
            --iters 20 --lplr-iters 50 --ft-rank "$FT_RANK" --seed 42 \
            --model-save-path "$MODEL_SAVE_PATH/lplr"
        run quantize_save "${common[@]}" --method quip-sharp --seed 42 \
            --model-save-path "$MODEL_SAVE_PATH/quip"
        ;;
    esac
}

# 4. You should see perplexity beside that of the 16-bit model, with a paired interval.
ppl() {
    if [ "$SCALE" = tiny ]; then
        tiny eval_ppl
        return
    fi
    local windows=()
    if [ "$SCALE" = paper ]; then windows=(--datasets wikitext2 c4 --seqlen "$CONTEXT"); fi
    for method in lplr quip; do
        run eval_ppl --model-save-path "$MODEL_SAVE_PATH/$method" --base-model "$BASE_MODEL" \
            ${windows[@]+"${windows[@]}"}
    done
}

# 5. You should see one accuracy per task, near that of the 16-bit model.
zeroshot() {
    local tasks=(--tasks winogrande rte piqa arc_easy arc_challenge)
    case "$SCALE" in
    tiny) tiny eval_zeroshot ;;
    small)
        for method in lplr quip; do
            run eval_zeroshot --model-save-path "$MODEL_SAVE_PATH/$method" --tasks microworld \
                --base-model "$BASE_MODEL"
        done
        ;;
    paper)
        if [ "$DATA_DIR" != hub ]; then tasks+=(--data-dir "$DATA_DIR"); fi
        for method in lplr quip; do
            run eval_zeroshot --model-save-path "$MODEL_SAVE_PATH/$method" "${tasks[@]}"
        done
        ;;
    esac
}

# 6. You should see perplexity before and after; after is lower on the text that was trained on.
finetune() {
    case "$SCALE" in
    tiny)
        tiny finetune_rht
        tiny finetune_wikitext
        ;;
    small)
        run finetune_rht --config configs/lplr_q/finetune_rht.small.yaml --name tuned-signs \
            --base-model "$BASE_MODEL" --model-save-path "$MODEL_SAVE_PATH/lplr"
        run finetune_wikitext --config configs/lplr_q/finetune_wikitext.small.yaml \
            --name tuned-components --base-model "$BASE_MODEL" --ft-rank 2 --learning-rate 1e-3 \
            --model-save-path "$ROOT/lplr_q/tuned-signs/model"
        ;;
    paper)
        run finetune_rht --base-model "$BASE_MODEL" --model-save-path "$MODEL_SAVE_PATH/lplr" --epochs 1
        run finetune_wikitext --model-save-path "$MODEL_SAVE_PATH/lplr" --ft-rank "$FT_RANK" \
            --dataset wikitext2
        ;;
    esac
}

for block in $BLOCKS; do
    case "$block" in
    hessians | frobenius | quantise | ppl | zeroshot | finetune) "$block" ;;
    *)
        echo "block $block: choose from hessians frobenius quantise ppl zeroshot finetune" >&2
        exit 2
        ;;
    esac
done
