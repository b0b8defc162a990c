"""Pictures as people have them, files or arrays, made into the uint8 images that a model takes.

Files are opened by their content, never by their name, and only in the formats below. What each mode becomes:

    1, L, P, RGB, CMYK, YCbCr, HSV, LAB      8 bits as they are; P by its palette
    I;16*, and I of a PGM                    the high byte; so are 16-bit colours, which Pillow reduces itself
    LA, PA, RGBA, and a transparent colour   laid upon `ImageForm.background`
    I and F of other files                   refused: nothing says which value is white
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from harness import terminal
from harness.errors import InputError, reason
from harness.files import RefusedFile, open_file, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PICTURE_BYTES = 2**29
# 67 million: a header that claims more is refused before it is decoded. Photographs of 48 million pixels take some
# 0.4 GB for a moment, JPEGs that are scaled down a sixteenth of it.
MAX_PIXELS = 1 << 26
LARGE = 1 << 22  # pixels beyond which a JPEG is decoded no larger than scaling it down needs
FINER = 4  # times the size that is wanted: then the scaling can hardly tell
GREY_MODES = ("1", "L", "LA", "La", "I")
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262  # tags


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """The form that pictures take as images of a model."""

    size: int | None = None  # pixels: the shorter side is scaled to it and the middle cut out; None: as they are
    channels: int | None = None  # 1: grey, 3: RGB; None: 1 where all pictures are grey
    background: str = "white"  # what shows through transparent pixels, as a name or #rrggbb

    def __post_init__(self) -> None:
        from PIL import ImageColor

        if self.size is not None and self.size < 2:
            raise InputError(f"image size {self.size}: expected at least 2 pixels")
        if self.channels not in (None, 1, 3):
            raise InputError(f"{self.channels} channels: expected 1 (grey) or 3 (RGB)")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise InputError(f"background {self.background!r}: no colour; expected a name or #rrggbb") from None


class Header(NamedTuple):
    """Facts that a picture's file tells before it is decoded."""

    height: int
    width: int
    grey: bool


def read_header(path: Path) -> Header:
    """Size of the upright picture, and whether it is grey. Raises InputError."""
    with _opened(path) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        width, height = reversed(image.size) if turned else image.size
        return Header(height, width, is_grey(image))


def read_picture(path: Path, form: ImageForm) -> np.ndarray:
    """Upright pixels [H, W, channels] of a file; without `form.channels` as many as it has. Raises InputError."""
    from PIL import ImageOps

    with _opened(path) as image:
        if form.size is not None and image.format == "JPEG" and image.width * image.height > LARGE:
            image.draft(None, (FINER * form.size, FINER * form.size))
        with terminal.libraries_hushed() if image.format == "TIFF" else nullcontext():
            image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return to_pixels(image, form)


def picture_bytes(path: Path) -> bytes:
    """Content of a picture's file, undecoded. Raises InputError."""
    try:
        return read_bytes(path, MAX_PICTURE_BYTES)
    except (RefusedFile, OSError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); mend or remove it") from None


def is_grey(image: "Image") -> bool:
    """Tell whether a PIL image has no colours by its mode."""
    return image.mode in GREY_MODES or image.mode.startswith("I;16")


def to_pixels(image: "Image", form: ImageForm) -> np.ndarray:
    """uint8 [H, W, channels] of a PIL image in any mode. Raises InputError for one without a known white."""
    from PIL import Image, ImageOps

    channels = form.channels or (1 if is_grey(image) else 3)
    image = _eight_bits(image)
    if image.has_transparency_data:
        above = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), above)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)  # exact for grey pixels
    if form.size is not None:  # antialiased: the filter widens with the reduction
        image = ImageOps.fit(image, (form.size, form.size), Image.Resampling.LANCZOS)
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def array_to_pixels(values: np.ndarray, form: ImageForm) -> np.ndarray:
    """One image [H, W, 1, 3 or 4] of uint8, uint16 or bool as `to_pixels` gives it."""
    from PIL import Image

    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    elif values.dtype == bool:
        values = values.astype(np.uint8) * 255
    channels = values.shape[-1]
    if form.size is None and channels in (1, 3) and form.channels in (None, channels):
        return values
    return to_pixels(Image.fromarray(np.ascontiguousarray(values[..., 0] if channels == 1 else values)), form)


def _eight_bits(image: "Image") -> "Image":
    """The image with 8 bits per channel; deeper ones lose their low bits, as fewer n_bits would lose them."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise InputError(
            f"32-bit values of mode {image.mode}, of which nothing says which is white; save it with 8 or 16 bits"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(TIFF_BITS, (16,))[0]
    high = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    result = Image.fromarray(255 - high if tags.get(TIFF_PHOTOMETRIC) == 0 else high)
    if (transparent := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _orientation(image: "Image") -> int:
    """How the camera was held, 1 to 8 (EXIF); 1 where nothing, or nothing legible, is said."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns TIFFs itself; looking further in a PNG would decode it
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # arbitrary bytes beside an intact picture
        return 1
    return orientation if orientation in range(1, 9) else 1


@contextmanager
def _opened(path: Path) -> Iterator["Image"]:
    """A PIL image; whatever is wrong with its file becomes one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes: those are checked here
            with open_file(path, MAX_PICTURE_BYTES) as file, Image.open(file, formats=FORMATS) as image:
                _check(image)
                yield image
    except UnidentifiedImageError:
        what = f"its content is none of {', '.join(FORMATS)}"
    except InputError as error:
        what = str(error)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = " ".join(reason(error).split())
    except (TypeError, KeyError, IndexError, ArithmeticError, EOFError, RuntimeError, MemoryError) as error:
        what = " ".join(f"{type(error).__name__} {error}".split())  # a decoder stumbled over arbitrary bytes
    else:
        return
    raise InputError(f"{path}: cannot be read as an image ({what}); mend or remove it") from None


def _check(image: "Image") -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's JPEG with a preview behind it
        raise InputError("it holds several pictures; save the one that is meant")
