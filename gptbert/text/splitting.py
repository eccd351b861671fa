"""How a new tokenizer takes a text apart: its normalizer, its splitter into words, and the decoder that undoes them.

A token never crosses a word's end, so the splitter decides which pieces can be tokens at all.
"""

from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers.decoders import Decoder
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

NormalForm = Literal["none", "nfc", "nfkc"]

_FORMS = {"none": None, "nfc": normalizers.NFC(), "nfkc": normalizers.NFKC()}
# GPT-2's words (Radford et al. 2019), in which a letter takes along the combining marks behind it, and the two joiners
# of Persian and of Indian scripts. Marks behind anything else, such as emoji, stay with that, as in GPT-2.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}[\p{L}\p{M}\x{200C}\x{200D}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The published tokenizers' words: upper case only in front of lower case, with any one character before them that is
# neither letter, digit nor line break; single digits; punctuation with the line breaks behind it.
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPSTREAM_WORDS = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPSTREAM_LONGEST = 24  # bytes of a piece


@dataclass(frozen=True)
class Splitting:
    """The parts of a byte-level BPE tokenizer around its vocabulary.

    Attributes:
        normalizer: applied to a text first, or None.
        pre_tokenizer: cuts it into words, of bytes.
        decoder: makes a text of tokens.
        takes_whole_words: a word that the vocabulary has is that token, whatever the merges make of it.
    """

    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer
    decoder: Decoder
    takes_whole_words: bool = False


def own_splitting(
    *, prefix_space: bool = False, normalizer: NormalForm = "nfc", marks_in_words: bool = True
) -> Splitting:
    """The words of GPT-2.

    Args:
        prefix_space: a space in front of each text that has none, which decoding removes.
        normalizer: the Unicode normal form of all text.
        marks_in_words: letters keep their combining marks; else each mark ends the word, as in GPT-2.
    """
    steps: list[PreTokenizer] = []
    if prefix_space:  # unlike ByteLevel's own setting, not behind a special token
        steps.append(pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False))
    if marks_in_words:
        steps.append(pre_tokenizers.Split(Regex(_WORDS), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not marks_in_words))
    bytes_to_text = decoders.ByteLevel()
    return Splitting(
        _FORMS[normalizer],
        pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0],
        decoders.Sequence([bytes_to_text, decoders.Strip(" ", 1, 0)]) if prefix_space else bytes_to_text,
    )


def upstream_splitting() -> Splitting:
    """That of the published tokenizers (github.com/ltgoslo/gpt-bert, tokenizer_creation).

    A space in front of the text and of each line, none at a line's end; NFKC; words without changes from lower to upper
    case; pieces of at most 24 bytes.
    """
    pieces = pre_tokenizers.Split(Regex(f".{{1,{_UPSTREAM_LONGEST}}}"), "isolated")
    lines = [normalizers.Replace(Regex("\n"), "\n "), normalizers.Replace(Regex(" *\n"), "\n")]
    return Splitting(
        normalizers.Sequence([normalizers.Prepend(" "), normalizers.NFKC(), *lines]),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_UPSTREAM_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                pieces,
            ]
        ),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0), decoders.Replace("\n ", "\n")]),
        takes_whole_words=True,
    )
