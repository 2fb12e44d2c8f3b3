"""What was encoded once is not encoded again: results by the content of what they were made from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from depthdiff.models.attention import MultiHeadAttention
from depthdiff.models.base import Model, hooked, layers_of
from depthdiff.models.plain import version_of


class Cache:
    """The latest encoded prompts, images and depth maps of a pipeline; `pipe.cache`.

    An entry is found again by the tokens or pixels that were encoded, and by the state of the network that encoded
    them; so neither another prompt nor an adapter, a dtype or a training step meets an old result. What changes weights
    behind torch's back (`weight.data.mul_(2)`) has to `clear()` it.

    Attributes:
        size: how many results are kept, the latest used ones; 0 keeps none.
        hits: how often a result was found.
        misses: how often it had to be made.

    Examples:
        >>> cache = Cache(size=2)
        >>> [cache.get((key,), lambda: torch.zeros(1)) is not None for key in "abab"]
        [True, True, True, True]
        >>> cache.hits, cache.misses, len(cache)
        (2, 2, 2)
    """

    def __init__(self, size: int = 16) -> None:
        self.size, self.hits, self.misses = size, 0, 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        used = sum(entry.numel() * entry.element_size() for entry in self._entries.values())
        return f"Cache({len(self)} of {self.size} results, {used / 2**20:.1f} MiB, {self.hits} hits)"

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def get(self, key: Hashable | None, make: Callable[[], Tensor]) -> Tensor:
        """Return the result of `key`, a copy that is the caller's, or make it; a key of None is never kept."""
        if key is None or self.size < 1:
            return make()
        found = self._entries.pop(key, None)  # each line leaves the entries whole, for threads that come between
        if found is not None:
            self.hits += 1
            self._entries[key] = found
            return found.clone()
        self.misses += 1
        result = make()
        self._entries[key] = result.clone()
        for old in list(self._entries)[: -self.size]:
            self._entries.pop(old, None)
        return result


def fingerprint(x: Tensor) -> tuple[Hashable, ...]:
    """Tell tensors apart by content."""
    data = x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return tuple(x.shape), str(x.dtype), hashlib.blake2b(data.tobytes(), digest_size=20).digest()


def state_of(network: Model, *more: Hashable) -> tuple[Hashable, ...] | None:
    """Tell states of a network apart: its weights, where they are and how exact, and the form of attention.

    A network with hooks has none, None: nobody knows what they do.
    """
    if hooked(network):
        return None
    weights = tuple((weight.data_ptr(), version_of(weight)) for weight in network.state_dict(keep_vars=True).values())
    forms = tuple(repr(layer.attn_fn) for layer in layers_of(network) if isinstance(layer, MultiHeadAttention))
    return network.mark, weights, forms, str(network.device), str(network.dtype), *more
