"""PNGs: ours are read by everybody, everybody's are read by us, and damage is noticed."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glowscale.data.errors import UnreadableError
from glowscale.data.images import _decode_plain as decode_plain
from glowscale.data.images import decode_png, encode_png

SHAPES = st.tuples(st.sampled_from([1, 3, 4]), st.integers(1, 20), st.integers(1, 20))


def some_image(shape: tuple[int, int, int], kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, shape, np.uint8)
    axis = {"rows": 1, "columns": 2}.get(kind, 0)
    steps = rng.integers(0, 4, shape)
    return np.cumsum(steps, axis).astype(np.uint8)


def pillows(image: np.ndarray) -> bytes:
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@given(SHAPES, st.sampled_from(["noise", "rows", "columns", "flat"]), st.integers(0, 99))
def test_ours_and_pillows_are_read_back_by_both(
    shape: tuple[int, int, int], kind: str, seed: int
) -> None:
    image = some_image(shape, kind, seed)
    ours = encode_png(image)
    plain = decode_plain(ours)
    assert plain is not None
    assert np.array_equal(plain, image)
    seen = np.array(Image.open(io.BytesIO(ours)))
    assert np.array_equal(seen[None] if seen.ndim == 2 else seen.transpose(2, 0, 1), image)
    assert np.array_equal(decode_png(pillows(image)), image)


def test_every_filter_is_used_where_it_is_best() -> None:
    dots = np.eye(32, dtype=np.uint8)[None] * 9
    ramps = [some_image((1, 32, 32), kind, 0) for kind in ("columns", "rows")]
    kinds = []
    for image in (dots, *ramps):
        data = encode_png(image)
        start = data.index(b"IDAT") + 4
        kinds.append(zlib.decompress(data[start:-16])[0])
    assert kinds == [0, 1, 2]


@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_harmless(place: int, change: int) -> None:
    image = some_image((3, 9, 9), "noise", 0)
    data = bytearray(encode_png(image))
    data[place % len(data)] ^= change
    try:
        decoded = decode_png(bytes(data))
    except UnreadableError:
        return
    assert np.array_equal(decoded, image)


@pytest.mark.parametrize(
    "data", [b"", b"no image at all", encode_png(np.ones((1, 4, 4), np.uint8))[:-20]]
)
def test_what_is_no_png_is_named(data: bytes) -> None:
    with pytest.raises(UnreadableError, match="not a readable PNG"):
        decode_png(data)


def test_modes_that_are_not_plain_pixels_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "PNG")
    with pytest.raises(UnreadableError, match="its mode is P; only L, RGB, RGBA of 8 bits"):
        decode_png(buffer.getvalue())
