"""What only a CUDA device can show; skipped where there is none. `pytest -m gpu` runs these and their kin elsewhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from depthdiff import fast
from depthdiff.fast.calls import find
from depthdiff.fast.cuda_graphs import CUDAGraphRunner, record

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)


def paint(pipe, image, prompt="two tigers", **options):
    options = {"num_inference_steps": 8, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, image, output_type="np", **options).images


def runner_of(pipe):
    return find(pipe.unet, CUDAGraphRunner)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_captured_equals_plain(pipe, small_photo, dtype):
    """For several kinds of input in turn, and with weights written in place, moved and cast."""
    pipe.to("cuda", dtype)
    kinds = [{}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0, "prompt": "a cup"}, {"num_images_per_prompt": 2}]
    expected = [paint(pipe, small_photo, **kind) for kind in kinds]
    fast.capture(pipe)
    for _ in range(2):
        for kind, picture in zip(kinds, expected, strict=True):
            np.testing.assert_allclose(paint(pipe, small_photo, **kind), picture, atol=1e-3)
            assert runner_of(pipe).reason is None
    assert len(runner_of(pipe).graphs) == 3
    pipe.to("cpu")
    pipe.to("cuda")
    np.testing.assert_allclose(paint(pipe, small_photo), expected[0], atol=1e-3)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    other = paint(pipe, small_photo)
    fast.release(pipe)
    np.testing.assert_allclose(other, paint(pipe, small_photo), atol=1e-3)
    assert np.abs(other - expected[0]).max() > 1e-2


def test_fast_computations_leave_a_gpu_alone(pipe, small_photo):
    """They are for CPUs: pictures are the same to the bit."""
    pipe.to("cuda")
    expected = paint(pipe, small_photo)
    fast.disable(pipe)
    assert np.array_equal(paint(pipe, small_photo), expected)


def test_a_capture_that_fails_leaves_the_present_stream():
    """The UNet runs on it without a graph then, after what came before."""
    x, present = torch.ones(3, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(present):
        with pytest.raises(RuntimeError):
            record(lambda: x * x.sum().item(), x.device)
        assert torch.cuda.current_stream() == present
    assert (x + 1).tolist() == [2, 2, 2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_on_two_devices():
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        x = torch.ones(3, device=device)
        replay, output = record(lambda x=x: 2 * x, device)
        x.fill_(5)
        replay()
        assert output.tolist() == [10, 10, 10]


@pytest.mark.parametrize("form", ["sdpa", "efficient", "sliced", "math"])
def test_every_form_of_attention_is_captured(pipe, small_photo, form):
    pipe.to("cuda")
    pipe.set_attention(form)
    expected = paint(pipe, small_photo)
    fast.capture(pipe)
    np.testing.assert_allclose(paint(pipe, small_photo), expected, atol=1e-3)
    assert runner_of(pipe).reason is None


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_falls_back(pipe, small_photo, how):
    expected = paint(pipe, small_photo)
    fast.capture(pipe)
    getattr(pipe, how)()
    assert np.abs(paint(pipe, small_photo) - expected).max() < 5e-3
    assert runner_of(pipe).reason is not None


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_is_close_to_plain(pipe, small_photo, mode, capture):
    """Without guidance the solver keeps what the UNet returned, also where the compiler's graphs reuse its memory."""
    pipe.to("cuda")
    scales = (7.5, 1.0)
    expected = [paint(pipe, small_photo, guidance_scale=scale) for scale in scales]
    fast.compile(pipe, mode)
    if capture:
        fast.capture(pipe)
    for _ in range(2):
        for scale, picture in zip(scales, expected, strict=True):
            assert np.abs(paint(pipe, small_photo, guidance_scale=scale) - picture).max() < 5e-3
    if capture:
        assert (runner_of(pipe).reason is None) == (mode is None)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("head_dim", "backend"),
    [(64, SDPBackend.FLASH_ATTENTION), (64, SDPBackend.CUDNN_ATTENTION), (512, SDPBackend.EFFICIENT_ATTENTION)],
)
def test_kernels_that_torch_may_choose(dtype, head_dim, backend):
    """Each can do its shape: forced, it gives the definition's numbers."""
    heads = 5 if head_dim == 64 else 1
    q, k, v = (torch.randn(2, 1024, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    if backend == SDPBackend.CUDNN_ATTENTION and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN's attention needs compute capability 8.0")
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
    exact = (q.float() @ k.float().mT / head_dim**0.5).softmax(-1) @ v.float()
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
