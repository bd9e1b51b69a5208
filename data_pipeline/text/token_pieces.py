"""The pieces of a tokenizer: what they are, and what they say of words and sentences, one flag for each token id."""

from typing import NamedTuple

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # protobuf makes its classes at run time
    ModelProto,
    TrainerSpec,
)

from data_pipeline.text.tokenizer import SPACE_MARK, TextTokenizer, Tokenizer

SENTENCE_ENDS = (".", "!", "?", "\n")


class TokenPiece(NamedTuple):
    """One token id: its text (of a byte `<0x41>`), its score, and its kind in SentencePiece's words: `normal`, `byte`,
    `control`, `unknown`, `user_defined` or `unused`."""

    text: str
    score: float
    kind: str


class Vocabulary(NamedTuple):
    """All that a SentencePiece model knows: the algorithm (`bpe`, `unigram`, `word`, `char`), what it does to a text
    before it looks pieces up (nothing, in models trained here), and the piece of every id."""

    algorithm: str
    changes: tuple[str, ...]
    pieces: tuple[TokenPiece, ...]


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The model taken apart; a space is a space in it, not SPACE_MARK."""
    proto = ModelProto.FromString(tokenizer.model)
    rules = proto.normalizer_spec
    changes = {"normalization": bool(rules.precompiled_charsmap), "add_dummy_prefix": rules.add_dummy_prefix,
               "remove_extra_whitespaces": rules.remove_extra_whitespaces,
               "spaces kept as spaces": not rules.escape_whitespaces}
    kind_name = ModelProto.SentencePiece.Type.Name
    pieces = []
    for piece in proto.pieces:
        kind = kind_name(piece.type).lower()
        is_text = kind in ("normal", "user_defined", "unused")
        pieces.append(TokenPiece(piece.piece.replace(SPACE_MARK, " ") if is_text else piece.piece, piece.score, kind))
    algorithm = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
    return Vocabulary(algorithm, tuple(name for name, does in changes.items() if does), tuple(pieces))


def word_starts(tokenizer: TextTokenizer) -> np.ndarray:
    """bool [vocabulary]: tokens that begin a word, which are those that do not go on with a letter, digit or byte."""
    return np.array([_starts(piece) for piece in tokenizer.pieces()])


def sentence_ends(tokenizer: TextTokenizer) -> np.ndarray:
    """bool [vocabulary]: tokens that end a sentence or a line, and end-of-text."""
    ends = np.array([piece.endswith(SENTENCE_ENDS) or piece == "<0x0A>" for piece in tokenizer.pieces()])
    ends[tokenizer.end_of_text] = True
    return ends


def _starts(piece: str) -> bool:
    if piece.startswith("<0x") and len(piece) == 6:
        return int(piece[3:5], 16) < 0x80  # the other bytes continue a character or stand inside one
    return piece.startswith(SPACE_MARK) or not piece[:1].isalnum()
