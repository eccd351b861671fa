"""From text to token ids.

- `corpus`: documents streamed out of JSONL and text files.
- `tables`: rows of Parquet and Arrow files and of Hugging Face datasets.
- `tokenizer`: the tokenizer file and its hash.
- `special_tokens`: the special tokens and their ids.
- `encoding`: documents and sentences to token ids.
"""
