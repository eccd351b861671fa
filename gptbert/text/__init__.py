"""From text to token ids.

- `corpus`: documents streamed out of JSONL and text files.
- `tables`: rows of Parquet and Arrow files and of Hugging Face datasets.
- `tokenizer_file`: a tokenizer's JSON file, as untrusted content.
- `tokenizer`: loading it, normalized; its special tokens and its hash.
- `special_tokens`: the special tokens and their ids.
- `encoding`: documents and sentences to token ids.
"""
