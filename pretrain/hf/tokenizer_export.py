"""A SentencePiece tokenizer as the files that transformers reads: the same ids for every text.

`tokenizer.json` describes a byte-pair encoding for the library tokenizers. In it a space is a space, so that nothing is
normalized and U+2581, SentencePiece's own mark for a space, is spelled in bytes as here. `tokenizer.model` is the
SentencePiece model itself, from which the tokenizer comes back whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import writing
from data_pipeline.corruption.special_ids import NUM_FIXED_IDS, SpecialIds
from data_pipeline.folder.manifest import TOKENIZER_FILE
from data_pipeline.text.token_pieces import TokenPiece, Vocabulary, vocabulary
from data_pipeline.text.tokenizer import END_OF_TEXT, Tokenizer
from pretrain.config.run_config import RunConfig
from pretrain.models import hf_adapter
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import END_OF_TEXT_ROLE

TEXT = "$A"  # stands for the text in a frame
UNKNOWN = "<unk>"


def export_tokenizer(tokenizer: Tokenizer, config: RunConfig, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model` into an existing folder.

    The special ids of the config's objective get names (`<pad>`, `[MASK]`, `<extra_id_0>` ..) and their attributes in
    transformers. transformers puts around a text what the objective puts there in training. A special name inside a
    text is text, as in training; transformers looks for such names when it is called with `split_special_tokens=False`.

    Raises:
        UserError: the library tokenizers would encode some texts differently, or the folder cannot be written.
        StorageError: the storage fails.
    """
    found = vocabulary(tokenizer)
    _check(found)
    special = special_ids(config)
    uses, usual = OBJECTIVES[config.objective.name].special, _usual_names(config)
    taken = {piece.text for piece in found.pieces}
    names = {plain: _free(plain, taken) for plain in special} | {
        END_OF_TEXT: found.pieces[tokenizer.end_of_text].text,
        UNKNOWN: next(piece.text for piece in found.pieces if piece.kind == "unknown")}
    ids = {names[plain]: token for plain, token in special.items()} | {names[END_OF_TEXT]: tokenizer.end_of_text}
    before, after = ([names[usual[role]] for role in roles] for roles in (uses.before, uses.after))
    frame = (*before, TEXT, *after)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.model.sequence_length,
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,
        **{attribute: names[plain] for attribute, plain in _attributes(config).items()},
    }
    files = {"tokenizer.json": _tokenizer_json(found, ids, frame), "tokenizer_config.json": settings}
    with writing(folder):
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)


def special_ids(config: RunConfig) -> dict[str, int]:
    """Usual names of the ids at the top of the vocabulary that the objective uses, with the ids."""
    ids, usual = SpecialIds.at_top(config.model.vocab_size), _usual_names(config)
    spec = OBJECTIVES[config.objective.name]
    num_sentinels = max(spec.reserved_ids(config.objective, config.model) - NUM_FIXED_IDS, 0)
    return {usual[role]: getattr(ids, role) for role in _roles(config)} | {
        name: ids.required("first_sentinel") - number
        for number, name in enumerate(spec.special.names_of_sentinels(num_sentinels))}


def _usual_names(config: RunConfig) -> dict[str, str]:
    """The name of each role; a tokenizer that has a piece of that name gets another."""
    names = hf_adapter(config.model.family).token_names
    return {role: name.text for role, name in names._asdict().items()} | {END_OF_TEXT_ROLE: END_OF_TEXT}


def _roles(config: RunConfig) -> list[str]:
    """The roles that get a name, in the order of `SpecialIds`."""
    special = OBJECTIVES[config.objective.name].special
    return [role for role in SpecialIds._fields if role in special.needed or role in special.named]


def _attributes(config: RunConfig) -> dict[str, str]:
    """The usual name for each attribute of transformers; end-of-text stands in for a padding token."""
    found = {"unk_token": UNKNOWN, "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    names = hf_adapter(config.model.family).token_names._asdict()
    return found | {names[role].attributes[0]: names[role].text for role in _roles(config)}


def _check(found: Vocabulary) -> None:
    if found.algorithm != "bpe":
        raise UserError(f"the tokenizer is a {found.algorithm} model, and among equally likely cuts the library "
                        "tokenizers takes others than SentencePiece, so some texts would get other ids. Byte-pair "
                        "encodings alone are exported: train one with `trainyard data tokenizer --algorithm bpe`")
    if found.changes:
        raise UserError(f"the tokenizer changes texts before it cuts them ({', '.join(found.changes)}); only those "
                        "that do not are exported, such as `trainyard data tokenizer` trains")
    texts = {piece.text for piece in found.pieces}
    if len(texts) < len(found.pieces) or any(piece.kind == "unused" for piece in found.pieces):
        raise UserError("the tokenizer holds a piece twice, or unused ones, which the library tokenizers do not have")


def _free(name: str, taken: set[str]) -> str:
    """The name, in further brackets where a piece of text looks like it."""
    while name in taken:
        name = f"<{name}>"
    return name


def _tokenizer_json(found: Vocabulary, special: dict[str, int], frame: tuple[str, ...]) -> dict[str, Any]:
    ids = {piece.text: number for number, piece in enumerate(found.pieces)}
    kinds = {number: piece.kind for number, piece in enumerate(found.pieces)}
    added = {number: text for text, number in (ids | special).items() if kinds.get(number) not in ("normal", "byte")}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "added_tokens": [
            {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": kinds.get(number) != "user_defined"} for number, text in sorted(added.items())],
        "post_processor": _frame_json(special, frame),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": ids | special, "merges": _merges(found.pieces)},
    }


def _merges(pieces: tuple[TokenPiece, ...]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: SentencePiece merges any neighbours that do."""
    texts = {piece.text for piece in pieces if piece.kind == "normal"}
    ordered = sorted((piece for piece in pieces if piece.kind == "normal"), key=lambda piece: -piece.score)
    return [(text[:cut], text[cut:]) for text, _, _ in ordered for cut in range(1, len(text))
            if text[:cut] in texts and text[cut:] in texts]


def _frame_json(special: dict[str, int], frame: tuple[str, ...]) -> dict[str, Any] | None:
    """The template that puts special tokens around one text and around two, of which the second ends like the first."""
    if frame == (TEXT,):
        return None
    second = frame[frame.index(TEXT):]

    def part(name: str, sequence: str, type_id: int) -> dict[str, Any]:
        if name == TEXT:
            return {"Sequence": {"id": sequence, "type_id": type_id}}
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    single = [part(name, "A", 0) for name in frame]
    used = {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in frame if name != TEXT}
    return {"type": "TemplateProcessing", "single": single, "pair": single + [part(name, "B", 1) for name in second],
            "special_tokens": used}
