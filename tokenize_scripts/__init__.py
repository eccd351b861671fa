"""Commands that turn text into a tokenizer and token files, without torch."""
