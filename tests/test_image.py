"""Images and depth maps in and out: every accepted form of one picture gives that picture; the rest is refused."""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from depthdiff.image import (
    OUTPUT_TYPES,
    contact_sheet,
    depth_image,
    from_pixels,
    image_size,
    is_latents,
    read_depth,
    read_images,
    to_pixels,
)

H, W = 16, 24


def picture(seed=0, height=H, width=W):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_array(images):
    return np.stack([np.asarray(image) for image in images])


PAIR = np.stack([picture(0), picture(1)])  # (2, H, W, 3)
FLOAT = PAIR.astype(np.float32) / 255
ONE = {
    "PIL": Image.fromarray(PAIR[0]),
    "HWC uint8": PAIR[0],
    "CHW uint8": np.moveaxis(PAIR[0], -1, 0),
    "HWC float": FLOAT[0],
    "HWC double": FLOAT[0].astype(np.float64),
    "HWC uint16": PAIR[0].astype(np.uint16) * 257,
    "HWC uint16, other bytes": (PAIR[0].astype(np.uint16) * 257).astype(">u2"),
    "CHW tensor": torch.from_numpy(FLOAT[0]).permute(2, 0, 1),
    "CHW tensor uint8": torch.from_numpy(PAIR[0]).permute(2, 0, 1),
    "HWC tensor": torch.from_numpy(PAIR[0]),
    "negative stride": PAIR[0, ::-1].copy()[::-1],
    "negative stride of floats": FLOAT[0, :, ::-1].copy()[:, ::-1],
}
TWO = {
    "PIL": [Image.fromarray(one) for one in PAIR],
    "NHWC": PAIR,
    "NCHW": np.moveaxis(PAIR, -1, 1),
    "NHWC float": FLOAT,
    "NCHW tensor": torch.from_numpy(FLOAT).permute(0, 3, 1, 2),
    "NCHW tensor uint8": torch.from_numpy(PAIR).permute(0, 3, 1, 2),
    "NHWC tensor": torch.from_numpy(FLOAT),
    "list of HWC": list(PAIR),
    "tuple of CHW tensors": tuple(torch.from_numpy(FLOAT).permute(0, 3, 1, 2)),
    "list of batches": [PAIR[:1], PAIR[1:]],
}


def normal(images):
    """(N, H, W, 3) uint8 of either form that `read_images` returns."""
    if isinstance(images, torch.Tensor):
        assert images.dtype == torch.float32 and images.shape[1] == 3
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert all(image.mode == "RGB" for image in images)
    return as_array(images)


@pytest.mark.parametrize("form", ONE)
def test_one_image_in_every_form(form):
    images = read_images(ONE[form])
    assert image_size(images) == (H, W)
    assert np.array_equal(normal(images), PAIR[:1])


@pytest.mark.parametrize("form", TWO)
def test_two_images_in_every_form(form):
    images = read_images(TWO[form])
    assert image_size(images) == (H, W)
    assert np.array_equal(normal(images), PAIR)


def test_range_from_minus_one(caplog):
    image = torch.from_numpy(FLOAT).permute(0, 3, 1, 2)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(normal(read_images(image * 2 - 1)), PAIR)
    assert "[-1, 1]" in caplog.text
    half = read_images(image.half())
    torch.testing.assert_close(half, image, atol=3e-4, rtol=0)  # half precision itself: observed 2.4e-4


def test_grey_forms():
    grey = PAIR[0, :, :, 0]
    expected = np.repeat(grey[None, :, :, None], 3, axis=-1)
    for image in (grey, grey[None], grey[..., None], torch.from_numpy(grey), Image.fromarray(grey), grey[None, None]):
        assert np.array_equal(normal(read_images(image)), expected)


def test_ambiguous_shapes():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(normal(read_images(cube))[0], cube), "an array has channels last"
    assert np.array_equal(normal(read_images(torch.from_numpy(cube)))[0], np.moveaxis(cube, 0, -1)), "a tensor first"
    flat = np.arange(9 * 5, dtype=np.uint8).reshape(1, 3, 5, 3)
    assert image_size(read_images(flat)) == (3, 5)
    assert image_size(read_images(torch.from_numpy(flat))) == (5, 3)
    assert image_size(read_images(torch.rand(3, 5, 9))) == (5, 9)
    assert image_size(read_images(np.zeros((5, 3), dtype=np.uint8))) == (5, 3)


