"""Pixels to PNGs and back, without loss, several times faster than a general decoder.

A PNG predicts every row by a filter of its own. The ones written here have the same filter in
all rows, so that the whole image is decoded by one cumulative sum; all others go to Pillow.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from glowscale.data.errors import UnreadableError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
START = struct.Struct(">8sI4sIIBBBBBII4s")
"""Signature; IHDR's length, name, width, height, bits, colour type, three methods and checksum;
the next chunk's length and name."""
COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
"""PNG's colour type by number of channels: grey, RGB, RGBA."""
CHANNELS = {colour: channels for channels, colour in COLOUR_TYPES.items()}
MODES = ("L", "RGB", "RGBA")
"""Pillow's modes of what is read."""
NONE, LEFT, UP = 0, 1, 2
"""PNG's filters: a pixel is stored as it is, or less the one to its left, or the one above it."""


def encode_png(image: np.ndarray) -> bytes:
    """A uint8 image (C, H, W) of 1, 3 or 4 channels as PNG; raises ValueError for others.

    >>> image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    >>> bool((decode_png(encode_png(image)) == image).all())
    True
    """
    channels, height, width = image.shape
    if image.dtype != np.uint8 or channels not in COLOUR_TYPES:
        allowed = ", ".join(map(str, COLOUR_TYPES))
        raise ValueError(
            f"An image of {channels} channels of {image.dtype} cannot be a PNG; it must have "
            f"{allowed} channels of uint8."
        )
    pixels = image.transpose(1, 2, 0)
    left, up = pixels.copy(), pixels.copy()
    left[:, 1:] -= pixels[:, :-1]
    up[1:] -= pixels[:-1]
    # The filter that leaves the smallest differences compresses best, nearly always.
    candidates = {NONE: pixels, LEFT: left, UP: up}
    kind = min(candidates, key=lambda k: int(np.abs(candidates[k].view(np.int8)).sum(dtype=int)))
    rows = np.full((height, 1 + width * channels), kind, np.uint8)
    rows[:, 1:] = candidates[kind].reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    body = zlib.compress(rows.tobytes())
    return b"".join(
        [SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b"")]
    )


def decode_png(data: bytes) -> np.ndarray:
    """A PNG as uint8 (C, H, W); raises UnreadableError for other data and other modes."""
    try:
        image = _decode_plain(data)
        return _decode_any(data) if image is None else image
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise UnreadableError(f"not a readable PNG ({error})") from error


def _decode_plain(data: bytes) -> np.ndarray | None:
    """The image of a PNG as `encode_png` writes them, None of any other."""
    if len(data) < START.size:
        return None
    fields = START.unpack_from(data)
    signature, width, height, bits, colour, interlace = (fields[i] for i in (0, 3, 4, 5, 6, 9))
    checksum, size, name = fields[10:]
    plain = signature == SIGNATURE and bits == 8 and not interlace and name == b"IDAT"
    end = START.size + size
    if not plain or colour not in CHANNELS or data[end + 8 : end + 12] != b"IEND":
        return None
    body = data[START.size : end]
    stored = int.from_bytes(data[end : end + 4], "big")
    if zlib.crc32(data[12:29]) != checksum or zlib.crc32(body, zlib.crc32(name)) != stored:
        raise ValueError("a checksum is wrong")
    channels = CHANNELS[colour]
    stride = 1 + width * channels
    content = zlib.decompress(body, bufsize=max(1, height * stride))
    rows = np.frombuffer(content, np.uint8).reshape(height, stride)
    kind = rows[0, 0]
    if kind > UP or (rows[:, 0] != kind).any():
        return None
    pixels = rows[:, 1:].reshape(height, width, channels)
    if kind == NONE:
        pixels = pixels.copy()  # the bytes themselves cannot be written to
    else:
        pixels = np.add.accumulate(pixels, axis=0 if kind == UP else 1, dtype=np.uint8)
    return pixels.transpose(2, 0, 1)


def _decode_any(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if image.mode not in MODES:
        raise ValueError(f"its mode is {image.mode}; only {', '.join(MODES)} of 8 bits are read")
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
