"""Captioned scenes of drawn shapes: data for image-text models with nothing to download, deterministic by seed.

Every scene is one of three kinds: a thing of some size and place, several of the same thing, two things and how they
lie to each other. Some combinations of colour and shape are held out: training scenes never show or name them, though
each colour and each shape occurs often, so that naming them right takes composition and not memory.
"""

import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from common.errors import UserError
from common.files import write_folder_aside, writing
from data_pipeline.image_text.pair_writer import RawPair, write_pairs
from data_pipeline.text.tokenizer import TokenizerOptions, train_tokenizer

COLOURS = {
    "red": (225, 35, 35), "green": (40, 170, 60), "blue": (45, 85, 235), "yellow": (245, 225, 50),
    "purple": (150, 50, 190), "orange": (245, 135, 25), "white": (245, 245, 245), "cyan": (70, 215, 225),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
_ALL = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple((colour, SHAPES[(number + offset) % len(SHAPES)])
                 for number, colour in enumerate(COLOURS) for offset in (0, 3))
SEEN = tuple(pair for pair in _ALL if pair not in HELD_OUT)
SIZES = {"small": (0.12, 0.15), "large": (0.2, 0.25)}  # radius as a part of the image
PLACES = {
    "in the middle": (0.5, 0.5), "at the top": (0.5, 0.25), "at the bottom": (0.5, 0.75), "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
}  # fmt: skip
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
TEMPLATES = ("a {}", "a picture of a {}", "one {} on a dark ground", "a small {}", "a large {}", "a {} in the middle")
FINER = 2  # drawn this many times larger, then averaged down
TOKENIZER_VOCAB_SIZE = 384
ZERO_SHOT = "zero-shot"
TEMPLATES_FILE = "templates.json"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn thing; place and radius as parts of the image."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """What is drawn, and what is said of it."""

    things: tuple[Thing, ...]
    caption: str


def scene(chance: random.Random, combinations: tuple[tuple[str, str], ...]) -> Scene:
    """One random scene of things from `combinations` (colour, shape)."""
    kind = chance.choices((single, several, related), weights=(5, 2, 3))[0]
    return kind(chance, combinations)


def single(chance: random.Random, combinations: tuple[tuple[str, str], ...]) -> Scene:
    """One thing; the caption may tell its size, its place, or neither."""
    colour, shape = chance.choice(combinations)
    size, place = chance.choice(list(SIZES)), chance.choice(list(PLACES))
    x, y = (centre + chance.uniform(-0.06, 0.06) for centre in PLACES[place])
    thing = Thing(colour=colour, shape=shape, x=x, y=y, radius=chance.uniform(*SIZES[size]))
    name = f"{colour} {shape}"
    caption = chance.choice((f"{_a(name)}", f"a picture of {_a(name)}", f"one {name} on a dark ground",
                             f"a {size} {name}", f"{_a(name)} {place}", f"a {size} {name} {place}"))
    return Scene((thing,), caption)


def several(chance: random.Random, combinations: tuple[tuple[str, str], ...]) -> Scene:
    """Two to four of the same thing."""
    colour, shape = chance.choice(combinations)
    count = chance.choice(list(COUNTS))
    corners = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    things = tuple(Thing(colour=colour, shape=shape, x=x + chance.uniform(-0.06, 0.06),
                         y=y + chance.uniform(-0.06, 0.06), radius=chance.uniform(0.11, 0.16))
                   for x, y in chance.sample(corners, count))
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return Scene(things, f"{COUNTS[count]} {colour} {plural}")


def related(chance: random.Random, combinations: tuple[tuple[str, str], ...]) -> Scene:
    """Two different things, and how the first lies to the second."""
    (colour, shape), (other_colour, other_shape) = chance.sample(combinations, 2)
    relation = chance.choice(list(RELATIONS))
    dx, dy = (0.24 * part for part in RELATIONS[relation])
    x, y = 0.5 + chance.uniform(-0.05, 0.05), 0.5 + chance.uniform(-0.05, 0.05)
    things = (Thing(colour=colour, shape=shape, x=x + dx, y=y + dy, radius=chance.uniform(0.13, 0.18)),
              Thing(colour=other_colour, shape=other_shape, x=x - dx, y=y - dy, radius=chance.uniform(0.13, 0.18)))
    return Scene(things, f"{_a(f'{colour} {shape}')} {relation} {_a(f'{other_colour} {other_shape}')}")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def draw(drawn: Scene, size: int, chance: random.Random) -> bytes:
    """The scene as the bytes of a PNG of `size` x `size` pixels, on a dark ground of random shade."""
    ground = tuple(chance.randint(0, 50) for _ in range(3))
    image = Image.new("RGB", (size * FINER, size * FINER), ground)
    pen = ImageDraw.Draw(image)
    for thing in drawn.things:
        colour = tuple(max(0, min(255, value + chance.randint(-12, 12))) for value in COLOURS[thing.colour])
        _draw_thing(pen, thing, size * FINER, colour=colour, ground=ground)
    written = io.BytesIO()
    image.reduce(FINER).save(written, "PNG")
    return written.getvalue()


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, size: int, *, colour: tuple, ground: tuple) -> None:
    x, y, r = thing.x * size, thing.y * size, thing.radius * size
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if thing.shape == "ring":
            pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=ground)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=colour)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=colour)
    elif thing.shape == "diamond":
        pen.polygon([(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)], fill=colour)
    else:  # a triangle
        pen.polygon([(x + 1.1 * r * cos(a), y + 1.1 * r * sin(a)) for a in (-pi / 2, pi / 6, 5 * pi / 6)], fill=colour)


def scenes(count: int, split: str, seed: int, size: int) -> Iterator[RawPair]:
    """Captioned images of a split: `train` shows seen combinations only, `heldout` held-out ones only."""
    for number in range(count):
        chance = random.Random(f"{seed}/{split}/{number}")
        made = scene(chance, SEEN if split == "train" else HELD_OUT)
        yield RawPair(f"{split}-{number}", ".png", draw(made, size, chance), made.caption)


def write_shapes(folder: str | os.PathLike, *, num_train: int, num_test: int, seed: int, size: int = 64) -> list[Path]:
    """Write `train`, `heldout` (dataset folders) and `zero-shot` (a folder per held-out combination) into `folder`.

    `num_test` scenes are held out, and as many images of a single thing are divided among the combinations. Folders
    that are there from the same settings are reused. Raises UserError for numbers that cannot be, or what is in the
    way.
    """
    folder = Path(folder)
    if num_train < 1 or num_test < len(HELD_OUT) or size < 16:
        raise UserError(f"num_train={num_train}, num_test={num_test}, size={size}: at least 1 scene to train on, "
                        f"{len(HELD_OUT)} to test (one for each combination) and 16 pixels are needed")
    words = [scene(random.Random(f"{seed}/words/{number}"), SEEN).caption for number in range(4000)]
    tokenizer = train_tokenizer(words, TokenizerOptions(vocab_size=TOKENIZER_VOCAB_SIZE))
    for split, count in (("train", num_train), ("heldout", num_test)):
        write_pairs(scenes(count, split, seed, size), tokenizer, folder / split, split=split,
                    inputs=f"shapes/{count}/{seed}/{size}")
    if not (folder / ZERO_SHOT).exists():
        _write_zero_shot(folder / ZERO_SHOT, num_test, seed, size)
    return [folder / "train", folder / "heldout", folder / ZERO_SHOT]


def _write_zero_shot(folder: Path, count: int, seed: int, size: int) -> None:
    with writing(folder), write_folder_aside(folder) as aside:
        (aside / TEMPLATES_FILE).write_text(json.dumps(TEMPLATES, indent=1) + "\n", encoding="utf-8")
        for colour, shape in HELD_OUT:
            (aside / f"{colour} {shape}").mkdir()
        for number in range(count):
            chance = random.Random(f"{seed}/{ZERO_SHOT}/{number}")
            combination = HELD_OUT[number % len(HELD_OUT)]
            image = draw(single(chance, (combination,)), size, chance)
            (aside / " ".join(combination) / f"{number:06d}.png").write_bytes(image)
