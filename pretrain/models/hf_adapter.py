"""The contract between a family and transformers (no torch).

`pretrain/models/<family>/hf.py` holds `ADAPTER`, an `HFAdapter`. It lists the architectures of transformers that the
family has a name map for, and holds what differs between kinds of models: the inputs that prove an exported folder, how
either side takes them, and the names of the special tokens. Export, import, the certificate and both directions of a
tokenizer use the adapter, so that a new kind of model is added in its own folder alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models.family import TextConfig
from pretrain.models.hf_map import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Config = TypeVar("Config", bound=TextConfig)
Tensors = dict[str, "Tensor"]


class RandomInputs(Protocol):
    """Random inputs of n samples, all from one generator.

    Attributes:
        end_id: the id that ends a text; it is drawn nowhere, nor is the id that the architecture takes for padding.
    """

    end_id: int | None

    def ids(self, max_tokens: int) -> Tensor:
        """Token ids int64 [n, s] with s at most `max_tokens`."""

    def padded_ids(self, max_tokens: int) -> Tensors:
        """`ids` int64 [n, s] and `mask` int64 [n, s], which is 0 where a sample is padded at its end."""

    def below(self, bound: int, *shape: int) -> Tensor:
        """Integers from 0 to bound - 1, int64 [n, *shape]."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, fp32 [n, *shape]."""


class TrainingModel(Protocol):
    """The training model on the tensor axis of some ranks; every method is called on all of them."""

    def run(self, inputs: Tensor | tuple[Tensor, ...]) -> Any:
        """What the last layer returns for the inputs of the first."""

    def logits(self, columns: Tensor) -> Tensor:
        """[s, b, v/tp] -> [b, s, v], without the padding of the vocabulary."""


class TokenName(NamedTuple):
    """The token of one role in a tokenizer of transformers.

    Args:
        text: its name in an exported tokenizer.
        attributes: attributes of a tokenizer; an export sets the first, an import takes the first that is set.
    """

    text: str
    attributes: tuple[str, ...]


class TokenNames(NamedTuple):
    """The token of each role of `SpecialIds` but for the sentinels."""

    pad: TokenName = TokenName("<pad>", ("pad_token",))
    start: TokenName = TokenName("<s>", ("bos_token", "cls_token"))
    separator: TokenName = TokenName("<sep>", ("sep_token",))
    mask: TokenName = TokenName("<mask>", ("mask_token",))


class HFAdapter(ABC, Generic[Config]):
    """A family's side of the exchange with transformers.

    Attributes:
        architectures: an export without `--architecture` takes the first that fits.
        token_names: names of the special tokens.
        text_separators: attributes of a tokenizer; the first that is set is the token between two texts.
        keeps_text_start: a text keeps the tokens that the tokenizer puts before it, as in training.
    """

    architectures: tuple[Architecture[Config], ...]
    token_names: TokenNames = TokenNames()
    text_separators: tuple[str, ...] = ("eos_token", "sep_token", "bos_token")
    keeps_text_start: bool = False

    @abstractmethod
    def sample(self, model: Config, random: RandomInputs) -> Tensors:
        """Inputs for both sides, under names of the adapter's choice; the first dim counts samples."""

    @abstractmethod
    def ours(self, sample: Tensors, model: TrainingModel) -> Tensors:
        """Logits of the training model by head, without those at padded positions, which are arbitrary."""

    @abstractmethod
    def theirs(self, sample: Tensors, model: Any) -> Tensors:
        """The same of a model of transformers: equal names and shapes, and equal numbers up to rounding."""

    @abstractmethod
    def config_token_ids(self, special: SpecialIds, end_of_text: int, decoder_start: int) -> dict[str, int | None]:
        """The token ids in the config.json of a model that was trained here.

        Args:
            decoder_start: the first input of the decoder under the objective of the run.
        """
