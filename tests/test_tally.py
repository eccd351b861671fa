"""The figures that end a command: what would show a mistake; past a limit a warning, and then an error."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gptbert.errors import InputError
from gptbert.text import tally
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.special_tokens import SPECIAL_TOKENS
from gptbert.text.tally import Tally
from tests.test_file_kinds import put
from tests.texts import jsonl
from tokenize_scripts import train_tokenizer as tokenizer_script
from tokenize_scripts.split_corpus import SplitConfig, split_corpus
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, learn, train_tokenizer


def word_tokenizer(path, words, size=0):
    """A tokenizer that knows these words and nothing else, with names up to `size` tokens."""
    vocabulary = [*SPECIAL_TOKENS, *words]
    vocabulary += [f"[{number}]" for number in range(len(vocabulary), size)]
    model = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=SPECIAL_TOKENS[0])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def run(script, config, capsys, **settings):
    """The command's last line, and its warnings."""
    capsys.readouterr()
    script(config(**settings))
    captured = capsys.readouterr()
    lines = captured.err.replace("\r", "\n").splitlines()
    return captured.out.splitlines()[-1], [line.removeprefix("warning: ") for line in lines if "warning: " in line]


def test_a_tokenizer_is_tried_on_the_start_of_its_corpus_alone(tmp_path, monkeypatch):
    """Which is kept in memory meanwhile."""
    texts = [f"document {number}" for number in range(9)]
    monkeypatch.setattr(tokenizer_script, "SAMPLED_CHARACTERS", len("".join(texts[:3])))
    sample = []
    corpus = Corpus(CorpusConfig(input=(put(tmp_path, "a.jsonl", jsonl(texts)),)))
    assert list(tokenizer_script._announce_merges(corpus, sample)) == texts
    assert sample == texts[:3]


@pytest.mark.parametrize(("unknown", "warned"), [(0, False), (1, False), (20, True), (490, True), (510, None)])
def test_unknown_tokens(tmp_path, capsys, unknown, warned):
    words = ["known"] * (1000 - unknown) + ["alien"] * unknown
    file = put(tmp_path, "a.jsonl", jsonl([" ".join(words), "known"]))
    settings = {
        "input": (file,),
        "tokenizer_path": word_tokenizer(tmp_path / "tokenizer.json", ["known"]),
        "output": tmp_path / "t.safetensors",
    }
    if warned is None:
        with pytest.raises(InputError, match=r"tokenizer.json: 51% of the tokens are unknown; nothing was written"):
            tokenize_corpus(TokenizeConfig(**settings))
        assert not settings["output"].exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "tokenizer.json"]
        return
    line, warnings = run(tokenize_corpus, TokenizeConfig, capsys, **settings)
    assert f"; {unknown / 1001:.2%} of the tokens are unknown; " in line
    assert [warning for warning in warnings if "unknown" in warning] == (
        [f"{unknown / 1001:.1%} of the tokens are unknown: the tokenizer lacks characters of the text"] * warned
    )


@pytest.mark.parametrize(("length", "size", "warned"), [(1, 40, False), (1, 1000, False), (20, 1000, True)])
def test_bytes_per_token(tmp_path, capsys, length, size, warned):
    """A token for every letter, or for twenty."""
    words = ["a" * length]
    file = put(tmp_path, "a.jsonl", jsonl([" ".join(words * 99)]))
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", words, size)
    settings = {"input": (file,), "tokenizer_path": tokenizer, "output": tmp_path / "t"}
    line, warnings = run(tokenize_corpus, TokenizeConfig, capsys, **settings)
    assert f"({length + 98 / 99:.2f} bytes per token)" in line
    assert (f"{length + 98 / 99:.2f} bytes per token, with a vocabulary of {size:,}" in "".join(warnings)) == warned


def test_a_tokenizer_for_another_language(tmp_path, capsys):
    english = [f"{a}{b}{c}{d} " for a in "bcdfghst" for b in "aeiou" for c in "lmnrst" for d in "aeiou"]
    learn(iter(["".join(english) * 2]), 1200, 2).save(str(tmp_path / "tokenizer.json"))
    file = put(tmp_path, "a.txt", "Паром опаздывает, пожалуйста, подождите на причале.".encode())
    settings = {"input": (file,), "tokenizer_path": tmp_path / "tokenizer.json", "output": tmp_path / "t"}
    _, warnings = run(tokenize_corpus, TokenizeConfig, capsys, **settings)
    assert any("bytes per token, with a vocabulary of 1," in warning for warning in warnings)


@pytest.mark.parametrize("script", [split_corpus, train_tokenizer])
def test_skipped_cut_repeated_and_other_fields(tmp_path, capsys, script):
    config, outputs = {
        split_corpus: (SplitConfig, {"output_dir": tmp_path / "out", "valid_fraction": 0, "test_fraction": 0}),
        train_tokenizer: (TrainTokenizerConfig, {"output": tmp_path / "t.json", "vocab_size": 290}),
    }[script]
    file = put(tmp_path, "a.jsonl", jsonl([f"one document {i}" for i in range(50)]))
    line, warnings = run(script, config, capsys, input=(file,), **outputs)
    assert line.endswith("0.00% were skipped, 0 documents cut, 0.0% repeat others")
    assert warnings == []
    file.write_bytes(jsonl(["the same document"] * 40 + ["another"] * 9) + b"a bad line\n")
    line, warnings = run(script, config, capsys, input=(file,), on_error="skip", **outputs)
    assert "2.00% were skipped, 0 documents cut, 95.9% repeat others" in line
    assert warnings == [
        "2.0% of the text was left out as bad lines; look at those named above",
        "96% of the documents repeat others",
    ]
    file.write_bytes(json.dumps({"text": "A title", "body": "x" * 1000}).encode() + b"\n")
    line, warnings = run(script, config, capsys, input=(file,), **outputs)
    assert "0.7% of the bytes read are text" in line
    assert "other fields" in "".join(warnings)
    file.write_bytes(jsonl(["word " * 300_000]))
    line, warnings = run(script, config, capsys, input=(file,), **outputs)
    assert "1 document cut" in line
    assert "1 document of more than 1,048,576 characters cut into several" in warnings


