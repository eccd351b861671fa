"""How new tokenizers take texts apart, by flag: words, normal forms, spaces, and what other commands make of them."""

import random
import re
import unicodedata
from functools import cache
from itertools import pairwise

import pytest
import torch
from tokenizers import pre_tokenizers

from gptbert.command_line import parse
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.model import GPTBert
from gptbert.model.objective import Objective
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.text.encoding import decode_behind, encode_prompt, encode_sentences, encode_with_masks
from gptbert.text.special_tokens import BOS_ID, MASK_ID
from gptbert.text.splitting import own_splitting, upstream_splitting
from tests.runs import MODEL, ROOT
from tests.texts import ARABIC, ENGLISH, GREEK, HINDI
from tests.tokenizer_kinds import SPLITTINGS
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, learn, train_tokenizer

NFC, NFD = (lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
PREFIXED = [flags for flags in SPLITTINGS if "space" in flags or "upstream" in flags]


def form_of(flags):
    found = re.search(r"nfkc|none", flags.replace("upstream", "nfkc"))
    return {"nfkc": "NFKC", "none": None}[found[0]] if found else "NFC"


@cache
def learned(flags):
    """A tokenizer of these flags that knows all texts' words."""
    text = f"{ENGLISH} {GREEK} {HINDI} {ARABIC}"
    return learn(iter([*([text] * 20), "a\nThe cook\npaints\n"] * 5), 2000, 2, SPLITTINGS[flags])


@pytest.fixture(params=SPLITTINGS)
def flags(request):
    return request.param


def words(splitting, text):
    return [text[slice(*place)] for _, place in splitting.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text", [GREEK, NFD(GREEK), HINDI, NFD(HINDI), ARABIC, "می‌خواهم کتاب‌ها", "שָׁלוֹם עוֹלָם", "Vie\u0323\u0302t Nam"]
)
def test_a_word_keeps_the_marks_of_its_letters(text):
    assert words(own_splitting(normalizer="none"), text) == re.findall(r" ?[^ ]+", text)
    apart = words(own_splitting(normalizer="none", marks_in_words=False), text)
    assert len(apart) > len(text.split()) or text == GREEK


@pytest.mark.parametrize(
    "text", [ENGLISH, "it's we'd 'tis  x_1\n\n ❤️ 1️⃣ naïve\t#\u0301a ", "\u0301a", "👩\u200d👩 e-mail"]
)
def test_what_has_no_marks_on_letters_is_split_as_before(text):
    """English text has the tokens that it had before there was a choice."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert own_splitting().pre_tokenizer.pre_tokenize_str(text) == before


def test_english_is_learned_as_before():
    own, before = (learn(iter([ENGLISH] * 9), 500, 2, own_splitting(**settings)) for settings in (
        {}, {"normalizer": "none", "marks_in_words": False}
    ))  # fmt: skip
    assert own.get_vocab() == before.get_vocab()
    assert encode_sentences(own, [ENGLISH]) == encode_sentences(before, [ENGLISH])


def test_upstreams_words():
    """Upper case only in front of lower case, single digits, line breaks with punctuation, pieces of 24 bytes."""
    pieces = words(upstream_splitting(), "helloWorld NASAs 1984, (a)\n\nx" + "y" * 30)
    expected = ["hello", "World", " NASAs", " 1", "9", "8", "4", ",", " (", "a", ")\n\n"]
    assert pieces == [*expected, "x" + "y" * 23, "y" * 7]
    normalized = upstream_splitting().normalizer.normalize_str("ﬁne ²  \nline\n")
    assert normalized == " fine 2\n line\n "


@pytest.mark.parametrize("text", [ENGLISH, GREEK, NFD(GREEK), HINDI, NFD(ARABIC), "ﬁne ２ Å\nline\n\nnext <mask> 👍"])
def test_decoding_gives_the_text_in_its_normal_form(flags, text):
    (ids,) = encode_sentences(learned(flags), [text])
    form = form_of(flags)
    assert learned(flags).decode(ids) == (unicodedata.normalize(form, text) if form else text)


def test_composed_and_decomposed_text_have_the_same_tokens(flags):
    composed, decomposed = encode_sentences(learned(flags), [NFC(GREEK), NFD(GREEK)])
    assert (composed == decomposed) == (form_of(flags) is not None)


def test_a_word_in_front_is_the_word_inside_with_a_space_in_front(flags):
    (inside,) = encode_sentences(learned(flags), ["The cook paints"])
    (word,) = encode_sentences(learned(flags), ["paints"])
    assert (word == [BOS_ID, inside[-1]]) == (flags in PREFIXED)


def test_a_text_cut_before_a_space_has_the_tokens_of_the_whole(flags):
    for text in (ENGLISH, NFD(GREEK), HINDI):
        (whole,) = encode_sentences(learned(flags), [text])
        heads = [text[: space.start()] for space in re.finditer(" ", text)]
        for ids in encode_sentences(learned(flags), heads):
            assert ids == whole[: len(ids)]


def test_offsets_lead_to_the_words_of_the_text(flags):
    """Of the text as it was given, whatever its normal form is."""
    for text in (ENGLISH, GREEK, NFD(GREEK), NFD(ARABIC)):
        encoding = learned(flags).encode(text, add_special_tokens=False)
        starts, ends = zip(*encoding.offsets, strict=True)
        assert ends[-1] == len(text)
        assert starts[0] == 0
        assert all(start <= end for start, end in encoding.offsets)
        assert all(before <= after for before, after in pairwise(ends))
        for place in re.finditer(r"[^\s,;.]+", text):
            ids = [
                token
                for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                if end > place.start() and start < place.end()
            ]
            found = learned(flags).decode(ids).strip(" ,;.")
            assert NFC(found) == NFC(place[0]), "the tokens that a word's place has are the word's"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPTBert(ModelConfig(**(MODEL | {"vocab_size": 2000, "num_hidden_layers": 1}))).eval()


def test_a_words_probability_does_not_depend_on_how_the_text_was_cut(flags, model):
    """The score of a text less that of its start is what the model gives the words behind."""
    for text in ("The cook paints a red boat", NFD(GREEK[:40])):
        cut = text.rindex(" ")
        head, whole = encode_sentences(learned(flags), [text[:cut], text])
        scores = log_likelihoods(model, [head, whole], Objective.CLM)[:, 0]
        ids = torch.tensor([whole])
        with torch.no_grad():
            logits = model.logits(model.encode(ids, torch.zeros_like(ids), causal=True))[0].double()
        of_each = logits.log_softmax(-1)[torch.arange(len(whole) - 1), ids[0, 1:]]
        assert (scores[1] - scores[0]).item() == pytest.approx(of_each[len(head) - 1 :].sum().item(), abs=1e-4)


class Reciting:
    """A fake model that knows one text, token by token."""

    def __init__(self, ids, vocab_size):
        self.ids, self.vocab_size = ids, vocab_size

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, input_ids, document_ids, causal):
        return torch.tensor([self.ids[1:][: input_ids.shape[1]]]).unsqueeze(-1)

    def encode_next(self, input_ids, cache):
        first, cache.length = cache.length, cache.length + input_ids.shape[1]
        return torch.tensor([self.ids[1:][first : cache.length]]).unsqueeze(-1)

    def logits(self, hidden):
        return 20 * torch.nn.functional.one_hot(hidden.squeeze(-1), self.vocab_size).float()


@pytest.mark.parametrize("text", ["The cook paints a red boat", "a\nThe cook\npaints a boat", NFC(GREEK[:60])])
def test_a_prompt_goes_on_without_a_doubled_or_lost_space(flags, text):
    """From every place where the prompt's tokens are the text's: all ends of words, and more."""
    tokenizer = learned(flags)
    (ids,) = encode_sentences(tokenizer, [text])
    reciting = Reciting(ids, tokenizer.get_vocab_size())
    heads = {text[:end]: encode_prompt(tokenizer, text[:end]) for end in range(len(text))}
    prompts = {prompt: head for prompt, head in heads.items() if head == ids[: len(head)]}
    assert {text[: space.start()] for space in re.finditer(" ", text)} <= set(prompts)
    assert "" in prompts
    for prompt, head in prompts.items():
        assert continue_text(reciting, tokenizer, prompt, len(ids) - len(head), temperature=0) == text
        if prompt:
            assert continue_text(reciting, tokenizer, " " + prompt, 1, temperature=0).startswith(" " + prompt)


@pytest.mark.parametrize(
    ("masked", "whole", "answers"),
    [
        ("The cook<mask> a red boat", "The cook paints a red boat", [" paints"]),
        ("<mask> cook paints<mask> red<mask>", "The cook paints a red boat", ["The", " a", " boat"]),
        ("The cook<mask><mask> red boat", "The cook paints a red boat", [" paints", " a"]),
        ("a\n<mask> cook", "a\nThe cook", ["The"]),
    ],
)
def test_filled_masks_are_the_words_that_were_there(flags, masked, whole, answers):
    tokenizer = learned(flags)
    (ids,) = encode_sentences(tokenizer, [whole])
    found = encode_with_masks(tokenizer, masked)
    assert [
        MASK_ID if is_mask else token for token, is_mask in zip(ids, [x == MASK_ID for x in found], strict=True)
    ] == (found)
    guesses = fill_masks(Reciting(ids, tokenizer.get_vocab_size()), tokenizer, masked, top_k=1)
    assert [text for ((text, _),) in guesses] == answers


def test_a_mask_may_stand_for_a_part_of_a_word(flags):
    tokenizer = learned(flags)
    (ids,) = encode_sentences(tokenizer, ["The cook"])
    masked = encode_with_masks(tokenizer, "The cook<mask>s")
    assert masked[: len(ids)] == ids
    assert masked[len(ids)] == MASK_ID
    assert decode_behind(tokenizer, masked[: len(ids)], masked[len(ids) + 1 :]) == "s"


def lines_of(capsys, tmp_path, texts, *arguments):
    (tmp_path / "text.jsonl").write_text("".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    arguments = ["--input", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "t.json"), *arguments]
    train_tokenizer(parse(TrainTokenizerConfig, [*arguments, "--vocab_size", "300"]))
    said = capsys.readouterr()
    return [line for line in (said.err + said.out).splitlines() if " are decomposed" in line]


def test_text_that_is_decomposed_or_mixed_is_told(capsys, tmp_path):
    mixed = ["plain", NFC(GREEK), NFD(GREEK), NFD(ARABIC)]
    (line,) = lines_of(capsys, tmp_path, mixed, "--normalizer", "none")
    assert line.startswith("warning: 2 of 3 documents with other than ASCII characters are decomposed")
    assert line.endswith("--normalizer nfc makes them one")
    (line,) = lines_of(capsys, tmp_path, mixed)
    assert line.startswith("note: 2 of 3 documents")
    assert "(NFC)" in line
    assert lines_of(capsys, tmp_path, ["plain", NFC(GREEK)], "--normalizer", "none") == []
    assert lines_of(capsys, tmp_path, ["plain"] * 2) == []
    rare = [NFC(GREEK)] * 100 + [NFD(GREEK)]
    assert lines_of(capsys, tmp_path, rare, "--normalizer", "none") == []


def test_flags_are_the_parts_of_the_file_and_may_not_contradict(capsys, tmp_path):
    paths = ["--input", "a", "--output", "b"]
    for flags, splitting in SPLITTINGS.items():
        arguments = [] if flags == "the default" else flags.split()
        made = parse(TrainTokenizerConfig, [*paths, *arguments]).splitting
        assert repr(made) == repr(splitting)
    assert repr(parse(TrainTokenizerConfig, [*paths, "--no_prefix_space", "--marks_in_words"]).splitting) == (
        repr(own_splitting())
    )
    for other, message in (
        (["--normalizer", "nfc"], "--normalizer nfc: --like upstream is nfkc"),
        (["--no_marks_in_words"], "--no_marks_in_words: --like upstream has marks in words"),
    ):
        with pytest.raises(InputError, match=message):
            parse(TrainTokenizerConfig, [*paths, "--like", "upstream", *other])


def test_no_two_choices_of_a_normal_form_differ_only_in_case(capsys):
    paths = ["--input", "a", "--output", "b"]
    assert parse(TrainTokenizerConfig, [*paths, "--normalizer", "none"]).normal_form == "none"
    assert parse(TrainTokenizerConfig, [*paths, "--like", "upstream", "--normalizer", "nfkc"]).normal_form == "nfkc"
    for arguments, status in ((["--help"], 0), ([*paths, "--normalizer", "None"], 2)):
        with pytest.raises(SystemExit) as end:
            parse(TrainTokenizerConfig, arguments)
        assert (end.value.code or 0) == status
    said = capsys.readouterr()
    (shown,) = re.findall(r"--normalizer \{(.*)\}", said.out)
    assert shown == "none,nfc,nfkc"
    assert "(default: nfc; with --like upstream nfkc)" in " ".join(said.out.split())
    assert "invalid choice 'None' for argument '--normalizer'" in said.err


def composed_bytes_per_token(sentences, form, splitting):
    """Of a text of such words, by a tokenizer that learned from another one; bytes are those of the composed text."""

    def text(seed):
        return " ".join(random.Random(seed).choices(sentences.split(), k=4000))

    tokenizer = learn(iter([form(text(1))]), 700, 2, splitting)
    (ids,) = encode_sentences(tokenizer, [form(text(2))])
    return len(NFC(text(2)).encode()) / (len(ids) - 1)


COLUMNS = [(GREEK, NFC), (GREEK, NFD), (HINDI, NFC), (ARABIC, NFC), (ENGLISH, NFC)]


def test_the_pages_table_is_what_the_choices_come_to():
    page = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([^|`]+?)`? ((?:\| \d+\.\d+ ){5})\|$", page, re.MULTILINE)
    made = {
        name: [f"{composed_bytes_per_token(*column, splitting):.2f}" for column in COLUMNS]
        for name, splitting in SPLITTINGS.items()
        if "nfkc --no_marks" not in name
    }
    assert {name: re.findall(r"[\d.]+", cells) for name, cells in rows} == made
