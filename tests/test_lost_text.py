"""What of a text its tokens do not have: a share of its characters, whatever the number of unknown tokens."""

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from gptbert.errors import InputError
from gptbert.text import encoding
from gptbert.text.encoding import LostText, lost_characters
from gptbert.text.special_tokens import SPECIAL_TOKENS
from tests.test_file_kinds import put
from tests.test_tally import run, word_tokenizer
from tests.texts import jsonl
from tests.tokenizer_kinds import SPLITTINGS, UNK
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import learn

ONE_WORD = "語" * 900


def test_one_unknown_token_for_a_long_stretch_is_a_warning_and_for_most_of_the_text_an_error(tmp_path, capsys):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ["known"])
    settings = {"tokenizer_path": tokenizer, "output": tmp_path / "t.safetensors"}
    file = put(tmp_path, "a.jsonl", jsonl(["known " * 200, f"known {ONE_WORD}"]))
    line, warnings = run(tokenize_corpus, TokenizeConfig, capsys, input=(file,), **settings)
    assert "0.50% of the tokens are unknown" in line
    assert warnings == [
        "47.2% of the text has no known token: the tokenizer leaves it out, or has one unknown token for a long stretch"
    ]
    settings["output"].unlink()
    file.write_bytes(jsonl(["known " * 100, ONE_WORD]))
    with pytest.raises(InputError, match=r"64% of the text has no known token; nothing was written"):
        tokenize_corpus(TokenizeConfig(input=(file,), **settings))
    assert not settings["output"].exists()


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": normalizers.Replace(Regex("[0-9]"), "")},
        {"pre_tokenizer": pre_tokenizers.Split(Regex("[0-9]"), "removed")},
        {},
    ],
)
def test_what_has_no_token_at_all_is_lost_too(part):
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], fuse_unk=True, **UNK))
    for name, value in part.items():
        setattr(tokenizer, name, value)
    assert lost_characters(tokenizer, "aaa123", 0) == (6, 3)
    assert lost_characters(tokenizer, "", 0) == (0, 0)


@pytest.mark.parametrize("flags", SPLITTINGS)
def test_own_tokenizers_lose_nothing(flags):
    text = "Cafe\u0301 na\u00efve  \n ﬁne x² हिन्दी में 각 \N{ROCKET}\u200d\N{FIRE}\t<mask> 語"
    tokenizer = learn(iter([text] * 2), 300, 2, SPLITTINGS[flags])
    assert lost_characters(tokenizer, text, SPECIAL_TOKENS.index("<unk>"))[1] == 0


def test_of_a_long_corpus_a_part_is_looked_at_that_stands_for_the_rest(monkeypatch):
    monkeypatch.setattr(encoding, "FIRST", 1000)
    looked_at = []

    def count(_, text, __):
        looked_at.append(text)
        return len(text), text.count("b")

    monkeypatch.setattr(encoding, "lost_characters", count)
    lost = LostText(None, 0)
    documents = ["a" * 100] * 2000 + ["b" * 100] * 2000 + ["b" * 1_000_000]
    assert list(lost.watched(documents)) == documents
    assert sum(map(len, looked_at)) < 50_000
    assert lost.share == pytest.approx(12 / 14, abs=0.02)
