"""The name map of an architecture: a closed set of rules for config.json and for tensors, as data (no torch).

`pretrain/models/<family>/hf.py` has an `Architecture` for each model_type: the keys of config.json beside the fields of
our config, and the names of its tensors beside ours, with the steps between. The same rules serve both directions:
`pretrain/hf/config_json.py` applies those for keys, `pretrain/hf/tensor_steps.py` those for tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

from pretrain.models.family import TextConfig
from pretrain.models.mixture import MixtureFields

REQUIRED = object()  # a key that config.json must hold
Config = TypeVar("Config", bound=TextConfig, contravariant=True)  # the config class of the family

# -- steps from a tensor of ours to one of transformers ----------------------------------------------------------------


@dataclass(frozen=True)
class Grouped:
    """Ours is fused by group along dim 0, [a b ..] for each group; transformers has a tensor for each part.

    widths: rows of each part in one group.
    """

    groups: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Joined:
    """The parts stand one after the other along dim 0 of one tensor. sizes: rows of each part."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Transposed:
    """A matrix with its dims swapped; a vector stays as it is."""


@dataclass(frozen=True)
class Rows:
    """transformers has rows [start, stop) of our `total` rows; an import sets the others to zero."""

    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Shaped:
    """The same numbers in another shape."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]


Step = Grouped | Joined | Transposed | Rows | Shaped


@dataclass(frozen=True)
class Entry:
    """A tensor of ours and those of transformers. `{n}` and `{e}` stand for a number, `{p}` for weight or bias."""

    ours: str
    theirs: str | tuple[str, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Converted:
    """One tensor of ours: its names in transformers, and the steps from ours to theirs."""

    theirs: tuple[str, ...]
    steps: tuple[Step, ...]


_PLACES = {"{n}": r"(?P<n>\d+)", "{e}": r"(?P<e>\d+)", "{p}": r"(?P<p>weight|bias)"}


def pattern(name: str) -> re.Pattern[str]:
    """The names that a name with places stands for."""
    return re.compile("".join(_PLACES.get(part) or re.escape(part) for part in re.split(r"(\{[nep]\})", name)))


def converted(entries: Iterable[Entry], names: Iterable[str]) -> dict[str, Converted]:
    """The names in transformers, and the steps, for each name of ours.

    Raises:
        LookupError: a name has no entry or two, or two tensors would get the same name: the map is wrong.
    """
    patterns = [(pattern(entry.ours), entry) for entry in entries]
    found: dict[str, Converted] = {}
    owner: dict[str, str] = {}
    for name in names:
        hits = [(match, entry) for regex, entry in patterns if (match := regex.fullmatch(name))]
        if len(hits) != 1:
            raise LookupError(f"{name} has {len(hits)} entries in the name map instead of one")
        match, entry = hits[0]
        theirs = (entry.theirs,) if isinstance(entry.theirs, str) else entry.theirs
        found[name] = Converted(tuple(text.format(**match.groupdict()) for text in theirs), entry.steps)
        for text in found[name].theirs:
            if text in owner:
                raise LookupError(f"{name} and {owner[text]} are both called {text} in the name map")
            owner[text] = name
    return found


# -- config.json -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped(Generic[Config]):
    """A value that both configs hold.

    Args:
        ours: our field.
        theirs: dotted key of config.json.
        default: what the class of transformers takes when the key is absent.
        words: (ours, theirs) where the values have different names; the first for one of ours is written.
        value: how ours is read where the field itself may be null.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    words: tuple[tuple[Any, Any], ...] = ()
    _: KW_ONLY
    value: Callable[[Config], Any] | None = None


@dataclass(frozen=True)
class RequiredValue:
    """A transformers key that must have one value, because our models have no such choice. change: what to do else."""

    theirs: str
    value: Any
    default: Any = REQUIRED
    change: str = "take a model without it: what it turns on is not built here"


