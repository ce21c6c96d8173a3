"""Foreign images made safe: JPEG header facts, RGB pixels of anything Pillow reads, encoding.

What an image *is* decides here, never what its name says. Everything a file claims (sizes, counts,
lengths) is checked before a decoder sees it. JPEG is decoded by libjpeg-turbo (simplejpeg, accurate
DCT, strict), the rest and the odd kinds of JPEG by Pillow. No colour management: ICC profiles are
noted, not applied. This module knows nothing of data sets or of the .beton file.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image

from backmix.pipeline.beton import MAX_PIXELS, NORMALISED_SHIFT, SUBSAMPLING_SHIFT, Flag

MAX_BYTES = 256 * 2**20
"""Largest encoded image that is read [bytes]."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG. Real ones have about ten; a hostile one has thousands, each a
pass over the whole image."""
MAX_SIDE = 65_535
"""Longest side that JPEG and .beton can hold [pixels]."""

WARNING_NOTE = "decodes with a warning"
"""How the note on a JPEG begins that is whole but makes the decoder complain."""

# What Pillow may open. Left out on purpose: formats that start other programs (EPS), that have no
# signature (TGA), or that no data set uses.
FORMATS = ("JPEG", "PNG", "PPM", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000")

SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jp2": "JPEG2000",
}
"""File name endings (lower case) of images, and the format that each promises."""

CONVERTED_MODES = ("", "CMYK", "YCCK", "16 bit", "palette", "alpha", "1 bit", "other colour space")
"""The colour modes that bits 12 to 15 of the flags number (`beton.NORMALISED_SHIFT`)."""

# Sampling factors (luma h, v), (chroma h, v) that every TurboJPEG since 2.1 understands.
_SUBSAMPLINGS = {
    ((1, 1), (1, 1)): "444",
    ((2, 1), (2, 1)): "444",
    ((1, 2), (1, 2)): "444",
    ((3, 1), (3, 1)): "444",
    ((1, 3), (1, 3)): "444",
    ((2, 1), (1, 1)): "422",
    ((2, 2), (1, 2)): "422",
    ((2, 2), (1, 1)): "420",
    ((1, 2), (1, 1)): "440",
    ((2, 2), (2, 1)): "440",
    ((4, 1), (1, 1)): "411",
}
_SUBSAMPLING_CODES = {"444": 0, "422": 1, "420": 2}

# In entropy-coded data FF 00 is a stuffed byte, FF D0..D7 a restart marker and FF FF a fill byte;
# FF with anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC share the range


@dataclass(frozen=True)
class JpegFacts:
    """What the markers of a JPEG stream say, read without decoding it."""

    frame: int
    """Frame marker 0xC0..0xCF: C0 baseline, C1 extended, C2 progressive, C9.. arithmetic."""
    precision: int
    """Bits per value."""
    height: int
    width: int
    factors: tuple[tuple[int, int], ...]
    """Sampling factors (h, v) of each component."""
    frames: int = 1
    adobe: int | None = None
    """Colour transform of the Adobe segment, if there is one: 0 none, 1 YCbCr, 2 YCCK."""
    orientation: int = 1
    """EXIF orientation 1..8; 1 where absent or out of range."""
    icc: bool = False
    line_count: bool = False
    """The height is (also) given by a DNL marker after the first scan."""
    restart_interval: int = 0
    scans: int = 0
    extraneous: bool = False
    """Bytes that belong to nothing stand between segments."""
    end: int = -1
    """Offset just behind the end marker; -1 where it is missing or was not looked for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return self.height, self.width

    @property
    def components(self) -> int:
        """Number of colour components: 1 gray, 3 colour, 4 CMYK or YCCK."""
        return len(self.factors)

    @property
    def progressive(self) -> bool:
        """Whether the image comes in several scans that refine each other."""
        return self.frame in (0xC2, 0xC6, 0xCA, 0xCE)

    @property
    def arithmetic(self) -> bool:
        """Whether it is arithmetically coded, not by Huffman."""
        return self.frame >= 0xC9

    @property
    def subsampling(self) -> str:
        """`gray`, `444`, `422`, `420`, `440`, `411` or `other`."""
        if self.components == 1:
            return "gray"
        chroma = set(self.factors[1:])
        if self.components != 3 or len(chroma) != 1:
            return "other"
        return _SUBSAMPLINGS.get((self.factors[0], chroma.pop()), "other")