RGB = (200, 30, 90)
MODES = {
    "RGB": (RGB, RGB),
    "RGBA": ((*RGB, 0), RGB),
    "L": (77, (77, 77, 77)),
    "LA": ((77, 10), (77, 77, 77)),
    "1": (1, (255, 255, 255)),
    "CMYK": ((55, 225, 165, 0), RGB),
    "I;16": (77 * 257, (77, 77, 77)),
    "I;16B": (77 * 257, (77, 77, 77)),
    "I": (77 * 257, (77, 77, 77)),
    "F": (0.5, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    colour, expected = MODES[mode]
    (image,) = read_images(Image.new(mode, (W, H), colour))
    assert (image.mode, image.size, image.getpixel((3, 2))) == ("RGB", (W, H), expected)


def test_deep_modes_choose_their_scale():
    assert read_images(Image.fromarray(np.array([[0, 128, 255]], np.int32)))[0].getpixel((1, 0)) == (128, 128, 128)
    assert read_images(Image.fromarray(np.array([[0, 32896, 65535]], np.int32)))[0].getpixel((1, 0)) == (128,) * 3
    assert read_images(Image.fromarray(np.array([[0, 128, 255]], np.float32)))[0].getpixel((1, 0)) == (128, 128, 128)
    assert read_images(Image.fromarray(np.array([[0, 200]], np.uint16)))[0].getpixel((1, 0)) == (1, 1, 1)


def test_palette_with_transparency():
    image = Image.fromarray(PAIR[0]).convert("P", palette=Image.Palette.ADAPTIVE)
    expected = np.asarray(image.convert("RGB"))
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(normal(read_images(image))[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """A file whose tag says how to turn it, turned as the EXIF standard defines each number."""
    stored, exif = Image.fromarray(PAIR[0]), Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](PAIR[0])
    assert np.array_equal(normal(read_images(Image.open(buffer)))[0], turned)
    depth = Image.fromarray(np.ascontiguousarray(PAIR[0, :, :, 0]))
    depth.save(buffer := io.BytesIO(), "PNG", exif=exif)
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(turned[:, :, 0])), np.float32)
    assert np.array_equal(read_depth(Image.open(buffer))[0].numpy(), expected)


def test_latents_are_recognised():
    assert is_latents(torch.zeros(2, 4, 8, 12))
    assert is_latents([torch.zeros(4, 8, 12)] * 2)
    for image in (
        torch.zeros(2, 3, 8, 12),
        torch.zeros(2, 4, 8, 12, dtype=torch.uint8),
        torch.zeros(4, 8, 12),
        np.zeros((1, 4, 8, 12), np.float32),
        [torch.zeros(4, 8, 12), torch.zeros(3, 8, 12)],
        [],
        Image.new("RGB", (8, 8)),
    ):
        assert not is_latents(image)


def test_resize_goes_down_to_the_multiple(caplog):
    image = Image.fromarray(picture(0, 70, 101))
    with caplog.at_level(logging.INFO, logger="depthdiff.image"):
        pixels = to_pixels(read_images(image))
    assert pixels.shape == (1, 3, 64, 96)
    assert "101x70" in caplog.text and "96x64" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="depthdiff.image"):
        assert to_pixels(read_images(ONE["PIL"])).shape == (1, 3, H, W)
    assert not caplog.text
    assert to_pixels(read_images(torch.rand(2, 3, 70, 101)), 32).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("form", TWO)
def test_pixels_and_back(form):
    pixels = to_pixels(read_images(TWO[form]))
    assert pixels.dtype == torch.float32 and pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(as_array(from_pixels(pixels)), PAIR)
    np.testing.assert_allclose(from_pixels(pixels, "np"), FLOAT, atol=6e-8, rtol=0)  # observed 1.5e-8
    assert np.array_equal(from_pixels(pixels, "pt").permute(0, 2, 3, 1).numpy(), from_pixels(pixels, "np"))


def test_output_clamps_and_survives_nan(caplog):
    pixels = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("nan")]).expand(1, 3, 2, 6)
    assert from_pixels(pixels)[0].getpixel((0, 0)) == (0, 0, 0)
    assert [from_pixels(pixels.half())[0].getpixel((x, 1))[0] for x in range(6)] == [0, 0, 128, 255, 255, 0]
    assert "NaN" in caplog.text
    assert from_pixels(pixels.bfloat16(), "np").dtype == np.float32


