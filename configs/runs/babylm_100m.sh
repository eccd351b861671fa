#!/usr/bin/env bash
# GPT-BERT base (119M parameters) on 100 million words: the strict track of BabyLM 2024. From the repository's root:
#
#     DATA=train_100M.jsonl VALIDATION=dev.jsonl configs/runs/babylm_100m.sh [further flags of train_distributed.py]
#
# It makes tokenizer and token files, and trains, with validation every 1,000 steps and at the end, and with the weights
# saved for good at each of BabyLM's numbers of words. The same command goes on where it was stopped. Further flags come
# last and so replace those below.
#
# Published are shape, optimizer, schedules and batch: Charpentier & Samuel 2024 (arXiv 2410.24159), by the defaults of
# pretraining/train_100m.py of github.com/ltgoslo/gpt-bert; with its corpus, ltg/babylm-2024-baby-cosmo-fine-100m, BLiMP
# was 86.1. Shape, learning rate, steps and rows at once on a GPU are other than in babylm_10m.sh: 41 billion tokens in
# all, some three hundred passes. BabyLM allows ten since 2025; docs/choosing.md says what to change for that.
set -euo pipefail

DATA=${DATA:?the documents to train on: JSONL or text, a file or a folder}
VALIDATION=${VALIDATION:-}                   # documents to validate on; without it 5 % of DATA's
OUT=${OUT:-babylm_100m}                      # folder of tokenizer, token files and runs
CONFIG=${CONFIG:-configs/base.json}          # published; it sets the tokenizer's size too, 16,384
GPUS=${GPUS:-auto}                           # all of this machine; on one without, the number of processes
MAX_STEPS=${MAX_STEPS:-15625}                # published: 31,250 / 2
LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-128}    # rows at once on a GPU; published, and of no effect on what is learnt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set it too, and say so

configs/runs/prepare.sh "$DATA" "$OUT" "$CONFIG" "$VALIDATION"

# 15/16 masked is published, there with whole GPUs for either objective; where 16 does not divide their number, each
# trains both here, and the loss is the same. Ours: validation on the whole file, --checkpoint_words, --resume.
exec torchrun --standalone --nproc_per_node="$GPUS" train_distributed.py \
    --train_path="$OUT/train.safetensors" \
    --valid_path="$OUT/validation.safetensors" \
    --config_file="$CONFIG" \
    --tokenizer_path="$OUT/tokenizer.json" \
    --output_dir="$OUT/runs" \
    --name="babylm_100m" \
    --hybrid_numerator=15 \
    --hybrid_denominator=16 \
    --seq_length=128 \
    --seq_length_growth \
    --local_batch_size="$LOCAL_BATCH_SIZE" \
    --global_batch_size=32768 \
    --batch_reduction=4 \
    --optimizer="lamb" \
    --learning_rate=1e-2 \
    --weight_decay=0.1 \
    --optimizer_beta1=0.9 \
    --optimizer_beta2=0.98 \
    --optimizer_eps=1e-8 \
    --max_gradient=2.0 \
    --ema_decay=0.999 \
    --z_loss_weight=1e-4 \
    --max_steps="$MAX_STEPS" \
    --warmup_proportion=0.016 \
    --cooldown_proportion=0.016 \
    --mask_p_start=0.3 \
    --mask_p_end=0.15 \
    --mask_random_p=0.1 \
    --mask_keep_p=0.1 \
    --mixed_precision \
    --validate_every=1000 \
    --save_every=1000 \
    --checkpoint_words=babylm \
    --seed=42 \
    --resume=auto \
    "$@"
