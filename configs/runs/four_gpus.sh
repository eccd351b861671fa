#!/usr/bin/env bash
# README.md's run on four GPUs of one machine, starting from documents. From the repository's root:
#
#     DATA=corpus.jsonl configs/runs/four_gpus.sh [further flags of train_distributed.py]
#
# Builds the tokenizer and token files, then trains, with validation every 1,000 steps and at the end, and with weights
# kept permanently at each of BabyLM's word counts. The same command resumes an interrupted run. Further flags come last
# and override those below.
#
# All flags from --hybrid_numerator to --seed except --checkpoint_words are docs/training.md's: one masked GPU, three
# causal ones. Other flags keep their defaults: the batch grows from a quarter of its size, rows have a constant length.
# These settings are from no paper; scaled by the square root of the batch size to that of babylm_10m.sh, the learning
# rate is 0.016, against 0.0141 there (docs/choosing.md).
set -euo pipefail

DATA=${DATA:?the documents to train on: JSONL or text, a file or a folder}
VALIDATION=${VALIDATION:-}                   # documents to validate on; default: 5 % of those in DATA
OUT=${OUT:-four_gpus}                        # folder for tokenizer, token files and runs
CONFIG=${CONFIG:-configs/base_32k.json}      # base with twice the vocabulary; also sets the tokenizer's size
GPUS=${GPUS:-4}                              # on a machine without GPUs, the number of processes
MAX_STEPS=${MAX_STEPS:-40000}
LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-32}     # rows per micro-batch on a GPU; does not affect the result
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default; set here, it prints no warning

configs/runs/prepare.sh "$DATA" "$OUT" "$CONFIG" "$VALIDATION"

exec torchrun --standalone --nproc_per_node="$GPUS" train_distributed.py \
    --train_path="$OUT/train.safetensors" \
    --valid_path="$OUT/validation.safetensors" \
    --config_file="$CONFIG" \
    --tokenizer_path="$OUT/tokenizer.json" \
    --output_dir="$OUT/runs" \
    --name="four_gpus" \
    --hybrid_numerator=1 \
    --hybrid_denominator=4 \
    --seq_length=128 \
    --local_batch_size="$LOCAL_BATCH_SIZE" \
    --global_batch_size=128 \
    --learning_rate=1e-3 \
    --max_steps="$MAX_STEPS" \
    --optimizer="lamb" \
    --weight_decay=0.1 \
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
