"""Documents that are in a tokenizer's normal form are encoded without its normalizer: to the same ids."""

import unicodedata
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from gptbert.text import encoding
from gptbert.text.encoding import encode_documents
from gptbert.text.tokenizer_parts import is_in_form, without_normal_form, without_prefix
from tests.texts import ARABIC, ENGLISH, GREEK, HINDI
from tokenize_scripts.train_tokenizer import learn

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
DECOMPOSED, COMPOSED = "cafe\N{COMBINING ACUTE ACCENT}", "café"
UNASSIGNED = "a\u0378"  # in every version of Unicode so far
MARKS = st.characters(categories=["Mn", "Mc", "Lm", "No"])


@cache
def tokenizer_of(form):
    texts = [GREEK, HINDI, ARABIC, ENGLISH]
    tokenizer = learn(iter(text for text in texts for _ in range(3)), 700, 1)
    tokenizer.normalizer = getattr(normalizers, form)() if form else None
    return tokenizer


def ids_of(tokenizer, texts):
    found = []
    for ids, lengths, _ in encode_documents(Tokenizer.from_str(tokenizer.to_str()), texts):
        ends = lengths.cumsum()
        found += [ids[end - length : end].tolist() for length, end in zip(lengths, ends, strict=True)]
    return found


@given(
    st.sampled_from(FORMS),
    st.lists(st.text() | st.text(MARKS | st.sampled_from("aeo 가각각" + GREEK)) | st.just(UNASSIGNED), min_size=1),
)
def test_any_texts_in_any_order_get_the_normalizers_ids(form, texts):
    tokenizer = tokenizer_of(form)
    expected = [encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert ids_of(tokenizer, texts) == expected


@pytest.mark.parametrize("form", FORMS)
def test_the_copy_leaves_a_text_as_it_is(form):
    copy, found = without_normal_form(tokenizer_of(form))
    assert found == form
    assert copy.normalizer is None
    ids = [copy.encode(text, add_special_tokens=False).ids for text in (DECOMPOSED, COMPOSED)]
    assert ids[0] != ids[1]  # so a text that goes to it wrongly shows


def test_only_texts_that_are_surely_in_the_form_go_without(monkeypatch):
    texts = ["plain", COMPOSED, DECOMPOSED, "“quotes” – and 猫 🐈", UNASSIGNED, "\U00020000", ""]
    asked = []
    monkeypatch.setattr(encoding, "is_in_form", lambda text, form: asked.append(is_in_form(text, form)) or asked[-1])
    ids = ids_of(tokenizer_of("NFC"), texts)
    assert asked == [True, True, False, True, False, False, True]
    assert ids[1] == ids[2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [GREEK, HINDI, ARABIC, ENGLISH])
def test_a_text_in_a_form_is_found_to_be(form, text):
    assert is_in_form(unicodedata.normalize(form, text), form)


def test_other_normalizers_are_always_applied():
    assert without_normal_form(tokenizer_of(None)) is None
    tokenizer = Tokenizer.from_str(tokenizer_of("NFC").to_str())
    for normalizer in (normalizers.Lowercase(), normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])):
        tokenizer.normalizer = normalizer
        assert without_normal_form(tokenizer) is None
        assert ids_of(tokenizer, ["ABC"]) == ids_of(tokenizer, ["abc"])


def test_a_token_whose_name_is_not_in_the_form_is_found_as_before():
    tokenizer = Tokenizer.from_str(tokenizer_of("NFC").to_str())
    tokenizer.add_tokens([AddedToken(DECOMPOSED, normalized=True)])
    assert without_normal_form(tokenizer) is None
    added = tokenizer.token_to_id(DECOMPOSED)
    assert ids_of(tokenizer, [COMPOSED, DECOMPOSED]) == [[added], [added]]


def test_a_token_whose_name_is_in_the_form_is_found_as_before():
    tokenizer = Tokenizer.from_str(tokenizer_of("NFC").to_str())
    tokenizer.add_tokens([AddedToken(COMPOSED, normalized=True), AddedToken("naïve", normalized=False)])
    assert without_normal_form(tokenizer) is not None
    texts = [COMPOSED, DECOMPOSED, "naïve", "nai\N{COMBINING DIAERESIS}ve", "a café, naïve"]
    expected = [encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert ids_of(tokenizer, texts) == expected


@pytest.mark.parametrize(
    "splitter",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
    ],
)
def test_without_a_prefix_no_splitter_puts_one_in_front(splitter):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Prepend(" "), splitter
    assert [piece for piece, _ in splitter.pre_tokenize_str("a")] != ["a"]
    without = without_prefix(tokenizer)
    assert without.normalizer is None
    assert [piece for piece, _ in without.pre_tokenizer.pre_tokenize_str("a")] == ["a"]
    assert without_prefix(without) is without
