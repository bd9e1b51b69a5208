"""The tokenizer of a transformers folder, with the same face as ours: used through transformers, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import Problem, UserError
from data_pipeline.corruption.special_ids import NUM_FIXED_IDS, GivenIds
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.tokenizer import Tokenizer
from pretrain.hf.read_folder import HFError
from pretrain.models.family import FamilyConfig, FamilySpec
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import ObjectiveConfig

FIRST_SENTINEL = "<extra_id_0>"
ADVICE = "put the model's own tokenizer files beside config.json"
# Ids that an objective needs: the name in GivenIds, and what transformers calls it.
NEEDED = {
    "masked_lm": {"start": "cls_token", "separator": "sep_token", "mask": "mask_token"},
    "denoising": {"pad": "pad_token", "start": "bos_token", "mask": "mask_token"},
    "span_corruption": {"pad": "pad_token", "first_sentinel": FIRST_SENTINEL},
}


class HFTokenizer:
    """A tokenizer of another project. Names of special tokens that stand in a text are text.

    `end_of_text` separates texts: what follows a text, or for a decoder what stands before one.
    """

    def __init__(self, folder: Path, model_type: str, spec: FamilySpec) -> None:
        """Raises UserError when transformers is not there, or cannot make a tokenizer of the folder's files."""
        self.folder = folder
        self._theirs = theirs = _load(folder, model_type)
        known = theirs.get_vocab()
        special = set(theirs.all_special_ids)
        self.vocab_size = 1 + max((token for token in known.values() if token not in special), default=-1)
        if self.vocab_size == 0:  # transformers makes an empty one where there are no files
            raise UserError(f"{folder}: no tokenizer there; {ADVICE}")
        self.sha256 = _sha256(folder)
        first, last = theirs.bos_token_id, _first_of(theirs.eos_token_id, theirs.sep_token_id)
        separator = _first_of(first, last) if spec.form == "decoder" else _first_of(last, first)
        if separator is None:
            raise UserError(f"{folder}: its tokenizer names no token that begins or ends a text (bos_token, eos_token)")
        self.end_of_text: int = separator
        # A caption is framed by the tokenizer itself; what stands after the text is put there by whoever asks.
        frame = theirs.encode("") if spec.form == "dual_encoder" else []
        self._before = frame[: frame.index(separator)] if separator in frame else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without what ends it."""
        ids = self._theirs.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*self._before, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return self._theirs.decode([int(token) for token in ids], skip_special_tokens=True)

    def pieces(self) -> list[str]:
        """The text of every token id."""
        return [self._theirs.decode([token]) for token in range(self.vocab_size)]

    def special(self, objective: ObjectiveConfig, model: FamilyConfig) -> GivenIds:
        """The ids that the objective has beside text.

        Raises:
            HFError: the tokenizer lacks some of them, or gives out ids that the model does not know.
        """
        if self.vocab_size > model.vocab_size:
            raise HFError(self.folder, [Problem("tokenizer", f"{self.vocab_size} token ids", f"at most "
                                                f"{model.vocab_size}, which the model knows by its config.json",
                                                "take the folder with its own tokenizer")])
        theirs, needed = self._theirs, NEEDED.get(objective.name, {})
        found: dict[str, Any] = {"pad": theirs.pad_token_id, "mask": theirs.mask_token_id,
                                 "separator": theirs.sep_token_id,
                                 "start": _first_of(theirs.cls_token_id, theirs.bos_token_id)}
        if "first_sentinel" in needed:
            found["first_sentinel"] = self._first_sentinel(objective, model)
        missing = [name for ours, name in needed.items() if found[ours] is None]
        if missing:
            raise HFError(self.folder, [Problem(f"tokenizer {name}", "no such token", f"a token for every id that "
                                                f"{objective.name} needs", "take the folder with its own tokenizer")
                                        for name in missing])
        return GivenIds(**found)

    def _first_sentinel(self, objective: ObjectiveConfig, model: FamilyConfig) -> int | None:
        """None unless there are as many as a sample needs, one below the other."""
        known = self._theirs.get_vocab()
        count = OBJECTIVES[objective.name].reserved_ids(objective, model) - NUM_FIXED_IDS
        first = known.get(FIRST_SENTINEL)
        in_a_row = all(known.get(f"<extra_id_{number}>") == (first or 0) - number for number in range(count))
        return first if in_a_row else None


def _first_of(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)


def _sha256(folder: Path) -> str:
    """That of the SentencePiece model that lies in a folder written here; of other files none that a dataset knows."""
    path = folder / TOKENIZER_FILE
    return Tokenizer(path.read_bytes()).sha256 if path.is_file() and (folder / "tokenizer.json").is_file() else ""


def _load(folder: Path, model_type: str) -> Any:
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError:
        raise UserError(f"{folder}: its tokenizer is read with transformers, which is not installed: "
                        "pip install 'trainyard[hf]'") from None
    try:
        config = AutoConfig.for_model(model_type)
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it fails in as many ways as there are tokenizers, and each means the same here
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{folder}: transformers makes no tokenizer of the files there ({type(error).__name__}: "
                        f"{reason}); {ADVICE}") from None
