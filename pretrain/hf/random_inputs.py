"""Random inputs of the certificate, from which a family's adapter takes its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.family import FamilyConfig
from pretrain.models.hf_adapter import Tensors
from pretrain.models.hf_map import Architecture

SEED, NUM_SAMPLES, MAX_TOKENS = 20240607, 3, 192


class SeededInputs:
    """Inputs of NUM_SAMPLES samples, all from one generator (`pretrain.models.hf_adapter.RandomInputs`).

    Args:
        end_id: the id that ends a text; it is not drawn.
        multiple: lengths are a multiple of it (the tensor degree, for sequence parallelism).
    """

    def __init__(self, model: FamilyConfig, architecture: Architecture, end_id: int | None, multiple: int) -> None:
        self.end_id, self.pad_id = end_id, architecture.pads_with(model)
        self._multiple = multiple
        self._generator = torch.Generator().manual_seed(SEED)
        self._usable = torch.tensor([token for token in range(model.vocab_size) if token not in (self.pad_id, end_id)])

    def ids(self, max_tokens: int) -> Tensor:
        """Token ids int64 [n, s]; s is at most MAX_TOKENS and a multiple of `multiple`."""
        length = max(self._multiple, min(max_tokens, MAX_TOKENS) // self._multiple * self._multiple)
        return self._usable[self.below(len(self._usable), length)]

    def padded_ids(self, max_tokens: int) -> Tensors:
        """`ids` int64 [n, s] and their `mask` int64 [n, s]: the first sample is whole, the others end earlier."""
        ids = self.ids(max_tokens)
        length = ids.shape[1]
        lengths = torch.tensor([length - (length * number) // (NUM_SAMPLES + 1) for number in range(NUM_SAMPLES)])
        mask = (torch.arange(length) < lengths[:, None]).long()
        if self.pad_id is not None:
            ids[mask == 0] = self.pad_id
        return {"ids": ids, "mask": mask}

    def below(self, bound: int, *shape: int) -> Tensor:
        """Integers from 0 to bound - 1, int64 [n, *shape]."""
        return torch.randint(bound, (NUM_SAMPLES, *shape), generator=self._generator)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, fp32 [n, *shape]."""
        return torch.randn(NUM_SAMPLES, *shape, generator=self._generator)