def test_a_split_without_documents_is_a_warning(tmp_path, capsys):
    file = put(tmp_path, "a.jsonl", jsonl(["one"]))
    _, warnings = run(split_corpus, SplitConfig, capsys, input=(file,), output_dir=tmp_path / "out", test_fraction=0)
    assert warnings == ["no document went to validation"]


def test_skipped_lines_of_a_text_are_shares_of_its_lines(tmp_path, capsys):
    file = put(tmp_path, "a.txt", b"a line of text\n" * 300 + b"caf\xe9\n" + b"a line of text\n" * 300)
    flags = {"output_dir": tmp_path / "out", "valid_fraction": 0, "test_fraction": 0}
    line, warnings = run(split_corpus, SplitConfig, capsys, input=(file,), on_error="skip", **flags)
    assert "0.17% were skipped" in line
    assert warnings == []


def test_repeated_texts_are_counted_in_bounded_memory(monkeypatch):
    exact = Tally()
    for number in range(3000):
        exact.add(f"text {number % 1000}")
    assert exact.repeated.exact
    assert exact.repeated_share == pytest.approx(2 / 3)
    monkeypatch.setattr(tally, "SAMPLED_TEXTS", 500)
    sampled = Tally()
    for _ in range(3):
        for number in range(20_000):
            sampled.add(f"text {number}")
            assert len(sampled.repeated._hashes) <= 500
    assert not sampled.repeated.exact
    assert sampled.repeated_share == pytest.approx(2 / 3, abs=0.03)
    for _ in range(60_000):
        sampled.add("one text")
    assert sampled.repeated_share == pytest.approx(5 / 6, abs=0.03), "however often a single text comes"


MEANT = ["Le café était fermé.", "“Où est-il ?”", "It’s closed.", "Паром опаздывает."]
READ_WRONGLY = [
    "Le cafÃ© Ã©tait fermÃ©.",
    "â€œOÃ¹ est-il ?â€\x9d",
    "Itâ€™s closed.",
    MEANT[3].encode().decode("latin-1"),
]
LATIN = ["MAÇÃ É «ótimo»", "Ça «va»", "LÊ 3 °C", "À 5 €", "naïve Â", "“é”", "ÅÄÖ åäö"]


@pytest.mark.parametrize(
    ("texts", "warned"),
    [
        (READ_WRONGLY, True),
        ([*READ_WRONGLY, *["plain"] * 300], True),
        ([*READ_WRONGLY, *["plain"] * 400], False),  # of so few the share says nothing
        ([*READ_WRONGLY, *MEANT], False),
        (MEANT, False),
        (LATIN, False),
        (["plain"], False),
    ],
)
def test_text_that_was_read_in_another_encoding_is_told(texts, warned):
    counted = Tally()
    for text in texts:
        counted.add(text)
    found = [warning for warning in counted.warnings() if "another encoding" in warning]
    assert len(found) == warned
    assert not warned or found[0].startswith("100% of the documents that are not ASCII are UTF-8")


@pytest.mark.parametrize("text", READ_WRONGLY)
def test_what_was_meant_is_shown(text):
    counted = Tally()
    counted.add(text)
    assert counted.example == (text, MEANT[READ_WRONGLY.index(text)])


@pytest.mark.parametrize("text", ["b'caf\\xc3\\xa9'", 'b"it\'s"', "['a boat', 'a clock']", '{"text": "a boat"}'])
def test_notation_of_programs_is_told(tmp_path, capsys, text):
    """In place of text: str() of bytes, and lines of JSON that were written as strings."""
    for lines, warned in (([text, text + " ", "A boat."], True), ([text, "A boat.", "b'", "'", "[a]"], False)):
        file = put(tmp_path, "a.jsonl", jsonl(lines))
        _, warnings = run(split_corpus, SplitConfig, capsys, input=(file,), output_dir=tmp_path / str(warned))
        assert any("take the texts out of them" in warning for warning in warnings) == warned


def test_a_thousand_million_different_documents_repeat_none():
    """A sample of them: those whose hashes lack 2^16 bits. Of 32 bits, one in nine would have that of another."""
    repeated, mask = tally.RepeatedTexts(), 2**16 - 1
    texts = np.random.default_rng(0).bytes(15_000 * 20)
    keys = [tally._hash(texts[start : start + 20]) & ~mask for start in range(0, len(texts), 20)]
    repeated.mask = mask
    for key in keys:  # as those of 10^9 documents that the sample keeps
        if not key & repeated.mask:
            repeated.add(key)
    assert abs(repeated.share(15_000 * (mask + 1))) < 0.03
