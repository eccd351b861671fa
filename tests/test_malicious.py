"""Files crafted to run code, to exhaust memory or time, or that are not regular files."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gptbert.data.token_shards import FORMAT
from tests.damage import archive
from tests.sandbox import Sandbox
from tokenize_scripts.train_tokenizer import learn

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    box = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield box
    box.close()


class Payload:
    """An object that pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(proof):
    """Calls that create the file `proof`."""
    code = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    yield "system", Payload(os.system, f"touch {proof}")
    yield "eval", Payload(eval, code)
    yield "exec", Payload(exec, code)
    yield "touch", Payload(Path.touch, proof)
    yield "getattr", Payload(getattr, Payload(__import__, "os"), "system")
    yield "hub", Payload(torch.hub.load, str(proof.parent), "model", "x", "local")
    yield "load", Payload(torch.load, str(proof), None, None)
    yield "storage", Payload(torch.storage._load_from_bytes, pickle.dumps(Payload(os.system, f"touch {proof}")))


def packed(content, form):
    """A pickle in each of torch's file formats."""
    if form == "bare":
        return content
    if form == "zip":
        return archive({"a/data.pkl": content, "a/version": b"3\n"})
    if form == "legacy":
        start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        return b"".join([*start, content, pickle.dumps([], 2)])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, part in (("storages", pickle.dumps(0, 2)), ("tensors", pickle.dumps(0, 2)), ("pickle", content)):
            entry = tarfile.TarInfo(name)
            entry.size = len(part)
            tar.addfile(entry, io.BytesIO(part))
    return file.getvalue()


@pytest.mark.parametrize("form", ["bare", "zip", "legacy", "tar"])
@pytest.mark.parametrize("reader", ["tokens", "state", "foreign"])
def test_code_is_not_run(sandbox, tmp_path, form, reader):
    proof, path = tmp_path / "executed", tmp_path / "t.bin"
    pickle.loads(pickle.dumps(Payload(Path.touch, proof)))
    assert proof.exists(), "the trap works"
    proof.unlink()
    for name, payload in payloads(proof):
        for protocol in PROTOCOLS:
            path.write_bytes(packed(pickle.dumps([payload], protocol), form))
            assert sandbox.read(reader, path), (name, protocol)
    assert not proof.exists()


