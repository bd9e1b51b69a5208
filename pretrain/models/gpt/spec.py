"""Facts of GPT decoders: the fields, their limits, parameters and FLOPs (no torch)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import Found, nearest_multiples
from pretrain.models import mixture
from pretrain.models.family import FamilySpec, TextConfig
from pretrain.models.mixture import MixtureFields


class GPTConfig(MixtureFields, TextConfig):
    """A causal decoder. The defaults are GPT-2's shape of block."""

    family: Literal["gpt"] = Field("gpt", description="the architecture")
    layers: int = Field(ge=1, description="number of transformer blocks")
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="number of attention heads; hidden / heads is the width of one")
    kv_heads: int | None = Field(
        None, ge=1, description="number of key and value heads, each shared by heads / kv_heads heads; null: as heads"
    )
    ffn: int | None = Field(None, ge=1, description="inner width of the feed-forward part; null: 4 x hidden")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="kind of norm")
    norm_position: Literal["pre", "post"] = Field(
        "pre", description="`pre`: before attention and feed-forward, and once at the end; `post`: after each addition"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in a norm")
    positions: Literal["learned", "rotary", "none"] = Field("learned", description="how a token knows its place")
    rotary_base: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = Field(
        "gelu", description="non-linearity of the feed-forward part; `swiglu` adds a gate matrix"
    )
    bias: bool = Field(True, description="biases in attention and feed-forward")
    tied_head: bool = Field(True, description="the output head is the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="part of embedding and residual activations set to 0")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="part of attention weights set to 0")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_hidden(self) -> int:
        """Inner width of the feed-forward part."""
        return 4 * self.hidden if self.ffn is None else self.ffn


def problems(config: GPTConfig) -> Iterator[Found]:
    """What does not fit together inside one model, as (where, asked, possible, change)."""
    if config.hidden % config.heads:
        multiples = " or ".join(map(str, nearest_multiples(config.hidden, config.heads)))
        near = sorted(divisors(config.hidden), key=lambda heads: abs(heads - config.heads))[:3]
        yield ("model.heads", f"hidden={config.hidden} in {config.heads} heads", "heads that divide hidden",
               f"set model.heads to one of {', '.join(map(str, sorted(near)))}, or model.hidden to {multiples}")
    elif config.positions == "rotary" and config.head_dim % 2:
        yield ("model.positions", f"rotary with heads of width {config.head_dim} (hidden / heads)",
               "an even width: rotary turns pairs of numbers",
               f"set model.hidden to {config.heads * (config.head_dim + 1)}, or model.positions=learned")
    if config.heads % config.num_kv_heads:
        yield ("model.kv_heads", f"{config.heads} heads that share {config.num_kv_heads} key and value heads",
               "kv_heads that divide heads",
               f"set model.kv_heads to one of {', '.join(map(str, divisors(config.heads)))}")
    yield from mixture.problems(config, config.layers)


def facts(config: GPTConfig) -> ModelTraits:
    """What the rules need to know."""
    return ModelTraits(
        layers=config.layers, heads=config.heads, kv_heads=config.num_kv_heads, hidden=config.hidden,
        ffn=config.ffn_hidden, vocab_size=config.padded_vocab_size, sequence_length=config.sequence_length,
        experts=config.experts, expert_ffn=config.expert_width, shared_expert_ffn=config.shared_width,
        why_no_context="routers of experts look at whole sequences, for their balance and capacity"
        if config.experts else "",
    )


def parameter_count(config: GPTConfig) -> int:
    """Parameters with the vocabulary as it is, which is what is published. Tied weights count once."""
    return _parameters(config, config.vocab_size)


def built_parameter_count(config: GPTConfig) -> int:
    """Parameters with the vocabulary padded, which is what memory holds. Tied weights count once."""
    return _parameters(config, config.padded_vocab_size)


def flops_per_token(config: GPTConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward for one token of a sequence of `sequence_length` tokens.

    Matrix products only, two FLOPs for each multiply-add and three passes (forward, and two products in the backward);
    attention counts the whole square, the embedding lookup nothing. With ffn = 4 hidden and kv_heads = heads this is
    72 s L h^2 (1 + s/6h + V/12Lh) a sequence: Narayanan et al., SC21, section 5.1, without their recompute factor, and
    Korthikanti et al., arXiv 2205.05198, appendix A. Of a mixture the experts count that a token meets.
    """
    width = config.heads * config.head_dim
    weights = config.layers * (_attention_matrices(config) + _ffn_matrices(config)) \
        + config.padded_vocab_size * config.hidden \
        + mixture.added_active_parameters(config, config.layers, config.activation == "swiglu", bias=False)
    return 6 * weights + 12 * config.layers * width * sequence_length


def _parameters(config: GPTConfig, vocab_size: int) -> int:
    hidden = config.hidden
    norm = 2 * hidden if config.norm == "layernorm" else hidden
    embedding = vocab_size * hidden + (config.sequence_length * hidden if config.positions == "learned" else 0)
    block = _attention_matrices(config) + _ffn_matrices(config) + 2 * norm
    if config.bias:
        inner_biases = 2 if config.activation == "swiglu" else 1
        qkv = (config.heads + 2 * config.num_kv_heads) * config.head_dim
        block += qkv + hidden + inner_biases * config.ffn_hidden + hidden
    final_norm = norm if config.norm_position == "pre" else 0
    head = 0 if config.tied_head else vocab_size * hidden
    experts = mixture.added_parameters(config, config.layers, config.activation == "swiglu", config.bias)
    return embedding + config.layers * block + experts + final_norm + head


def idle_parameter_count(config: GPTConfig) -> int:
    """Parameters of experts that one token does not meet."""
    form = (config, config.layers, config.activation == "swiglu", config.bias)
    return mixture.added_parameters(*form) - mixture.added_active_parameters(*form)


def _attention_matrices(config: GPTConfig) -> int:
    return 2 * config.hidden * (config.heads + config.num_kv_heads) * config.head_dim


def _ffn_matrices(config: GPTConfig) -> int:
    return (3 if config.activation == "swiglu" else 2) * config.hidden * config.ffn_hidden


SPEC = FamilySpec(
    config_class=GPTConfig,
    form="decoder",
    evaluation="language",
    generation="continuation",
    objectives=("causal_lm", "prefix_lm", "fill_in_the_middle"),
    problems=problems,
    facts=facts,
    parameter_count=parameter_count,
    built_parameter_count=built_parameter_count,
    flops_per_token=flops_per_token,
    idle_parameter_count=idle_parameter_count,
)
