"""Small tokenizers of every kind that training takes, as the content of their files, by the name of what is odd."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptbert.text.special_tokens import SPECIAL_TOKENS
from gptbert.text.splitting import own_splitting, upstream_splitting
from tokenize_scripts.train_tokenizer import learn

TEXT = "The cook paints a red boat. A neighbour (quietly) repairs the broken clock, and his 3 chairs!"
FIVE = list(SPECIAL_TOKENS[:5])
BOS, EOS = ("<s>", 1), ("</s>", 2)
UNK = {"unk_token": "<unk>"}
OURS = "as train_tokenizer.py makes them"
SPLITTINGS = {  # by the flags of train_tokenizer.py
    "the default": own_splitting(),
    "--prefix_space": own_splitting(prefix_space=True),
    "--normalizer none": own_splitting(normalizer="none"),
    "--normalizer nfkc": own_splitting(normalizer="nfkc"),
    "--no_marks_in_words": own_splitting(marks_in_words=False),
    "--normalizer none --no_marks_in_words": own_splitting(normalizer="none", marks_in_words=False),
    "--prefix_space --normalizer nfkc --no_marks_in_words": own_splitting(
        prefix_space=True, normalizer="nfkc", marks_in_words=False
    ),
    "--like upstream": upstream_splitting(),
}


def _trained(model, trainer, special=FIVE, **parts) -> dict:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    settings = {"special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator([TEXT] * 20, trainer(vocab_size=380, **settings))
    return json.loads(tokenizer.to_str())


def _byte_level(special=FIVE, prefix=False, **parts) -> dict:
    def trainer(**settings):
        return trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)

    parts = {"decoder": decoders.ByteLevel(), "pre_tokenizer": pre_tokenizers.ByteLevel(prefix), **parts}
    return _trained(models.BPE(), trainer, special, **parts)


def _with_added(content: dict, *tokens: AddedToken) -> dict:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(list(tokens))
    return json.loads(tokenizer.to_str())


def _flagged(content: dict, **flags) -> dict:
    return content | {"added_tokens": [token | flags for token in content["added_tokens"]]}


@cache
def kinds() -> dict[str, str]:
    """Contents of tokenizer files."""
    ours = json.loads(learn(iter([TEXT] * 20), 340, 2).to_str())
    five = _byte_level()
    metaspace = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    unigram = _trained(models.Unigram(), lambda **all_: trainers.UnigramTrainer(**UNK, **all_), **metaspace)
    words = {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}
    llama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
               "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[BOS, EOS])
    found = {
        OURS: ours,
        **{
            f"{OURS}, {flags}": json.loads(learn(iter([TEXT] * 20), 340, 2, splitting).to_str())
            for flags, splitting in SPLITTINGS.items()
            if flags != "the default"
        },
        "five special tokens": five,
        "sixty-five special tokens": _byte_level([*FIVE, *(f"<extra_{index}>" for index in range(60))]),
        "RoBERTa's post-processor": _byte_level(post_processor=processors.RobertaProcessing(EOS, BOS)),
        "BERT's post-processor": _byte_level(post_processor=processors.BertProcessing(EOS, BOS)),
        "</s> at the end": _byte_level(post_processor=template),
        "a sequence of post-processors": _byte_level(
            post_processor=processors.Sequence([processors.ByteLevel(), template])
        ),
        "special tokens not added": ours | {"added_tokens": []},
        "special tokens not special": _flagged(ours, special=False),
        "special tokens that a normalizer changes": _flagged(
            _trained(models.BPE(**UNK), trainers.BpeTrainer, normalizer=llama, decoder=decoders.Metaspace()),
            normalized=True,
        ),
        "special tokens that strip": _flagged(five, lstrip=True, rstrip=True, single_word=True, normalized=True),
        "BPE dropout": five | {"model": five["model"] | {"dropout": 0.5}},
        "padding and truncation": five | {"padding": padding, "truncation": truncation},
        "a space in front": _byte_level(prefix=True),
        "a space in front, in a sequence": _byte_level(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(True)])
        ),
        "NFC": _byte_level(normalizer=normalizers.NFC()),
        "NFKC and a space, as upstream's": _byte_level(
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend(" ")])
        ),
        "Unigram with Metaspace": unigram,
        "Unigram, special tokens not added": unigram | {"added_tokens": []},
        "BPE with Metaspace and bytes": _trained(
            models.BPE(**UNK, byte_fallback=True, fuse_unk=True), trainers.BpeTrainer, **metaspace
        ),
        "BPE of whole words": _trained(models.BPE(**UNK, ignore_merges=True), trainers.BpeTrainer, **words),
        "WordPiece in lower case": _trained(
            models.WordPiece(**UNK),
            trainers.WordPieceTrainer,
            normalizer=normalizers.BertNormalizer(),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
            decoder=decoders.WordPiece(),
        ),
        "WordLevel": _trained(models.WordLevel(**UNK), trainers.WordLevelTrainer, **words),
        "characters": _trained(
            models.BPE(**UNK),
            trainers.BpeTrainer,
            pre_tokenizer=pre_tokenizers.Split("", "isolated"),
            decoder=decoders.Fuse(),
        ),
        "added tokens at the end": _with_added(
            five, AddedToken("cook paints"), AddedToken("<end>", special=True), AddedToken("boat", single_word=True)
        ),
        "special tokens in the middle": _with_added(
            _byte_level([*FIVE, "<between>"]), AddedToken("red", lstrip=True), AddedToken("<end>", special=True)
        ),
    }
    return {name: json.dumps(content) for name, content in found.items()}


def special_names(name: str) -> set[str]:
    """The special tokens of a kind."""
    if name == "sixty-five special tokens":
        return {*FIVE, *(f"<extra_{index}>" for index in range(60))}
    more = {"added tokens at the end": {"<end>"}, "special tokens in the middle": {"<between>", "<end>"}}
    ours = name.startswith((OURS, "special tokens not"))
    return set(SPECIAL_TOKENS) if ours else {*FIVE, *more.get(name, ())}
