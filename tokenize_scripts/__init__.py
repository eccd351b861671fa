"""Commands that turn text into a tokenizer and into token files; none of them needs torch."""
