"""Tokenizer files of many kinds: what they ask for beyond training is undone, and special tokens go by their names."""

import dataclasses
import json
from collections import Counter
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer

from gptbert.command_line import parse
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.inputs import Inputs
from gptbert.data.objectives import Masking, masked_batch
from gptbert.errors import InputError
from gptbert.evaluate import EvaluateSettings, evaluate
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.model import GPTBert
from gptbert.monitoring.records import read_records
from gptbert.text.encoding import encode_documents, encode_sentences, encode_with_ends, encode_with_masks
from gptbert.text.special_tokens import BOS_ID, MASK_ID, SPECIAL_TOKENS, UNK_ID
from gptbert.text.tokenizer import are_same, load_tokenizer, notes, ordinary_ids, special_ids, tokenizer_hash
from gptbert.train import fit
from kernels import span_mask
from tests.runs import MODEL, flags, write_inputs
from tests.tokenizer_kinds import FIVE, OURS, TEXT, kinds, special_names
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus


@pytest.fixture(params=kinds())
def kind(request):
    return request.param


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes the file of a kind, with its content changed, and returns its path."""

    def written(kind, name="tokenizer.json", **changes):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(kinds()[kind]) | changes))
        return path

    return written


def test_texts_have_the_ids_that_the_file_gives_them_and_nothing_around(write, kind):
    path = write(kind)
    tokenizer = load_tokenizer(path)
    content = json.loads(path.read_text())
    (content["model"] or {}).pop("dropout", None)
    plain = Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    expected = plain.encode(TEXT, add_special_tokens=False).ids
    for _ in range(5):  # the same each time
        assert encode_sentences(tokenizer, [TEXT]) == [[BOS_ID, *expected]]
    ((ids, *_),) = encode_documents(load_tokenizer(path), [TEXT])
    assert ids.tolist() == expected
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode(TEXT).ids == [BOS_ID, *expected]
    assert tokenizer.encode(TEXT, "a").ids.count(BOS_ID) == 2


def test_special_tokens_are_those_of_the_file_by_name(write, kind):
    tokenizer = load_tokenizer(write(kind))
    special = special_ids(tokenizer)
    assert {tokenizer.id_to_token(number) for number in special} == special_names(kind)
    assert ordinary_ids(tokenizer) == [number for number in range(tokenizer.get_vocab_size()) if number not in special]


def test_special_tokens_in_a_text_are_text_unless_they_are_meant(write, kind):
    tokenizer = load_tokenizer(write(kind))
    literal = "In <mask> and <s>text</s> <pad>. a<mask>b"
    for text in (literal, literal.upper(), "<mask>\n<s>", "<<mask>>", *FIVE[1:]):
        (ids,) = encode_sentences(tokenizer, [text])
        assert not set(ids[1:]) & set(special_ids(tokenizer)) - {UNK_ID}
        ((ids, *_),) = encode_documents(tokenizer, [text])
        assert not set(ids) & set(special_ids(tokenizer)) - {UNK_ID}
    masked = encode_with_masks(tokenizer, "The cook<mask> a red boat<mask>.")
    assert masked.count(MASK_ID) == 2
    before, whole = encode_sentences(tokenizer, ["The cook", "The cook a red boat"])
    assert masked[: len(before) + 1] == [*before, MASK_ID]
    assert masked[len(before) + 1 :][: len(whole) - len(before)] == whole[len(before) :]


def test_what_is_loaded_and_written_again_stays(write, kind, tmp_path):
    once = load_tokenizer(write(kind)).to_str()
    (tmp_path / "again.json").write_text(once)
    assert load_tokenizer(tmp_path / "again.json").to_str() == once
    assert (json.loads(once) == json.loads(kinds()[kind])) == kind.startswith(OURS)
    assert are_same(write(kind), tmp_path / "again.json")
    other = write(OURS if kind != OURS else "NFC", "other.json")
    assert not are_same(write(kind), other) or kind.startswith("special tokens not")


def test_the_hash_is_of_the_file_as_it_is_written(write):
    digests = [tokenizer_hash(write(kind)) for kind in kinds()]
    assert len(set(digests)) == len(digests)
    path = write(OURS)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3, sort_keys=True))
    assert tokenizer_hash(path) == digests[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (OURS, []),
        ("five special tokens", []),
        ("BPE dropout", ["is used without dropout"]),
        ("padding and truncation", ["is used without truncation, padding"]),
        ("RoBERTa's post-processor", ["is used without the tokens that it puts around a text"]),
        ("</s> at the end", ["is used without the tokens that it puts around a text"]),
        ("characters", [r"does not keep every text: 'A text, 1 or 2.\n' becomes 'A te<unk>t, <unk> or <unk>.<unk>'"]),
    ],
)
def test_what_a_user_should_know(write, kind, expected):
    path = write(kind)
    assert notes(path, load_tokenizer(path)) == expected


def test_characters_that_no_token_has_are_not_dropped(write):
    """A byte-level model that lacks bytes, and no token for unknown text."""
    content = json.loads(kinds()["five special tokens"])
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < 200}
    vocab |= {"Z": 200} if "Z" not in vocab else {}
    tokenizer = load_tokenizer(write("five special tokens", model=content["model"] | {"vocab": vocab, "merges": []}))
    missing = next(letter for letter in map(chr, range(0xC0, 0x250)) if UNK_ID in tokenizer.encode(letter).ids)
    (ids,) = encode_sentences(tokenizer, [f"A{missing}A"])
    assert ids.count(UNK_ID) >= 1


def without_unknown(content):
    return {"model": content["model"] | {"unk_id": None}}


def added(content, *tokens, **more):
    number, flags = len(content["model"]["vocab"]), dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    ordinary = [
        flags | {"normalized": True, "id": number + index, "content": text} for index, text in enumerate(tokens)
    ]
    return {"added_tokens": content["added_tokens"] + [token | more for token in ordinary]}


def numbered(content, name, number):
    """The added token of this name with another id."""
    added = [token | {"id": number} if token["content"] == name else token for token in content["added_tokens"]]
    return {"added_tokens": added}


REFUSED = {
    "unknown text has no token": ("Unigram with Metaspace", without_unknown, "cannot encode"),
    "unknown text is a mask": (
        "WordLevel",
        lambda content: {"model": content["model"] | {"unk_token": "<mask>"}},
        "gives <mask> for text that it does not know",
    ),
    "unknown text begins a text": (
        "Unigram with Metaspace",
        lambda content: {"model": content["model"] | {"unk_id": 1}},
        "gives <s> for text that it does not know",
    ),
    "numbered twice": (OURS, lambda content: numbered(content, "<special_3>", 99), "id 99 in added_tokens and 8 in"),
    "two added tokens in one": (
        "five special tokens",
        lambda content: added(content, "Boats", "boats") | {"normalizer": {"type": "Lowercase"}},
        "its added tokens 'Boats' and 'boats' are both 'boats' when normalized, so a text has one or the other",
    ),
    "an added token without a name": (
        "five special tokens",
        lambda content: added(content, "\x01", single_word=True) | {"normalizer": {"type": "Nmt"}},
        r"nothing is left of its added token '\\x01' when normalized; mark it",
    ),
    "a special space": (
        "five special tokens", lambda content: added(content, " ", special=True), "special token ' ' is in ordinary"),
    "a special word": (
        "five special tokens", lambda content: added(content, "Boats", special=True), "special token 'Boats' is in"),
    "a word for unknown text": (
        "WordPiece in lower case",
        lambda content: {"model": content["model"] | {"unk_token": "the"}},
        "special token 'the' is in ordinary texts",
    ),
    "one id twice": (
        OURS,
        lambda content: {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"!": 18}}},
        "two tokens with the id 18|gaps",
    ),
    "another order": ("five special tokens", lambda content: {
        "model": content["model"] | {"vocab": content["model"]["vocab"] | {"<pad>": 4, "<mask>": 3}},
        "added_tokens": [],
    }, "<pad> has id 4, expected 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_contradict_themselves_or_cannot_do_it_are_refused(write, case):
    kind, change, message = REFUSED[case]
    path = write(kind, **change(json.loads(kinds()[kind])))
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("space", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("word", list(product((False, True), repeat=2)))
def test_added_tokens_that_strip_are_refused_where_the_library_fails(write, space, word):
    """It fails where a token takes the whitespace behind it that another one would be, which takes that before it."""
    content = json.loads(kinds()["five special tokens"])
    tokens = added(content, "\n", "café")["added_tokens"]
    for token, (lstrip, rstrip) in zip(tokens[-2:], (space, word), strict=True):
        token |= {"lstrip": lstrip, "rstrip": rstrip}
    path, texts = write("five special tokens", added_tokens=tokens), ["café\n\n", "café \n a", "\n \ncafé", "\n"]
    try:
        expected = [encoding.ids for encoding in Tokenizer.from_file(str(path)).encode_batch(texts)]
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        with pytest.raises(InputError, match=r"its added tokens 'café' and '\\n' both take the whitespace"):
            load_tokenizer(path)
        assert (space, word[1]) == ((True, False), True)
    else:
        assert encode_sentences(load_tokenizer(path), texts) == [[BOS_ID, *ids] for ids in expected]


def test_a_text_that_the_library_fails_on_is_named(write):
    """Its normalizers may fail on single texts, here on those that begin with a digit."""
    spaced = {"type": "Replace", "pattern": {"Regex": r"(?=\d)"}, "content": " "}
    tokenizer = load_tokenizer(write("five special tokens", normalizer=spaced))
    texts = ["a boat", "1 boat\nand more" + " words" * 99, "2 boats"]
    for encode in (encode_documents, encode_sentences, encode_with_ends):
        with pytest.raises(InputError, match=r"^text '1 boat\\nand .*': the tokenizer cannot encode it \(index out"):
            list(encode(tokenizer, texts))
    with pytest.raises(InputError, match=r"^text '3 boats': the tokenizer cannot encode it \(index out"):
        encode_with_masks(tokenizer, "3 boats")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spm.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0b", "is a SentencePiece model"),
        ("spiece", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0b", "is a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is a list of tokens for tiktoken"),
        ("spm.vocab", "<unk>\t0\n<s>\t0\n▁the\t-3.2\n".encode(), "is a list of tokens"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\nthe\n##s\n", "is a list of tokens"),
        ("merges.txt", b"#version: 0.2\na b\n", "is a list of merges"),
        ("vocab.json", b'{"<unk>": 0, "<s>": 1}', "is a vocabulary"),
        ("tokenizer_config.json", b'{"tokenizer_class": "BertTokenizer"}', "is transformers' settings"),
        ("special_tokens_map.json", b'{"mask_token": "<mask>"}', "is transformers' settings"),
        ("special_tokens_map.json", b'{"unk_token": "[UNK]"}', "is transformers' settings"),
        ("config.json", b'{"model_type": "bert"}', "is the configuration of a model"),
        (
            "tokenizer.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "it is a pointer of Git",
        ),
        ("tokenizer.json", b'\xef\xbb\xbf{"model": {}}', "it is text with a byte order mark; save it as UTF-8 without"),
        ("tokenizer.json", '{"model": {}}'.encode("utf-16"), "it is text in UTF-16; save it as UTF-8"),
        ("corpus.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "not a tokenizers JSON file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load_tokenizer(tmp_path / name)
    assert ("expected tokenizer.json" in str(refused.value)) == (name not in {"corpus.jsonl", "tokenizer.json"})


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Replace", "pattern": {"Regex": "^|$"}, "content": "<mask>"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a<mask>"}]},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "b"}, "content": " <mask> "}]},
    ],
)
def test_a_normalizer_that_puts_special_tokens_into_texts_is_refused(write, normalizer):
    with pytest.raises(InputError, match=r": its normalizer puts <mask> into texts, which would be a special token$"):
        load_tokenizer(write("as train_tokenizer.py makes them", normalizer=normalizer))


def test_names_that_reach_the_model_whole_only_behind_an_added_token_are_text(write):
    content = json.loads(kinds()["BPE of whole words"])
    changes = {"normalizer": {"type": "Prepend", "prepend": "_"}, "pre_tokenizer": None} | added(content, "\n")
    tokenizer = load_tokenizer(write("BPE of whole words", **changes))
    for text in ("<mask>\n<s>", "\n</s>\n<mask>"):
        (ids,) = encode_sentences(tokenizer, [text])
        assert not set(ids[1:]) & {*range(1, 5)}


def test_a_folder_is_no_tokenizer(write, tmp_path):
    with pytest.raises(InputError, match="is a folder; expected tokenizer"):
        load_tokenizer(tmp_path)
    write(OURS)
    with pytest.raises(InputError, match=r"is a folder; name .*/tokenizer.json$"):
        load_tokenizer(tmp_path)


MASKING = {"mask_p": 0.5, "random_p": 0.4, "keep_p": 0.1, "seed": 3}


def some_tokens(size):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size, (60, 130), generator=generator)


@pytest.mark.parametrize(
    "kind",
    ["five special tokens", "sixty-five special tokens", "added tokens at the end", "special tokens in the middle"],
)
def test_all_ordinary_tokens_are_masked_and_drawn_and_no_others(write, kind):
    tokenizer = load_tokenizer(write(kind))
    size, special = tokenizer.get_vocab_size(), special_ids(tokenizer)
    tokens = some_tokens(size)
    masking = Masking(**MASKING, vocab_size=size, special_ids=special)
    batch = masked_batch(tokens, torch.zeros_like(tokens), torch.arange(len(tokens)), masking)
    labeled = batch.labels >= 0
    assert torch.equal(batch.labels[labeled], tokens[:, 1:][labeled])
    ordinary = set(ordinary_ids(tokenizer))
    assert set(batch.labels[labeled].tolist()) == ordinary
    inputs, before = batch.input_ids[:, 1:], tokens[:, 1:-1]
    drawn = Counter(inputs[(inputs != before) & (inputs != MASK_ID)].tolist())
    assert set(drawn) <= ordinary
    assert len(drawn) > 0.9 * len(ordinary)
    assert torch.equal(inputs[~labeled[:, :-1]], before[~labeled[:, :-1]])
    assert ((inputs == MASK_ID) & labeled[:, :-1]).sum() == pytest.approx(0.5 * labeled.sum().item(), rel=0.1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("special", [(*range(16),), (*range(5), 7, 19)])
def test_masks_are_those_of_the_operation(special, backend, parallel_scans, monkeypatch):
    """Special tokens in front go through as they are; others as if the vocabulary had its special tokens in front."""
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    tokens, size = some_tokens(20)[:5], 20
    masking = Masking(**MASKING, vocab_size=size, special_ids=special)
    row_ids = torch.arange(5)
    batch = masked_batch(tokens, torch.zeros_like(tokens), row_ids, masking)
    order = [*special, *(number for number in range(size) if number not in special)]
    renamed = torch.tensor([[order.index(token) for token in row] for row in tokens.tolist()])
    settings = {"mask_token_id": MASK_ID, "vocab_size": size, "num_special_tokens": len(special), "row_ids": row_ids}
    inputs, labels = span_mask(renamed, **MASKING, **settings, backend="torch")
    assert batch.input_ids.tolist() == [[order[token] for token in row[:-1]] for row in inputs.tolist()]
    assert batch.labels.tolist() == [[-100 if x < 0 else order[x] for x in row[1:]] for row in labels.tolist()]


def test_every_kind_fills_masks_and_goes_on(write, kind):
    tokenizer = load_tokenizer(write(kind))
    torch.manual_seed(0)
    shape = MODEL | {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1}
    model = GPTBert(ModelConfig(**shape)).eval()
    ((best, _),) = fill_masks(model, tokenizer, "The cook<mask> a red boat.", top_k=1)[0]
    assert best not in SPECIAL_TOKENS
    text = continue_text(model, tokenizer, "The cook", num_tokens=5)
    assert "<s>" not in text
    assert len(text) >= len("the cook")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("vocabulary"), train_characters=10_000)


@pytest.mark.parametrize(
    ("stated", "size", "remark"),
    [
        (320, 320, ""),
        (None, 320, "vocab_size is 320, as in --tokenizer_path, which is not in --config_file"),
        (300, 320, "vocab_size is 320, as in --tokenizer_path, not 300 as in --config_file"),
        (512, 512, "vocab_size is 512, as in --config_file; the tokenizer has 320"),
    ],
)
def test_the_tokenizer_decides_the_vocabulary(inputs, tmp_path, stated, size, remark):
    values = {name: value for name, value in (MODEL | {"vocab_size": stated}).items() if value is not None}
    (tmp_path / "model.json").write_text(json.dumps(values))
    config = parse(TrainConfig, flags(inputs, config_file=tmp_path / "model.json", n_special_tokens=16))
    opened, long = Inputs.open(config), Inputs.open(dataclasses.replace(config, seq_length_growth=True))
    assert (opened.model_config.vocab_size, opened.vocab_size, opened.remark) == (size, 320, remark)
    assert "rows of 128 tokens are longer than max_position_embeddings 64 of" in long.remark
    assert opened.special_ids == tuple(range(16))
    if stated is None:
        with pytest.raises(InputError, match="missing key vocab_size"):
            ModelConfig.from_json(tmp_path / "model.json")
    else:
        assert ModelConfig.from_json(tmp_path / "model.json").vocab_size == stated


def test_a_run_with_special_tokens_anywhere_and_a_model_without_a_vocabulary(write, tmp_path, capfd):
    """Tokens, masks, vocabulary and records of training, resuming and evaluating go by the tokenizer."""
    tokenizer_path = write("special tokens in the middle")
    (tmp_path / "text.jsonl").write_text(json.dumps(TEXT * 40) + "\n")
    tokens = tmp_path / "tokens.safetensors"
    tokenize_corpus(TokenizeConfig(input=(tmp_path / "text.jsonl",), tokenizer_path=tokenizer_path, output=tokens))
    (tmp_path / "model.json").write_text(json.dumps({name: MODEL[name] for name in MODEL if name != "vocab_size"}))
    paths = {"train_path": tokens, "valid_path": tokens, "tokenizer_path": tokenizer_path, "name": "run"}
    for steps in (2, 3):
        fit(parse(TrainConfig, flags(tmp_path, max_steps=steps, validation_steps=0, resume="auto", **paths)))
    said = capfd.readouterr().err
    assert "\n7 special tokens of 323: <unk>, <s>, </s>, <pad>, <mask>, <between>, <end>; vocab_size is 323" in said
    assert f"going on from {tmp_path}/runs/run/checkpoints/step_00000002; changed since: --max_steps 2 -> 3\n" in said
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step_00000003"
    assert json.loads((checkpoint / "train_config.json").read_text())["n_special_tokens"] == 7
    assert json.loads((checkpoint / "model_config.json").read_text())["vocab_size"] == 323
    evaluate(EvaluateSettings(run=checkpoint, input=(tokens,), output=tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())["all"]
    record = read_records(tmp_path / "runs" / "run" / "metrics.jsonl")[-1]
    assert results["mlm"]["loss"] == pytest.approx(record["validation_ema/mlm/loss"], rel=1e-6)
