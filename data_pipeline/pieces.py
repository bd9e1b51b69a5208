"""What the pieces of a tokenizer say of words and sentences, as one flag for each token id."""

import numpy as np

from data_pipeline.tokenizer import SPACE_MARK, Tokenizer

SENTENCE_ENDS = (".", "!", "?", "\n")


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocabulary]: tokens that begin a word, which are those that do not go on with a letter, digit or byte."""
    return np.array([_starts(piece) for piece in tokenizer.pieces()])


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocabulary]: tokens that end a sentence or a line, and end-of-text."""
    ends = np.array([piece.endswith(SENTENCE_ENDS) or piece == "<0x0A>" for piece in tokenizer.pieces()])
    ends[tokenizer.end_of_text] = True
    return ends


def _starts(piece: str) -> bool:
    if piece.startswith("<0x") and len(piece) == 6:
        return int(piece[3:5], 16) < 0x80  # the other bytes continue a character or stand inside one
    return piece.startswith(SPACE_MARK) or not piece[:1].isalnum()
