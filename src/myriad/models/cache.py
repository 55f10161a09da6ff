"""A cache of attention's keys and values."""

from torch import Tensor


class KVCache:
    """Grows by doubling, so that a token costs a copy of itself and not of all that came before.

    Each layer holds keys and values of shape (B, H, capacity, Q).
    """

    is_compileable = False
    """Transformers' word for a cache of fixed length."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def get_seq_length(self) -> int:
        """The positions held."""
        return self._lengths[0] if self._lengths else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append to a layer, and return all of its keys and values as (B, H, length, Q)."""
        if layer_idx == len(self._buffers):
            self._buffers.append((key_states[:, :, :0], value_states[:, :, :0]))
            self._lengths.append(0)
        start = self._lengths[layer_idx]
        end = start + key_states.shape[2]
        keys, values = (_with_room(buffer, start, end) for buffer in self._buffers[layer_idx])
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._buffers[layer_idx], self._lengths[layer_idx] = (keys, values), end
        return keys[:, :, :end], values[:, :, :end]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence `beam_idx[i]` holds; there may be fewer or more of them then."""
        self._buffers = self.select(beam_idx)._buffers

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of some sequences alone, which grows by itself."""
        cache = KVCache()
        cache._buffers = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self._buffers]
        cache._lengths = list(self._lengths)
        return cache


def _with_room(buffer: Tensor, used: int, needed: int) -> Tensor:
    if needed <= buffer.shape[2]:
        return buffer
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty(batch, heads, max(needed, 2 * used), width)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger
