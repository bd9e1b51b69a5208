"""DeepSpeed's cross entropy fused with the head."""

from __future__ import annotations

from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import Tensor

from parallel.chunked_loss import ChunkedCrossEntropy
from parallel.tensor_parallel import TensorParallel


def chunked_cross_entropy(tp: TensorParallel, chunk_tokens: int) -> ChunkedCrossEntropy:
    """DeepSpeed's cross entropy fused with the head: logits of `chunk_tokens` tokens at a time, over the tensor group.

    Its backward makes them again in blocks of the vocabulary of the same size, so that each row of the weight's
    gradient is one product over all tokens, and sums the gradient of `hidden` over blocks and tensor ranks in fp32.
    """

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        first = tp.rank * weight.shape[0]
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, bias, tp_group=tp.group if tp.size > 1 else None, vocab_start_index=first,
            vocab_end_index=first + weight.shape[0], reduction="none", chunk_size=chunk_tokens)

    return losses
