#!/usr/bin/env bash
# GPT-BERT base (119M parameters) on 100 million words: the strict track of BabyLM 2024. From the repository's root:
#
#     DATA=train_100M.jsonl VALIDATION=dev.jsonl configs/runs/babylm_100m.sh [further flags of train_distributed.py]
#
# Runs babylm_10m.sh with different settings; variables, files and resuming are the same.
#
# Architecture, optimizer, schedules and batch size are those of Charpentier & Samuel 2024 (arXiv 2410.24159), from the
# defaults of pretraining/train_100m.py in github.com/ltgoslo/gpt-bert; with its corpus,
# ltg/babylm-2024-baby-cosmo-fine-100m, BLiMP was 86.1. Architecture, learning rate, steps and local batch size differ
# from those for 10 million words: 41 billion tokens in total, some three hundred epochs. BabyLM allows ten since 2025;
# docs/choosing.md explains the changes for that.
set -euo pipefail

export OUT=${OUT:-babylm_100m}                   # folder for tokenizer, token files and runs
export CONFIG=${CONFIG:-configs/base.json}       # published; also sets the tokenizer's size, 16,384
export MAX_STEPS=${MAX_STEPS:-15625}             # published: 31,250 / 2
export LOCAL_BATCH_SIZE=${LOCAL_BATCH_SIZE:-128} # rows per micro-batch on a GPU; published; does not affect the result

exec configs/runs/babylm_10m.sh --name="babylm_100m" --learning_rate=1e-2 "$@"
