"""The words in which a family says how its models lie in a transformers folder (facts: no torch).

`pretrain/models/<family>/hf.py` holds `ARCHITECTURES`, a tuple of `Architecture`: the keys of config.json beside our
fields, and the names of tensors beside ours, with what happens to a tensor on the way. Nothing here or there runs on a
tensor; `pretrain/hf/tensor_steps.py` does what the steps say, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.models.family import FamilyConfig
from pretrain.models.mixture import MixtureFields

REQUIRED = object()  # a key that config.json must hold

# -- what happens to a tensor, told from ours to theirs ----------------------------------------------------------------


@dataclass(frozen=True)
class Grouped:
    """Ours is fused by group along dim 0, [a b ..] for each group; theirs is a tensor for each part.

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
    """Theirs is rows [start, stop) of ours, which has `total`; the others are zero when ours is made from theirs."""

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
    """A tensor of ours and those it becomes. `{n}` and `{e}` stand for a number, `{p}` for weight or bias."""

    ours: str
    theirs: str | tuple[str, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Converted:
    """One tensor of ours: the names it has there, and the way."""

    theirs: tuple[str, ...]
    steps: tuple[Step, ...]


_PLACES = {"{n}": r"(?P<n>\d+)", "{e}": r"(?P<e>\d+)", "{p}": r"(?P<p>weight|bias)"}


def pattern(name: str) -> re.Pattern[str]:
    """The names that a name with places stands for."""
    return re.compile("".join(_PLACES.get(part) or re.escape(part) for part in re.split(r"(\{[nep]\})", name)))


def converted(entries: Iterable[Entry], names: Iterable[str]) -> dict[str, Converted]:
    """Their names for each of ours.

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
class Mapped:
    """A value that both configs hold.

    ours: our field; theirs: dotted key; default: what their class takes when the key is absent; words: (ours, theirs)
    where the values are called differently, the first for one of ours is the one that is written; value: how ours is
    read where the field itself may be null.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    words: tuple[tuple[Any, Any], ...] = ()
    value: Callable[[FamilyConfig], Any] | None = None


@dataclass(frozen=True)
class RequiredValue:
    """A key of theirs that has one value for which our model is the same. change: the remedy, where there is one."""

    theirs: str
    value: Any
    default: Any = REQUIRED
    change: str = "take a model without it: what it turns on is not built here"


@dataclass(frozen=True)
class SupportedValues:
    """Our field fits this architecture with these values, and takes the first of them on import.

    implied: the value is not said to the config on import (it follows from others, or is the default).
    """

    ours: str
    values: tuple[Any, ...]
    value: Callable[[FamilyConfig], Any] | None = None
    implied: bool = False


@dataclass(frozen=True)
class TrainingOnly:
    """A key of theirs that acts in their training only: another value than this is told, and not carried over."""

    theirs: str
    value: Any


@dataclass(frozen=True)
class IfTensorPresent:
    """Our switch for a part that is there when their folder holds this tensor."""

    ours: str
    tensor: str


@dataclass(frozen=True)
class Ignored:
    """Keys of theirs without a bearing on the numbers."""

    theirs: tuple[str, ...]


DENSE = SupportedValues("experts", (0,))  # of an architecture without mixtures of experts
OF_A_MIXTURE = tuple(name for name in MixtureFields.model_fields if name != "experts")  # without a bearing there

FieldRule = Mapped | RequiredValue | SupportedValues | TrainingOnly | IfTensorPresent | Ignored

# Of every config.json: who wrote it, labels of other heads, and how texts are generated.
_NO_BEARING = """
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
FREE_EVERYWHERE = frozenset(_NO_BEARING.split())
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def unchanged(values: dict[str, Any]) -> dict[str, Any]:
    """For an architecture whose config.json needs no other spelling."""
    return values


@dataclass(frozen=True)
class Architecture:
    """A model of transformers that is one of ours in other words."""

    model_type: str  # as config.json says it
    class_name: Callable[[FamilyConfig], str]  # the class that holds all of our weights
    fields: tuple[FieldRule, ...]
    names: Callable[[FamilyConfig], tuple[Entry, ...]]
    # Our fields without a bearing on the numbers, or that follow from others on import.
    free_of_ours: tuple[str, ...] = ()
    # theirs: the tensor that it repeats, where the folder holds it all the same
    copies: Callable[[FamilyConfig], Mapping[str, str]] = lambda config: {}
    # theirs: the tensor it is read from where the folder leaves it out; given config.json
    stand_ins: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda values: {}
    zeros: tuple[str, ...] = ()  # tensors of theirs that ours lacks, and that must be zero where they are there
    ignored: tuple[str, ...] = ()  # patterns of buffers that hold nothing learnt
    prefix: str = ""  # what names of older folders lack
    renamed: tuple[tuple[str, str], ...] = ()  # endings of names in older folders, and what they are today
    read: Callable[[dict[str, Any]], dict[str, Any]] = unchanged  # other spellings of config.json into the one above
    write: Callable[[dict[str, Any]], dict[str, Any]] = unchanged  # and back
    files: Callable[[FamilyConfig], Mapping[str, Any]] = lambda config: {}  # further JSON files, by name
    tokens_in: str = ""  # the section of config.json that names token ids, where it is not the top
    pads_with: Callable[[FamilyConfig], int | None] = lambda config: None  # an id that it takes for padding anywhere


def vocabulary(config: FamilyConfig) -> Rows:
    """The token table without its padding."""
    return Rows(0, config.vocab_size, config.padded_vocab_size)


def attention_parts(heads: int, kv_heads: int, width: int) -> Grouped:
    """The fused projection of `pretrain.models.blocks.SelfAttention` as queries, keys and values."""
    return Grouped(kv_heads, (heads // kv_heads * width, width, width))
