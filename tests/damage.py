"""Hypothesis strategies that corrupt valid files: as bytes, JSON, safetensors headers, archives and pickles."""

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import pickletools
import zipfile

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.numpy import save

from gptbert.data.token_shards import FORMAT

HUGE = [0, 1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
NUMBERS = st.one_of(st.sampled_from([*HUGE, *[-number for number in HUGE]]), st.integers(-5, 400))
SCALARS = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.text(max_size=6), st.floats(), st.sampled_from(["\ud800", "\0", "../x", "-5"])
)


class _Nested(str):
    """JSON text that Python's own encoder cannot produce."""

    __slots__ = ()


def _containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)


VALUES = st.recursive(SCALARS, _containers, max_leaves=8)
JSON = st.one_of(
    VALUES,
    st.sampled_from([300, 3000, 100_000]).map(lambda depth: _Nested("[" * depth + "]" * depth)),
    st.sampled_from([400, 5000]).map(lambda digits: _Nested("9" * digits)),
)


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """Bits flipped; ranges removed, repeated, zeroed or inserted; numbers made huge; the end truncated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["bit", "byte", "cut", "remove", "repeat", "zero", "insert", "huge"]))
        if not data:
            break
        if kind == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 2, 50]))
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        else:
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(st.sampled_from(HUGE)) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
    return bytes(data)


@st.composite
def damaged_value(draw, value, others=JSON):
    """A value with parts changed in value or type, removed, or added."""
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_changed(value, others))
    return value


@st.composite
def _changed(draw, value, others):
    """One change at a random depth."""
    if isinstance(value, int | float) and draw(st.booleans()):
        return draw(NUMBERS)
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 19)) == 0:
        return draw(others)
    if isinstance(value, list):
        index = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(["change", "change", "remove", "repeat"]))
        middle = {"change": [draw(_changed(value[index], others))], "remove": [], "repeat": [value[index]] * 2}[kind]
        return [*value[:index], *middle, *value[index + 1 :]]
    key = draw(st.sampled_from(list(value)))
    kind = draw(st.sampled_from(["change", "change", "change", "change", "change", "remove", "rename", "add"]))
    result = {name: part for name, part in value.items() if name != key}
    if kind == "change":
        return value | {key: draw(_changed(value[key], others))}
    if kind == "rename":
        return result | {draw(st.text(max_size=8)): value[key]}
    return result if kind == "remove" else value | {draw(st.text(max_size=8)): draw(others)}


def json_text(value) -> str:
    """JSON of a value that may contain `_Nested` parts."""
    if isinstance(value, _Nested):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {json_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged_json(draw, content: bytes) -> bytes:
    """JSON with a changed structure, a duplicate key, a byte order mark or a different encoding; or damaged bytes."""
    kind = draw(st.sampled_from(["structure", "structure", "structure", "twice", "mark", "encoding", "bytes"]))
    value = json.loads(content)
    if kind == "structure":
        return json_text(draw(damaged_value(value))).encode("utf-8", "surrogatepass")
    if kind == "twice":
        key, other = draw(st.sampled_from(sorted(value))), draw(JSON)
        return (f"{{{json.dumps(key)}: {json_text(other)}, " + json.dumps(value)[1:]).encode("utf-8", "surrogatepass")
    if kind == "mark":
        return b"\xef\xbb\xbf" + content
    if kind == "encoding":
        return content.decode().encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-7"])))
    return draw(damaged_bytes(content))


@st.composite
def damaged_safetensors(draw, content: bytes) -> bytes:
    """A header with changed offsets, shapes, dtypes or metadata, and a right or wrong length; or damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if draw(st.booleans()):
        header = draw(damaged_value(header))
    else:
        name = draw(st.sampled_from(sorted(header)))
        if name == "__metadata__":
            header[name] = draw(damaged_value(header[name]))
        else:
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            dtypes = st.sampled_from(
                ["BOOL", "U8", "I8", "F8_E4M3", "F4", "I16", "U16", "BF16", "I64", "U64", "F64", "C64"]
            )
            shapes = st.lists(NUMBERS, max_size=3)
            header[name] = header[name] | {field: draw(dtypes if field == "dtype" else shapes)}
    text = json_text(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    size = draw(st.sampled_from([len(text)] * 8 + [0, 1, len(text) + 8, 2**31, 2**63, 2**64 - 1]))
    return size.to_bytes(8, "little") + text + data


@st.composite
def built_token_file(draw) -> bytes:
    """A token file with valid structure and consistent or inconsistent numbers."""
    length = draw(st.integers(0, 12))
    dtype = draw(st.sampled_from(["uint8", "uint8", "uint16", "uint32", "uint64", "int32", "float32", "bool"]))
    tokens = np.array(draw(st.lists(st.integers(0, 300), min_size=length, max_size=length))).astype(dtype)
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    offsets = [0, *cuts, length]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(offsets) - 1))
        offsets[at : at + 1] = draw(
            st.lists(st.sampled_from([-(2**63), -2, -1, 0, 1, 2**31, 2**62, 2**63 - 1]), max_size=2)
        )
    sizes = ["301", "256", "300", "9999999999", "0", "-5", "1e3", "١٢", "1_000", " 7", "9" * 30, "9" * 5000, ""]
    metadata = {
        "format": FORMAT,
        "vocab_size": draw(st.sampled_from(sizes)),
        "tokenizer_hash": draw(st.text(max_size=3)),
    }
    types = st.sampled_from(["int64"] * 5 + ["int32", "uint64", "float64"])
    arrays = {"tokens": tokens, "document_offsets": np.array(offsets, dtype=np.int64).astype(draw(types))}
    return save(arrays, metadata)


