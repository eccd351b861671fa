"""From text to tokens: every kind of input, every kind of broken input, and outputs that are complete or absent."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError
from gptbert.text import document_reader
from gptbert.text import encoding as encoding_module
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import encode_documents
from gptbert.text.special_tokens import BOS_ID, SPECIAL_TOKENS
from gptbert.text.tokenizer import load_tokenizer, tokenizer_hash
from tests.texts import DOCUMENTS, jsonl
from tokenize_scripts import train_tokenizer as tokenizer_script
from tokenize_scripts.split_corpus import SplitConfig, side_of, split_corpus
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, _announce_merges, learn, train_tokenizer

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = ("train_tokenizer", "tokenize_corpus", "split_corpus", "demo_corpus")
SPECIAL_IDS = range(len(SPECIAL_TOKENS))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [f"{a}{b}{c}" for a in "bcdst" for b in "aeiou" for c in ("ll", "nd", "st")]
    (folder / "corpus.jsonl").write_bytes(jsonl([" ".join(words), *DOCUMENTS] * 3))
    output = folder / "tokenizer.json"
    train_tokenizer(TrainTokenizerConfig(input=(folder / "corpus.jsonl",), output=output, vocab_size=320))
    return output


@pytest.fixture
def run_each(tmp_path, tokenizer_path):
    """The three scripts that read a corpus, as functions of their flags; all of them write to tmp_path/out."""
    out = tmp_path / "out"

    def run(script, **flags):
        if script == "train_tokenizer":
            train_tokenizer(TrainTokenizerConfig(output=out / "tokenizer.json", vocab_size=300, **flags))
        elif script == "split_corpus":
            split_corpus(SplitConfig(output_dir=out, **flags))
        else:
            tokenize_corpus(TokenizeConfig(output=out / "t.safetensors", tokenizer_path=tokenizer_path, **flags))

    return run


def decoded(store_path, tokenizer_path):
    tokenizer, store = Tokenizer.from_file(str(tokenizer_path)), TokenStore.open(store_path)
    pairs = zip(*store.documents(), strict=True)
    return [tokenizer.decode(store.gather(np.array([s]), np.array([n]))[0].tolist()) for s, n in pairs]


# Input kinds


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("objects.jsonl", jsonl(DOCUMENTS)),
        ("strings.ndjson", "".join(json.dumps(text, ensure_ascii=False) + "\r\n" for text in DOCUMENTS).encode()),
        ("gaps.JSON", b"\xef\xbb\xbf" + jsonl(DOCUMENTS[:2]) + b"\n  \n" + jsonl(DOCUMENTS[2:]).rstrip()),
        ("paragraphs.txt", "\n\n \n\n".join(DOCUMENTS).encode()),
        ("no_suffix", b"\xef\xbb\xbf\n" + "\r\n\r\n".join(DOCUMENTS).encode() + b"\n\n"),
    ],
)
def test_every_kind_of_input_round_trips(tmp_path, tokenizer_path, name, content, packed):
    file = tmp_path / name  # gzip files keep the name: they are recognized by content
    file.write_bytes(gzip.compress(content) if packed else content)
    assert list(Corpus(CorpusConfig(input=(file,)))) == DOCUMENTS
    output = tmp_path / "new" / "t.safetensors"
    tokenize_corpus(TokenizeConfig(input=(file,), output=output, tokenizer_path=tokenizer_path))
    assert decoded(output, tokenizer_path) == DOCUMENTS
    assert TokenStore.open(output).tokenizer_hash == tokenizer_hash(tokenizer_path)
    assert TokenStore.open(output).vocab_size == load_tokenizer(tokenizer_path).get_vocab_size()


# Broken input


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_skipping_reports_the_first_lines_and_the_total(tmp_path, run_each, capsys, script):
    (tmp_path / "a.jsonl").write_bytes((jsonl(["good text"]) + b"bad\n") * 40)
    run_each(script, input=(tmp_path / "a.jsonl",), on_error="skip")
    captured = capsys.readouterr()
    assert "40 documents" in captured.out
    assert "40 bad lines skipped" in captured.out
    assert captured.err.count("\nskipped ") + captured.err.count("\rskipped ") == document_reader.REPORTED_LINES + 1
    assert f"skipped {tmp_path}/a.jsonl:2: not JSON" in captured.err


@pytest.mark.parametrize("script", SCRIPTS[:3])
@pytest.mark.parametrize("fault", ["bad line", "cut gzip", "damaged gzip", "no text", "all bad", "interrupted"])
def test_failure_leaves_nothing_and_keeps_the_old_output(tmp_path, run_each, monkeypatch, script, fault):
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    good = jsonl([f"document {i} {os.urandom(40).hex()}" for i in range(400)])
    packed = gzip.compress(good)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    content, error, message, flags = {
        "bad line": (good + b"{}\n", InputError, "a.jsonl:401: the object has no `text`", {}),
        "cut gzip": (packed[:-200], InputError, "a.jsonl: the gzip data is damaged or cut short", {}),
        "damaged gzip": (bytes(damaged), InputError, "a.jsonl: the gzip data is damaged or cut short|:[0-9]+: not", {}),
        "no text": (jsonl(["", " "]), InputError, "holds no text", {}),
        "all bad": (b"bad\n", InputError, "holds no text", {"on_error": "skip"}),
        "interrupted": (good, KeyboardInterrupt, None, {}),
    }[fault]
    file.write_bytes(content)
    if fault == "interrupted":
        monkeypatch.setattr(Corpus, "__iter__", lambda self: chain(["first"], map(_interrupt, [0])))
        monkeypatch.setattr(encoding_module, "BATCH_BYTES", 1)
    with pytest.raises(error, match=message):
        run_each(script, input=(file,), **flags)
    assert not out.exists()
    assert list(tmp_path.iterdir()) == [file]

    monkeypatch.undo()
    file.write_bytes(good)
    run_each(script, input=(file,))
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert before
    file.write_bytes(good + b"{}\n")
    with pytest.raises(InputError):
        run_each(script, input=(file,))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def _interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_output_must_not_be_an_input_or_unwritable(tmp_path, run_each, script):
    out = tmp_path / "out"
    out.write_bytes(jsonl(DOCUMENTS))
    with pytest.raises(InputError, match=r"out/.*: cannot be written \(Not a directory\)"):
        run_each(script, input=(out,))
    out.unlink()
    for name in ("t.safetensors", "tokenizer.json", "train.jsonl"):
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(jsonl(DOCUMENTS))
    with pytest.raises(InputError, match="is also an input"):
        run_each(script, input=(out,), format="jsonl")
    assert all(path.read_bytes() == jsonl(DOCUMENTS) for path in out.iterdir())
    file = (out / "tokenizer.json").rename(tmp_path / "a.jsonl")
    for name in ("t.safetensors", "tokenizer.json", "train.jsonl"):
        (out / name).unlink(missing_ok=True)
        os.mkfifo(out / name)
    with pytest.raises(InputError, match="is a device or a pipe"):
        run_each(script, input=(file,), format="jsonl")
    assert all(path.is_fifo() for path in out.iterdir())


# train_tokenizer


def test_special_tokens_come_first_and_s_leads(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    assert [tokenizer.id_to_token(i) for i in SPECIAL_IDS] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == 320
    for text in ("", "the cat", " \n"):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).ids == [BOS_ID, *bare]
        assert tokenizer.decode(bare) == text
    assert len(tokenizer.encode(" the", add_special_tokens=False).ids) < 4, "merges were learnt"


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(SPECIAL_TOKENS)).map("".join))
def test_any_text_is_encoded_without_loss_and_without_special_ids(tokenizer_path, text):
    tokenizer = load_tokenizer(tokenizer_path)
    ((ids, lengths, _),) = encode_documents(tokenizer, [text, "x"])
    assert ids.min() >= len(SPECIAL_TOKENS)
    assert lengths.sum() == len(ids)
    decoded = tokenizer.decode(ids[: lengths[0]].tolist(), skip_special_tokens=False)
    assert decoded == unicodedata.normalize("NFC", text)


def test_special_tokens_in_the_training_text_are_not_learnt():
    tokenizer = learn(iter([" ".join(SPECIAL_TOKENS) + "".join(SPECIAL_TOKENS)] * 50), vocab_size=400, min_frequency=2)
    ((ids, *_),) = encode_documents(tokenizer, [" ".join(SPECIAL_TOKENS), "".join(SPECIAL_TOKENS)])
    assert ids.min() >= len(SPECIAL_TOKENS)


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["abab abab"]))
    config = TrainTokenizerConfig(input=(tmp_path,), output=tmp_path / "tokenizer.json", vocab_size=1000)
    train_tokenizer(config)
    size = load_tokenizer(config.output).get_vocab_size()
    assert 272 < size < 280
    assert f"note: the vocabulary has {size} tokens, not 1000" in capsys.readouterr().out
    first = config.output.read_bytes()
    config.output.unlink()
    train_tokenizer(config)
    assert config.output.read_bytes() == first, "the same corpus gives the same file"


def test_words_without_an_end_are_learned_from_in_parts(tmp_path):
    """The library takes the square of a word's length."""
    words = ["short", "a" * 999, "acgt" * 5000, "é" * 2500]
    (tmp_path / "a.txt").write_text(" ".join(words), encoding="utf-8")
    sample = []
    (text,) = _announce_merges(Corpus(CorpusConfig(input=(tmp_path,))), sample)
    assert sample == [" ".join(words)]
    assert max(map(len, text.split())) == 1000
    assert text.replace("\n", "") == sample[0]


