"""Joins the files of a folder, or the members of a tar, to pairs of image and caption by their names."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from data_pipeline.image_text.captions import CAPTION_SUFFIXES
from data_pipeline.image_text.images import IMAGE_SUFFIXES
from data_pipeline.left_out import LeftOut, printable

# Pictures that people have beside captions, and that this version does not store.
OTHER_PICTURES = (".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".ico", ".psd", ".ppm", ".dng")
MAX_KINDS_NAMED = 30
MAX_SUFFIX_CHARACTERS = 16


class Part(Protocol):
    """A file or a tar member that may be half of a pair."""

    @property
    def name(self) -> str:
        """Path within the folder or the tar, with `/`."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its content."""

    def read(self) -> bytes:
        """Its content; of an image only. Raises DataError when it is not whole, StorageError when the disk fails."""

    def caption(self) -> str:
        """The text in it; of a caption only. Raises BadCaption."""


class Joined(NamedTuple):
    """An image and all files that may hold its caption, the preferred one first."""

    image: Part
    captions: list[Part]


class _Loose(NamedTuple):
    """A part without a partner of its own name. `turn` is 0 for the first one of its name, 1 for the second..."""

    number: int
    turn: int
    part: Part


def kind_fault(name: str, left_out: LeftOut) -> str | None:
    """Why a file of that name is no part of a pair; None when it may be one."""
    base, suffix = name.rpartition("/")[2], suffix_of(name)
    if base.startswith("._") or base == ".DS_Store" or "__MACOSX" in name.split("/"):
        return "a file that macOS adds (._*, .DS_Store, __MACOSX)"
    if suffix in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
        return None
    kinds = ", ".join(IMAGE_SUFFIXES)
    if suffix in OTHER_PICTURES:
        return f"a picture of a kind that is not stored ({suffix}); convert it to one of {kinds}"
    shown = printable(suffix)[:MAX_SUFFIX_CHARACTERS] or "no suffix"
    reason = f"neither an image nor a caption ({shown})"
    is_new = reason not in left_out.counts
    return "neither an image nor a caption" if is_new and len(left_out.counts) > MAX_KINDS_NAMED else reason


def suffix_of(name: str) -> str:
    """The last suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def joined(parts: Iterable[Part], left_out: LeftOut, *, by_first_dot: bool) -> Iterator[Joined]:
    """Pairs in the order of their images; every part is in one of them or counted in `left_out`.

    Parts belong together by their name up to the last dot, wherever they stand. Then `a.jpg` and `a.jpg.txt` do, and
    with `by_first_dot` (tars) what has the same name up to the first dot, which is webdataset's key. Where a name
    occurs twice, its first image goes with its first caption and its second with the second.
    """
    images: dict[tuple[str, int], list[_Loose]] = defaultdict(list)
    captions: dict[tuple[str, int], list[_Loose]] = defaultdict(list)
    turns: Counter[str] = Counter()
    for number, part in enumerate(parts):
        name = _plain(part.name)
        turn, suffix = turns[name], suffix_of(name)
        turns[name] += 1
        kind = images if suffix in IMAGE_SUFFIXES else captions
        kind[os.path.splitext(name)[0], turn].append(_Loose(number, turn, part))
    pairs: list[tuple[int, Joined]] = []
    loose_images: list[_Loose] = []
    for key, group in images.items():
        texts = captions.pop(key, None)
        if texts:
            pairs.append(_pair(group[0], texts))
        loose_images += group[1:] if texts else group
    loose_images = _join_loose(loose_images, captions, pairs, _full_name)
    if by_first_dot:
        captions = _regrouped(captions)
        loose_images = _join_loose(loose_images, captions, pairs, _webdataset_key)
    _count(loose_images, captions, left_out, _taken(pairs))
    for _, pair in sorted(pairs, key=lambda found: found[0]):
        if turns[_plain(pair.image.name)] > 1:
            left_out.note("pairs of a name that occurs twice", pair.image.place)
        yield Joined(pair.image, _one_of_a_kind(pair.captions, left_out))


def _join_loose(loose: Sequence[_Loose], captions: dict[tuple[str, int], list[_Loose]],
                pairs: list[tuple[int, Joined]],
                key_of: Callable[[_Loose], tuple[str, int]]) -> list[_Loose]:
    """Moves images that are alone with their key, and captions of that key, to `pairs`; returns those left."""
    by_key: dict[tuple[str, int], list[_Loose]] = defaultdict(list)
    for image in loose:
        by_key[key_of(image)].append(image)
    left = []
    for key, found in by_key.items():
        if len(found) == 1 and key in captions:
            pairs.append(_pair(found[0], captions.pop(key)))
        else:
            left += found
    return left


def _pair(image: _Loose, texts: list[_Loose]) -> tuple[int, Joined]:
    """.txt goes before .json, and otherwise what comes first."""
    order = sorted(texts, key=lambda text: (CAPTION_SUFFIXES.index(suffix_of(text.part.name)), text.number))
    return image.number, Joined(image.part, [text.part for text in order])


def _one_of_a_kind(captions: Sequence[Part], left_out: LeftOut) -> list[Part]:
    """The first caption of each suffix; the others are counted."""
    first = {suffix_of(text.name): text for text in reversed(captions)}
    for text in captions:
        if first[suffix_of(text.name)] is not text:
            left_out.add("another caption of the same image beside the one that is used", text.place)
    return sorted(first.values(), key=lambda text: CAPTION_SUFFIXES.index(suffix_of(text.name)))


def _regrouped(captions: dict[tuple[str, int], list[_Loose]]) -> dict[tuple[str, int], list[_Loose]]:
    found: dict[tuple[str, int], list[_Loose]] = defaultdict(list)
    for group in captions.values():
        for text in group:
            found[_webdataset_key(text)].append(text)
    return found


def _full_name(loose: _Loose) -> tuple[str, int]:
    return _plain(loose.part.name), loose.turn


def _webdataset_key(loose: _Loose) -> tuple[str, int]:
    return _first_dot(loose.part.name), loose.turn


def _first_dot(name: str) -> str:
    folder, slash, base = _plain(name).rpartition("/")
    return folder + slash + base.partition(".")[0]


def _taken(pairs: Sequence[tuple[int, Joined]]) -> set[str]:
    """Names up to the last dot that have a pair."""
    return {os.path.splitext(_plain(pair.image.name))[0] for _, pair in pairs}


def _count(images: Sequence[_Loose], captions: dict[tuple[str, int], list[_Loose]], left_out: LeftOut,
           taken: set[str]) -> None:
    per_key = Counter(_first_dot(image.part.name) for image in images)
    texts = sorted(text for group in captions.values() for text in group)
    caption_keys = {_first_dot(text.part.name) for text in texts}
    for image in sorted(images):
        key = _first_dot(image.part.name)
        if image.turn:
            reason = "an image whose name occurs twice, without a caption of its own"
        elif os.path.splitext(_plain(image.part.name))[0] in taken:
            reason = "another image of the same name beside the one that is used"
        elif per_key[key] > 1 and key in caption_keys:
            reason = "one of several images of the same name up to the first dot, without a caption of its own"
        else:
            reason = "an image without a caption"
        left_out.add(reason, image.part.place)
    for text in texts:
        reason = "a caption whose name occurs twice, without an image of its own" if text.turn else \
            "a caption without an image"
        left_out.add(reason, text.part.place)


def _plain(name: str) -> str:
    """The name as it is compared: without `./`, accents composed (macOS writes them apart)."""
    return unicodedata.normalize("NFC", name.removeprefix("./"))
