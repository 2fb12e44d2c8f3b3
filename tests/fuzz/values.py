"""Values that no argument expects, made when they are asked for: one that was changed must not meet another case."""

import decimal
import fractions
import io
import pathlib
import struct
import zlib
from functools import partial

import numpy as np
import torch
from PIL import Image


def png(width=24, height=16, mode="RGB"):
    """Return the bytes of a picture."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def opened(data):
    """Open a picture without decoding it; a whole one where the damage shows at once."""
    try:
        return Image.open(io.BytesIO(data))
    except Exception:
        return Image.open(io.BytesIO(png()))


def damaged(kind="PNG", seed=0, cut=False):
    """Return a picture, opened but not decoded, whose file is cut off or has a few bytes changed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    picture = Image.fromarray(pixels)
    (picture.convert("P") if kind == "GIF" else picture).save(file, kind)
    data = bytearray(file.getvalue())
    if cut:
        data = data[: int(rng.integers(len(data) // 2, len(data)))]
    else:
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(20, len(data)))] = int(rng.integers(256))
    return opened(bytes(data))


def chunk(name, content):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(name, content):
    """Return a lazily opened PNG with one more chunk before its pixels."""
    data = png()
    place = data.index(b"IDAT") - 4
    return opened(data[:place] + chunk(name, content) + data[place:])


def broken_chunk():
    """Return a lazily opened PNG, a chunk of which after the pixels is no chunk."""
    data = png()
    place = data.index(b"IEND") - 4
    return opened(data[:place] + b"\0\0\0\4\1\2\3\4abcdefgh" + data[place:])


def closed():
    """Return a picture that was closed before it was decoded."""
    image = Image.open(io.BytesIO(png()))
    image.close()
    return image


def behind_a_closed_file():
    """Return a picture whose file was closed before it was decoded."""
    file = io.BytesIO(png())
    image = Image.open(file)
    file.close()
    return image


def bomb():
    """Return a lazily opened picture that claims more pixels than its file has."""
    image = Image.open(io.BytesIO(png()))
    image._size = (64, 48)
    return image


class Odd:
    """An object that knows nothing."""

    def __init__(self, *arguments):
        pass


class Liar(dict):
    """A mapping that holds something else than it says."""

    def keys(self):
        return [object()]


def endless():
    """Yield for ever."""
    while True:
        yield 0


def quantized():
    """Return a quantised tensor."""
    return torch.quantize_per_tensor(torch.rand(1, 3, 16, 24), 0.1, 0, torch.quint8)


ODD = {
    "none": lambda: None,
    "true": lambda: True,
    "false": lambda: False,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "two": lambda: 2,
    "five": lambda: 5,
    "half": lambda: 0.5,
    "minus half": lambda: -0.5,
    "seven and a half": lambda: 7.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus inf": lambda: float("-inf"),
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "-10**400": lambda: -(10**400),
    "1e300": lambda: 1e300,
    "million": lambda: 10**6,
    "complex": lambda: 1j,
    "fraction": lambda: fractions.Fraction(1, 2),
    "decimal": lambda: decimal.Decimal("0.5"),
    "empty text": lambda: "",
    "text": lambda: "abc",
    "number as text": lambda: "3",
    "nul text": lambda: "a\0b",
    "half a surrogate": lambda: "\ud800",
    "long text": lambda: "word " * 5000,
    "path-like text": lambda: "../x",
    "bytes": lambda: b"abc",
    "path": lambda: pathlib.Path("nowhere"),
    "list": lambda: [],
    "tuple": lambda: (),
    "dict": lambda: {},
    "set": lambda: {1, 2},
    "range": lambda: range(3),
    "list of none": lambda: [None],
    "list of ints": lambda: [1, 2],
    "list of texts": lambda: ["a", "b"],
    "list of a list": lambda: [[]],
    "list of mixed": lambda: [Image.new("RGB", (24, 16)), torch.rand(3, 16, 24), "x"],
    "list of arrays": lambda: [np.zeros(3), np.zeros(2)],
    "list of nan": lambda: [float("nan")] * 2,
    "pair of huge": lambda: (10**400, 10**400),
    "dict of int": lambda: {1: 2},
    "dict of mixed keys": lambda: {1: 2, "a": 3, None: 4},
    "dict of scale": lambda: {"scale": "x"},
    "dict of arrays": lambda: {"scale": np.zeros(3)},
    "dict of latents": lambda: {"latents": 5, "prompt_embeds": None, "depth_mask": "x"},
    "lying dict": lambda: Liar(scale=1),
    "generator function": lambda: endless(),
    "object": lambda: Odd(),
    "class": lambda: Odd,
    "function": lambda: Odd.__init__,
    "module": lambda: torch,
    "exception": lambda: ValueError("x"),
    "ellipsis": lambda: ...,
    "np int": lambda: np.int64(2),
    "np float": lambda: np.float32(0.5),
    "np bool": lambda: np.bool_(True),
    "np nan": lambda: np.float64("nan"),
    "np text": lambda: np.str_("abc"),
    "np complex": lambda: np.complex64(1j),
    "np datetime": lambda: np.datetime64("2020-01-01"),
    "0-d array": lambda: np.array(1),
    "0-d float array": lambda: np.array(0.5),
    "0-d object array": lambda: np.array(None),
    "1-d array": lambda: np.zeros(1),
    "2-d array": lambda: np.zeros((2, 3)),
    "empty array": lambda: np.zeros(0),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "array of texts": lambda: np.array(["a", "b"]),
    "array of records": lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
    "array of nan": lambda: np.full((16, 24), np.nan),
    "big-endian array": lambda: np.zeros((16, 24, 3), dtype=">f4"),
    "masked array": lambda: np.ma.masked_array(np.zeros((16, 24)), mask=True),
    "long double array": lambda: np.zeros((16, 24), dtype=np.longdouble),
    "0-d tensor": lambda: torch.tensor(1),
    "0-d float tensor": lambda: torch.tensor(0.5),
    "0-d bool tensor": lambda: torch.tensor(True),
    "0-d nan tensor": lambda: torch.tensor(float("nan")),
    "0-d complex tensor": lambda: torch.tensor(1j),
    "0-d meta tensor": lambda: torch.tensor(1.0, device="meta"),
    "1-d tensor": lambda: torch.zeros(1),
    "empty tensor": lambda: torch.zeros(0),
    "no rows": lambda: torch.zeros(0, 3, 16, 24),
    "6-d tensor": lambda: torch.zeros(1, 1, 1, 1, 1, 1),
    "image tensor": lambda: torch.rand(1, 3, 16, 24),
    "meta tensor": lambda: torch.rand(1, 3, 16, 24, device="meta"),
    "meta latents": lambda: torch.rand(1, 4, 2, 3, device="meta"),
    "meta embeds": lambda: torch.rand(1, 77, 40, device="meta"),
    "sparse tensor": lambda: torch.rand(1, 3, 16, 24).to_sparse(),
    "sparse latents": lambda: torch.rand(1, 4, 2, 3).to_sparse(),
    "sparse embeds": lambda: torch.rand(1, 77, 40).to_sparse(),
    "csr tensor": lambda: torch.eye(16).to_sparse_csr(),
    "quantised tensor": quantized,
    "complex tensor": lambda: torch.rand(1, 3, 16, 24) * 1j,
    "bool tensor": lambda: torch.ones(1, 3, 16, 24, dtype=torch.bool),
    "float8 tensor": lambda: torch.rand(1, 3, 16, 24).to(torch.float8_e4m3fn),
    "float8 latents": lambda: torch.rand(1, 4, 2, 3).to(torch.float8_e4m3fn),
    "float8 embeds": lambda: torch.rand(1, 77, 40).to(torch.float8_e5m2),
    "uint16 tensor": lambda: torch.ones(1, 3, 16, 24, dtype=torch.uint16),
    "nan tensor": lambda: torch.full((1, 3, 16, 24), torch.nan),
    "huge tensor": lambda: torch.full((1, 3, 16, 24), 1e38),
    "both ends": lambda: torch.tensor([[3e38, -3e38]] * 8).repeat(1, 4),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.rand(3, 2), torch.rand(4, 2)]),
    "latents": lambda: torch.randn(1, 4, 2, 3),
    "small latents": lambda: torch.randn(1, 4, 1, 1),
    "no latents": lambda: torch.randn(1, 4, 0, 3),
    "embeds": lambda: torch.randn(1, 77, 40),
    "short embeds": lambda: torch.randn(1, 5, 40),
    "no tokens": lambda: torch.randn(1, 0, 40),
    "two embeds": lambda: torch.randn(2, 77, 40),
    "narrow embeds": lambda: torch.randn(1, 77, 39),
    "half embeds": lambda: torch.randn(1, 77, 40).half(),
    "huge embeds": lambda: torch.full((1, 77, 40), 1e38),
    "list of latents": lambda: [torch.randn(4, 2, 3), torch.randn(4, 3, 3)],
    "list of meta latents": lambda: [torch.randn(4, 2, 3, device="meta")],
    "tuple of latents": lambda: (torch.randn(4, 2, 3),),
    "mixed latents": lambda: [torch.randn(4, 2, 3), torch.randn(4, 2, 3).double()],
    "parameter": lambda: torch.nn.Parameter(torch.rand(1, 3, 16, 24)),
    "layer": lambda: torch.nn.Linear(2, 2),
    "generator": lambda: torch.Generator(),
    "generators": lambda: [torch.Generator(), torch.Generator()],
    "generators and none": lambda: [torch.Generator(), None],
    "empty dtype": lambda: torch.int8,
    "float8": lambda: torch.float8_e4m3fn,
    "complex dtype": lambda: torch.complex64,
    "dtype": lambda: torch.float32,
    "meta device": lambda: torch.device("meta"),
    "device": lambda: torch.device("cpu"),
    "cuda": lambda: "cuda",
    "cuda 99": lambda: "cuda:99",
    "picture": lambda: Image.new("RGB", (24, 16), "red"),
    "one pixel": lambda: Image.new("RGB", (1, 1)),
    "no pixel": lambda: Image.new("RGB", (0, 16)),
    "thin picture": lambda: Image.new("L", (8, 300)),
    "float picture": lambda: Image.fromarray(np.full((16, 24), np.nan, dtype=np.float32)),
    "deep picture": lambda: Image.new("I", (24, 16), 2**30),
    "lab picture": lambda: Image.new("LAB", (24, 16)),
    "palette picture": lambda: Image.new("P", (24, 16)),
    "cut png": lambda: damaged("PNG", 1, cut=True),
    "cut jpeg": lambda: damaged("JPEG", 1, cut=True),
    "cut gif": lambda: damaged("GIF", 2, cut=True),
    "bad tiff": lambda: damaged("TIFF", 3),
    "bad webp": lambda: damaged("WEBP", 4),
    "bad gif": lambda: damaged("GIF", 5),
    **{
        f"bad {kind} {seed}": partial(damaged, kind, seed)
        for kind in ("PNG", "TIFF", "TGA", "PCX")
        for seed in range(3)
    },
    "bad exif": lambda: with_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\xff\xff\xff\xff\xff\xff"),
    "bad transparency": lambda: with_chunk(b"tRNS", b"\1"),
    "bad colours": lambda: with_chunk(b"iCCP", b"name\0\0" + b"broken"),
    "bad text": lambda: with_chunk(b"zTXt", b"name\0\0" + b"broken"),
    "broken chunk": broken_chunk,
    "closed picture": closed,
    "picture of a closed file": behind_a_closed_file,
    "bomb": bomb,
    "list of damaged": lambda: [damaged("PNG", 7, cut=True)] * 2,
}
"""Name -> what makes the value."""
