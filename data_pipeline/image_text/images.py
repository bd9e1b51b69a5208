"""From the bytes of an image to the pixels a model sees: decoding within limits, the crops of training and evaluation.

Pixels leave as uint8 [3, size, size] in red, green, blue; the model normalises them on its device.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import exp, log, sqrt

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from common.errors import DataError
from common.seeding import derive_key

# Pillow's name -> the suffix under which a shard stores it. TIFF is not among them: its tiles may be far larger than
# the image that its header tells of.
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "AVIF": ".avif"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif")
MAX_PIXELS = 50_000_000
# Radford et al. 2021, section 2.4: a random square crop is the only augmentation. Area and shape as OpenCLIP sets them.
CROP_AREA = (0.9, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
ORIENTATION = 0x0112  # the EXIF tag
BAND_ROWS = 256
REDUCING_GAP = 2.0  # Pillow's own choice for thumbnails: closer to 1 is faster, from 3 on nobody sees a difference
OBJECT_ADDRESS = re.compile(r" ?<[^<>]* object at 0x[0-9a-f]+>")  # another one in every run
REAL_VALUED = "real-valued pixels, of which nobody says the range"


class BadImage(DataError):
    """Bytes that are no usable image; the message says why. `reason` is the same for every image of that kind."""

    reason = "an image that cannot be decoded"


class TooManyPixels(BadImage):
    """An image of more pixels than are decoded."""

    reason = f"an image of more than {MAX_PIXELS:,} pixels"


class UnknownFormat(BadImage):
    """Bytes that begin as no image of a known format does."""

    reason = f"no image of a known format ({', '.join(sorted(FORMATS))})"


def decode(content: bytes, max_pixels: int = MAX_PIXELS, *, crop_size: int | None = None) -> Image.Image:
    """The image in RGB, upright. Its size is read from the header and refused before anything is decoded.

    16-bit grey keeps its upper bits; transparency is dropped. With `crop_size`, a JPEG may come out 2, 4 or 8 times
    smaller, as its decoder makes it at a fraction of the cost: both sides keep at least twice that many pixels, from
    which a training crop hardly differs. Raises BadImage.
    """
    with _decoding():
        image = _opened(content, max_pixels)
        if crop_size:
            enough = round(REDUCING_GAP * crop_size)
            image.draft(None, (enough, enough))  # None: the mode stays
        return _rgb(_upright(image))


def suffix_of_format(content: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """The suffix of the format that the bytes have, whatever their file is called; only the header is read.

    Raises BadImage when it shows that `decode` would.
    """
    with _decoding():
        image = _opened(content, max_pixels)
        if image.mode == "F":
            raise BadImage(REAL_VALUED)
        return FORMATS.get(image.format or "", ".jpg")  # a JPEG with further pictures in it calls itself MPO


def _opened(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image: we refuse it ourselves
            image = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
    except UnidentifiedImageError:  # its own message holds the address of an object
        fault = f"{UnknownFormat.reason}, or a damaged header" if content else "it is empty"
        raise UnknownFormat(f"cannot be decoded: {fault}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} pixels, where {max_pixels:,} are the most")
    return image


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever a decoder raises into a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixels(TooManyPixels.reason) from None
    except Exception as error:  # decoders fail in many ways on damaged bytes, and each means the same here
        text = OBJECT_ADDRESS.sub("", str(error))[:100]
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {text})") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; most images need no turn, and then there is no copy."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would cut off at 255
        return _upper_bits(image).convert("RGB")
    if image.mode == "F":
        raise BadImage(REAL_VALUED)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """8-bit grey, made in bands of rows: NumPy's copies of a whole image would take several times its memory."""
    grey = Image.new("L", image.size)
    for top in range(0, image.height, BAND_ROWS):
        values = np.asarray(image.crop((0, top, image.width, min(top + BAND_ROWS, image.height))))
        grey.paste(Image.fromarray((values.clip(0, 2**16 - 1) >> 8).astype(np.uint8)), (0, top))
    return grey


def training_crop(image: Image.Image, size: int, seed: str) -> np.ndarray:
    """A random part of the image, resized: uint8 [3, size, size]. The same `seed` gives the same crop.

    Area and log of the aspect ratio are uniform (Szegedy et al. 2015, section 6, as torchvision's RandomResizedCrop
    does it), bicubic.
    """
    draws = _uniform(seed, 4 * CROP_ATTEMPTS)
    left, top, width, height = _random_box(image.width, image.height, draws)
    box = (left, top, left + width, top + height)
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _random_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    low, high = (log(bound) for bound in CROP_ASPECT)
    for area_draw, aspect_draw, left_draw, top_draw in draws.reshape(-1, 4).tolist():
        area = width * height * (CROP_AREA[0] + area_draw * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = exp(low + aspect_draw * (high - low))
        crop_width, crop_height = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (int(left_draw * (width - crop_width + 1)), int(top_draw * (height - crop_height + 1)),
                    crop_width, crop_height)
    # No part of that area fits: the largest one of an allowed shape, from the middle.
    crop_width = min(width, max(1, round(height * CROP_ASPECT[1])))
    crop_height = min(height, max(1, round(width / CROP_ASPECT[0])))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def evaluation_crop(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side resized to `size` (bicubic), and the square in the middle: uint8 [3, size, size]."""
    shorter = min(image.size)
    width, height = (max(size, int(size * side / shorter)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    # Resizing only what is kept: a panorama would otherwise grow by its aspect ratio first.
    scale_x, scale_y = image.width / width, image.height / height
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _uniform(seed: str, count: int) -> np.ndarray:
    """float64 [count] in [0, 1) from the raw output of a bit generator, which NumPy keeps stable across versions."""
    bits = np.random.Philox(key=derive_key(seed)).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def _pixels(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
