#!/usr/bin/env bash
# The run of four GPUs on one machine that README.md shows, from documents on. From the repository's root:
#
#     DATA=corpus.jsonl configs/runs/four_gpus.sh [further flags of train_distributed.py]
#
# It makes tokenizer and token files, and trains, with validation every 1,000 steps and at the end, and with the weights
# saved for good at each of BabyLM's numbers of words. The same command goes on where it was stopped. Further flags come
# last and so replace those below.
#
# All flags from --hybrid_numerator to --seed but --checkpoint_words are README.md's: one masked GPU, three causal ones.
# What it does not name keeps its default: rows grow from a quarter of the batch, and stay of one length. No paper has
# this run; by the square root of the batch, its rate is 0.016 at that of babylm_10m.sh, which has 0.0141
# (docs/choosing.md).
set -euo pipefail

DATA=${DATA:?the documents to train on: JSONL or text, a file or a folder}
VALIDATION=${VALIDATION:-}                   # documents to validate on; without it 5 % of DATA's
OUT=${OUT:-four_gpus}                        # folder of tokenizer, token files and runs
CONFIG=${CONFIG:-configs/base_32k.json}      # base with twice the vocabulary; it sets the tokenizer's size too
GPUS=${GPUS:-4}                              # on a machine without, the number of processes
MAX_STEPS=${MAX_STEPS:-40000}
LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-32}     # rows at once on a GPU, of no effect on what is learnt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set it too, and say so

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