DEPTH = np.random.default_rng(3).integers(0, 65536, (2, H, W), dtype=np.uint16)
BYTES = (DEPTH // 257).astype(np.uint8)
DEPTHS = {
    "HW": (DEPTH[0], DEPTH[:1]),
    "NHW": (DEPTH, DEPTH),
    "HW1": (DEPTH[0][..., None], DEPTH[:1]),
    "N1HW": (DEPTH[:, None], DEPTH),
    "NHW1": (DEPTH[..., None], DEPTH),
    "1HW": (DEPTH[:1], DEPTH[:1]),
    "list of HW": (list(DEPTH), DEPTH),
    "list of 1HW": ([DEPTH[:1], DEPTH[1:]], DEPTH),
    "float": (DEPTH / 7.0, DEPTH / 7.0),
    "negative integers": (-DEPTH.astype(np.int64), -DEPTH.astype(np.int64)),
    "tensor": (torch.from_numpy(BYTES), BYTES),
    "tensor N1HW half": (torch.from_numpy(BYTES)[:, None].half(), BYTES),
    "list of tensors": (list(torch.from_numpy(BYTES)), BYTES),
    "PIL 16 bit": (Image.fromarray(DEPTH[0]), DEPTH[:1]),
    "PIL I": (Image.fromarray(DEPTH[0].astype(np.int32)), DEPTH[:1]),
    "PIL F": (Image.fromarray(DEPTH[0] / np.float32(7)), DEPTH[:1] / np.float32(7)),
    "PIL 8 bit": ([Image.fromarray(one) for one in BYTES], BYTES),
    "PIL grey as RGB": (Image.fromarray(BYTES[0]).convert("RGB"), BYTES[:1]),
    "PIL grey as RGBA": (Image.fromarray(BYTES[0]).convert("RGBA"), BYTES[:1]),
    "PIL LA": (Image.fromarray(BYTES[0]).convert("LA"), BYTES[:1]),
    "small, four maps": (DEPTH[:, :2, :3], DEPTH[:, :2, :3]),
}


@pytest.mark.parametrize("form", DEPTHS)
def test_depth_in_every_form(form):
    given, expected = DEPTHS[form]
    depth = read_depth(given)
    assert depth.dtype == torch.float32 and depth.ndim == 3
    assert np.array_equal(depth.numpy(), expected.astype(np.float32))


def test_depth_image():
    disparity = torch.linspace(-3, 5, H * W).reshape(H, W)
    deep, preview = depth_image(disparity), depth_image(disparity[None], bits=8)
    assert (deep.mode, deep.size, preview.mode, preview.size) == ("I;16", (W, H), "L", (W, H))
    back = read_depth(deep)[0] / 65535 * 8 - 3
    torch.testing.assert_close(back, disparity, atol=8 / 65535 / 2 * 1.01, rtol=0)  # half a step of 16 bits
    assert preview.getextrema() == (0, 255)
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    assert np.array_equal(read_depth(Image.open(buffer)), read_depth(deep))
    assert depth_image(torch.full((H, W), 3.0)).getextrema() == (0, 0)


def test_contact_sheet():
    images = [Image.fromarray(PAIR[0]), depth_image(torch.rand(2 * H, W)), Image.new("L", (W, H // 2), 0)]
    sheet = contact_sheet(images)
    assert sheet.size == (8 * 4 + W + W // 2 + 2 * W, H + 16)
    assert np.array_equal(np.asarray(sheet)[8:-8, 8 : 8 + W], PAIR[0])
    assert sheet.getpixel((0, 0)) == (255, 255, 255) and sheet.getpixel((sheet.width - 9, 10)) == (0, 0, 0)
    labelled = contact_sheet(images, ["input", "depth", "Ergebnis ß"])
    assert labelled.size == (sheet.width, sheet.height + 24)
    assert (np.asarray(labelled)[H + 8 :] < 128).any()


def broken_file():
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:3000]))


NAN = np.full((H, W, 3), np.nan, np.float32)
WRONG_IMAGES = {
    "None": (None, TypeError, "got NoneType"),
    "a path": ("photo.png", TypeError, r"got str; open files with PIL\.Image\.open"),
    "a list of paths": (["a.png", "b.png"], TypeError, r"PIL\.Image\.open"),
    "an empty list": ([], ValueError, "at least one image"),
    "mixed kinds": ([Image.new("RGB", (8, 8)), PAIR[0]], TypeError, "got Image, ndarray"),
    "mixed dtypes": ([PAIR[0], FLOAT[0]], TypeError, "got float32 and uint8"),
    "mixed sizes of PIL": ([Image.new("RGB", (8, 9)), Image.new("RGB", (9, 8))], ValueError, "8x9, 9x8; resize"),
    "mixed sizes of arrays": ([PAIR[0], PAIR[0, :8]], ValueError, "24x16, 24x8; resize"),
    "integers": (PAIR.astype(np.int64), TypeError, r"uint8 \(0\.\.255\).* got int64"),
    "booleans": (PAIR > 3, TypeError, "got bool"),
    "objects": (np.array([[None]]), TypeError, "got object"),
    "complex": (torch.zeros(3, 8, 8, dtype=torch.complex64), TypeError, "got complex64"),
    "two channels": (PAIR[..., :2], ValueError, r"got \(2, 16, 24, 2\)"),
    "four channels": (np.zeros((H, W, 4), np.uint8), ValueError, r"\[\.\.\., :3\]"),
    "one dimension": (np.zeros(8, np.uint8), ValueError, r"got \(8,\)"),
    "five dimensions": (PAIR[None], ValueError, r"got \(1, 2, 16, 24, 3\)"),
    "no height": (np.zeros((0, 8, 3), np.uint8), ValueError, "nothing empty"),
    "no images": (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "nothing empty"),
    "no width of PIL": (Image.new("RGB", (0, 8)), ValueError, "got 0x8"),
    "floats of 0..255": (FLOAT * 255, ValueError, r"got 0 to 255; divide by 255"),
    "below -1": (FLOAT - 2, ValueError, "got -2 to"),
    "NaN": (NAN, ValueError, "finite"),
    "infinity": (np.where(FLOAT > 0.5, np.inf, FLOAT), ValueError, "finite"),
    "minus infinity": (torch.full((3, 8, 8), -torch.inf), ValueError, "finite"),
    "NaN in PIL": (Image.fromarray(NAN[..., 0]), ValueError, "mode F must be in"),
    "negative PIL": (Image.fromarray(np.array([[-5]], np.int32)), ValueError, "mode I must be in .* got -5"),
    "too large PIL": (Image.fromarray(np.array([[70000]], np.int32)), ValueError, "70000"),
    "truncated file": (broken_file(), ValueError, "decoded"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images(case):
    image, error, message = WRONG_IMAGES[case]
    with pytest.raises(error, match=message) as caught:
        read_images(image)
    assert str(caught.value).startswith("image ")


WRONG_DEPTHS = {
    "None": (None, TypeError, "got NoneType"),
    "an empty list": ([], ValueError, "at least one"),
    "mixed kinds": ([DEPTH[0], torch.zeros(H, W)], TypeError, "got Tensor, ndarray"),
    "mixed sizes": ([DEPTH[0], DEPTH[0, :4]], ValueError, "24x16, 24x4"),
    "text": (np.array([["a"]]), TypeError, "real numbers"),
    "complex": (torch.zeros(8, 8, dtype=torch.complex64), TypeError, "real numbers"),
    "one dimension": (DEPTH[0, 0], ValueError, r"got \(24,\)"),
    "three channels": (PAIR[0], ValueError, r"got \(16, 24, 3\); of a colour image pass one channel"),
    "a batch of three channels": (PAIR, ValueError, r"got \(2, 16, 24, 3\)"),
    "five dimensions": (DEPTH[None, None, None], ValueError, "must be"),
    "nothing": (DEPTH[:, :0], ValueError, "nothing empty"),
    "NaN": (np.where(DEPTH > 9, np.nan, DEPTH), ValueError, "finite"),
    "infinity": (torch.full((H, W), torch.inf), ValueError, "finite"),
    "beyond float32": (np.full((H, W), 1e300), ValueError, "finite in float32"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", WRONG_DEPTHS)
def test_wrong_depths(case):
    depth, error, message = WRONG_DEPTHS[case]
    with pytest.raises(error, match=message) as caught:
        read_depth(depth)
    assert str(caught.value).startswith("depth_map ")


def test_other_wrong_calls():
    with pytest.raises(ValueError, match="at least 8x8 pixels, got 7x9"):
        to_pixels(read_images(Image.new("RGB", (7, 9))))
    with pytest.raises(ValueError, match="pil, np, pt, got 'numpy'"):
        from_pixels(torch.zeros(1, 3, 8, 8), "numpy")
    with pytest.raises(ValueError, match="one map, got 2"):
        depth_image(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="got 0 and 0"):
        contact_sheet([])
    with pytest.raises(ValueError, match="got 1 and 2"):
        contact_sheet([Image.new("RGB", (8, 8))], ["a", "b"])
    assert OUTPUT_TYPES == ("pil", "np", "pt")


def test_inputs_stay_as_they_are():
    for images in (PAIR.copy(), FLOAT.copy(), torch.from_numpy(FLOAT.copy()).permute(0, 3, 1, 2)):
        before = images.copy() if isinstance(images, np.ndarray) else images.clone()
        to_pixels(read_images(images)).add_(5)
        read_depth(images[..., 0]).add_(5)
        assert (images == before).all()
