#!/usr/bin/env bash
# From documents to token files, for the recipes beside this file, from the repository's root:
#
#     configs/runs/prepare.sh DATA OUT CONFIG [VALIDATION]
#
# DATA and VALIDATION are files or folders of documents; without VALIDATION, 5 % of DATA's documents are kept for it. In
# the folder OUT there will be tokenizer.json, with as many tokens as the model of CONFIG knows, and train and
# validation .safetensors. What is there already is not made again: files appear when they are complete, or not at all.
# Tokenizing counts words, by which --checkpoint_words saves.
set -euo pipefail

data=${1:?the documents to train on} out=${2:?the folder to write to} config=${3:?the JSON file of the model}
validation=${4:-}
train=$data

if [[ -z $validation ]]; then
    train=$out/split/train.jsonl validation=$out/split/validation.jsonl
    [[ -e $out/split/test.jsonl ]] || # the last of the three to appear; with no share of its own it is empty
        python tokenize_scripts/split_corpus.py --input "$data" --output_dir "$out/split" --test_fraction 0
fi
[[ -e $out/tokenizer.json ]] || python tokenize_scripts/train_tokenizer.py --input "$train" \
    --output "$out/tokenizer.json" \
    --vocab_size "$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' "$config")"
for part in train validation; do
    compgen -G "$out/$part*.safetensors" >/dev/null || # a large corpus becomes several files
        python tokenize_scripts/tokenize_corpus.py --input "${!part}" --tokenizer_path "$out/tokenizer.json" \
            --output "$out/$part.safetensors"
done
