"""A small evaluation folder, each file of the form that BabyLM's evaluation reads."""

import csv
import json
import math
from pathlib import Path

import numpy as np

TIE = ("It is the same.", "It is the same.")
BLIMP = {  # by file: field, UID, term and pairs
    "agreement": ("syntax_semantics", "agreement", "verbs", [
        ("The statement is executed.", "The statement are executed."),
        ("It returns a value.", "It return a value."),
        TIE,
        ("The names are bound.", "The names is bound."),
    ]),
    "order": ("syntax", "word order", "words", [("This is the name of a file.", "This is name the of a file.")]),
}  # fmt: skip
SUPPLEMENT = {
    "hypernym": [("A list is a sequence.", "A sequence is a list."), TIE],
    "turn_taking": [("A: Is it true? B: It is.", "A: Is it true? B: I is.")],
}
EWOK = [
    ("spatial", "direct", "The file is in the folder.", "The folder holds the file.", "The file holds the folder."),
    ("spatial", "indirect", "The key is below.", "Look down.", "Look up."),
    ("social", "direct", "Ann likes Bob.", "She smiles.", "She frowns."),
]
ENTITIES = {
    "regular": [(0, ["the ball", "the bell", "the key", "nothing"]), (1, ["a hat", "a cat"]), (1, ["a key", "a tie"])],
    "ambiref": [(0, ["the big box and the hat", "nothing", "a sock"])],
}
COMPS = {
    "comps_base": [("A dog", "A table", "can bark."), ("A knife", "A cloud", "is sharp.")],
    "comps_wugs": [("A wug is a dog. Therefore, a wug", "A wug is a chair. Therefore, a wug", "can bark.")],
    "comps_wugs_dist-before": [("A wug is a dog. A dax is a cup. A wug", "A dax is a dog. A wug", "barks.")],
    "comps_wugs_dist-in-between": [("A wug is a dog. A dax", "A wug is a cup. A dax", "barks.")],
}
WUGS = {
    "wug_adj_nominalization": [
        ("wugable", "ity", "ness", 0.9), ("daxive", "ity", "ness", 0.4), ("tovous", "ity", "ness", 0.4),
        ("blickish", "ity", "ness", 0.1), ("zorable", "ity", "ness", 0.7),
    ],
    "wug_past_tense": [("spling", "ed", "t", 0.5), ("gleed", "ed", "d", 0.8), ("nace", "d", "t", 0.65)],
}  # fmt: skip
MEASURES = ["RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound", "self_paced_reading_time", "ELAN", "LAN", "N400",
            "P600", "EPNP", "PNP"]  # fmt: skip
SENTENCES = [
    "The parser reads a logical line and yields extraordinary tokens", "Names refer to objects of every kind",
    "An exception that nobody catches ends the program", "A list holds null or more values",
]  # fmt: skip
CURVES = {  # of children: a, b and c of their sigmoids
    "the": (1.0, 0.6, 19.0), "of": (0.9, 0.4, 22.0), "to": (1.1, 0.8, 25.0), "in": (1.0, 0.5, 21.0),
    "is": (0.3, 0.5, 20.0),
}  # fmt: skip
LINES = ["I see the ", " There is a", "every"]


def write_folder(data: Path) -> Path:
    """Write all tasks, under the names of `full_eval`."""
    for stem, (field, uid, term, pairs) in BLIMP.items():
        extra = {"field": field, "UID": uid, "linguistics_term": term, "pairID": "0"}
        write_lines(data / f"blimp_filtered/{stem}.jsonl", [_pair(*pair) | extra for pair in pairs])
    for stem, pairs in SUPPLEMENT.items():
        write_lines(data / f"supplement_filtered/{stem}.jsonl", [_pair(*pair) for pair in pairs])
    for number, (domain, kind, context, right, wrong) in enumerate(EWOK):
        item = {
            "Domain": domain, "ContextType": kind, "ContextDiff": "x", "TargetDiff": "y", "Context1": context,
            "Context2": "unused", "Target1": right, "Target2": wrong,
        }  # fmt: skip
        write_lines(data / f"ewok_filtered/{domain}-{number}.jsonl", [item])
    for stem, items in ENTITIES.items():
        lines = [
            {"input_prefix": "Box 0 has the ball. Box 1 has the hat. Box 0 has ", "options": texts, "numops": number}
            for number, texts in items
        ]
        write_lines(data / f"entity_tracking/{stem}.jsonl", lines)
    for stem, items in COMPS.items():
        names = ("prefix_acceptable", "prefix_unacceptable", "property_phrase")
        write_lines(data / f"comps/{stem}.jsonl", [dict(zip(names, item, strict=True)) for item in items])
    for folder, items in WUGS.items():
        lines = [
            {"sentences": f"It is its {stem}{one}.\tIt is its {stem}{other}.", "ratio": ratio}
            for stem, one, other, ratio in items
        ]
        write_lines(data / f"{folder}/{folder}.jsonl", lines)
    write_reading(data / "reading/reading_data.csv")
    write_acquisition(data / "aoa")
    return data


def write_lines(file: Path, values: list[dict]) -> None:
    """Write a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_reading(file: Path) -> None:
    """Write a table with missing measures, contexts and previous words."""
    rng = np.random.default_rng(3)
    file.parent.mkdir(parents=True)
    names = ["", "item", "word", "prev_item", "prev_word", "length", "prev_length", "context_length", "Subtlex_log10"]
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow([*names, *MEASURES])
        for sentence in SENTENCES:
            words = sentence.split()
            for number, word in enumerate(words):
                previous = words[number - 1] if number else ""
                row = [number, " ".join(words[:number]), word, " ".join(words[: number - 1]) if number > 1 else ""]
                row += [previous, len(word), len(previous) or "", number, round(float(rng.uniform(1, 6)), 3)]
                measured = [f"{300 + 9 * len(word) + value:.2f}" for value in rng.normal(0, 40, len(MEASURES))]
                if number == 2:
                    measured[4], measured[7] = "", "NA"
                writer.writerow([*row, *measured])


def write_acquisition(folder: Path) -> None:
    """Write words in contexts, and the shares of children who know them: exact sigmoids, with one share missing."""
    folder.mkdir(parents=True)
    contexts = {word: [{"context": text} for text in LINES] for word in [*CURVES, "unasked", "a"]}
    (folder / "cdi_childes.json").write_text(json.dumps(contexts))
    ages = range(16, 31)
    with (folder / "cdi_human.csv").open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["word", "category", *ages])
        for word, (a, b, c) in {**CURVES, "elsewhere": (1.0, 0.5, 20.0)}.items():
            shares = [f"{a / (1 + math.exp(-b * (age - c))):.10f}" for age in ages]
            writer.writerow([word, "noun", *shares[:5], "", *shares[6:]])


def _pair(good: str, bad: str) -> dict:
    return {"sentence_good": good, "sentence_bad": bad}
