"""Facts: parameters and multiply-adds of the parts that families share (no torch)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PartSizes:
    """What a block is made of, as far as counting needs it. `norm` is the number of parameters of one norm."""

    hidden: int
    heads: int
    width: int
    ffn: int
    gated: bool
    bias: bool
    norm: int

    @property
    def attention_matrices(self) -> int:
        """Weights of the four projections."""
        return 4 * self.hidden * self.heads * self.width

    @property
    def ffn_matrices(self) -> int:
        """Weights of the feed-forward part."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    def block(self, cross: bool = False) -> int:
        """Parameters of a block: attention (two with `cross`), feed-forward and a norm for each."""
        attentions = 2 if cross else 1
        biases = attentions * (3 * self.heads * self.width + self.hidden) + self.hidden
        biases += (2 if self.gated else 1) * self.ffn
        return (attentions * self.attention_matrices + self.ffn_matrices + (attentions + 1) * self.norm
                + (biases if self.bias else 0))

    def products(self, num_queries: int, num_keys: int, num_memory: int = 0) -> int:
        """Multiply-adds of a block's forward for one sample.

        Args:
            num_queries: its tokens; num_keys: those they look at; num_memory: tokens of the encoder, 0 for no attention
                to them.
        """
        inner = self.heads * self.width
        total = num_queries * (self.attention_matrices + self.ffn_matrices) + 2 * num_queries * num_keys * inner
        if num_memory:  # queries and output of the decoder's tokens, keys and values of the encoder's
            total += 2 * (num_queries + num_memory) * self.hidden * inner + 2 * num_queries * num_memory * inner
        return total


def flops(multiply_adds: int) -> int:
    """FLOPs of forward and backward: two for each multiply-add, three passes."""
    return 6 * multiply_adds
