"""Decoding: every kind of picture that is taken, and every kind of data that is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.decode import Decoder
from service.problems import Problem
from tests.service.pictures import animation, encode, noise, pixels, png_bomb, raw_png, webp_bomb

DECODER = Decoder(height=32, width=32, max_bytes=100_000, max_pixels=1_000_000)
WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def corner(data: bytes) -> tuple[int, ...]:
    """The colour that the picture's first pixel comes out as."""
    return tuple(DECODER.decode(data)[:, 0, 0].tolist())


def refusal(data: bytes, decoder: Decoder = DECODER) -> Problem:
    with pytest.raises(Problem) as caught:
        decoder.decode(data)
    return caught.value


def test_a_png_of_the_right_size_arrives_bit_for_bit() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    decoded = DECODER.decode(encode(picture))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels(picture))


def test_a_lossless_webp_arrives_bit_for_bit() -> None:
    picture = noise(1)
    np.testing.assert_array_equal(DECODER.decode(encode(picture, "WEBP", lossless=True)), pixels(picture))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_lossy_format_arrives_almost_as_it_was(kind: str) -> None:
    picture = Image.new("RGB", (32, 32), (200, 90, 40))
    np.testing.assert_allclose(DECODER.decode(encode(picture, kind)).astype(int), pixels(picture).astype(int), atol=4)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (999, 1000), (33, 31), (60_000, 1)])
def test_any_size_is_resized_and_keeps_its_colours(size: tuple[int, int]) -> None:
    decoded = DECODER.decode(encode(Image.new("RGB", size, (10, 200, 90))))
    np.testing.assert_array_equal(decoded, np.broadcast_to(np.array([[[10]], [[200]], [[90]]]), (3, 32, 32)))


def test_the_whole_picture_is_kept_when_it_is_not_square() -> None:
    picture = Image.new("RGB", (64, 16), "red")
    picture.paste("blue", (32, 0, 64, 16))
    decoded = Decoder(height=8, width=16, max_bytes=100_000, max_pixels=10_000).decode(encode(picture))
    assert decoded.shape == (3, 8, 16)
    assert decoded[:, 4, 0].tolist() == list(RED)
    assert decoded[:, 4, 15].tolist() == list(BLUE)


def test_grey_becomes_three_equal_channels() -> None:
    assert corner(encode(Image.new("L", (32, 32), 77))) == (77, 77, 77)


def test_one_bit_pictures_are_black_and_white() -> None:
    picture = Image.new("1", (32, 32), 0)
    assert corner(encode(picture)) == BLACK
    assert corner(encode(Image.new("1", (32, 32), 1))) == WHITE


@pytest.mark.parametrize(("value", "becomes"), [(0x0000, 0), (0x0100, 1), (0x8000, 128), (0xFFFF, 255)])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(value: int, becomes: int) -> None:
    scanlines = (b"\0" + value.to_bytes(2, "big") * 32) * 32
    assert corner(raw_png(32, 32, 16, 0, scanlines)) == (becomes,) * 3


def test_sixteen_bit_colour_is_scaled_and_not_clipped() -> None:
    scanlines = (b"\0" + bytes.fromhex("8000 4000 ffff") * 32) * 32
    assert corner(raw_png(32, 32, 16, 2, scanlines)) == (128, 64, 255)


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(kind: str, alpha: int) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(Image.new("RGBA", (32, 32), (0, 0, 0, alpha)), kind, **options)
    assert corner(data) == pytest.approx((255 - alpha,) * 3, abs=1)


def test_transparent_grey_is_laid_over_white() -> None:
    assert corner(encode(Image.new("LA", (32, 32), (0, 0)))) == WHITE
    assert corner(encode(Image.new("LA", (32, 32), (80, 255)))) == (80, 80, 80)


@pytest.mark.parametrize(("index", "colour"), [(0, WHITE), (1, GREEN)])
def test_the_transparent_colour_of_a_palette_is_laid_over_white(index: int, colour: tuple[int, int, int]) -> None:
    picture = Image.new("P", (32, 32), index)
    picture.putpalette([*RED, *GREEN])
    assert corner(encode(picture, transparency=0)) == colour


@pytest.mark.parametrize(("depth", "colour_type", "pixel"), [(8, 0, b"\x40"), (8, 2, b"\x40" * 3), (16, 0, b"\x40\0")])
def test_a_png_s_transparent_colour_is_laid_over_white(depth: int, colour_type: int, pixel: bytes) -> None:
    transparent = pixel if depth == 16 else b"".join(b"\0" + bytes([value]) for value in pixel)
    data = raw_png(32, 32, depth, colour_type, (b"\0" + pixel * 32) * 32, (b"tRNS", transparent))
    assert corner(data) == WHITE