@dataclass(frozen=True)
class Decoded:
    """Pixels and how they came about."""

    pixels: np.ndarray
    """uint8 [h, w, 3], RGB, contiguous."""
    format: str
    """Format by content, as Pillow names it (MPO counts as JPEG)."""
    flags: int = 0
    notes: list[str] = field(default_factory=list)
    """What was done to get there, for people."""


def is_jpeg(data: bytes) -> bool:
    """Tell whether the content starts as JPEG streams do."""
    return data[:2] == b"\xff\xd8"


def jpeg_facts(data: bytes, *, whole: bool = True) -> JpegFacts:
    """Read the markers of a JPEG stream.

    Args:
        data: the stream, or its beginning where `whole` is False.
        whole: walk through all scans to the end marker; otherwise stop at the first scan.

    Raises:
        ValueError: no JPEG, no frame header, or a segment that does not fit into the data.
    """
    if not is_jpeg(data):
        raise ValueError("not a JPEG stream")
    found: dict[str, object] = {}
    frames = scans = 0
    extraneous = False
    end = -1
    for marker, position, body, clean in _segments(data):
        extraneous |= not clean
        if marker in _FRAMES:
            frames += 1
            if frames == 1:
                found |= _frame(marker, body)
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"JPEG with more than {MAX_SCANS} scans")
            if not whole:
                break
        elif marker == 0xD9:
            end = position + 2
            break
        elif marker == 0xDC:
            found["line_count"] = True
        elif marker == 0xDD and len(body) >= 2:
            found["restart_interval"] = int.from_bytes(body[:2], "big")
        elif marker == 0xE1 and body[:6] == b"Exif\0\0":
            found.setdefault("orientation", _orientation(body[6:]))
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0":
            found["icc"] = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            found["adobe"] = body[11]
    if not frames:
        raise ValueError("JPEG without a frame header")
    return JpegFacts(frames=frames, scans=scans, extraneous=extraneous, end=end, **found)  # pyright: ignore[reportArgumentType]


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes, bool]]:
    """Yield (marker, its offset, body, whether it stood where it should) up to the end marker."""
    position = 2
    while True:
        start = data.find(b"\xff", position)
        if start < 0:
            return
        clean = start == position
        while data[start + 1 : start + 2] == b"\xff":
            start += 1
        if start + 1 >= len(data):
            return
        marker = data[start + 1]
        if marker == 0xD9:
            yield marker, start, b"", clean
            return
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stand alone, mean nothing here
            position = start + 2
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2 + length
        if length < 2 or position > len(data):
            raise ValueError(f"JPEG ends inside the header segment at byte {start}")
        yield marker, start, data[start + 4 : position], clean
        if marker == 0xDA:
            scan_end = _SCAN_END.search(data, position)
            if scan_end is None:
                return
            position = scan_end.start()


def _frame(marker: int, body: bytes) -> dict[str, object]:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ValueError("JPEG with a cut frame header")
    precision, height, width, components = struct.unpack(">BHHB", body[:6])
    sampling = body[7 : 6 + 3 * components : 3]
    factors = tuple((value >> 4, value & 15) for value in sampling)
    return {
        "frame": marker,
        "precision": precision,
        "height": height,
        "width": width,
        "factors": factors,
    }