@dataclass(frozen=True)
class SupportedValues(Generic[Config]):
    """A field of ours that this architecture has for some values only; an import sets the first of them.

    implied: an import leaves the field out, because it follows from others or is the default.
    """

    ours: str
    values: tuple[Any, ...]
    value: Callable[[Config], Any] | None = None
    implied: bool = False


@dataclass(frozen=True)
class TrainingOnly:
    """A transformers key that acts in training only; an import notes another value than this and drops it."""

    theirs: str
    value: Any


@dataclass(frozen=True)
class IfTensorPresent:
    """A switch of ours for a part that a transformers folder has when it holds this tensor."""

    ours: str
    tensor: str


@dataclass(frozen=True)
class Ignored:
    """transformers keys that don't change the model's outputs."""

    theirs: tuple[str, ...]


DENSE: SupportedValues[TextConfig] = SupportedValues("experts", (0,))  # of an architecture without mixtures of experts
OF_A_MIXTURE = tuple(name for name in MixtureFields.model_fields if name != "experts")  # fields without effect there

FieldRule = Mapped[Config] | RequiredValue | SupportedValues[Config] | TrainingOnly | IfTensorPresent | Ignored

# In every config.json: who wrote it, labels of other heads, how texts are generated. No output depends on them.
_WITHOUT_EFFECT = """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash use_cache
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 chunk_size_feed_forward id2label
    label2id num_labels _num_labels problem_type task_specific_params finetuning_task tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id force_bos_token_to_be_generated max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss gradient_checkpointing output_past classifier_dropout attn_implementation
    _attn_implementation_autoset vocab_file
"""
WITHOUT_KEY_EVERYWHERE = ("freeze",)  # fields of our configs that say what is trained and nothing of the model
IGNORED_EVERYWHERE = frozenset(_WITHOUT_EFFECT.split())
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def unchanged(values: dict[str, Any]) -> dict[str, Any]:
    """For an architecture whose config.json is taken as it is written."""
    return values


@dataclass(frozen=True, kw_only=True)
class Architecture(Generic[Config]):
    """A model_type of transformers that has the same layers as a family of ours, under other names."""

    model_type: str  # as config.json says it
    class_name: Callable[[Config], str]  # the class that holds all of our weights
    fields: tuple[FieldRule[Config], ...]
    names: Callable[[Config], tuple[Entry, ...]]
    # our fields that config.json has no key for: they don't change the outputs, or follow from others on import
    without_key: tuple[str, ...] = ()
    # name of a tensor that repeats another, and that other: a folder may hold both, and ours has one
    copies: Callable[[Config], Mapping[str, str]] = lambda config: {}
    # name of a tensor that a folder may leave out, and the one that is read instead; from the values of config.json
    stand_ins: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda values: {}
    zeros: tuple[str, ...] = ()  # tensors without a counterpart here, which must be zero where a folder has them
    ignored: tuple[str, ...] = ()  # patterns of buffers, which are not learnt
    prefix: str = ""  # prefix that names in older folders lack
    renamed: tuple[tuple[str, str], ...] = ()  # endings of names in older folders, and those of today
    read: Callable[[dict[str, Any]], dict[str, Any]] = unchanged  # other spellings of keys to those in `fields`
    write: Callable[[dict[str, Any]], dict[str, Any]] = unchanged  # and back
    files: Callable[[Config], Mapping[str, Any]] = lambda config: {}  # further JSON files, by name
    tokens_in: str = ""  # the section of config.json with the token ids; "": the top level
    pads_with: Callable[[Config], int | None] = lambda config: None  # an id that means padding at every place


def vocabulary(config: TextConfig) -> Rows:
    """The token table without its padding."""
    return Rows(0, config.vocab_size, config.padded_vocab_size)


def attention_parts(heads: int, kv_heads: int, width: int) -> Grouped:
    """The fused projection of `pretrain.models.blocks.SelfAttention` as queries, keys and values."""
    return Grouped(kv_heads, (heads // kv_heads * width, width, width))