def test_a_program_of_torchscript_is_refused(sandbox, tmp_path):
    class Program(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.jit.save(torch.jit.trace(Program(), torch.zeros(1)), tmp_path / "t.bin")
    for reader in ("tokens", "state"):
        assert sandbox.read(reader, tmp_path / "t.bin")


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(offset=0, size=4, stride=1, numel=4, key="0"):
    """Opcodes of an int64 tensor."""
    storage = b"(" + text("storage") + name("torch", "LongStorage") + text(key) + text("cpu") + number(numel) + b"tQ"
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + shape + b"\x89" + hooks + b"tR"


FOUR_IDS = np.arange(4).tobytes()


def file_of(*opcodes, storage=FOUR_IDS):
    """An archive with a list of the objects that these opcodes create."""
    content = b"\x80\x02](" + b"".join(opcodes) + b"e."
    return archive({"a/data.pkl": content, "a/data/0": storage})


DOUBLED = b"q\x00h\x00\x86"  # a pair of the previous object with itself
BOMBS = {
    "bytearray of a terabyte": file_of(name("builtins", "bytearray") + number(10**12) + b"\x85R"),
    "tensor of a terabyte": file_of(name("torch", "Tensor") + number(10**11) + b"\x85R"),
    "key of nested pairs": file_of(b"})\x85" + DOUBLED * 60 + b"Ns"),
    "call of nested pairs": file_of(b")\x85" + DOUBLED * 60 + b")R"),
    "class of nested pairs": file_of(b")\x85" + DOUBLED * 60 + b")\x81"),
    "text doubled by an encoding": file_of(
        *[name("_codecs", "encode")] * 50, text("a" * 9), *[text("hex") + b"\x86R"] * 50
    ),
    "one element repeated": file_of(tensor(size=10**10, stride=0)),
    "one element seen as many": file_of(tensor(size=4, stride=0)),
    "more than its storage": file_of(tensor(size=10**12)),
    "a storage of a terabyte": file_of(tensor(size=10**11, numel=10**11)),
    "sizes whose product overflows": file_of(tensor(size=2**63 - 1, stride=2**63 - 1)),
    "negative offset": file_of(tensor(offset=-1)),
    "negative size": file_of(tensor(size=-4)),
    "negative stride": file_of(tensor(stride=-1)),
    "offset beyond": file_of(tensor(offset=2**62)),
    "negative storage": file_of(tensor(size=0, numel=-1)),
    "storage outside": file_of(tensor(key="../../../../etc/passwd")),
    "storage elsewhere": file_of(tensor(key="1")),
    "documents that overlap": file_of(*[tensor(size=50_000, numel=50_000)] * 400, storage=bytes(400_000)),
    "list in itself": file_of(b"]q\x00h\x00a"),
    "lists of twice the same": file_of(b"]" + b"q\x00(h\x00h\x00e" * 40),
    "nested a million deep": file_of(b"]" * 10**6),
    "tuples a million deep": file_of(b")" + b"\x85" * 10**6),
    "marks": file_of(b"(" * 10**6),
    "empty lists": file_of(b"]" * 50_000 + b"e", b"(" + b"]" * 50_000),
    "a million empty dictionaries": file_of(*[b"(" + b"}" * 900 + b"l0" for _ in range(1000)]),
    "a parameter of a list": file_of(name("torch._utils", "_rebuild_parameter") + b"(]\x89" + name(
        "collections", "OrderedDict") + b")RtR"),
    "a parameter of nothing": file_of(name("torch._utils", "_rebuild_parameter") + b")R"),
    "a parameter of a function": file_of(name("torch._utils", "_rebuild_parameter") * 2 + b"\x89NtR"),
    "a parameter that repeats an element": file_of(name("torch._utils", "_rebuild_parameter") + b"(" + tensor(
        size=10**10, stride=0) + b"\x89NtR"),
    "memo at the end of the world": file_of(b"]r\xff\xff\xff\x7f"),
    "string of 4 GB": file_of(b"X\xff\xff\xff\xff"),
    "bytes of an exabyte": file_of(b"\x8e" + b"\xff" * 7 + b"\x7f"),
    "number of 2 GB": file_of(b"\x8b\xff\xff\xff\x7f"),
    "number of a million digits": file_of(b"I" + b"9" * 10**6 + b"\n"),
    "compressed a thousandfold": archive({"a/data.pkl": b"\x80\x02](" + b"N" * 10**8 + b"e."}, zipfile.ZIP_DEFLATED),
    "compressed storage": archive(
        {"a/data.pkl": b"\x80\x02](" + tensor(size=10**7, numel=10**7) + b"e.", "a/data/0": bytes(8 * 10**7)},
        zipfile.ZIP_DEFLATED,
    ),
    "entries of one storage": archive(
        {f"a/data/{index}": b"" for index in range(20_000)} | {"a/data.pkl": b"\x80\x02]."}
    ),
    "two pickles": archive({"a/data.pkl": b"\x80\x02].", "b/data.pkl": b"\x80\x02]."}),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_files_of_torch_save_take_no_more_than_they_hold(sandbox, tmp_path, bomb):
    (tmp_path / "t.bin").write_bytes(BOMBS[bomb])
    assert sandbox.read("tokens", tmp_path / "t.bin")
    sandbox.read("state", tmp_path / "t.bin")
    assert sandbox.read("foreign", tmp_path / "t.bin")


def test_dictionaries_in_dictionaries_take_no_time(sandbox, tmp_path):
    """Weights are searched in them, however often the same one is there."""
    entries = b"".join(text(f"k{number}") + b"h\x00" for number in range(300))  # the dictionary itself
    (tmp_path / "t.bin").write_bytes(archive({"a/data.pkl": b"\x80\x02}q\x00(" + entries + b"u."}))
    assert "more entries" in sandbox.read("foreign", tmp_path / "t.bin")


def test_an_archive_with_wrong_sizes_is_refused(sandbox, tmp_path):
    content = bytearray(file_of(tensor()))
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    assert sandbox.read("tokens", path) == ""
    place = content.index(b"PK\x01\x02")
    for offset in (20, 24, 42):  # compressed size, uncompressed size and offset, in the central directory
        for value in (0, 1, 10**6, 2**31, 2**32 - 2):
            damaged = content.copy()
            damaged[place + offset : place + offset + 4] = value.to_bytes(4, "little")
            path.write_bytes(damaged)
            sandbox.read("tokens", path)


def token_file(path, tokens, offsets, **metadata):
    known = {"format": FORMAT, "vocab_size": "300", "tokenizer_hash": "abc"}
    save_file({"tokens": tokens, "document_offsets": np.array(offsets, dtype=np.int64)}, path, known | metadata)
    return path


def test_token_files_take_no_more_than_they_hold(sandbox, tmp_path):
    path = tmp_path / "t.safetensors"
    ids = np.zeros(3, np.uint16)
    assert sandbox.read("tokens", token_file(path, ids, [0, 3])) == ""
    assert "offsets" in sandbox.read(
        "tokens", token_file(path, ids, [0, 2**63 - 1, -2, 3])
    )  # their differences overflow
    for size in ("-5", "0", "١٢", "1e3", "1_000", "9" * 21, "9" * 5000, ""):
        assert "vocab_size" in sandbox.read("tokens", token_file(path, ids, [0, 3], vocab_size=size))
    assert sandbox.read("tokens", token_file(path, np.zeros(10**7, np.uint8), np.arange(10**7 + 1))) == ""
    header = json.dumps(
        {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not written by" in sandbox.read("tokens", path)


def changed_tokenizer(**parts):
    tokenizer = json.loads(learn(iter(["the quick brown fox " * 50]), 280, 2).to_str())
    model = parts.pop("model", {})
    return tokenizer | parts | {"model": tokenizer["model"] | model}


def replaced(count, content):
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": content}] * count,
    }


TOKENIZERS = {
    "panics while loading": {"model": {"continuing_subword_prefix": "##" * 50}},
    "aborts while loading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "aborts, without its type": {"normalizer": {"precompiled_charsmap": "/////w=="}},
    "panics while encoding": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "grows every text": {"normalizer": replaced(20, "a" * 10)},
    "names a token that is not there": {
        "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                           "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}]}
    },
    "is of another version": {"version": "9"},
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_of_no_use_are_refused(sandbox, tmp_path, case):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed_tokenizer(**TOKENIZERS[case])))
    assert sandbox.read("tokenizer", path)


