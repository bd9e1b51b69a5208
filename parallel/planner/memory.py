"""Bytes that a rank holds: model states by kind, and activations (imports no torch).

Sources: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5, for states; Korthikanti et al. 2022 (arXiv 2205.05198),
equations 1 to 6, for activations, with the terms of our blocks. docs/memory.md compares both with what was measured.
"""

from dataclasses import KW_ONLY, dataclass

from common.number_formats import NUMBER_FORMATS
from parallel.zero.settings import BUCKET_ELEMENTS

FULL_BYTES = 4  # master weights, moments and sums of gradients are fp32
NUM_MOMENTS = 2


@dataclass(frozen=True)
class StateBytes:
    """Model states of one rank between two micro-batches, where gradients are largest."""

    weights: float
    gradients: float
    optimizer: float  # moments, and the fp32 master weights where they are not the weights themselves
    communication: float  # buffers that stay
    _: KW_ONLY
    # In host memory with or without offload, so not part of `total`: fp32 copies of frozen weights of 16 bits.
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.communication


def state_bytes(num_parameters: int, zero_stage: int, data: int, compute: str, *, num_gathered: int = 0,
                num_frozen: int = 0) -> StateBytes:
    """Model states of a rank whose tensor slice and stage have `num_parameters` that are trained and `num_frozen` that
    are not, over `data` ranks (`Layout.replicas`).

    Gradients are summed in fp32 whatever the compute type is, where the paper has 2 bytes. Stage 0 keeps fp32 weights
    in every compute type and has no others. Stage 3 keeps `num_gathered` elements whole, those of small parameters.
    """
    low, moments = NUMBER_FORMATS[compute].num_bytes, NUM_MOMENTS * FULL_BYTES
    if zero_stage == 0:
        weights = FULL_BYTES * (num_parameters + num_frozen)
        return StateBytes(weights, FULL_BYTES * num_parameters, moments * num_parameters, 0)
    frozen = low * num_frozen / (data if zero_stage == 3 else 1)
    host = 0 if low == FULL_BYTES else FULL_BYTES * num_frozen / data
    share = num_parameters / data
    optimizer = (FULL_BYTES + moments) * share
    if zero_stage == 1:
        return StateBytes(low * num_parameters + frozen, FULL_BYTES * num_parameters, optimizer, 0, host=host)
    if zero_stage == 2:
        return StateBytes(low * num_parameters + frozen, FULL_BYTES * share, optimizer, 0, host=host)
    bucket = FULL_BYTES * min(num_parameters, BUCKET_ELEMENTS)
    return StateBytes(low * (share + num_gathered) + frozen, FULL_BYTES * share, optimizer, bucket, host=host)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Activations of a decoder of equal pre-norm blocks on one tensor rank, for one micro-batch.

    `pretrain.models.shapes.activations` makes it from the shape of a model's block.

    Args:
        tokens: of the micro-batch, sequence length times sequences; over context ranks, this rank's part of them.
        head_dim: width of one attention head; kv_heads: key and value heads.
        gated: the feed-forward part has a gate; rotary: positions turn queries and keys.
        dropout: there are masks of it, a byte for each element of the residual.
        scores_kept: attention is not fused and keeps its scores: on a CPU with attention dropout.
        norm_tensors: tensors of the residual's size that a norm keeps, itself included: input and output, and one more
            for an RMSNorm that is not fused (torch on a CPU).
        tensor, sequence: the tensor degree and whether sequence parallelism splits the rest over it.
    """

    tokens: int
    sequence_length: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    element_bytes: int
    gated: bool = False
    rotary: bool = False
    dropout: bool = False
    scores_kept: bool = False
    norm_tensors: int = 2
    tensor: int = 1
    sequence: bool = False

    @property
    def residual(self) -> float:
        """One tensor between the products, "sbh" (over t with sequence parallelism)."""
        return self.element_bytes * self.tokens * self.hidden / (self.tensor if self.sequence else 1)

    @property
    def kept_by_full(self) -> float:
        """Of a block that is recomputed in full: its input."""
        return self.residual

    @property
    def kept_by_selective(self) -> float:
        """Of a block whose cheap parts are recomputed: both norms, what products give, and masks of dropout."""
        e, n, t = self.element_bytes, self.tokens, self.tensor
        width = (2 * self.heads + 2 * self.kv_heads) * self.head_dim  # queries, keys, values; attention's output
        inner = (2 if self.gated else 1) * self.ffn
        masks = 2 * self.residual / e if self.dropout else 0
        return 2 * self.norm_tensors * self.residual + e * n * (width + inner) / t + masks

    @property
    def recomputed_by_selective(self) -> float:
        """What `none` keeps beside that: inside attention, and the activation function's output."""
        e, n, t = self.element_bytes, self.tokens, self.tensor
        turned = (self.heads + self.kv_heads) * self.head_dim  # copies of queries and keys: turned, or scaled
        inside = FULL_BYTES * n * self.heads  # the sum of each softmax
        if self.scores_kept:  # softmax, mask and their product, in the compute type
            inside = 3 * e * n * self.sequence_length * self.heads + e * n * turned
        if self.rotary:
            inside += e * n * turned
        return (inside + e * n * (2 if self.gated else 1) * self.ffn) / t

    def block(self, recompute: str) -> float:
        """Bytes that a block keeps for its backward under `none`, `selective` or `full`."""
        if recompute == "full":
            return self.kept_by_full
        return self.kept_by_selective + (self.recomputed_by_selective if recompute == "none" else 0)

    @property
    def probabilities(self) -> float:
        """What the loss over all logits at once keeps: fp32 log-probabilities."""
        return FULL_BYTES * self.tokens * self.vocab_size / self.tensor

    @property
    def ends(self) -> float:
        """Input of the final norm and of the head (whole again after sequence parallelism), embedding's mask."""
        mask = self.residual / self.element_bytes if self.dropout else 0
        head = self.element_bytes * self.tokens * self.hidden
        return (self.norm_tensors - 1) * self.residual + head + mask + self.probabilities

    def kept(self, num_blocks: int, recompute: str, every: int = 1) -> float:
        """Bytes alive between forward and backward; every n-th block is recomputed."""
        chosen = 0 if recompute == "none" else -(-num_blocks // every)
        return chosen * self.block(recompute) + (num_blocks - chosen) * self.block("none") + self.ends

    def peak(self, num_blocks: int, recompute: str, every: int = 1) -> float:
        """Largest bytes of a forward and backward, gradients of weights left out.

        Either the gradient of the logits is there beside all that is kept (twice with one tensor rank; megatron-core
        writes it over the probabilities, and the head's input has one), or the last block that is recomputed is whole
        again, while the gradient of its widest part is there.
        """
        kept = self.kept(num_blocks, recompute, every)
        loss = 2 * self.probabilities if self.tensor == 1 else self.element_bytes * self.tokens * self.hidden
        gradient = self.element_bytes * self.tokens * self.ffn / self.tensor
        again = {"none": 0.0, "selective": self.recomputed_by_selective,
                 "full": self.block("none") - self.kept_by_full + gradient}[recompute]
        return kept + max(loss, again - self.probabilities)
