"""Captions from the bytes of a .txt or .json file."""

import codecs
import json

from common.errors import DataError

CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_KEYS = ("caption", "text")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadCaption(DataError):
    """Bytes that hold no caption; the message is the reason, the same for every file of that kind."""


def read_caption(content: bytes, is_json: bool) -> str:
    """The caption in a file's bytes, of JSON its value of `caption` or `text`, without white space at its ends.

    A byte-order mark at the beginning says the encoding and is no part of the caption. Raises BadCaption.
    """
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError:
        raise BadCaption("the caption is no UTF-8") from None
    return checked_caption(_value(text) if is_json else text)


def checked_caption(text: str) -> str:
    """A caption without white space at its ends. Raises BadCaption when it is empty or no Unicode text."""
    text = text.strip()
    if not text:
        raise BadCaption("the caption is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise BadCaption("the caption is no UTF-8") from None
    return text


def _value(text: str) -> str:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCaption("the JSON beside the image is not valid") from None
    keys = " or ".join(f'"{key}"' for key in CAPTION_KEYS)
    found = [values[key] for key in CAPTION_KEYS if key in values] if isinstance(values, dict) else []
    if not found:
        raise BadCaption(f"the JSON beside the image has no {keys}")
    texts = [value for value in found if isinstance(value, str)]
    if not texts:
        raise BadCaption(f"{keys} of the JSON beside the image is no text")
    return next((value for value in texts if value.strip()), texts[0])
