"""Images: what is decoded, what is refused and how early, and crops that depend on their seed alone."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_text.images import (
    CROP_AREA,
    BadImage,
    TooManyPixels,
    UnknownFormat,
    _random_box,
    _uniform,
    decode,
    evaluation_crop,
    suffix_of_format,
    training_crop,
)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, (250, 0, 0))
    image.paste((0, 0, 250), (size[0] // 2, 0, *size))
    return image.convert(mode)


def bomb_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds next to nothing."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("CMYK", "JPEG"),
                                            ("P", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
                                            ("RGB", "GIF"), ("RGB", "BMP"), ("RGB", "AVIF")])  # fmt: skip
def test_every_mode_becomes_rgb(mode, kind):
    image = decode(encoded(picture(mode), kind))
    assert image.mode == "RGB"
    assert image.size == (24, 16)
    left, right = np.asarray(image)[8, 3].astype(int), np.asarray(image)[8, 20].astype(int)
    assert left[0] > 200 > left[2]
    assert right[2] > 180 > right[0]


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_becomes_rgb(mode):
    image = decode(encoded(Image.new("L", (9, 9), 255).convert(mode)))
    assert image.mode == "RGB"
    assert np.asarray(image).min() == 255


def test_16_bit_grey_keeps_its_upper_bits():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values))))[..., 0]
    assert np.array_equal(pixels, (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_its_first_picture(kind):
    frames = [Image.new("RGB", (12, 12), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    red, green, _ = np.asarray(decode(content))[6, 6]
    assert red > 200 > green


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side is the top
    image = decode(encoded(picture(), "JPEG", exif=exif, quality=95))
    assert image.size == (16, 24)
    assert np.asarray(image)[3, 8][0] > 200


@pytest.mark.parametrize("content", [
    b"", b"not an image", encoded(picture())[:60], encoded(picture(size=(300, 200)), "JPEG")[:-600],
    encoded(picture(), "TIFF"), encoded(picture(), "PPM"),
    encoded(picture())[:40] + b"\xff" * 40 + encoded(picture())[80:],
], ids=["empty", "text", "cut png", "cut jpeg", "tiff", "ppm", "overwritten"])  # fmt: skip
def test_what_cannot_be_used_is_refused(content):
    with pytest.raises(BadImage):
        decode(content)


@pytest.mark.parametrize("size", [(10_000, 6_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(size):
    with pytest.raises(BadImage, match="pixels"):
        decode(bomb_header(*size))


def test_the_limit_is_50_million_pixels():
    with pytest.raises(BadImage, match="cannot be decoded"):  # allowed by its size, and then found to hold too little
        decode(bomb_header(7_000, 7_000))


@pytest.mark.parametrize(("content", "suffix"), [
    (encoded(picture(), "JPEG"), ".jpg"), (encoded(picture(), "WEBP"), ".webp"), (encoded(picture(), "GIF"), ".gif"),
    (encoded(picture(), "MPO", save_all=True, append_images=[picture()]), ".jpg"),
    (encoded(picture(size=(300, 200)), "JPEG")[:-600], ".jpg"),  # what is lost behind the header is not looked for
])  # fmt: skip
def test_a_suffix_follows_from_the_header(content, suffix):
    assert suffix_of_format(content) == suffix


@pytest.mark.parametrize(("content", "kind"), [
    (b"", UnknownFormat), (bytes(5000), UnknownFormat), (b"<html>", UnknownFormat),
    (encoded(picture(), "TIFF"), UnknownFormat), (bomb_header(60_000, 60_000), TooManyPixels),
    (bomb_header(10_000, 6_000), TooManyPixels),
])  # fmt: skip
def test_a_header_that_cannot_be_used_has_a_reason_and_a_lasting_message(content, kind):
    for read in (suffix_of_format, decode):
        with pytest.raises(kind) as caught:
            read(content)
        assert caught.value.reason == kind.reason
        assert "0x" not in str(caught.value)


def test_16_bit_grey_is_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.zeros((600, 10), np.uint16)  # more rows than one band
    values[:300] = 40_000
    image = decode(encoded(Image.fromarray(values), "PNG", exif=exif))
    assert image.size == (600, 10)
    assert np.asarray(image)[5, 450, 0] == 40_000 >> 8


def test_random_boxes_have_the_area_and_lie_inside():
    for number in range(300):
        left, top, width, height = _random_box(200, 160, _uniform(str(number), 40))
        assert left >= 0 and top >= 0 and left + width <= 200 and top + height <= 160  # noqa: PT018
        assert CROP_AREA[0] - 0.02 <= width * height / (200 * 160) <= 1


def test_a_large_jpeg_is_decoded_smaller_for_a_training_crop():
    y, x = np.mgrid[:600, :900]
    smooth = Image.fromarray(np.stack([x * 255 // 900, y * 255 // 600, (x + y) * 255 // 1500], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(smooth, "JPEG", quality=95, exif=exif)
    small, whole = decode(content, crop_size=64), decode(content)
    assert (small.size, whole.size) == ((150, 225), (600, 900))  # turned, and 4 times smaller: 150 is at least 2 * 64
    crops = [training_crop(image, 64, "7/0/crop").astype(int) for image in (small, whole)]
    assert np.abs(crops[0] - crops[1]).mean() < 2
    assert decode(content, crop_size=400).size == whole.size
    assert decode(encoded(smooth), crop_size=64).size == (900, 600)  # only a JPEG holds smaller ones


def test_a_bomb_is_refused_by_its_own_size_and_not_by_the_smaller_one():
    with pytest.raises(TooManyPixels, match="10000 x 6000"):
        decode(bomb_header(10_000, 6_000), crop_size=8)
    large = encoded(Image.new("L", (1000, 1000)), "JPEG")
    with pytest.raises(TooManyPixels):
        decode(large, max_pixels=999_999, crop_size=8)


def test_a_panorama_is_cropped_in_the_middle():
    assert _random_box(2000, 10, _uniform("x", 40)) == (993, 0, 13, 10)


def test_training_crops_depend_on_the_seed_alone():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    one, same, other = (training_crop(noise, 32, seed) for seed in ("7/0/crop", "7/0/crop", "7/1/crop"))
    assert one.shape == (3, 32, 32)
    assert one.dtype == np.uint8
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("size", [(64, 64), (640, 64), (33, 500), (5, 5)])
def test_evaluation_takes_the_middle(size):
    image = Image.new("RGB", size, (10, 10, 10))
    shorter = min(size)
    middle = [(side - shorter) // 2 for side in size]
    image.paste((250, 250, 250), (*middle, middle[0] + shorter, middle[1] + shorter))
    pixels = evaluation_crop(image, 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, 2:-2, 2:-2].min() > 240
