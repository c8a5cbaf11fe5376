"""Pictures of every mode, depth, orientation and file type: the pixels that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from selfkd.data.folder import suffixes
from selfkd.data.pictures import is_grey, read_or_raise, read_picture, square

GREY = np.linspace(0, 255, 12 * 16).reshape(12, 16).round().astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
ONE_CHANNEL = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def pixels(source) -> np.ndarray:
    return np.asarray(read_picture(source)).astype(int)


def saved(picture: Image.Image, kind: str, **settings) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    file.seek(0)
    return file


# --- modes ---


def in_mode(mode: str) -> Image.Image:
    """Return the grey or the coloured picture in a mode, opaque."""
    if mode.startswith("I;16"):
        kind = {"I;16B": ">u2"}.get(mode, "<u2")
        data = (GREY.astype(np.uint16) * 257).astype(kind).tobytes()
        return Image.frombytes(mode, GREY.T.shape, data)
    if mode == "I":
        return Image.fromarray(GREY.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray((GREY / 255).astype(np.float32))
    if mode == "La":
        return Image.fromarray(GREY).convert("LA").convert("La")
    if mode == "1":
        return Image.fromarray(GREY > 127)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
        return ImageCms.applyTransform(Image.fromarray(COLOUR), transform)
    if mode == "PA":
        return Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    if mode == "P":
        return Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    if mode == "RGBa":
        return Image.fromarray(COLOUR).convert("RGBA").convert("RGBa")
    return Image.fromarray(GREY if mode in ONE_CHANNEL else COLOUR).convert(mode)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow_is_read(mode):
    picture = in_mode(mode)
    before = picture.tobytes()
    read = read_picture(picture)
    one_channel = mode in ONE_CHANNEL
    assert read.mode == ("L" if one_channel else "RGB")
    assert is_grey(picture) == one_channel
    expected = (GREY if one_channel else COLOUR).astype(int)
    if mode == "1":
        expected = np.where(GREY > 127, 255, 0)
    loss = {"P": 24, "PA": 24, "HSV": 8, "YCbCr": 3, "LAB": 32, "CMYK": 1}.get(mode, 0)
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= loss
    assert picture.tobytes() == before  # a caller's own image stays


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-0.05, 0.25, 1.08], [0, 64, 255]),  # overshoot of an interpolation
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 32767.5, 65535.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([-1000.0, 251.0, 1500.0], [0, 128, 255]),
        ([0.0, 5e5, 1e6], [0, 128, 255]),
        ([np.nan, np.inf, -np.inf, 0.5], [0, 255, 0, 128]),
        ([-0.001, 0.0, 0.002], [0, 0, 1]),  # nearly black
        ([-3.0, 0.0, 3.0], [0, 128, 255]),
        ([np.nan, np.nan], [0, 0]),
        ([0.0, 0.0], [0, 0]),
        ([-7.0, -7.0], [0, 0]),
    ],
)
def test_floats_are_scaled_from_the_range_that_holds_them(values, expected):
    picture = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels(picture).tolist() == [expected]
    assert pixels(saved(picture, "TIFF")).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 1, 1], [0, 1, 1]),
        ([0, 32896, 65535], [0, 128, 255]),
        ([-32768, 0, 32767], [0, 128, 255]),
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_32_bit_integers_are_scaled_from_the_range_that_holds_them(values, expected):
    picture = Image.fromarray(np.array([values], dtype=np.int32))
    assert pixels(picture).tolist() == [expected]
    assert pixels(saved(picture, "TIFF")).tolist() == [expected]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_files_are_scaled_whatever_their_brightest_pixel(kind):
    dark = Image.fromarray(GREY.astype(np.uint16) * 4)  # to 1020 of 65535
    assert np.abs(pixels(saved(dark, kind)) - GREY / 64.25).max() <= 0.51
    darker = Image.fromarray(GREY.astype(np.uint16))  # to 255 of 65535
    assert pixels(saved(darker, kind)).max() == 1
    whole = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert pixels(saved(whole, kind)).tolist() == GREY.tolist()


def test_16_bit_tiff_in_either_byte_order_or_with_white_as_zero():
    for mode in ("I;16", "I;16B"):
        assert pixels(saved(in_mode(mode), "TIFF")).tolist() == GREY.tolist()
    inverted = saved(in_mode("I;16"), "TIFF", tiffinfo={262: 0})
    with Image.open(inverted) as picture:
        assert picture.tag_v2[262] == 0
    assert pixels(inverted).tolist() == (255 - GREY.astype(int)).tolist()


# --- transparency ---


def png(grey_depth: int | None, rows: list[bytes], key: bytes, *, colour: int = 0) -> io.BytesIO:
    """Write a PNG with a transparent colour, at depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    width = {0: len(rows[0]) * 8 // (grey_depth or 16), 2: len(rows[0]) // 6}[colour]
    head = struct.pack(">IIBBBBB", width, len(rows), grey_depth or 16, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", key) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(1, [b"\x0f"], b"\0\0"), [255] * 8),  # black is transparent
        (png(1, [b"\x0f"], b"\0\1"), [0] * 4 + [255] * 4),
        (png(2, [b"\x1b"], b"\0\1"), [0, 255, 170, 255]),
        (png(4, [b"\x01\xef"], b"\0\1"), [0, 255, 238, 255]),
        (png(8, [b"\0\x50\xff"], b"\0\x50"), [0, 255, 255]),
        (png(16, [struct.pack(">3H", 0, 1000, 65535)], b"\0\0"), [255, 4, 255]),
        (
            png(None, [struct.pack(">6H", 0, 0, 1000, 51400, 0, 0)], b"\0\0\0\0\x03\xe8", colour=2),
            [[255] * 3, [200, 0, 0]],
        ),
    ],
    ids=["1", "1, other", "2", "4", "8", "16", "RGB 16"],
)
def test_the_transparent_colour_of_a_png_of_any_depth(file, expected):
    assert pixels(io.BytesIO(file.getvalue()))[0].tolist() == expected


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (9, 200, 77)])
def test_what_alpha_hides_has_no_effect(mode, hidden):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[...] = (*hidden, 0)
    rgba[1:3, 1:3] = (90, 90, 90, 255)
    steps = {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBa",)}.get(mode, (mode,))
    picture = Image.fromarray(rgba)
    for step in steps:
        picture = picture.convert(step)
    if mode == "PA":
        picture.putalpha(Image.fromarray(rgba[..., 3]))
    read = pixels(picture)
    read = read if read.ndim == 3 else read[..., None]
    assert (read[0] == 255).all()
    assert np.abs(read[1:3, 1:3] - 90).max() <= (8 if mode == "PA" else 0)


def test_half_transparent_pixels_are_mixed_with_white():
    assert pixels(Image.new("RGBA", (1, 1), (0, 100, 200, 51))).tolist() == [[[204, 224, 244]]]
    assert pixels(Image.new("LA", (1, 1), (0, 51))).tolist() == [[204]]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("key", [1, bytes([255, 0, 255, 255])], ids=["index", "bytes"])
def test_transparent_entries_of_a_palette(kind, key):
    if kind == "GIF" and isinstance(key, bytes):
        key = 1  # of which a GIF has no other
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0, 77, 77, 77])
    assert picture.mode == "P"
    settings = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture.info["transparency"] = key
    read = pixels(saved(picture.convert("RGBA") if kind == "WEBP" else picture, kind, **settings))
    assert read.tolist() == [[[0] * 3, [255] * 3], [[200, 0, 0], [255] * 3]]
    assert pixels(picture).tolist() == read.tolist()


