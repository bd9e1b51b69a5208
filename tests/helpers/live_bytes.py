"""Counts the bytes of tensors that are alive, by storage, from what torch itself dispatches."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations inside the context made, forward and backward.

    What was there before does not count. A view counts with its storage, and a storage that is resized with the size
    that it has.
    """

    def __init__(self):
        super().__init__()
        self.peak_bytes = 0
        self._made: dict[int, weakref.ref] = {}
        self._foreign: set[int] = set()

    @property
    def current_bytes(self) -> int:
        """What is alive now."""
        return sum(storage.nbytes() for storage in (reference() for reference in self._made.values()) if storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._meet(storage, is_new=False)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._meet(storage, is_new=True)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def _meet(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        key = storage._cdata
        if key in self._made or key in self._foreign:
            return
        if is_new:
            self._made[key] = weakref.ref(storage)
            weakref.finalize(storage, self._made.pop, key, None)
        else:
            self._foreign.add(key)
            weakref.finalize(storage, self._foreign.discard, key)


def _storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
