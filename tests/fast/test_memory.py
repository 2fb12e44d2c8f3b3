"""Pages of a file are given back once they are copied, nothing that was written is lost; large pages; layouts."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import GEOMETRIES, build_pipeline

from depthdiff import AutoencoderKL, UNet2DConditionModel, fast
from depthdiff.checkpoint import weights as pages
from depthdiff.checkpoint.weights import OF_FILE, PAGEMAP, PRESENT, give_back_unwritten, whole_pages
from depthdiff.fast import memory
from depthdiff.fast.memory import advise_hugepage

needs_pagemap = pytest.mark.skipif(not PAGEMAP.exists(), reason="the system does not tell which pages are written")
COUNT = 16 * mmap.PAGESIZE


def present(tensor):
    """Count the whole pages of a tensor that lie in memory, and those of them that are a file's."""
    first, count = whole_pages(tensor)
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * count), np.uint64)
    here = (entries & PRESENT) > 0
    return int(here.sum()), int((here & ((entries & OF_FILE) > 0)).sum())


@pytest.fixture
def mapped(tmp_path):
    """A tensor that is a file's own pages, all of them read."""
    path = tmp_path / "numbers"
    np.arange(COUNT, dtype=np.uint8).tofile(path)
    tensor = torch.from_file(str(path), shared=False, size=COUNT, dtype=torch.uint8)
    tensor.sum()
    return tensor


@needs_pagemap
def test_unwritten_pages_are_given_back_and_can_be_read_again(mapped):
    before = mapped.clone()
    assert present(mapped) == (16, 16)
    assert give_back_unwritten(mapped)
    assert present(mapped) == (0, 0)
    assert torch.equal(mapped, before)


@needs_pagemap
@pytest.mark.parametrize("place", [0, 5 * mmap.PAGESIZE + 7, COUNT - 1])
def test_one_written_byte_keeps_all(mapped, place):
    mapped[place] = 200 if mapped[place] != 200 else 201
    before = mapped.clone()
    assert not give_back_unwritten(mapped)
    assert present(mapped)[0] == 16
    assert torch.equal(mapped, before)


@needs_pagemap
def test_other_memory_is_kept(mapped):
    own = torch.arange(COUNT, dtype=torch.int32)
    assert not give_back_unwritten(own)
    assert torch.equal(own, torch.arange(COUNT, dtype=torch.int32))
    assert not give_back_unwritten(mapped[:7])
    assert not give_back_unwritten(torch.empty(COUNT, device="meta"))


@needs_pagemap
def test_a_system_that_does_not_tell(mapped, tmp_path, monkeypatch):
    """No such file, or one that may not be opened."""
    for path in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr(pages, "PAGEMAP", path)
        assert not give_back_unwritten(mapped)
    assert present(mapped)[0] == 16


@needs_pagemap
def test_convolutions_laid_out_anew_count_once(tmp_path):
    """The file's pages of a weight are gone; where it was written to, another name for it keeps what was written."""
    build_pipeline("small").unet.to(torch.bfloat16).save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    convs = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3)]
    names = [layer.weight.data for layer in convs]
    expected = [name.clone() for name in names]
    large = [i for i, name in enumerate(names) if whole_pages(name)[1] >= 4]
    written, *others = large
    assert len(others) >= 4
    assert all(present(names[i])[1] == whole_pages(names[i])[1] for i in large), "loading maps the file"
    names[written].mul_(2)
    fast.lay_out(unet)
    left = sum(present(names[i])[0] for i in others)
    assert left < sum(whole_pages(names[i])[1] for i in others) / 5, "more than the system reads around other weights"
    assert torch.equal(convs[written].weight.data, 2 * expected[written])
    assert torch.equal(names[written], 2 * expected[written])
    for i in others:
        assert torch.equal(convs[i].weight.data, expected[i])
        assert torch.equal(names[i], expected[i]), "read again from the file"


