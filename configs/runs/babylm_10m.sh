#!/usr/bin/env bash
# GPT-BERT small (30M parameters) on 10 million words: BabyLM's strict-small track. From the repository's root:
#
#     DATA=train_10M.jsonl VALIDATION=dev.jsonl configs/runs/babylm_10m.sh [further flags of train_distributed.py]
#
# Builds the tokenizer and token files, then trains, with validation every 1,000 steps and at the end, and with weights
# kept permanently at each of BabyLM's word counts. The same command resumes an interrupted run. Further flags come last
# and override those below.
#
# Architecture, optimizer, schedules and batch size are those of Charpentier & Samuel 2024 (arXiv 2410.24159), from the
# defaults of pretraining/train_10m.py in github.com/ltgoslo/gpt-bert; with its corpus,
# ltg/babylm-2024-baby-cosmo-fine-10m, BLiMP was 81.2. The last steps have 32,768 rows of 128 tokens (4.2 million), the
# first a quarter of that: 20 billion tokens in total, more than a thousand epochs. BabyLM allows ten since 2025;
# docs/choosing.md explains the changes for that.
set -euo pipefail

DATA=${DATA:?the documents to train on: JSONL or text, a file or a folder}
VALIDATION=${VALIDATION:-}                   # documents to validate on; default: 5 % of those in DATA
OUT=${OUT:-babylm_10m}                       # folder for tokenizer, token files and runs
CONFIG=${CONFIG:-configs/small.json}         # published; also sets the tokenizer's size, 8,192
GPUS=${GPUS:-auto}                           # default: all of this machine; without GPUs, the number of processes
MAX_STEPS=${MAX_STEPS:-7812}                 # published: 31,250 / 4
LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-256}    # rows per micro-batch on a GPU; published; does not affect the result
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default; set here, it prints no warning

# Published: its tokenizer's normalizer and splitter, with the space in front that BabyLM's reading tasks count on.
configs/runs/prepare.sh "$DATA" "$OUT" "$CONFIG" "$VALIDATION" --like=upstream

# 15/16 masked is published, there with each GPU training one objective; here each GPU trains both if the number of GPUs
# is not divisible by 16, with the same loss. --mask_history is what the published code always does. Ours: validation on
# 262,144 tokens, spread over the file (--validation_steps=0 takes all rows), --checkpoint_words, --resume.
exec torchrun --standalone --nproc_per_node="$GPUS" train_distributed.py \
    --train_path="$OUT/train.safetensors" \
    --valid_path="$OUT/validation.safetensors" \
    --config_file="$CONFIG" \
    --tokenizer_path="$OUT/tokenizer.json" \
    --output_dir="$OUT/runs" \
    --name="babylm_10m" \
    --hybrid_numerator=15 \
    --hybrid_denominator=16 \
    --seq_length=128 \
    --seq_length_growth \
    --local_batch_size="$LOCAL_BATCH_SIZE" \
    --global_batch_size=32768 \
    --batch_reduction=4 \
    --optimizer="lamb" \
    --learning_rate=1.41e-2 \
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
    --mask_history \
    --mixed_precision \
    --validate_every=1000 \
    --save_every=1000 \
    --checkpoint_words=babylm \
    --seed=42 \
    --resume=auto \
    "$@"
