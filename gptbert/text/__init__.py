"""From text to token ids.

- `corpus`: documents streamed out of text, JSON and tables.
- `corpus_config`: its settings, which commands have as flags.
- `document_reader`: documents out of one file after the other; bad lines are counted.
- `corpus_files`: the files to read, and those of a folder that are left out.
- `forecast`: how many documents they hold, told from a part of them.
- `file_kind`, `text_kind`: what a file is, by its first bytes.
- `opened_file`: a file unpacked and decoded as it streams.
- `lines`: numbered lines; long ones in pieces.
- `json_values`: JSON over several lines.
- `long_json`: a line or value of JSON that is too long for memory.
- `long_text`: its document, on the disk and cut.
- `documents`: the text of a line or row, and where a long one is cut.
- `tally`: what reading came to, and what of it is worth a warning.
- `tables`: rows of Parquet and Arrow files and of Hugging Face datasets.
- `tokenizer_file`: a tokenizer's JSON file, as untrusted content.
- `tokenizer`: loading it, normalized; its special tokens and its hash.
- `special_tokens`: the special tokens and their ids.
- `splitting`: normalizer, splitter and decoder of a new tokenizer.
- `tokenizer_parts`: a tokenizer without the space in front of texts, or without its normal form.
- `encoding`: documents and sentences to token ids, and back; what of a text no token has.
"""