def flags_of(tensor):
    """List the system's flags of the memory that a tensor's middle lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= tensor.data_ptr() + tensor.nbytes // 2 < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("the memory is not listed")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not list its memory")
def test_large_pages():
    """Memory asked for in large pages is marked so ("hg") where the system has them, and holds what is written."""
    plain, room = torch.empty(2**25, dtype=torch.uint8), advise_hugepage(torch.empty(2**25, dtype=torch.uint8))
    room.copy_(torch.arange(2**25).to(torch.uint8))
    assert torch.equal(room[::251], torch.arange(0, 2**25, 251).to(torch.uint8))
    assert "hg" not in flags_of(plain)
    assert ("hg" in flags_of(room)) == Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_large_pages_of_what_is_large_and_here(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "advise", lambda tensor, advice: asked.append((tensor.nbytes, advice)))
    for tensor in (torch.empty(2**25 - 1, dtype=torch.uint8), torch.empty(2**25, dtype=torch.uint8, device="meta")):
        assert advise_hugepage(tensor) is tensor
    assert not asked
    advise_hugepage(torch.empty(2**23))
    assert asked == [(2**25, "MADV_HUGEPAGE")]


@needs_pagemap
def test_advice_that_the_system_does_not_know(mapped):
    before = mapped.clone()
    pages.advise(mapped, "MADV_OF_ANOTHER_SYSTEM")
    assert present(mapped) == (16, 16) and torch.equal(mapped, before)


# The order of weights in memory


@pytest.fixture
def vae():
    return AutoencoderKL.from_config(GEOMETRIES["tiny"]["vae"]).eval()


def is_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_convolutions_are_laid_out(dtype, vae):
    """In half precision all; in float32 on a CPU the first ones, whose layout results and what follows have."""
    vae.to(dtype)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in vae.named_parameters()}
    fast.lay_out(vae)
    convs = {name: layer for name, layer in vae.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    pixelwise = {name for name, layer in convs.items() if layer.kernel_size == (1, 1)}  # both layouts are the same
    first = {name for name, layer in convs.items() if layer.in_channels <= 8} - pixelwise
    assert {name for name, layer in convs.items() if is_last(layer.weight)} == (
        set(convs) if dtype == torch.bfloat16 else first | pixelwise
    )
    moved = {name for name, weight in vae.named_parameters() if weight.data_ptr() != before[name][0]}
    if dtype == torch.float32:
        assert moved == {f"{name}.weight" for name in first}
    assert all(torch.equal(weight, before[name][1]) for name, weight in vae.named_parameters())
    x = vae.decoder.mid_block(vae.decoder.conv_in(torch.randn(1, 4, 6, 9, dtype=dtype)))
    assert is_last(x) and not x.is_contiguous()


def test_a_layout_chosen_in_inference_mode_can_be_trained(vae):
    with torch.inference_mode():
        fast.lay_out(vae)
        vae.encode(torch.rand(1, 3, 32, 48))
    vae.encode(torch.rand(1, 3, 32, 48)).latent_dist.mean.sum().backward()
    assert vae.encoder.conv_in.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_layout_of_another_device(dtype, vae):
    """Weights that only wait on the CPU for a GPU keep their layout; in float32 they get it back."""
    vae.to(dtype)
    plain = {name: weight.stride() for name, weight in vae.named_parameters()}
    fast.lay_out(vae, torch.device("cuda"))
    assert plain == {name: weight.stride() for name, weight in vae.named_parameters()}
    if dtype == torch.float32:
        fast.lay_out(vae)
        assert is_last(vae.encoder.conv_in.weight)
        fast.lay_out(vae, torch.device("cuda"))
    assert plain == {name: weight.stride() for name, weight in vae.named_parameters()}
    vae.to(memory_format=torch.channels_last)
    fast.lay_out(vae, torch.device("cuda"))
    assert is_last(vae.encoder.conv_in.weight), "a layout that the user chose for all stays"
