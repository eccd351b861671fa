"""What each attention keeps of a text's earlier positions, so that a further token is one position's work.

Letters of shapes: B rows, T new positions, K keys (earlier positions and new ones), H heads, d head size, P position
vectors.
"""

from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of a text's positions, for `GPTBert.encode_next`.

    Args:
        capacity: positions that it may hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # positions in it
        self._layers: dict[nn.Module, LayerCache] = {}

    def of(self, attention: nn.Module) -> "LayerCache":
        """The part of one attention."""
        return self._layers.setdefault(attention, LayerCache(self.capacity))


class LayerCache:
    """One attention's keys and values, and the projections of its position vectors, which do not change."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._length = 0
        self.positions: tuple[Tensor, Tensor] | None = None  # as queries and as keys, [H, P, d] each

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [H, B, T, d] to those of all positions, [H, B, K, d].

        Raises:
            ValueError: the cache is full.
        """
        first, self._length = self._length, self._length + key.shape[2]
        if self._length > self._capacity:
            raise ValueError(f"the cache has room for {self._capacity} positions, not for {self._length}")
        if first == 0:
            shape = (*key.shape[:2], self._capacity, key.shape[3])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        self._keys[:, :, first : self._length] = key
        self._values[:, :, first : self._length] = value
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]


def next_context(
    query: Tensor, key: Tensor, position_query: Tensor, position_key: Tensor, value: Tensor, buckets: Tensor
) -> Tensor:
    """`kernels.attention_context` of one query, which sees all keys, without products of all keys and position vectors.

    Args:
        query: [H, B, 1, d], scaled.
        key: [H, B, K, d].
        position_query: [H, P, d], scaled.
        position_key: [H, P, d].
        value: [H, B, K, d].
        buckets: [K] int64, β of the query and each key.

    Returns:
        [H, B, 1, d].
    """
    of_position = (query.squeeze(2) @ position_key.mT)[..., buckets]  # q·pk_β(j), [H, B, K]
    # q·k_j + pq_β(j)·k_j
    scores = ((query + position_query[:, None, buckets]) * key).sum(-1) + of_position
    return scores.unsqueeze(2).softmax(dim=-1) @ value