def test_a_palette_with_alpha_of_its_own():
    picture = Image.fromarray(np.array([[0, 1]], np.uint8))
    picture.putpalette([7, 7, 7, 0, 200, 0, 0, 255], "RGBA")
    assert pixels(picture).tolist() == [[[255] * 3, [200, 0, 0]]]


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("MPO", {"quality": 100, "subsampling": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_pictures_are_turned_as_exif_says(kind, settings, orientation):
    upright = Image.fromarray(np.kron(COLOUR[::3, ::4], np.ones((8, 8, 1), np.uint8)))
    turns = [None, 0, 3, 1, 5, 2, 6, 4]  # that undo the orientations 1, 2, …, by Pillow's numbers
    stored = upright
    if (turn := turns[orientation - 1]) is not None:
        stored = upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(stored, kind, exif=exif, **settings)
    read = read_picture(file)
    assert read.size == upright.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(upright)).mean() < 3
    with Image.open(file) as picture:
        assert ImageOps.exif_transpose(picture).tobytes() == read.tobytes()
    assert read_picture(read).tobytes() == read.tobytes()  # and not once more


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P", "LA", "1"])
def test_other_modes_are_turned_too(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = in_mode(mode)
    turned = pixels(saved(picture, "PNG", exif=exif))
    assert turned.tolist() == np.rot90(pixels(picture), -1).tolist()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_leaves_the_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(saved(Image.fromarray(GREY), "PNG", exif=exif)).tolist() == GREY.tolist()


@pytest.mark.parametrize("damage", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no exif"])
def test_damaged_exif_leaves_the_picture(damage):
    file = saved(Image.fromarray(GREY), "JPEG", exif=damage or b"Exif", quality=100)
    assert np.abs(pixels(file) - GREY).max() <= 3


# --- file types ---


def encodable() -> dict[str, str]:
    """Return a suffix, and its type, of all types that Pillow both writes and decodes."""
    found = {}
    for suffix in sorted(suffixes()):
        kind = Image.registered_extensions()[suffix]
        if kind in Image.SAVE and kind not in ("EPS", "BLP", "IM"):  # IM: deprecated
            found[suffix] = kind
    return found


@pytest.mark.parametrize(("suffix", "kind"), encodable().items())
def test_every_suffix_of_pillow_s_can_be_read(tmp_path, suffix, kind):
    path = tmp_path / f"picture{suffix}"
    modes = {"XBM": "1", "MSP": "1", "WMF": "1"}
    Image.new(modes.get(kind, "RGB"), (32, 32), "white").save(path, kind)
    read = np.asarray(read_picture(path))
    assert read.shape[0] == read.shape[1] == (1024 if kind == "ICNS" else 32)
    assert read.min() > 240


def test_suffixes_are_those_that_can_be_decoded():
    wanted = {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"}
    wanted |= {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".tga"}
    wanted |= {".ico", ".icns", ".psd", ".pcx", ".sgi", ".qoi", ".dds", ".mpo", ".xpm", ".fits"}
    assert wanted <= suffixes()
    assert not suffixes() & {".pdf", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".mpg"}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    settings = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    with Image.open(file) as picture:
        assert picture.n_frames == 2
    assert np.abs(pixels(file) - (200, 0, 0)).max() <= 2


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF", "ICO"]
)
def test_a_truncated_file_is_read_or_named(kind, tmp_path):
    whole = saved(Image.fromarray(np.tile(COLOUR, (4, 4, 1))), kind).getvalue()
    path, refused = tmp_path / "cut", 0
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        try:
            read_or_raise(lambda: read_picture(path), str(path))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"every image must be readable, got {path} (")  # noqa: PT017
    assert refused >= 30


@pytest.mark.parametrize("content", [b"", bytes(100), b"version https://git-lfs.github.com/spec"])
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"every image must be readable, got .*x\.png \("):
        read_or_raise(lambda: read_picture(path), str(path))


def test_a_very_long_picture_takes_no_memory_for_its_ends():
    long = np.zeros((2, 40_000, 3), np.uint8)
    long[:, 19_990:20_010] = 200
    read = np.asarray(square(Image.fromarray(long), 16))
    assert read.shape == (16, 16, 3)
    assert (read == 200).all()
    whole = np.tile(COLOUR, (1, 40, 1))  # 640 x 12, whose centre is that of 240 x 12
    cut = square(Image.fromarray(whole[:, 200:440]), 12)
    assert np.asarray(square(Image.fromarray(whole), 12)).tolist() == np.asarray(cut).tolist()


def test_a_picture_of_too_many_pixels_says_what_to_do(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    large = saved(Image.new("L", (30, 30)), "PNG")
    with pytest.raises(ValueError, match=r"got a\.png \(it has more pixels .*: scale it down\)"):
        read_or_raise(lambda: read_picture(large), "a.png")
