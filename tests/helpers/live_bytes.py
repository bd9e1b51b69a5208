"""Counts the bytes of tensors that are alive, by storage, from what torch itself dispatches."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`current_bytes` and `peak_bytes` of all storages made by operations inside the context, forward and backward.

    What was there before does not count; a view counts with its storage; a storage that is resized counts as it is at
    the time of the last operation that touched it.
    """

    def __init__(self):
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self._held: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, is_new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor, is_new=True)
        return result

    def _meet(self, tensor: torch.Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held and key not in self._known:
            if not is_new:
                self._known.add(key)  # from before; it stays out of the count
                weakref.finalize(storage, self._known.discard, key)
                return
            self._held[key] = 0
            weakref.finalize(storage, self._forget, key)
        if key in self._held:
            self._change(storage.nbytes() - self._held[key])
            self._held[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self._change(-self._held.pop(key, 0))

    def _change(self, num_bytes: int) -> None:
        self.current_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
