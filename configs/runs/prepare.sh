#!/usr/bin/env bash
# From documents to token files, for the recipes in this folder. From the repository's root:
#
#     configs/runs/prepare.sh DATA OUT CONFIG [VALIDATION [further flags of train_tokenizer.py]]
#
# DATA and VALIDATION are files or folders of documents; without VALIDATION, 5 % of DATA's documents are held out.
# Writes to the folder OUT: tokenizer.json, with the vocabulary size of CONFIG, and train and validation .safetensors.
# Existing files are kept: files are written atomically, so they are complete. Tokenizing also counts the words that
# --checkpoint_words needs.
set -euo pipefail

data=${1:?the documents to train on} out=${2:?the folder to write to} config=${3:?the JSON file of the model}
validation=${4:-} tokenizer_flags=("${@:5}")
train=$data

# A name stands for a file of configs/, as it does for --config_file. Looked at before the work, which may take long.
[[ -f $config || ! -f configs/$config.json ]] || config=configs/$config.json
[[ -f $config ]] || { echo "error: CONFIG is $config: no such file, nor configs/$config.json" >&2 && exit 1; }

if [[ -z $validation ]]; then
    train=$out/split/train.jsonl validation=$out/split/validation.jsonl
    [[ -e $out/split/test.jsonl ]] || # written last of the three; empty, since its fraction is 0
        python tokenize_scripts/split_corpus.py --input "$data" --output_dir "$out/split" --test_fraction 0
fi
[[ -e $out/tokenizer.json ]] || python tokenize_scripts/train_tokenizer.py --input "$train" \
    --output "$out/tokenizer.json" \
    --vocab_size "$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' "$config")" \
    "${tokenizer_flags[@]}"
for part in train validation; do
    compgen -G "$out/$part*.safetensors" >/dev/null || # a large corpus is split into several files
        python tokenize_scripts/tokenize_corpus.py --input "${!part}" --tokenizer_path "$out/tokenizer.json" \
            --output "$out/$part.safetensors"
done