def _orientation(tiff: bytes) -> int:
    """Return the orientation in the first directory of an EXIF block, 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
        if tag == 0x0112 and kind == 3 and number == 1:
            (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1


def copy_refusal(facts: JpegFacts) -> str:
    """Say why a JPEG must not be stored byte for byte; empty where it may.

    The conditions are those under which every reader of a .beton (TurboJPEG 2.1 and later without
    looking at EXIF, GPU decoders) gets the same RGB image. That the stream decodes without error
    and warning is for `check_jpeg` to find out.
    """
    if facts.arithmetic:
        return "arithmetic coding"
    if facts.frame not in (0xC0, 0xC1, 0xC2):
        return f"frame type {facts.frame - 0xC0} (neither baseline nor progressive)"
    if facts.frames != 1:
        return "several frames"
    if facts.precision != 8:
        return f"{facts.precision} bits per value"
    if facts.components not in (1, 3):
        return "CMYK" if facts.components == 4 else f"{facts.components} components"
    if facts.height == 0 or facts.width == 0 or facts.line_count:
        return "height given by a DNL marker"
    if facts.subsampling == "other":
        return "unusual chroma sampling"
    if facts.orientation != 1:
        return f"EXIF orientation {facts.orientation}"
    if facts.extraneous:
        return "extraneous bytes between header segments"
    if facts.end < 0:
        return "no end marker"
    return ""


def stream_flags(facts: JpegFacts) -> int:
    """Return the flags that describe a stored JPEG stream (bits 1 to 5 and 10)."""
    subsampling = facts.subsampling
    flags = Flag.PROGRESSIVE * facts.progressive | Flag.ICC * facts.icc
    if subsampling == "gray":
        flags |= Flag.GRAY
    else:
        flags |= _SUBSAMPLING_CODES.get(subsampling, 3) << SUBSAMPLING_SHIFT
    if facts.frame == 0xC0 and subsampling in ("gray", *_SUBSAMPLING_CODES):
        flags |= Flag.HARDWARE
    return flags


def check_jpeg(data: bytes, *, scaled: bool) -> str:
    """Decode a JPEG for the sake of its errors.

    Args:
        data: the stream; its facts have been looked at.
        scaled: decode at 1/8 of the size: entropy decoding, which finds truncation and damage,
            runs over the whole stream all the same.

    Returns:
        The decoder's warning where the image is whole nevertheless, else an empty string.

    Raises:
        ValueError: the stream is damaged.
    """
    try:
        # A smallest side of 1 pixel asks for the smallest scale; 0 for none.
        simplejpeg.decode_jpeg(data, min_height=int(scaled), min_width=int(scaled))
    except ValueError as error:
        return _warning(error)
    return ""


def _warning(error: ValueError) -> str:
    """Return what the decoder complained about, or raise where it means damage.

    libjpeg calls lost data a warning, too, and fills up with gray. Stray bytes before a marker are
    common in photographs from the web and harmless; the rest of its "corrupt data" is not. What
    is left (an unknown revision number, a header that simplejpeg cannot read) is for a second
    decoder to judge.
    """
    message = str(error)
    damaged = message.startswith(("Premature end", "Corrupt JPEG data", "Corrupt data"))
    if damaged and "extraneous bytes before marker" not in message:
        raise ValueError(f"damaged JPEG: {message}") from error
    return message


def decode_rgb(data: bytes, limit: int = MAX_PIXELS) -> np.ndarray:
    """Decode any image to RGB, uint8 [h, w, 3]; see `decode`."""
    return decode(data, limit=limit).pixels


def rgb_of(image: Image.Image, limit: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of an image that Pillow holds, uint8 [h, w, 3], by the rules of `decode`.

    EXIF orientation is applied, unless whoever made the image has done so (Pillow's
    `exif_transpose` takes the mark away).

    Raises:
        ValueError: its file is damaged, floating-point pixels, or more than `limit` of them.
    """
    try:
        check_size(image.height, image.width, limit)
        asked = _pillow_orientation(image)
        decoded = _as_rgb(image, deep=False)
        return _rotate(decoded, asked if _pillow_orientation(image) == asked else 1).pixels
    except MemoryError:
        raise
    except Exception as error:  # see _by_pillow
        raise ValueError(str(error) or type(error).__name__) from error