def test_a_corpus_of_more_pairs_than_the_library_can_count_is_refused(tmp_path, monkeypatch):
    """It counts them in 32 bits: the most frequent pairs of a large corpus would be those that are never merged."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("abab " * 300_000)
    config = TrainTokenizerConfig(input=(corpus,), output=tmp_path / "tokenizer.json", vocab_size=300)
    monkeypatch.setattr(tokenizer_script, "MOST_PAIRS", 600_000)
    train_tokenizer(config)
    config.output.unlink()
    monkeypatch.setattr(tokenizer_script, "MOST_PAIRS", 400_000)
    with pytest.raises(InputError, match=r"too large to learn .*: the bytes b'ab' occur 4\d\d,\d\d\d times, and the"):
        train_tokenizer(config)
    assert not config.output.exists()


@pytest.mark.parametrize(("flag", "value"), [("vocab_size", 271), ("min_frequency", 0)])
def test_trainer_refuses_flags(tmp_path, flag, value):
    with pytest.raises(InputError, match=f"--{flag}={value}: must be at least"):
        train_tokenizer(TrainTokenizerConfig(input=(tmp_path,), output=tmp_path / "t.json", **{flag: value}))


# tokenize_corpus


def test_shards_hold_what_one_file_holds(tmp_path, tokenizer_path, capsys):
    documents = [f"document {i} " + "word " * (i % 50) for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    flags = {"input": (tmp_path / "a.jsonl",), "tokenizer_path": tokenizer_path}
    tokenize_corpus(TokenizeConfig(output=tmp_path / "one.safetensors", **flags))
    assert "one.safetensors" in capsys.readouterr().out
    tokenize_corpus(TokenizeConfig(output=tmp_path / "many.safetensors", shard_tokens=500, **flags))
    one, many = TokenStore.open(tmp_path / "one.safetensors"), TokenStore.open(tmp_path / "many.safetensors")
    assert len(many.shards) > 5
    assert max(map(len, many.shards)) <= 500
    assert np.array_equal(np.concatenate(many.shards), one.shards[0])
    assert np.array_equal(many.documents(), one.documents())
    assert decoded(tmp_path / "many.safetensors", tokenizer_path) == [document.strip() for document in documents]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:3]))
    tokenize_corpus(TokenizeConfig(output=tmp_path / "each.safetensors", shard_tokens=1, **flags))
    assert len(TokenStore.open(tmp_path / "each.safetensors").shards) == 3
    assert f"200 documents, {sum(len(d.strip()) for d in documents):,} bytes of text" in capsys.readouterr().out


def test_batches_are_bounded_and_keep_the_order(tokenizer_path, monkeypatch):
    monkeypatch.setattr(encoding_module, "BATCH_BYTES", 5000)
    documents = [f"{i} " * (i % 40 + 1) for i in range(300)]
    batches = list(encode_documents(load_tokenizer(tokenizer_path), documents))
    assert len(batches) > 20
    assert all(len(lengths) <= 10 for _, lengths, _ in batches), "short documents count too"
    lengths = np.concatenate([lengths for _, lengths, _ in batches])
    texts = np.split(np.concatenate([ids for ids, *_ in batches]), np.cumsum(lengths)[:-1])
    assert [load_tokenizer(tokenizer_path).decode(ids.tolist()) for ids in texts] == documents


def test_words_are_what_white_space_separates(tmp_path, tokenizer_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(
        jsonl(["one  two\u00a0three\n\tfour\u3000five", "word-with-hyphen, don't!", " "])
    )
    output = tmp_path / "t.safetensors"
    tokenize_corpus(TokenizeConfig(input=(tmp_path / "a.jsonl",), output=output, tokenizer_path=tokenizer_path))
    assert "of 7 words from 2 documents" in capsys.readouterr().out
    assert TokenStore.open(output).num_words == 7


def test_padding_and_truncation_in_the_tokenizer_file_are_ignored(tmp_path, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.enable_padding(pad_id=3)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    output = tmp_path / "t.safetensors"
    tokenize_corpus(
        TokenizeConfig(input=(tmp_path / "a.jsonl",), output=output, tokenizer_path=tmp_path / "tokenizer.json")
    )
    assert decoded(output, tokenizer_path) == DOCUMENTS


def test_tokenizing_refuses_flags(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    flags = {"input": (tmp_path,), "output": tmp_path / "t.safetensors", "tokenizer_path": tokenizer_path}
    for changed, message in (
        ({"shard_tokens": 0}, "--shard_tokens=0: must be at least 1"),
        ({"tokenizer_path": tmp_path / "none.json"}, "none.json: no such file"),
        ({"tokenizer_path": tmp_path / "a.jsonl"}, "a.jsonl: not a tokenizers JSON file"),
        ({"output": tokenizer_path}, "tokenizer.json: is also an input"),
    ):
        with pytest.raises(InputError, match=message):
            tokenize_corpus(TokenizeConfig(**{**flags, **changed}))


# split_corpus


@pytest.mark.parametrize("packed", [False, True])
def test_split_puts_every_document_on_one_side_for_good(tmp_path, packed):
    documents = [f"document number {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    (tmp_path / "again.txt").write_text("\n\n".join(reversed(documents)))
    flags = {"valid_fraction": 0.1, "test_fraction": 0.2, "gzip": packed}
    split_corpus(SplitConfig(input=(tmp_path / "a.jsonl",), output_dir=tmp_path / "one", **flags))
    split_corpus(
        SplitConfig(input=(tmp_path / "a.jsonl", tmp_path / "again.txt"), output_dir=tmp_path / "two", **flags)
    )
    suffix = ".jsonl.gz" if packed else ".jsonl"
    sides = {}
    for side in ("train", "validation", "test"):
        one, two = (Corpus(CorpusConfig(input=(tmp_path / name / f"{side}{suffix}",))) for name in ("one", "two"))
        assert list(two) == [*list(one), *reversed(list(one))], "order kept, and the same text on the same side"
        sides[side] = list(one)
    assert sorted(chain(*sides.values())) == sorted(documents)
    assert abs(len(sides["validation"]) - 200) < 60
    assert abs(len(sides["test"]) - 400) < 80
    files = list((tmp_path / "one").iterdir())
    assert [file.read_bytes().startswith(b"\x1f\x8b") for file in files] == [packed] * 3


@given(st.text(max_size=20), st.floats(0, 0.5, exclude_max=True), st.floats(0, 0.5, exclude_max=True))
def test_growing_one_side_takes_from_train_only(text, valid, test):
    one = side_of(text, valid, test)
    assert (one, side_of(text, valid, 0.5)) in {(one, one), ("train", "test")}
    assert (one, side_of(text, 0.5, test)) in {(one, one), ("train", "validation")}
    assert side_of(text, 0, 0) == "train"


@pytest.mark.parametrize(
    ("valid", "test", "message"),
    [
        (-0.1, 0, "--valid_fraction=-0.1: must be at least 0 and below 1"),
        (0, 1.0, "--test_fraction=1.0: must"),
        (float("nan"), 0, "--valid_fraction=nan: must"),
        (0.5, 0.5, "leave nothing to train on"),
    ],
)
def test_split_refuses_fractions(tmp_path, valid, test, message):
    with pytest.raises(InputError, match=message):
        split_corpus(SplitConfig(input=(tmp_path,), output_dir=tmp_path, valid_fraction=valid, test_fraction=test))


# Command lines


def run_script(script, *arguments, module=False):
    program = ["-m", f"tokenize_scripts.{script}"] if module else [f"tokenize_scripts/{script}.py"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_scripts_run_both_ways_from_corpus_to_tokens(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*DOCUMENTS, "more"] * 20))
    (tmp_path / "b.txt").write_text("text")
    for module in (False, True):
        out = tmp_path / f"{module}"
        inputs = ("--input", tmp_path / "a.jsonl", tmp_path / "b.txt")
        for script, arguments in (
            ("split_corpus", (*inputs, f"--output_dir={out}", "--valid_fraction=0.3", "--gzip")),
            ("train_tokenizer", (*inputs, f"--output={out}/tok.json", "--vocab_size=280")),
            ("tokenize_corpus", (*inputs, f"--output={out}/t.bin", f"--tokenizer_path={out}/tok.json")),
        ):
            done = run_script(script, *arguments, module=module)
            assert (done.returncode, done.stdout.count("wrote ")) == (0, 1), done.stderr
        assert TokenStore.open(out / "t.bin").num_documents == 101
    for module in (False, True):
        assert "--output" in run_script("demo_corpus", "--help", module=module).stdout


def test_input_error_is_one_line_and_exit_status_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"good"\n{"text": 1}\n')
    done = run_script("split_corpus", "--input", tmp_path, f"--output_dir={tmp_path}/out")
    assert done.returncode == 1
    assert done.stdout == ""
    listing, error = done.stderr.splitlines()
    assert listing == "to read: JSON Lines: 1 file, 19 bytes, 1 document"
    assert error.startswith(f"error: {tmp_path}/a.jsonl:2: `text` is a number, not a string; ")


def test_scripts_do_not_import_torch():
    imports = "; ".join(f"import tokenize_scripts.{script}" for script in SCRIPTS)
    code = f"import sys; {imports}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(tmp_path, sent):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "tokenize_scripts.split_corpus", "--input", pipe, f"--output_dir={tmp_path}/out"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb") as stream:  # blocks until the script reads
        stream.write(jsonl(DOCUMENTS))
        stream.flush()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(tmp_path.iterdir())) == 2, "the hidden folder is there"
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == [pipe]
