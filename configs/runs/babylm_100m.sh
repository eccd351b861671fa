#!/usr/bin/env bash
# GPT-BERT base (119M parameters) on 100 million words: the strict track of BabyLM 2024. From the repository's root:
#
#     DATA=train_100M.jsonl VALIDATION=dev.jsonl configs/runs/babylm_100m.sh [further flags of train_distributed.py]
#
# It is babylm_10m.sh with what differs: the same variables, files and ways to go on.
#
# Published are shape, optimizer, schedules and batch: Charpentier & Samuel 2024 (arXiv 2410.24159), by the defaults of
# pretraining/train_100m.py of github.com/ltgoslo/gpt-bert; with its corpus, ltg/babylm-2024-baby-cosmo-fine-100m, BLiMP
# was 86.1. Shape, learning rate, steps and rows at once on a GPU are other than for 10 million words: 41 billion tokens
# in all, some three hundred passes. BabyLM allows ten since 2025; docs/choosing.md says what to change for that.
set -euo pipefail

export OUT=${OUT:-babylm_100m}                   # folder of tokenizer, token files and runs
export CONFIG=${CONFIG:-configs/base.json}       # published; it sets the tokenizer's size too, 16,384
export MAX_STEPS=${MAX_STEPS:-15625}             # published: 31,250 / 2
export LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-128} # rows at once on a GPU; published, and of no effect on what is learnt

exec configs/runs/babylm_10m.sh --name="babylm_100m" --learning_rate=1e-2 "$@"