def decode(data: bytes, facts: JpegFacts | None = None, *, limit: int = MAX_PIXELS) -> Decoded:
    """Decode any image to RGB by its content.

    EXIF orientation is applied. CMYK and YCCK become RGB by Pillow's plain formula, 16 bits per
    value lose the lower 8, palettes and 1-bit images are expanded, an alpha channel is dropped
    (not composed on a background), of an animation the first frame counts.

    Args:
        data: the encoded image.
        facts: of a JPEG, where somebody has looked at them already.
        limit: most pixels of an image that is decoded; its header says how many it has.

    Raises:
        ValueError: no image, damaged or truncated, floating-point pixels, or beyond `limit`,
            `MAX_PIXELS`, `MAX_BYTES`, `MAX_SCANS`.
    """
    if not data:
        raise ValueError("the file is empty")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes; images may have {MAX_BYTES:,} at most")
    if is_jpeg(data):
        return _decode_jpeg(data, facts or jpeg_facts(data), limit)
    return _by_pillow(data, limit)


def _decode_jpeg(data: bytes, facts: JpegFacts, limit: int) -> Decoded:
    check_size(facts.height, facts.width, limit)
    if facts.end < 0:
        raise ValueError("truncated JPEG: the end marker is missing")
    four = facts.components == 4
    pixels = None
    warning = ""
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="CMYK" if four else "RGB")
    except ValueError as error:
        warning = _warning(error)
    if four or pixels is None:
        try:
            pixels = _by_pillow(data, limit).pixels
        except ValueError as error:
            raise ValueError(f"JPEG that does not decode: {warning or error}") from error
    decoded = Decoded(pixels, "JPEG", Flag.ICC * facts.icc)
    if four:
        decoded = _note_mode(decoded, "YCCK" if facts.adobe == 2 else "CMYK")
    if warning:
        note = f"{WARNING_NOTE}: {warning}"
        decoded = replace(decoded, flags=decoded.flags | Flag.WARNED, notes=[*decoded.notes, note])
    return _rotate(decoded, facts.orientation)


def _by_pillow(data: bytes, limit: int) -> Decoded:
    """Decode with Pillow; a JPEG's orientation is left alone, the others' is applied."""
    # Pillow and its plugins raise whatever a malformed file makes them stumble over: OSError,
    # SyntaxError, struct.error, IndexError and more. Here they all mean the same.
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(image.height, image.width, limit)
            deep = _bits(image, data) == 16
            if is_jpeg(data):
                return _as_rgb(image, deep=deep)
            asked = _pillow_orientation(image)
            decoded = _as_rgb(image, deep=deep)
            # Pillow turns a TIFF while it loads its pixels, and takes the request away.
            if _pillow_orientation(image) != asked:
                return _note_turn(decoded, asked)
            return _rotate(decoded, asked)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image of a known format") from error
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _as_rgb(image: Image.Image, *, deep: bool) -> Decoded:
    form = "JPEG" if image.format == "MPO" else str(image.format)
    animated = form != "JPEG" and getattr(image, "is_animated", False)
    image.load()
    icc = Flag.ICC * bool(image.info.get("icc_profile"))
    decoded = Decoded(np.empty((0, 0, 3), np.uint8), form, icc)
    if animated:
        note = "first frame of an animation"
        decoded = replace(decoded, flags=decoded.flags | Flag.ANIMATED, notes=[note])
    mode = image.mode
    if mode.startswith("I"):
        image = Image.fromarray(_high_byte(np.asarray(image)))
        decoded = _note_mode(decoded, "16 bit")
    elif mode == "F":
        raise ValueError("floating-point pixels; convert the image to 8 bits per value first")
    elif mode in ("P", "PA"):
        decoded = _note_mode(decoded, "palette")
        image = image.convert("RGBA")
    elif deep:
        decoded = _note_mode(decoded, "16 bit")
    elif mode in ("RGBA", "LA", "La", "RGBa"):
        decoded = _note_mode(decoded, "alpha")
    elif mode == "1":
        decoded = _note_mode(decoded, "1 bit")
    elif mode == "CMYK":
        decoded = _note_mode(decoded, "CMYK") if form != "JPEG" else decoded
    elif mode not in ("L", "RGB", "RGBX"):
        decoded = _note_mode(decoded, "other colour space")
    if image.mode == "RGBa":  # premultiplied: divide before the alpha goes
        image = image.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    return replace(decoded, pixels=np.array(image.convert("RGB")))


