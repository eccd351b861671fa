"""How often shared memory and the L1 cache are accessed for one instruction; both are one memory."""

import numpy as np

BANKS = 32  # of one word each
WORD = 4  # bytes
LINE = BANKS * WORD  # of the cache


def wavefronts(addresses: np.ndarray, size: int, active: np.ndarray) -> int:
    """Accesses that an instruction takes, of all its warps together.

    In one access, each of the 32 banks delivers one word of four bytes, to any number of lanes. Lanes with 8 or 16
    bytes are served by halves or quarters of a warp. So 32 different words of one bank take 32, and 16 bytes for each
    lane take at least 4. Matrices of `ldmatrix` and `stmatrix` are rows of 16 bytes from eight lanes each.

    Args:
        addresses: [n] integers, bytes; n is a multiple of 32.
        size: bytes of each lane.
        active: [n] bool, lanes that take part.
    """
    lanes = _served_together(size)
    words = addresses.astype(np.int64)[:, None] // WORD + np.arange(max(size // WORD, 1))
    words = np.sort(np.where(active[:, None], words, -1).reshape(-1, lanes * words.shape[1]), axis=1)
    is_new = words >= 0
    is_new[:, 1:] &= words[:, 1:] != words[:, :-1]
    groups = np.broadcast_to(np.arange(len(words))[:, None], words.shape)[is_new]
    counts = np.bincount(groups * BANKS + words[is_new] % BANKS, minlength=len(words) * BANKS)
    return int(counts.reshape(-1, BANKS).max(axis=1).sum())


def lines(addresses: np.ndarray, size: int, active: np.ndarray) -> int:
    """The same for the L1 cache, which delivers one of its lines in an access, also to halves or quarters of a warp."""
    touched = np.where(active, addresses.astype(np.int64) // LINE, -1).reshape(-1, _served_together(size))
    touched.sort(axis=1)
    is_new = touched >= 0
    is_new[:, 1:] &= touched[:, 1:] != touched[:, :-1]
    return int(is_new.sum())


def _served_together(size: int) -> int:
    """Lanes."""
    return LINE // max(size, WORD)
