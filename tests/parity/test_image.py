"""Images in and out beside diffusers' VaeImageProcessor: equal bit for bit, where that one works."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image, make_image_grid
from PIL import Image

from depthdiff import utils
from depthdiff.image import from_pixels, read_images, to_pixels

SIZES = [(70, 101), (64, 96), (8, 8), (9, 200), (131, 47)]


@pytest.fixture
def reference():
    return VaeImageProcessor(vae_scale_factor=8)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("height, width", SIZES)
def test_pil(reference, height, width):
    images = [Image.fromarray(picture(height, width, seed)) for seed in range(2)]
    for image in (images, images[:1], images[0]):
        expected = reference.preprocess(image)
        pixels = to_pixels(read_images(image))
        assert torch.equal(pixels, expected)
        assert pixels.stride() == expected.stride(), "the layout chooses the kernel of the first convolution"


@pytest.mark.parametrize("factor", [4, 16, 64])
def test_other_multiples(factor):
    image = Image.fromarray(picture(70, 101))
    expected = VaeImageProcessor(vae_scale_factor=factor).preprocess(image)
    assert torch.equal(to_pixels(read_images(image), factor), expected)


@pytest.mark.parametrize("height, width", SIZES)
def test_tensors_and_arrays(reference, height, width):
    array = np.stack([picture(height, width, seed) for seed in range(2)]).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for image in (array, list(array), tensor, list(tensor), [tensor, tensor]):
        assert torch.equal(to_pixels(read_images(image)), reference.preprocess(image))


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor with value range")
def test_tensors_from_minus_one(reference):
    tensor = torch.randn(2, 3, 70, 101, generator=torch.Generator().manual_seed(0)).tanh()
    difference = to_pixels(read_images(tensor)) - reference.preprocess(tensor)
    assert difference.abs().max() <= 1.2e-7  # observed 6.0e-8: [-1, 1] -> [0, 1] -> [-1, 1] rounds twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output(reference, dtype):
    pixels = (torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected, ours = reference.postprocess(pixels, "pt"), from_pixels(pixels, "pt")
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    expected, ours = reference.postprocess(pixels, "np"), from_pixels(pixels, "np")
    assert ours.dtype == expected.dtype and np.array_equal(ours, expected)
    expected, ours = reference.postprocess(pixels), from_pixels(pixels)
    assert [one.mode for one in ours] == [one.mode for one in expected] == ["RGB", "RGB"]
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "1", "YCbCr", "HSV"])
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_modes_as_load_image_has_them(reference, tmp_path, mode, orientation):
    image = Image.fromarray(picture(40, 24)).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    expected = load_image(image)
    assert expected.size == ((24, 40) if orientation in (None, 3) else (40, 24))
    assert torch.equal(to_pixels(read_images(image)), reference.preprocess(expected))


@pytest.mark.parametrize("mode, kind", [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpeg")])
def test_load_image(tmp_path, mode, kind):
    """A file, an address, an open picture, and a conversion of one's own."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(40, 24)).convert(mode).save(tmp_path / f"x.{kind}", exif=exif)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.{kind}"
        for source in (str(tmp_path / f"x.{kind}"), address, Image.open(tmp_path / f"x.{kind}")):
            ours, theirs = utils.load_image(source), load_image(source)
            assert ours.mode == "RGB" and ours.size == (40, 24)
            assert np.array_equal(ours, theirs)
            ours, theirs = (load(source, lambda one: one.convert("L")) for load in (utils.load_image, load_image))
            assert ours.mode == "L" and np.array_equal(ours, theirs)
        server.shutdown()


def test_what_is_not_an_image_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match="picture that Pillow reads"):
        utils.load_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        utils.load_image("absent.png")
    with pytest.raises(TypeError, match="path, a web address or a PIL image"):
        utils.load_image(3)


@pytest.mark.parametrize("resize", [None, 16])
def test_grids(resize):
    images = [Image.fromarray(picture(40, 24)).rotate(90 * turn) for turn in range(6)]
    grids = [make(images, 2, 3, resize) for make in (utils.make_image_grid, make_image_grid)]
    assert np.array_equal(*grids)
    with pytest.raises(ValueError, match=r"images must be rows \* cols, 2 \* 2, got 6"):
        utils.make_image_grid(images, 2, 2)