def _bits(image: Image.Image, data: bytes) -> int:
    """Return 16 where the file has 16 bits per value of which Pillow keeps 8, else 8."""
    if image.format == "PNG":
        # Byte 24 is the depth: signature 8, length 4, IHDR 4, width 4, height 4.
        return 16 if data[24:25] == b"\x10" else 8
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (8,))  # pyright: ignore[reportAttributeAccessIssue]
        return 16 if max(bits if isinstance(bits, tuple) else (bits,)) == 16 else 8
    return 8


def _high_byte(values: np.ndarray) -> np.ndarray:
    if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
        raise ValueError("32-bit integer pixels; convert the image to 8 bits per value first")
    return (values >> 8).astype(np.uint8)


def _pillow_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block (many exception types) must not cost the pixels
        return 1
    return value if value in range(1, 9) else 1


def _rotate(decoded: Decoded, orientation: int) -> Decoded:
    """Turn and mirror pixels so that they show what a viewer shows."""
    if orientation == 1:
        return decoded
    pixels = decoded.pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    # After the transposition of 5 to 8: 6 wants its columns mirrored, 8 its rows, 7 both.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return _note_turn(replace(decoded, pixels=np.ascontiguousarray(pixels)), orientation)


def _note_turn(decoded: Decoded, orientation: int) -> Decoded:
    note = f"turned by EXIF orientation {orientation}"
    flags = decoded.flags | Flag.ROTATED
    return replace(decoded, flags=flags, notes=[*decoded.notes, note])


def _note_mode(decoded: Decoded, mode: str) -> Decoded:
    note = {"alpha": "alpha dropped", "16 bit": "16 bits cut to 8"}.get(mode, f"from {mode}")
    flags = decoded.flags | Flag.NORMALISED | CONVERTED_MODES.index(mode) << NORMALISED_SHIFT
    return replace(decoded, flags=flags, notes=[*decoded.notes, note])


def check_size(height: int, width: int, limit: int = MAX_PIXELS) -> None:
    """Raise ValueError unless an image of this size [pixels] is within the limits."""
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(f"{width} x {height} pixels; sides may be 1 to {MAX_SIDE:,}")
    if height * width > min(limit, MAX_PIXELS):
        raise ValueError(f"{width} x {height} pixels are more than {min(limit, MAX_PIXELS):,}")


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of an image that is no JPEG, from its header alone.

    24 bytes of a PNG are enough; other formats are opened by Pillow.

    Raises:
        ValueError: no image, or its header does not fit into `data`.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # see _by_pillow
        raise ValueError(str(error) or type(error).__name__) from error


def shrunk_size(
    height: int, width: int, max_side: int | None = None, short_side: int | None = None
) -> tuple[int, int]:
    """Return the size after shrinking: never larger, the side that is meant exact.

    Args:
        height: of the image [pixels].
        width: of the image [pixels].
        max_side: most pixels of the longer side; None = any.
        short_side: most pixels of the shorter side; None = any.

    >>> shrunk_size(375, 500, 256)
    (192, 256)
    >>> shrunk_size(375, 500, short_side=256)
    (256, 341)
    """
    for which, limit in ((max, max_side), (min, short_side)):
        side = which(height, width)
        if limit is not None and side > limit:
            height, width = max(1, height * limit // side), max(1, width * limit // side)
    return height, width


def shrink(
    pixels: np.ndarray, max_side: int | None = None, short_side: int | None = None
) -> np.ndarray:
    """Resize RGB uint8 [h, w, 3] to `shrunk_size`.

    Pillow's LANCZOS filter, whose support grows with the scale, so nothing aliases.
    """
    height, width = shrunk_size(pixels.shape[0], pixels.shape[1], max_side, short_side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS))


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encode RGB uint8 [h, w, 3] as baseline JPEG, chroma 4:2:0, quality 1..100."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace="RGB", colorsubsampling="420"
    )


ENCODED_FLAGS = 2 << SUBSAMPLING_SHIFT | Flag.HARDWARE
"""Flags of what `encode_jpeg` returns."""