def test_a_cmyk_jpeg_comes_out_in_its_colours() -> None:
    assert corner(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG")) == pytest.approx(RED, abs=10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(kind: str) -> None:
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: its left side is the top
    decoded = DECODER.decode(encode(picture, kind, exif=exif)).astype(int)
    for row, colour in ((2, BLUE), (29, RED)):
        for column in (2, 29):
            assert decoded[:, row, column] == pytest.approx(colour, abs=10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_whose_exif_makes_no_sense_is_taken_as_it_lies(kind: str) -> None:
    exif = b"garbage" if kind == "PNG" else b"Exif\0\0garbage"
    assert corner(encode(Image.new("RGB", (32, 32), "blue"), kind, exif=exif)) == pytest.approx(BLUE, abs=4)


def test_a_jpeg_that_carries_more_pictures_as_phones_write_them_is_its_first() -> None:
    assert corner(animation("MPO")) == pytest.approx(RED, abs=4)


@pytest.mark.parametrize("data", [b"hello", b"\0" * 1000, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"])
def test_data_that_is_no_image_is_a_400(data: bytes) -> None:
    problem = refusal(data)
    assert problem.status == 400
    assert "PNG, JPEG, WEBP" in problem.detail


def test_an_empty_image_is_a_400() -> None:
    problem = refusal(b"")
    assert problem.status == 400
    assert "empty" in problem.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_an_image_that_is_cut_short_is_a_400(kind: str, part: float) -> None:
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(grain), kind)
    assert refusal(data[: int(len(data) * part)]).status == 400


@pytest.mark.parametrize(("data", "size"), [(png_bomb(), "10000 x 10000"), (webp_bomb(), "65535 x 65535")])
def test_a_bomb_is_a_413_by_its_header_alone(data: bytes, size: str) -> None:
    assert len(data) < 1000
    problem = refusal(data)  # its pixels are missing: decoding it would say so, with a 400
    assert problem.status == 413
    assert size in problem.detail
    assert str(DECODER.max_pixels) in problem.detail


def test_the_largest_image_is_taken_and_one_pixel_more_is_not() -> None:
    decoder = Decoder(height=32, width=32, max_bytes=100_000, max_pixels=64 * 64)
    assert decoder.decode(encode(noise(0, 64, 64))).shape == (3, 32, 32)
    assert refusal(encode(Image.new("RGB", (4097, 1))), decoder).status == 413


def test_an_image_of_too_long_a_side_is_a_413_however_few_its_pixels() -> None:
    problem = refusal(encode(Image.new("L", (65_536, 1))))
    assert problem.status == 413
    assert "65536 x 1" in problem.detail


def test_a_progressive_jpeg_is_taken_and_one_padded_with_scans_is_a_413() -> None:
    photo = encode(noise(0, 400, 400), "JPEG", progressive=True)
    assert DECODER.decode(photo).shape == (3, 32, 32)
    last_scan = photo[photo.rindex(b"\xff\xda") : -2]
    padded = photo[:-2] + last_scan * 150 + photo[-2:]
    generous = Decoder(height=32, width=32, max_bytes=10 * len(padded), max_pixels=1_000_000)
    problem = refusal(padded, generous)
    assert problem.status == 413
    assert "scans" in problem.detail


def test_decoding_stops_when_nobody_waits_any_more() -> None:
    answers = iter([False, True])
    with pytest.raises(Problem) as caught:
        DECODER.decode_all([encode(noise(0)), b"never looked at"], lambda: next(answers))
    assert caught.value.status == 504


def test_an_image_of_too_many_bytes_is_a_413() -> None:
    data = encode(noise(0))
    assert Decoder(height=32, width=32, max_bytes=len(data), max_pixels=1024).decode(data).shape == (3, 32, 32)
    problem = refusal(data, Decoder(height=32, width=32, max_bytes=len(data) - 1, max_pixels=1024))
    assert problem.status == 413
    assert str(len(data) - 1) in problem.detail


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_a_422(kind: str) -> None:
    problem = refusal(animation(kind))
    assert problem.status == 422
    assert "animated" in problem.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(Image.new("RGB", (4, 4)), "GIF"), "GIF"),
        (encode(Image.new("RGB", (4, 4)), "BMP"), "BMP"),
        (b"II*\0\x08\0\0\0" + bytes(50), "TIFF"),
        (b"MM\0*\0\0\0\x08" + bytes(50), "TIFF"),
    ],
)
def test_another_image_format_is_a_415_that_names_it(data: bytes, name: str) -> None:
    problem = refusal(data)
    assert problem.status == 415
    assert name in problem.detail


def test_several_images_keep_their_order() -> None:
    pictures = [noise(seed) for seed in range(4)]
    decoded = DECODER.decode_all([encode(picture) for picture in pictures])
    np.testing.assert_array_equal(decoded, np.stack([pixels(picture) for picture in pictures]))


def test_of_several_images_the_bad_one_is_named_by_its_number() -> None:
    good = encode(noise(0))
    with pytest.raises(Problem) as caught:
        DECODER.decode_all([good, good, b"hello"])
    assert caught.value.status == 400
    assert caught.value.detail.startswith("image 3 of 3: ")
    with pytest.raises(Problem) as caught:
        DECODER.decode_all([b"hello"])
    assert "image 1" not in caught.value.detail


MAGIC = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8 ", b"RIFF\x40\0\0\0WEBPVP8X", b"GIF89a", b"II*\0")
VALID = (
    *(encode(noise(0, 40, 24), kind) for kind in ("PNG", "JPEG", "WEBP")),
    encode(noise(0, 40, 24).convert("P")),
    encode(noise(0, 40, 24), "JPEG", progressive=True),
    encode(noise(0, 40, 24).convert("RGBA"), "WEBP"),
    *(animation(kind) for kind in ("PNG", "WEBP", "MPO")),
)


def _decode_or_refuse(data: bytes) -> None:
    try:
        decoded = DECODER.decode(data)
    except Problem as problem:
        assert problem.status in (400, 413, 415, 422)  # noqa: PT017 (one of two right outcomes)
        assert problem.detail  # noqa: PT017
    else:
        assert decoded.shape == (3, 32, 32)
        assert decoded.dtype == np.uint8


@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_but_a_problem(magic: bytes, rest: bytes) -> None:
    _decode_or_refuse(magic + rest)


@given(
    data=st.sampled_from(VALID),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 5000),
)
@settings(max_examples=500, deadline=None)
def test_no_damage_to_an_image_raises_anything_but_a_problem(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    _decode_or_refuse(bytes(damaged[: len(damaged) - cut % len(damaged) // 4]))