_PIECE = st.sampled_from(["a", " ", "", "<mask>", "x" * 20])
_PATTERN = st.sampled_from([{"String": "a"}, {"String": "<"}, {"Regex": r"\d"}, {"Regex": "^|$"}])
_BEHAVIOR = st.sampled_from(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
_PAIR = st.sampled_from([["<s>", 1], ["</s>", 2], ["<s>", 7], ["nope", 3]])
_FLAGS = {name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}


def _part(name: str, **fields: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"type": st.just(name), **fields})


def _parts(*parts: st.SearchStrategy, sequence: str) -> st.SearchStrategy:
    """One of the parts, or a sequence of them, or nothing."""
    one = st.one_of(*parts)
    return st.none() | one | _part("Sequence", **{sequence: st.lists(one, max_size=3)})


_TOKENIZER_PARTS = {
    "normalizer": _parts(
        *(_part(name) for name in ("NFC", "NFKC", "Lowercase", "StripAccents", "Nmt")),
        _part("Replace", pattern=_PATTERN, content=_PIECE),
        _part("Prepend", prepend=_PIECE),
        _part("Strip", strip_left=st.booleans(), strip_right=st.booleans()),
        sequence="normalizers",
    ),
    "pre_tokenizer": _parts(
        *(_part(name) for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
        _part("Punctuation", behavior=_BEHAVIOR),
        _part("Split", pattern=_PATTERN, behavior=_BEHAVIOR, invert=st.booleans()),
        _part("Digits", individual_digits=st.booleans()),
        _part("ByteLevel", add_prefix_space=st.booleans(), trim_offsets=st.booleans(), use_regex=st.booleans()),
        _part(
            "Metaspace",
            replacement=st.just("\N{LOWER ONE EIGHTH BLOCK}"),
            prepend_scheme=st.sampled_from(["always", "first", "never"]),
            split=st.booleans(),
        ),
        sequence="pretokenizers",
    ),
    "post_processor": _parts(
        _part("BertProcessing", sep=_PAIR, cls=_PAIR),
        _part("RobertaProcessing", sep=_PAIR, cls=_PAIR, trim_offsets=st.booleans(), add_prefix_space=st.booleans()),
        _part("ByteLevel", add_prefix_space=st.booleans(), trim_offsets=st.booleans(), use_regex=st.booleans()),
        sequence="processors",
    ),
    "truncation": st.none()
    | st.fixed_dictionaries(
        {
            "direction": st.sampled_from(["Left", "Right"]),
            "max_length": st.integers(0, 9),
            "strategy": st.sampled_from(["LongestFirst", "OnlyFirst", "OnlySecond"]),
            "stride": st.integers(0, 9),
        }
    ),
}
_MODEL_FLAGS = {
    "dropout": st.sampled_from([None, 0, 0.5, 1.0, 2, -1]),
    "unk_token": st.sampled_from([None, "<unk>", "<mask>", "nope"]),
    "unk_id": st.sampled_from([None, 0, 4, 10**6, -1]),
    "continuing_subword_prefix": st.sampled_from([None, "", "##"]),
    "end_of_word_suffix": st.sampled_from([None, "", "</w>"]),
    "max_input_chars_per_word": st.integers(0, 99),
    **{name: st.booleans() for name in ("fuse_unk", "byte_fallback", "ignore_merges")},
}


@st.composite
def built_tokenizer(draw, contents: list[str]) -> bytes:
    """A tokenizer of a known kind whose settings are others: valid ones, and a few that contradict each other."""
    content = json.loads(draw(st.sampled_from(contents)))
    content |= draw(st.fixed_dictionaries({}, optional=_TOKENIZER_PARTS))
    flags = {name: values for name, values in _MODEL_FLAGS.items() if name in content["model"]}
    content["model"] |= draw(st.fixed_dictionaries({}, optional=flags))
    is_kept = st.sampled_from([True, True, True, False])
    content["added_tokens"] = [
        token | draw(st.fixed_dictionaries({}, optional=_FLAGS))
        for token in content["added_tokens"]
        if token["id"] >= len(content["model"]["vocab"]) or draw(is_kept)
    ]
    return json.dumps(content).encode()


def built_model_config(content: bytes) -> st.SearchStrategy[bytes]:
    """A model configuration with consistent or inconsistent numbers."""
    few = st.sampled_from([1, 2, 3, 4, 8, 16, 24, 64, 1000, 2**20, 10**7, 10**7 + 1])
    shares = st.sampled_from([0, 0.1, 0.5, 1e-5, 1, 1e-300, -0.0, 1e999, 10**400])
    names = json.loads(content)
    return st.fixed_dictionaries(
        {}, optional={name: shares if "prob" in name or "eps" in name else few for name in names}
    ).map(lambda drawn: json.dumps(names | drawn).encode())


@st.composite
def built_state(draw, content: bytes) -> bytes:
    """A torch.save file whose value has changed parts."""
    file = io.BytesIO()
    torch.save(draw(damaged_value(torch.load(io.BytesIO(content), weights_only=True), VALUES)), file)
    return file.getvalue()


_NAMED = """os system, builtins eval, builtins bytearray, _codecs encode, collections OrderedDict, collections Counter,
torch Tensor, torch ByteStorage, torch LongStorage, torch uint16, torch device, torch Size,
torch.storage UntypedStorage, torch._tensor _rebuild_from_type_v2, torch._utils _rebuild_tensor_v2,
torch._utils _rebuild_tensor_v3, torch._utils _rebuild_qtensor"""
# opcodes whose arguments request huge sizes or missing objects
PIECES = [
    *(bytes([code]) for code in b"(t)]}aesuQRbN.012\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x97\x98"),
    b"h\x00", b"h\x05", b"q\x00", b"q\x07", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"K\x00", b"K\x7f",
    b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x82\x01",
    b"\x8b\xff\xff\xff\x7f", b"\x96" + b"\xff" * 7 + b"\x7f", b"X\xff\xff\xff\x7f", b"X\x01\x00\x00\x000",
    b"\x8c\x01a", b"G\x7f\xf8" + bytes(6), b"Pid\n", b"I10\n", b"F1\n",
    *("c{}\n{}\n".format(*name.split()).encode() for name in _NAMED.split(",")),
]  # fmt: skip


@st.composite
def damaged_pickle(draw, content: bytes) -> bytes:
    """Opcodes removed, repeated, swapped and inserted, from the whole pickle instruction set; or damaged bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged_bytes(content))
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    pieces = [content[first:last] for first, last in itertools.pairwise(places)]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(pieces) - 1))
        kind = draw(st.sampled_from(["remove", "repeat", "exchange", "insert", "replace", "other"]))
        if kind == "remove":
            del pieces[at : at + 1]
        elif kind == "repeat":
            pieces[at:at] = [pieces[at]] * draw(st.sampled_from([1, 2, 300]))
        elif kind == "exchange":
            other = draw(st.integers(0, len(pieces) - 1))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == "insert":
            pieces[at:at] = draw(st.lists(st.sampled_from(PIECES), max_size=4))
        elif kind == "replace":
            pieces[at] = draw(st.sampled_from(PIECES))
        else:
            pieces[at] = draw(st.sampled_from(pieces))
        if not pieces:
            break
    return b"".join(pieces)


def built_pickle() -> st.SearchStrategy[bytes]:
    """A pickle of random opcodes only."""
    return st.lists(st.sampled_from(PIECES), max_size=30).map(lambda pieces: b"\x80\x02" + b"".join(pieces) + b".")


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as output:
        for name, content in entries.items():
            output.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return file.getvalue()


@st.composite
def damaged_torch_file(draw, content: bytes) -> bytes:
    """A changed pickle, changed storages, names or compression; or damaged bytes."""
    kind = draw(st.sampled_from(["bytes", "pickle", "pickle", "pickle", "built", "storage", "name", "compressed"]))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    if kind == "pickle":
        entries[pickled] = draw(damaged_pickle(entries[pickled]))
    elif kind == "built":
        entries[pickled] = draw(built_pickle())
    elif kind == "storage":
        name = draw(st.sampled_from(sorted(entries)))
        entries[name] = draw(st.one_of(st.binary(max_size=50), damaged_bytes(entries[name])))
    elif kind == "name":
        name = draw(st.sampled_from(sorted(entries)))
        odd = st.sampled_from(
            ["../data.pkl", "/data.pkl", "data.pkl", "a/data.pkl", "../../x", "/etc/passwd", "a/b/data/0"]
        )
        entries[draw(odd | st.text(min_size=1, max_size=20))] = entries.pop(name)
    else:
        return archive(entries, draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])))
    return archive(entries)


# What may be taken for text: packed, encoded and laid out in other ways, one inside of the other.
_WRAPPINGS = [
    functools.partial(gzip.compress, mtime=0),  # the same each time, or hypothesis calls it flaky
    bz2.compress,
    lzma.compress,
    lambda content: archive({"a.txt": content}),
    lambda content: b"\x28\xb5\x2f\xfd" + content,
    *(
        lambda content, encoding=encoding: content.decode("utf-8", "replace").encode(encoding)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig", "utf-7")
    ),
    lambda content: b"[\n" + b",\n".join(content.splitlines()) + b"\n]",
    lambda content: b"id,text\n" + b"".join(b'1,"%s"\n' % line for line in content.splitlines()),
    lambda content: content.replace(b" ", b"\0"),
    lambda content: content.replace(b"{", b"{\n").replace(b"}", b"\n}"),
    lambda content: content.replace(b"\n", b" ") * min(500, 1 + (1 << 22) // (len(content) + 1)),  # some megabytes
    lambda content: b"PAR1" + content + b"PAR1",
    lambda content: b"ARROW1\0\0" + content,
    lambda content: b"\xff\xff\xff\xff" + content,
]


@st.composite
def wrapped_corpus(draw, content: bytes) -> bytes:
    """A corpus in up to three wrappings, whole or with damage between them."""
    for wrap in draw(st.lists(st.sampled_from(_WRAPPINGS), min_size=1, max_size=3)):
        content = wrap(content)
        if draw(st.integers(0, 3)) == 0:
            content = draw(damaged_bytes(content))
    return content
