"""Captions of .txt and .json files: each way in which there is none has a reason of its own."""

import codecs
import json

import pytest

from data_pipeline.image_text.captions import BadCaption, read_caption


@pytest.mark.parametrize(("content", "is_json", "expected"), [
    (b" words \r\n", False, "words"),
    (b"\xef\xbb\xbfwords", False, "words"),
    (codecs.BOM_UTF16_LE + "wörter".encode("utf-16-le"), False, "wörter"),
    (codecs.BOM_UTF16_BE + "wörter".encode("utf-16-be"), False, "wörter"),
    (b'{"caption": "words"}', True, "words"),
    (b'\xef\xbb\xbf{"caption": "words"}', True, "words"),
    (b'{"text": "words", "url": "x"}', True, "words"),
    (b'{"caption": null, "text": "words"}', True, "words"),
    (b'{"caption": "", "text": "words"}', True, "words"),
])  # fmt: skip
def test_captions(content, is_json, expected):
    assert read_caption(content, is_json) == expected


@pytest.mark.parametrize(("content", "is_json", "reason"), [
    (b"", False, "empty"), (b" \r\n", False, "empty"), (b"\xef\xbb\xbf", False, "empty"),
    (b"\xffabc", False, "UTF-8"), (b"\xff\xfe\x00", False, "UTF-8"),
    (b'{"caption": "\\ud83d"}', True, "UTF-8"),
    (b'{"caption": 3}', True, "is no text"), (b'{"caption": ["a"]}', True, "is no text"),
    (b'{"url": "x"}', True, "has no"), (b"[1]", True, "has no"),
    (b"{", True, "not valid"), (b"", True, "not valid"), (b"[" * 100_000, True, "not valid"),
    (b'{"caption": " "}', True, "empty"),
])  # fmt: skip
def test_reasons(content, is_json, reason):
    with pytest.raises(BadCaption, match=reason):
        read_caption(content, is_json)


def test_a_caption_may_hold_anything_that_json_can_spell():
    assert read_caption(json.dumps({"caption": "a \U0001f600 b"}).encode(), is_json=True) == "a \U0001f600 b"
