"""Every mode that Pillow opens is read right or refused: depth, transparency, orientation, size, hostile files."""

import contextlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from harness.errors import InputError
from image_density_experiments.own_images import load_own_images
from image_density_experiments.pictures import (
    MAX_PIXELS,
    ImageForm,
    array_to_pixels,
    read_header,
    read_picture,
    to_pixels,
)

ROOT = Path(__file__).parents[2]
GREY = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.where(np.arange(48) % 3 == 0, 0, 255).astype(np.uint8).reshape(6, 8)
BITS = np.where(GREY > 100, 255, 0).astype(np.uint8)
DEEP = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)
WHITE = ImageForm()


def on_white(pixels, alpha=ALPHA):
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.where(alpha[..., None] == 255, pixels, 255)


def palette():
    image = Image.fromarray(GREY // 16, "P")
    image.putpalette(COLOUR.reshape(-1)[: 3 * 16].tolist())
    return image


PALETTE = COLOUR.reshape(-1, 3)[:16][GREY // 16]


def with_alpha(image):
    image.putalpha(Image.fromarray(ALPHA))
    return image


def big_endian(image):
    """The image as a big-endian TIFF would hold it."""
    return Image.frombytes("I;16B", image.size, DEEP.astype(">u2").tobytes())


EXACT = {  # mode: image, formats that keep it, pixels
    "1": (Image.fromarray(BITS).convert("1"), "png bmp tiff ppm gif", BITS),
    "L": (Image.fromarray(GREY), "png bmp tiff ppm gif", GREY),
    "P": (palette(), "png bmp tiff gif", PALETTE),
    "RGB": (Image.fromarray(COLOUR), "png bmp tiff ppm webp", COLOUR),
    "LA": (with_alpha(Image.fromarray(GREY)), "png tiff", on_white(GREY)),
    "RGBA": (with_alpha(Image.fromarray(COLOUR)), "png tiff webp", on_white(COLOUR)),
    "RGBX": (Image.fromarray(COLOUR).convert("RGBX"), "tiff", COLOUR),
    "I;16": (Image.fromarray(DEEP), "png tiff ppm", DEEP >> 8),
    "I;16B": (big_endian(Image.fromarray(DEEP)), "tiff", DEEP >> 8),
    "CMYK": (Image.fromarray(COLOUR).convert("CMYK"), "tiff", COLOUR),
}
FILES = [(mode, kind) for mode, (_, kinds, _) in EXACT.items() for kind in kinds.split()]


def same(pixels, expected):
    expected = expected[..., None] if expected.ndim == 2 else expected
    assert pixels.dtype == np.uint8
    if pixels.shape[-1] != expected.shape[-1]:  # a format that has no grey, or a colour that is grey
        expected = np.broadcast_to(expected, pixels.shape)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(("mode", "kind"), FILES)
def test_each_mode_is_read_exactly_from_each_format_that_holds_it(tmp_path, mode, kind):
    image, _, expected = EXACT[mode]
    path = tmp_path / f"picture.{kind}"
    image.save(path, lossless=True) if kind == "webp" else image.save(path)
    same(read_picture(path, WHITE), expected)
    header = read_header(path)
    assert (header.height, header.width) == (6, 8)
    if kind != "gif":  # has palettes only, which Pillow may take for grey
        assert header.grey == (mode in ("1", "L", "LA", "I;16", "I;16B"))
    rgb = read_picture(path, ImageForm(channels=3))
    assert rgb.shape == (6, 8, 3)
    one = read_picture(path, ImageForm(channels=1))
    assert one.shape == (6, 8, 1)
    if header.grey:
        assert np.array_equal(one.repeat(3, -1), rgb)  # grey is the same value in either


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_lossy_colour_spaces_come_near(tmp_path, mode, kind):
    smooth = np.array(Image.fromarray(COLOUR[:2, :2]).resize((16, 16), Image.Resampling.BILINEAR))
    image = Image.fromarray(smooth).convert(mode)
    image.save(tmp_path / f"p.{kind}", **({"quality": 100, "subsampling": 0} if kind == "jpeg" else {}))
    expected = np.array(image.convert("RGB")).astype(int)
    assert np.abs(read_picture(tmp_path / f"p.{kind}", ImageForm(channels=3)) - expected).max() <= 4


def test_lab_is_converted_by_its_definition(tmp_path):
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    mild = (COLOUR // 4 + 90).astype(np.uint8)
    ImageCms.applyTransform(Image.fromarray(mild), lab).save(tmp_path / "lab.tiff")
    assert np.abs(read_picture(tmp_path / "lab.tiff", WHITE).astype(int) - mild).max() <= 4


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_in_memory_gives_pixels_of_its_shape(mode):
    """Also those that no file format keeps."""
    source = Image.fromarray(COLOUR // 8 + 100)
    source = source.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")).convert(mode)
    expected = 1 if mode in ("1", "L", "LA", "La") else 3
    pixels = to_pixels(source, WHITE)
    assert pixels.shape == (6, 8, expected)
    if mode not in ("1", "P", "PA"):  # those have few colours
        reference = np.array(Image.fromarray(COLOUR // 8 + 100).convert("L" if expected == 1 else "RGB"))
        assert np.abs(pixels.reshape(reference.shape).astype(int) - reference).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_white_are_refused_with_the_remedy(tmp_path, mode):
    Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32)).save(tmp_path / "deep.tiff")
    with pytest.raises(InputError, match=r"deep\.tiff: .*32-bit values of mode [IF], .*save it with 8 or 16 bits"):
        read_picture(tmp_path / "deep.tiff", WHITE)


# --- depth ------------------------------------------------------------------------------------------------------


def png(path, samples, colour_type, extra=b""):
    """A PNG with 16 bits per sample, which Pillow cannot write for colours; samples [H, W, n] of uint16."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("colour_type", "n"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_keep_their_high_byte(tmp_path, colour_type, n):
    deep = np.random.default_rng(1).integers(0, 65536, (6, 8, n), dtype=np.uint16)
    if n in (2, 4):
        deep[..., -1] = np.where(ALPHA, 65535, 0)
    high = (deep >> 8).astype(np.uint8)
    expected = high if n in (1, 3) else on_white(high[..., :-1])
    same(read_picture(png(tmp_path / "deep.png", deep, colour_type), WHITE), expected)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [12, 16])
def test_deep_tiffs_reach_white_and_black(tmp_path, bits, photometric):
    values = np.array([[0, (1 << bits) - 1, 1 << (bits - 1), 0]], np.uint16)
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values[0])
        strip = int(packed, 2).to_bytes(6, "big")
    else:
        strip = values.astype("<u2").tobytes()
    tags = [
        (256, 4),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(strip)),
    ]
    body = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in tags)
    offset = 8 + len(strip)
    path = tmp_path / "deep.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", offset) + strip + struct.pack("<H", len(tags)) + body + bytes(4))
    expected = np.array([[0, 255, 128, 0]])
    if photometric == 0:
        expected = 255 - expected
    if (bits, photometric) == (12, 0):  # unknown to Pillow
        with pytest.raises(InputError, match="cannot be read as an image"):
            read_picture(path, WHITE)
    else:
        same(read_picture(path, WHITE), expected)


@pytest.mark.parametrize("maxval", [1, 7, 255, 256, 1023, 65535])
@pytest.mark.parametrize("magic", ["P2", "P5"])
def test_grey_maps_of_any_depth_reach_white(tmp_path, maxval, magic):
    values = [0, maxval]
    body = (
        " ".join(map(str, values)).encode()
        if magic == "P2"
        else b"".join(value.to_bytes(2 if maxval > 255 else 1, "big") for value in values)
    )
    (tmp_path / "a.pgm").write_bytes(f"{magic}\n2 1\n{maxval}\n".encode() + body)
    same(read_picture(tmp_path / "a.pgm", WHITE), np.array([[0, 255]]))


# --- transparency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#102030", (16, 32, 48))])
def test_what_lies_under_transparent_pixels_is_never_seen(tmp_path, background, colour):
    with_alpha(Image.fromarray(COLOUR)).save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png", ImageForm(background=background))
    assert np.all(pixels[ALPHA == 0] == colour) and np.array_equal(pixels[ALPHA == 255], COLOUR[ALPHA == 255])


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.fromarray(np.full((2, 2, 4), (100, 0, 200, 128), np.uint8)).save(tmp_path / "a.png")
    mixed = read_picture(tmp_path / "a.png", WHITE)[0, 0].astype(int)
    assert np.abs(mixed - (np.array([100, 0, 200]) * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_colour_declared_transparent_is_transparent(tmp_path, mode):
    image, _, expected = EXACT[mode]
    first = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=first if mode != "1" else 0)
    where = np.array(image) == np.array(first)
    where = where.all(-1) if where.ndim == 3 else where
    same(read_picture(tmp_path / "a.png", WHITE), on_white(expected, np.where(where, 0, 255)))


# --- orientation ------------------------------------------------------------------------------------------------

UPRIGHT = {  # how the stored pixels are turned back, by the definition of the tag
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = COLOUR[:2, :3].repeat(8, 0).repeat(8, 1)
    options = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    Image.fromarray(blocks).save(tmp_path / f"a.{kind}", exif=exif, **options)
    pixels = read_picture(tmp_path / f"a.{kind}", WHITE)
    expected = UPRIGHT[orientation](blocks)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (8 if kind == "jpeg" else 0)
    assert read_header(tmp_path / f"a.{kind}")[:2] == expected.shape[:2]


def test_damaged_camera_data_beside_an_intact_picture_do_not_matter(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nothing of it is true")
    same(read_picture(tmp_path / "a.png", WHITE), COLOUR)


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16), (8, 9), (97, 41)])
def test_the_middle_square_is_scaled(tmp_path, shape):
    height, width = shape
    picture = np.zeros((*shape, 3), np.uint8)
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    picture[top : top + side, left : left + side] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png", ImageForm(size=8))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[2:-2, 2:-2].astype(int) - 200).max() <= 10


def test_scaling_down_averages_instead_of_skipping_pixels(tmp_path):
    Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / "a.png")
    assert np.abs(read_picture(tmp_path / "a.png", ImageForm(size=8)).astype(int) - 127.5).max() < 3


# --- arrays -----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "N H W": (lambda a: a[..., 0], 1),
    "N H W 1": (lambda a: a[..., :1], 1),
    "N H W 3": (lambda a: a, 3),
    "N 1 H W": (lambda a: a[:, None, :, :, 0], 1),
    "N 3 H W": (lambda a: a.transpose(0, 3, 1, 2), 3),
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_in_every_layout(tmp_path, layout, suffix, dtype):
    images = np.random.default_rng(2).integers(0, 256, (20, 6, 8, 3), dtype=np.uint8)
    arrange, channels = LAYOUTS[layout]
    stored = {"uint8": images, "uint16": images.astype(np.uint16) * 256 + 77, "bool": images > 99}[dtype]
    expected = images if dtype != "bool" else np.where(images > 99, 255, 0)
    (np.save if suffix == "npy" else np.savez)(tmp_path / f"a.{suffix}", arrange(stored))
    data = load_own_images(tmp_path / f"a.{suffix}", WHITE)
    assert data.image_shape == (6, 8, channels) and (len(data.train.images), len(data.test.images)) == (18, 2)
    same(data.test.images[1], expected[19, ..., :channels])
    rgb = load_own_images(tmp_path / f"a.{suffix}", ImageForm(channels=3, size=4))
    assert rgb.image_shape == (4, 4, 3)


def test_arrays_with_alpha_are_laid_upon_the_background():
    rgba = np.dstack([COLOUR, ALPHA])
    same(array_to_pixels(rgba, WHITE), on_white(COLOUR))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 8, 8, 3)), "float64; expected .* scale it to 0 ... 255"),
        (np.zeros((4, 8, 8, 3), np.int64), "int64; expected .* scale it to 0 ... 255"),
        (np.zeros((4, 8, 8, 2), np.uint8), r"\[4, 8, 8, 2\] of uint8; expected \(N, H, W\)"),
        (np.zeros((4, 8), np.uint8), r"\[4, 8\] of uint8"),
        (np.zeros((1, 8, 8, 3), np.uint8), "N at least 2"),
        (np.zeros((4, 8, 8), complex), "complex128; expected"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=words):
        load_own_images(tmp_path / "a.npy", WHITE)


def test_an_archive_may_hold_labels_and_its_own_split(tmp_path):
    images, labels = np.arange(20 * 16, dtype=np.uint16).reshape(20, 4, 4).astype(np.uint8), np.arange(20) % 3
    np.savez(tmp_path / "a.npz", labels=labels, images=images)
    data = load_own_images(tmp_path / "a.npz", WHITE)
    assert data.n_classes == 3 and data.test.labels.tolist() == [0, 1]
    np.savez(tmp_path / "mnist.npz", x_test=images[:4], x_train=images, y_train=labels, y_test=labels[:4])
    data = load_own_images(tmp_path / "mnist.npz", WHITE)
    assert (len(data.train.images), len(data.test.images), data.n_classes) == (20, 4, 3)
    np.savez(tmp_path / "b.npz", labels=labels[:7], images=images)
    with pytest.raises(InputError, match="7 labels of int64 for 20 images"):
        load_own_images(tmp_path / "b.npz", WHITE)


# --- hostile files ----------------------------------------------------------------------------------------------


def test_a_format_is_known_by_content_not_by_name(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    same(read_picture(tmp_path / "a.jpg", WHITE), COLOUR)


@pytest.mark.parametrize("kind", ["eps", "pcx", "ico", "im", "tga", "jp2", "dds", "psd"])
def test_formats_that_are_not_meant_are_not_opened(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "psd":
        path.write_bytes(b"8BPS\0\1" + bytes(100))
    else:
        Image.fromarray(COLOUR).save(path)
    path.rename(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(its content is none of PNG, JPEG"):
        read_picture(tmp_path / "a.png", WHITE)


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 2, 2**31 - 1])
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, side):
    path = png(tmp_path / "a.png", np.zeros((1, 1, 1), np.uint16), 0)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(.*(pixels|size)") as caught:
        read_picture(path, WHITE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png"])
def test_a_file_of_several_pictures_is_refused(tmp_path, kind):
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="holds several pictures; save the one that is meant"):
        read_picture(tmp_path / f"a.{kind}", WHITE)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "bmp", "gif", "ppm"])
def test_damage_anywhere_is_one_line_or_harmless(tmp_path, kind):
    path, random = tmp_path / f"a.{kind}", np.random.default_rng(3)
    Image.fromarray(COLOUR.repeat(6, 0).repeat(6, 1)).save(path)
    whole = path.read_bytes()
    for _ in range(60):
        content = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for place in random.integers(0, len(content), 4):
            content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            assert read_picture(path, WHITE).ndim == 3
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 1}, "image size 1: expected at least 2"),
        ({"channels": 2}, "2 channels: expected 1"),
        ({"background": "see-through"}, "no colour; expected a name or #rrggbb"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        ImageForm(**options)


# --- large pictures, and libraries that speak


PEAK = """
import resource, sys
from pathlib import Path
from image_density_experiments.pictures import ImageForm, read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read_picture(Path(sys.argv[1]), ImageForm(size=32)).shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("kind", "megabytes"), [("jpg", 150), ("png", 600)])
def test_photographs_of_48_million_pixels_are_read_in_bounded_memory(tmp_path, kind, megabytes):
    path = tmp_path / f"photograph.{kind}"
    Image.new("RGB", (8064, 6048), (200, 100, 50)).save(path, compress_level=1)
    result = subprocess.run([sys.executable, "-c", PEAK, path], cwd=ROOT, capture_output=True, text=True, check=True)
    shape, peak = result.stdout.splitlines()
    assert shape == "(32, 32, 3)" and float(peak) < megabytes


@pytest.mark.parametrize("kind", ["png", "tiff", "gif", "bmp", "ppm", "jpg"])
def test_81_million_pixels_are_refused_in_every_format(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.new("L" if kind == "jpg" else "1", (9000, 9000)).save(path)
    with pytest.raises(InputError, match="9000x9000 pixels, more than 67,108,864"):
        read_header(path)


def test_a_large_jpeg_looks_as_if_it_had_been_decoded_whole(tmp_path, monkeypatch):
    smooth = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = read_picture(tmp_path / "a.jpg", ImageForm(size=32)).astype(int)
    monkeypatch.setattr("image_density_experiments.pictures.LARGE", 0)
    assert np.abs(read_picture(tmp_path / "a.jpg", ImageForm(size=32)) - whole).max() <= 2


def test_what_libtiff_says_is_not_heard(tmp_path, capfd):
    """Its C code speaks to stderr itself; ours is one line. Bytes of compressed TIFFs are changed one by one."""
    dice, image = (
        np.random.default_rng(0),
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)),
    )
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        (image.convert("1") if compression == "group4" else image).save(tmp_path / "a.tif", compression=compression)
        content = (tmp_path / "a.tif").read_bytes()
        for _ in range(25):
            damaged = bytearray(content)
            damaged[dice.integers(8, len(content))] ^= 1 << dice.integers(8)
            (tmp_path / "b.tif").write_bytes(damaged)
            with contextlib.suppress(InputError):
                read_picture(tmp_path / "b.tif", WHITE)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"
