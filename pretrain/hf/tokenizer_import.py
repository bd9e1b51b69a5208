"""The tokenizer of a transformers folder, of any kind, used through transformers with the interface of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import Problem, UserError
from data_pipeline.corruption.special_ids import NUM_FIXED_IDS, SpecialIds
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.tokenizer import Tokenizer
from pretrain.hf.read_folder import HFError
from pretrain.models.family import FamilyConfig
from pretrain.models.hf_adapter import HFAdapter
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig

ADVICE = "put the model's own tokenizer files beside config.json"


class HFTokenizer:
    """A tokenizer of another project. The name of a special token inside a text is text.

    `end_of_text` is the token between two texts: the one after a text, or for a decoder the one before it.
    """

    def __init__(self, folder: Path, model_type: str, adapter: HFAdapter) -> None:
        """Raises UserError when transformers is not installed, or makes no tokenizer of the folder's files."""
        self.folder, self._adapter = folder, adapter
        self._theirs = theirs = _load(folder, model_type)
        known = theirs.get_vocab()
        special = set(theirs.all_special_ids)
        self.vocab_size = 1 + max((token for token in known.values() if token not in special), default=-1)
        if self.vocab_size == 0:  # transformers makes an empty one where there are no files
            raise UserError(f"{folder}: no tokenizer there; {ADVICE}")
        self.sha256 = _sha256(folder)
        separator = self._id_of(adapter.text_separators)
        if separator is None:
            raise UserError(f"{folder}: its tokenizer names no token that begins or ends a text (bos_token, eos_token)")
        self.end_of_text: int = separator
        frame = theirs.encode("") if adapter.keeps_text_start else []
        self._before = frame[: frame.index(separator)] if separator in frame else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the one that ends it."""
        ids = self._theirs.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*self._before, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return self._theirs.decode([int(token) for token in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        """The text of every token id."""
        return [self._theirs.decode([token]) for token in range(self.vocab_size)]

    def special(self, objective: ObjectiveConfig, model: FamilyConfig) -> SpecialIds:
        """The special ids of the objective.

        Raises:
            HFError: the tokenizer lacks some of them, or has more ids than the model.
        """
        if self.vocab_size > model.vocab_size:
            raise HFError(self.folder, [Problem("tokenizer", f"{self.vocab_size} token ids", f"at most "
                                                f"{model.vocab_size}, the vocabulary in its config.json",
                                                "take the folder with its own tokenizer")])
        spec, names = OBJECTIVES[objective.name], self._adapter.token_names._asdict()
        found = {role: self._id_of(name.attributes) for role, name in names.items()}
        missing = [names[role].attributes[0] for role in spec.special.needed if found[role] is None]
        num_sentinels = spec.reserved_ids(objective, model) - NUM_FIXED_IDS
        if num_sentinels > 0:
            sentinels = spec.special.names_of_sentinels(num_sentinels)
            found["first_sentinel"] = self._first_of_row(sentinels)
            missing += [sentinels[0]] if found["first_sentinel"] is None else []
        if missing:
            raise HFError(self.folder, [Problem(f"tokenizer {name}", "no such token", f"a token for every id that "
                                                f"{objective.name} needs", "take the folder with its own tokenizer")
                                        for name in missing])
        return SpecialIds(**found)

    def _id_of(self, attributes: Sequence[str]) -> int | None:
        """The id of the first of these attributes of the tokenizer that is set."""
        ids = (getattr(self._theirs, f"{name}_id") for name in attributes)
        return next((token for token in ids if token is not None), None)

    def _first_of_row(self, names: Sequence[str]) -> int | None:
        """The id of the first name; None unless the others follow it, each one below."""
        known = self._theirs.get_vocab()
        first = known.get(names[0])
        in_a_row = all(known.get(name) == (first or 0) - number for number, name in enumerate(names))
        return first if in_a_row else None


def _sha256(folder: Path) -> str:
    """The hash of the SentencePiece model in a folder written here; "" for other files, which have no dataset."""
    path = folder / TOKENIZER_FILE
    return Tokenizer(path.read_bytes()).sha256 if path.is_file() and (folder / "tokenizer.json").is_file() else ""


def _load(folder: Path, model_type: str) -> Any:
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError:
        raise UserError(f"{folder}: reading its tokenizer needs transformers, which is not installed: "
                        "pip install 'trainyard[hf]'") from None
    try:
        config = AutoConfig.for_model(model_type)
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer raises its own
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{folder}: transformers makes no tokenizer of the files there ({type(error).__name__}: "
                        f"{reason}); {ADVICE}") from None
