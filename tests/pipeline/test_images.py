"""Header facts, the decision to copy, and RGB pixels of whatever comes."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from backmix.pipeline import images
from backmix.pipeline.beton import NORMALISED_SHIFT, SUBSAMPLING_SHIFT, Flag
from tests.images import encoded, jpeg, photograph, png, turned, with_stray_bytes


def refusal(data: bytes) -> str:
    return images.copy_refusal(images.jpeg_facts(data))


def converted_from(flags: int) -> str:
    return images.CONVERTED_MODES[flags >> NORMALISED_SHIFT]


def with_frame(data: bytes, marker: int | None = None, height: int | None = None) -> bytes:
    """Return a baseline JPEG with another frame marker or height in its header."""
    at = data.index(b"\xff\xc0")
    changed = bytearray(data)
    if marker is not None:
        changed[at + 1] = marker
    if height is not None:
        changed[at + 5 : at + 7] = struct.pack(">H", height)
    return bytes(changed)


# --- header facts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"), [("444", 0), ("422", 1), ("420", 2), ("440", 3), ("411", 3)]
)
def test_subsampling_is_read_from_the_sampling_factors(name: str, code: int) -> None:
    stream = simplejpeg.encode_jpeg(photograph(0, 20, 30), colorsubsampling=name)
    facts = images.jpeg_facts(stream)
    assert facts.subsampling == name
    assert simplejpeg.decode_jpeg_header(stream)[3] == name
    assert (facts.height, facts.width) == (20, 30)
    assert images.stream_flags(facts) >> SUBSAMPLING_SHIFT & 3 == code
    assert bool(images.stream_flags(facts) & Flag.HARDWARE) == (code != 3)


def test_facts_of_a_progressive_stream_with_profile_and_restarts() -> None:
    facts = images.jpeg_facts(jpeg(progressive=True, icc_profile=b"p" * 200))
    assert facts.progressive
    assert facts.icc
    assert facts.scans > 3
    assert images.stream_flags(facts) & (Flag.PROGRESSIVE | Flag.ICC | Flag.HARDWARE) == (
        Flag.PROGRESSIVE | Flag.ICC
    )
    restarts = images.jpeg_facts(jpeg(photograph(0, 64, 64), restart_marker_blocks=1))
    assert restarts.restart_interval == 1
    assert restarts.scans == 1


def test_the_end_is_the_first_end_marker_outside_of_segments() -> None:
    # A preview picture inside the EXIF block has an end marker of its own.
    exif = Image.Exif()
    exif[0x010E] = "preview \xff\xd9"
    stream = jpeg(exif=exif.tobytes() + jpeg(photograph(5, 8, 8)))
    assert stream.count(b"\xff\xd9") == 2
    assert images.jpeg_facts(stream + b"behind" + stream).end == len(stream)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_in_both_byte_orders(orientation: int) -> None:
    for order in "<>":
        mark = b"II" if order == "<" else b"MM"
        tiff = mark + struct.pack(order + "HIH", 42, 8, 1)
        tiff += struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)
        facts = images.jpeg_facts(jpeg(exif=b"Exif\0\0" + tiff))
        assert facts.orientation == orientation


def test_an_orientation_out_of_range_counts_as_none() -> None:
    assert images.jpeg_facts(turned(0)).orientation == 1
    assert images.jpeg_facts(turned(9)).orientation == 1


@pytest.mark.parametrize("cut", range(2, 40))
def test_a_cut_exif_block_is_no_error(cut: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    facts = images.jpeg_facts(jpeg(exif=b"Exif\0\0" + block[6 : 6 + cut]))
    assert facts.orientation in (1, 6)


def test_every_cut_of_a_stream_is_refused_or_lacks_its_end() -> None:
    stream = jpeg(photograph(0, 16, 16), quality=50)
    for length in range(2, len(stream)):
        try:
            facts = images.jpeg_facts(stream[:length])
        except ValueError:
            continue
        assert facts.end == -1
        assert images.copy_refusal(facts)


def test_a_bomb_of_scans_is_refused_before_it_is_decoded() -> None:
    stream = jpeg(progressive=True)
    scan = stream[stream.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="more than 100 scans"):
        images.decode(stream[:-2] + 100 * scan + b"\xff\xd9")


# --- the decision to copy ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stream",
    [
        jpeg(),
        jpeg(mode="L"),
        jpeg(progressive=True),
        jpeg(subsampling="4:4:4"),
        jpeg(keep_rgb=True),
        turned(1),
        turned(0),
        jpeg(comment=b"hello", icc_profile=b"p" * 100_000),
    ],
)
def test_ordinary_jpegs_may_be_copied(stream: bytes) -> None:
    assert refusal(stream) == ""
    assert images.check_jpeg(stream, scaled=True) == ""


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (jpeg(mode="CMYK"), "CMYK"),
        (turned(6), "EXIF orientation 6"),
        (with_frame(jpeg(), marker=0xC9), "arithmetic coding"),
        (with_frame(jpeg(), marker=0xC3), "frame type 3"),
        (with_frame(jpeg(), height=0), "DNL"),
        (jpeg()[:-2], "no end marker"),
        (jpeg()[:2] + b"\x00\x01\x02" + jpeg()[2:], "extraneous bytes"),
    ],
)
def test_what_some_reader_would_show_differently_is_not_copied(stream: bytes, reason: str) -> None:
    assert reason in refusal(stream)


def test_a_stream_that_decodes_with_a_warning_says_so() -> None:
    assert "extraneous" in images.check_jpeg(with_stray_bytes(jpeg()), scaled=True)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_check_finds_lost_data_before_the_end_marker(scaled: bool) -> None:
    stream = jpeg(photograph(0, 200, 200))
    with pytest.raises(ValueError, match="damaged"):
        images.check_jpeg(stream[: len(stream) // 2] + b"\xff\xd9", scaled=scaled)


def test_the_scaled_check_decodes_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = simplejpeg.decode_jpeg

    def noted(*arguments: Any, **more: Any) -> np.ndarray:
        sizes.append(decode(*arguments, **more).shape)
        return decode(*arguments, **more)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    for scaled in (True, False):
        images.check_jpeg(jpeg(photograph(0, 80, 160)), scaled=scaled)
    assert sizes == [(10, 20, 3), (80, 160, 3)]


@pytest.mark.parametrize(
    "stream",
    [
        jpeg(photograph(3, 96, 128), subsampling="4:2:0"),
        jpeg(photograph(3, 96, 128), progressive=True),
        jpeg(photograph(3, 96, 128), restart_marker_blocks=4),
    ],
)
def test_the_scaled_check_finds_what_the_full_one_finds(stream: bytes) -> None:
    def verdict(data: bytes, scaled: bool) -> str:
        try:
            return images.check_jpeg(data, scaled=scaled)
        except ValueError:
            return "damaged"

    random = np.random.default_rng(0)
    verdicts = []
    for place in random.integers(20, len(stream) - 2, 200).tolist():
        damaged = bytearray(stream)
        damaged[place] ^= 1 << int(random.integers(8))
        verdicts.append(verdict(bytes(damaged), True))
        assert verdicts[-1] == verdict(bytes(damaged), False)
    assert "" in verdicts and "damaged" in verdicts


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_pillow_applies_it(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(photograph(1, 20, 30)), form, exif=exif, **options)
    decoded = images.decode(data)
    with Image.open(BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decoded.pixels, upright)
    assert decoded.pixels.flags.c_contiguous
    assert bool(decoded.flags & Flag.ROTATED) == (orientation != 1)
    note = f"turned by EXIF orientation {orientation}"
    assert decoded.notes == ([note] if orientation != 1 else [])


def test_lossless_formats_keep_their_pixels() -> None:
    pixels = photograph(2)
    for form in ("PNG", "PPM", "BMP", "TIFF"):
        decoded = images.decode(encoded(Image.fromarray(pixels), form))
        np.testing.assert_array_equal(decoded.pixels, pixels)
        assert (decoded.format, decoded.flags) == (form, 0)


def test_sixteen_bits_lose_the_lower_eight() -> None:
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    decoded = images.decode(png(deep))
    np.testing.assert_array_equal(decoded.pixels, np.repeat((deep >> 8)[..., None], 3, axis=2))
    assert converted_from(decoded.flags) == "16 bit"


def test_sixteen_bit_colour_loses_the_lower_eight() -> None:
    # Pillow writes no such PNG: built by hand.
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    decoded = images.decode(data)
    np.testing.assert_array_equal(decoded.pixels, values >> 8)
    assert converted_from(decoded.flags) == "16 bit"


def test_alpha_is_dropped_not_composed() -> None:
    pixels = photograph(3)
    alpha = np.zeros((*pixels.shape[:2], 1), np.uint8)
    decoded = images.decode(png(np.concatenate([pixels, alpha], axis=2)))
    np.testing.assert_array_equal(decoded.pixels, pixels)
    assert converted_from(decoded.flags) == "alpha"


def test_a_palette_is_looked_up_also_with_a_transparent_entry() -> None:
    image = Image.fromarray(photograph(4)).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(16))}):
        decoded = images.decode(encoded(image, "PNG", **options))
        np.testing.assert_array_equal(decoded.pixels, expected)
        assert converted_from(decoded.flags) == "palette"


def test_one_bit_and_gray_become_three_equal_channels() -> None:
    gray = photograph(5)[..., 0]
    np.testing.assert_array_equal(images.decode_rgb(png(gray)), np.stack([gray] * 3, axis=2))
    bits = Image.fromarray(gray).convert("1", dither=Image.Dither.NONE)
    decoded = images.decode(encoded(bits, "PNG"))
    np.testing.assert_array_equal(decoded.pixels[..., 1], np.where(gray >= 128, 255, 0))
    assert converted_from(decoded.flags) == "1 bit"


def test_cmyk_becomes_rgb() -> None:
    pixels = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    decoded = images.decode(jpeg(pixels, mode="CMYK", quality=100))
    assert np.abs(decoded.pixels.astype(int) - pixels).max() <= 2
    assert converted_from(decoded.flags) == "CMYK"


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for form, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        decoded = images.decode(data)
        np.testing.assert_array_equal(decoded.pixels, np.asarray(frames[0]))
        assert decoded.flags & Flag.ANIMATED


def test_a_jpeg_with_a_warning_keeps_its_pixels_and_is_flagged() -> None:
    stream = jpeg(photograph(6, 40, 40))
    decoded = images.decode(with_stray_bytes(stream))
    np.testing.assert_array_equal(decoded.pixels, images.decode_rgb(stream))
    assert decoded.flags == Flag.WARNED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, I am no image", "not an image of a known format"),
        (jpeg()[:200], "ends inside the header"),
        (jpeg(photograph(0, 64, 64))[:-30], "truncated"),
        (png(photograph())[:-30], "truncated|broken"),
        (encoded(Image.fromarray(photograph()[..., 0] * np.float32(1)), "TIFF"), "floating-point"),
        (with_frame(jpeg(), height=0), "pixels"),
        (with_frame(jpeg(), height=65_535), "does not decode|damaged"),
    ],
)
def test_what_cannot_be_decoded_is_a_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.decode(data)


def test_a_claim_of_too_many_pixels_is_refused_by_its_header() -> None:
    stream = bytearray(jpeg())
    at = stream.index(b"\xff\xc0")
    stream[at + 5 : at + 9] = struct.pack(">HH", 65_535, 65_535)
    with pytest.raises(ValueError, match="more than 178,956,970"):
        images.decode(bytes(stream))


def test_formats_that_run_other_programs_are_not_opened() -> None:
    postscript = encoded(Image.fromarray(photograph()), "EPS")
    with pytest.raises(ValueError, match="not an image of a known format"):
        images.decode(postscript)


@pytest.mark.parametrize("seed", range(200))
def test_damage_never_raises_anything_but_value_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = [jpeg(), jpeg(progressive=True), jpeg(mode="CMYK"), turned(6), png(photograph())]
    data = bytearray(kinds[seed % len(kinds)])
    for at in random.integers(0, len(data), 1 + seed % 7):
        data[at] = random.integers(256)
    try:
        decoded = images.decode(bytes(data))
    except ValueError:
        return
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.ndim == 3


# --- size and encoding ---------------------------------------------------------------------------


def test_shrinking_keeps_the_longer_side_and_rounds_the_other_down() -> None:
    assert images.shrunk_size(375, 500, 256) == (192, 256)
    assert images.shrunk_size(500, 333, 256) == (256, 170)
    assert images.shrunk_size(3, 1000, 10) == (1, 10)
    assert images.shrunk_size(20, 30, 30) == (20, 30)


def test_shrinking_does_not_alias() -> None:
    # Lines one pixel wide: without a low-pass filter they would come out as stripes.
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    small = images.shrink(lines, 16)
    assert small.shape == (16, 16, 3)
    assert np.abs(small[:, 2:-2].astype(int) - 127.5).max() < 3


def test_encoding_is_baseline_420_with_the_flags_that_are_claimed() -> None:
    pixels = photograph(7, 48, 64)
    data = images.encode_jpeg(pixels, 90)
    facts = images.jpeg_facts(data)
    assert (facts.frame, facts.subsampling, facts.size) == (0xC0, "420", (48, 64))
    assert images.stream_flags(facts) == images.ENCODED_FLAGS
    error = images.decode_rgb(data).astype(float) - pixels
    assert np.sqrt((error**2).mean()) < 8


@pytest.mark.real
def test_odd_images_decode_to_what_pillow_shows() -> None:
    root = Path(os.environ["BACKMIX_DATA"]) / "odd-images"
    broken = {"truncated_jpeg.jpg", "empty.jpg", "missing-sof.jpg", "monkey12.jpg"}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".tsv"]
    assert len(files) == 34
    for path in files:
        data = path.read_bytes()
        if path.name in broken:
            with pytest.raises(ValueError):
                images.decode(data)
            continue
        with Image.open(path) as image:
            turned_image = ImageOps.exif_transpose(image)
            if turned_image.mode.startswith("I"):
                continue  # Pillow clips 16 bits where we shift
            expected = np.asarray(turned_image.convert("RGBA").convert("RGB"))
        difference = np.abs(images.decode_rgb(data).astype(int) - expected)
        assert difference.max() <= 2, path.name  # two builds of libjpeg-turbo
