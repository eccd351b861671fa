"""Formats of files that lie where another one is expected, by how they begin, for messages."""

_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull brings the file itself",
    b"\x1f\x8b": "compressed by gzip; gunzip it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unzstd it",
    b"BZh": "compressed by bzip2; bunzip2 it",
    b"\xfd7zXZ": "compressed by xz; unxz it",
    b"GGUF": "GGUF, which llama.cpp reads; import the file that it was made from",
    b"\x89HDF": "HDF5, which Keras writes; import a PyTorch file",
    b"\x80": "a bare pickle, which may run code; torch.save(model.state_dict(), FILE) writes what is read here",
    **dict.fromkeys((b"<!", b"<?", b"<h", b"<H"), "a web page; download the file itself"),  # not <s>, of a vocabulary
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"\xef\xbb\xbf": "text with a byte order mark; save it as UTF-8 without one",
}


def format_of(start: bytes) -> str | None:
    """What a file is that begins so, and the way on; None if it is none of these."""
    return next((name for beginning, name in _BEGINNINGS.items() if start.startswith(beginning)), None)
