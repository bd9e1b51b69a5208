"""The one description of a model's layers: modules are built from it, and everything that is counted follows from it.

A family describes its model as stacks of blocks (`BlockStack`) and the layers around them (`EndShape`), without torch.
From these follow parameters, FLOPs, the costs of the pipeline cut, the inputs of the rules and the planner's memory of
activations. Units: parameters are numbers, not bytes; `multiply_adds` are those of the matrix products in the forward
of one sample, so that layers which see sequences of different lengths can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

from parallel.planner.memory import Activations

GATED = ("swiglu", "geglu_tanh")  # activations that multiply with the output of a second matrix


@dataclass(frozen=True, kw_only=True)
class MixtureShape:
    """A mixture of experts; `ffn` is the inner width of one expert, `shared_ffn` 0 where there is no shared expert."""

    experts: int
    top_k: int
    ffn: int
    shared_ffn: int
    renormalised: bool
    capacity_factor: float | None
    balance_loss: float
    z_loss: float
    bias_rate: float


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A transformer block: sizes, kinds of parts, initial standard deviations, and the tokens it sees in a sample.

    Args:
        num_tokens: tokens of one sample that pass through it.
        num_memory_tokens: tokens of the encoder's output that it attends to; 0: it has no cross-attention.
        attention_scale: factor of the products of queries and keys; None: 1 / sqrt(head_dim).
        query_std: None: std.
        up_std: of the feed-forward part's first matrix; None: std.
        down_std: of the matrix back from the feed-forward part; None: residual_std.
        mixture: experts in place of one feed-forward part.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    num_tokens: int
    num_memory_tokens: int = 0
    norm: str
    norm_position: str
    norm_epsilon: float
    activation: str
    bias: bool
    dropout: float
    attention_dropout: float
    std: float
    residual_std: float
    rotary_base: float | None = None
    attention_scale: float | None = None
    query_std: float | None = None
    up_std: float | None = None
    down_std: float | None = None
    mixture: MixtureShape | None = None

    @staticmethod
    def scaled_residual(std: float, num_layers: int) -> float:
        """Std of projections that write to the residual: std / sqrt(2 layers) (Radford et al. 2019, section 2.3)."""
        return std / sqrt(2 * num_layers)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate matrix."""
        return self.activation in GATED

    @property
    def has_cross_attention(self) -> bool:
        return self.num_memory_tokens > 0

    @property
    def num_parameters(self) -> int:
        """Of all its weights, every expert included."""
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * (inner + kv) + self.bias * (inner + 2 * kv + self.hidden)
        cross = 4 * self.hidden * inner + self.bias * (3 * inner + self.hidden) if self.has_cross_attention else 0
        norms = (3 if self.has_cross_attention else 2) * norm_parameters(self.norm, self.hidden)
        return attention + cross + norms + self._feed_forward_parameters()

    @property
    def num_idle_parameters(self) -> int:
        """Of experts that one token is not sent to."""
        if self.mixture is None:
            return 0
        return (self.mixture.experts - self.mixture.top_k) * self._dense_parameters(self.mixture.ffn)

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products for one sample; attention counts the whole square, a mixture the experts in use."""
        inner, kv, queries, memory = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.num_tokens,
                                      self.num_memory_tokens)
        total = 2 * queries * self.hidden * (inner + kv) + 2 * queries * queries * inner
        if memory:  # queries and output of the decoder's tokens, keys and values of the encoder's
            total += 2 * (queries + memory) * self.hidden * inner + 2 * queries * memory * inner
        widths = self.ffn
        router = 0
        if self.mixture:
            widths = self.mixture.top_k * self.mixture.ffn + self.mixture.shared_ffn
            router = self.mixture.experts * self.hidden
        return total + queries * ((3 if self.gated else 2) * self.hidden * widths + router)

    @property
    def cost(self) -> int:
        """Its weight in the pipeline cut, in multiply-adds of one sample's forward."""
        return self.multiply_adds

    def _feed_forward_parameters(self) -> int:
        mixture = self.mixture
        if mixture is None:
            return self._dense_parameters(self.ffn)
        shared = self._dense_parameters(mixture.shared_ffn) if mixture.shared_ffn else 0
        return mixture.experts * (self.hidden + self._dense_parameters(mixture.ffn)) + shared

    def _dense_parameters(self, width: int) -> int:
        matrices = 3 if self.gated else 2
        return matrices * self.hidden * width + self.bias * ((matrices - 1) * width + self.hidden)


