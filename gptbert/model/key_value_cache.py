"""A cache of keys and values of earlier positions, so that a further token costs the work of one position.

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
    """One attention's keys and values, and their products with its position vectors, which do not change.

    Attributes:
        positions: the position vectors as queries and as keys, [H, P, d] each; None at first.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._length = 0
        self._memory: tuple[Tensor, ...] = ()  # of what `append` returns, [H, B, capacity, …] each
        self.positions: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [H, B, K, d], values [H, B, K, d] and position scores of keys [H, B, K, P] of all positions.

        Args:
            key: [H, B, T, d], of new positions.
            value: likewise.
            positions: see above; kept.

        Raises:
            ValueError: the cache is full.
        """
        first, self._length = self._length, self._length + key.shape[2]
        if self._length > self._capacity:
            raise ValueError(f"the cache has room for {self._capacity} positions, not for {self._length}")
        self.positions = positions
        new = (key, value, key @ positions[0][:, None].mT)
        if first == 0:
            self._memory = tuple(each.new_empty(*each.shape[:2], self._capacity, each.shape[3]) for each in new)
        for memory, each in zip(self._memory, new, strict=True):
            memory[:, :, first : self._length] = each
        keys, values, by_key = (memory[:, :, : self._length] for memory in self._memory)
        return keys, values, by_key


def next_context(
    query: Tensor, key: Tensor, by_key: Tensor, position_key: Tensor, value: Tensor, buckets: Tensor
) -> Tensor:
    """`kernels.attention_context` of one query, which sees all keys, with position scores of keys from the cache.

    Args:
        query: [H, B, 1, d], scaled.
        key: [H, B, K, d].
        by_key: [H, B, K, P], k_j·pq.
        position_key: [H, P, d].
        value: [H, B, K, d].
        buckets: [K] int64, β of the query and each key.

    Returns:
        [H, B, 1, d].
    """
    scores = (query @ key.mT).squeeze(2)  # q·k_j, [H, B, K]
    of_query = (query.squeeze(2) @ position_key.mT)[..., buckets]  # q·pk_β(j)
    of_key = by_key.gather(-1, buckets[:, None].expand(*scores.shape, 1)).squeeze(-1)  # k_j·pq_β(j)
    return (scores + of_query + of_key).unsqueeze(2).softmax(dim=-1) @ value
