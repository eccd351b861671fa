"""A few documents, and the JSONL line of each, for tests of reading and tokenizing."""

import json

DOCUMENTS = [
    "The cat sat on the mat.",
    "Two lines,\nof one document.",
    "naïve café 猫 🐈",
    "<mask> is <s>plain</s> text",
]


def jsonl(documents):
    return "".join(json.dumps({"id": 1, "text": document}) + "\n" for document in documents).encode()