@dataclass(frozen=True, kw_only=True)
class BlockStack:
    """Consecutive blocks of one shape, except that every n-th has a mixture of experts.

    Args:
        name: of its layers: block i is `<name>.<i>`.
        num_blocks: at least 1.
        dense: shape of a block without experts.
        mixture: that of the last of every `mixture_every` blocks; None: all are dense.
        shared: one block's weights serve all of them (Lan et al. 2020, ALBERT, section 3.1).
    """

    name: str
    num_blocks: int
    dense: BlockShape
    mixture: MixtureShape | None = None
    mixture_every: int = 1
    shared: bool = False

    @property
    def num_mixtures(self) -> int:
        return self.num_blocks // self.mixture_every if self.mixture else 0

    @property
    def num_parameters(self) -> int:
        if self.shared:
            return self.shape_of(0).num_parameters
        return self._sum(self.dense.num_parameters, self._sparse.num_parameters)

    @property
    def num_idle_parameters(self) -> int:
        """Of experts that one token is not sent to."""
        return self.num_mixtures * self._sparse.num_idle_parameters

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products for one sample."""
        return self._sum(self.dense.multiply_adds, self._sparse.multiply_adds)

    def shape_of(self, index: int) -> BlockShape:
        """The shape of the block of this index."""
        return self._sparse if self.mixture and (index + 1) % self.mixture_every == 0 else self.dense

    def named(self) -> Iterator[tuple[str, BlockShape]]:
        """(layer name, shape) of each block in order."""
        yield from ((f"{self.name}.{index}", self.shape_of(index)) for index in range(self.num_blocks))

    @property
    def _sparse(self) -> BlockShape:
        return replace(self.dense, mixture=self.mixture)

    def _sum(self, dense: int, sparse: int) -> int:
        return (self.num_blocks - self.num_mixtures) * dense + self.num_mixtures * sparse


@dataclass(frozen=True, kw_only=True)
class EndShape:
    """A layer that is no block: an embedding, a norm between two stacks, a head.

    Args:
        num_parameters: those that do not depend on the size of the vocabulary.
        per_token_id: parameters for each token id; 0 where the table is that of another layer.
        multiply_adds: of its matrix products for one sample.
        num_lookups: numbers that it copies out of a table for one sample.
    """

    num_parameters: int = 0
    per_token_id: int = 0
    multiply_adds: int = 0
    num_lookups: int = 0

    @property
    def cost(self) -> int:
        """Its weight in the pipeline cut, in multiply-adds of one sample's forward.

        A number that is looked up counts twice: it is copied, and its gradient is added in the backward.
        """
        return self.multiply_adds + 2 * self.num_lookups


LayerShape = BlockShape | EndShape


def norm_parameters(kind: str, hidden: int) -> int:
    """Parameters of a norm: LayerNorm has a bias beside the weight, RMSNorm has none."""
    return 2 * hidden if kind == "layernorm" else hidden


def flops(multiply_adds: int) -> int:
    """FLOPs of forward and backward: two for each multiply-add, and three products (one forward, two backward)."""
    return 6 * multiply_adds


def activations(block: BlockShape, *, vocab_size: int, micro_batch: int, element_bytes: int, tensor: int = 1,
                context: int = 1, sequence: bool = False, fused: bool = True) -> Activations:
    """What the planner needs for the activations of a decoder of such blocks on one rank of a layout.

    Args:
        block: a dense pre-norm block without cross-attention; those are the blocks that the formulas describe.
        vocab_size: the padded one.
        micro_batch: samples of one forward.
        element_bytes: of the compute type.
        fused: whether kernels keep neither attention scores under dropout nor an RMSNorm's intermediate (a GPU); torch
            on a CPU keeps both.

    Raises:
        ValueError: the formulas do not describe such a block.
    """
    if block.norm_position != "pre" or block.has_cross_attention or block.mixture:
        raise ValueError("activations are known of dense pre-norm blocks without cross-attention")
    return Activations(
        tokens=micro_batch * block.num_tokens // context, sequence_length=block.num_tokens, hidden=block.hidden,
        heads=block.heads, kv_heads=block.kv_heads, head_dim=block.head_dim, ffn=block.ffn, vocab_size=vocab_size,
        element_bytes=element_bytes, gated=block.gated, rotary=block.rotary_base is not None,
        dropout=block.dropout > 0, scores_kept=not fused and block.attention_dropout > 0,
        norm_tensors=3 if block.norm == "rmsnorm" and not fused else 2, tensor=tensor, sequence=sequence)
