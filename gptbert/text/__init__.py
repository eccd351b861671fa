"""From text to token ids.

- `corpus`: documents streamed out of JSONL and text files.
- `tables`: rows of Parquet and Arrow files and of Hugging Face datasets.
- `tokenizer`: the tokenizer file, its special tokens and its hash.
- `encoding`: documents and sentences to token ids.
"""