def test_tokenizers_with_gaps_between_ids_are_refused(sandbox, tmp_path):
    path = tmp_path / "tokenizer.json"
    content = changed_tokenizer()
    content["model"]["vocab"]["qqqq"] = 10**9
    path.write_text(json.dumps(content))
    assert "gaps" in sandbox.read("tokenizer", path)


def test_padding_in_a_tokenizer_fills_no_memory(sandbox, tmp_path):
    path = tmp_path / "tokenizer.json"
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
               "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    path.write_text(json.dumps(changed_tokenizer(padding=padding)))
    assert sandbox.read("tokenizer", path) == ""


def test_files_that_are_too_large_to_be_meant_are_not_read(sandbox, tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b"[" + b"[],[]," * 12_000_000 + b"0]")
    assert "more than" in sandbox.read("tokenizer", path)
    assert "more than" in sandbox.read("model_config", path)
    path.write_bytes(b'{"step": 1, "x": "' + b"a" * 10**8)
    assert sandbox.read("records", path) == ""


def test_text_that_compression_made_small_takes_no_memory(sandbox, tmp_path):
    path = tmp_path / "a.txt"
    for content in (
        b"a" * (100 << 20),
        b"\xff\xfe" + b"a\0" * (20 << 20),
        b'[{"text": "a"}' + b" " * (100 << 20) + b"]",
        b'{"text": "a", "other": "' + b"a" * (96 << 20) + b'"}\n',
    ):
        path.write_bytes(gzip.compress(content, 1))
        assert sandbox.read("corpus", path) == ""
    path.write_bytes(bz2.compress(b'{"text": "a", "other": "' + b"a" * (20 << 20) + b'"}\n'))
    assert sandbox.read("corpus", path) == ""


def test_xz_that_asks_for_much_memory_is_refused(sandbox, tmp_path):
    path = tmp_path / "a.txt"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    content = bytearray(lzma.compress(b"a text", filters=filters, check=lzma.CHECK_NONE))
    assert content[16] == 16, "the size of the dictionary, as a code"
    content[16] = 39  # 3 GB
    content[20:24] = zlib.crc32(content[12:20]).to_bytes(4, "little")
    path.write_bytes(content)
    assert "takes more memory to unpack" in sandbox.read("corpus", path)


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


def endless(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, loop, endless, Path.mkdir])
@pytest.mark.parametrize("reader", ["tokens", "tokenizer", "model_config", "state"])
def test_what_is_no_file_is_refused(sandbox, tmp_path, make, reader):
    make(tmp_path / "t-00001-of-00001.json")
    assert sandbox.read(reader, tmp_path / "t-00001-of-00001.json")
    assert sandbox.read("tokens", tmp_path / "t.json"), "as a shard"
    make(tmp_path / "metrics.jsonl")
    assert sandbox.read("records", tmp_path / "metrics.jsonl") == ""
