"""The program of docs/serving.md, called without a network and over a real one. Needs depthdiff[field]."""

import asyncio
import importlib
import importlib.util
import io
import os
import random
import socket
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

from depthdiff import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from tests.test_state import lora as adapter

MISSING = [name for name in ("fastapi", "httpx", "uvicorn", "multipart") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("CI") == "true":
    raise ImportError(f"CI must run the server, but {', '.join(MISSING)} is missing")
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} is missing", allow_module_level=True)

httpx, uvicorn = importlib.import_module("httpx"), importlib.import_module("uvicorn")
ROOT = Path(__file__).parents[1]
SCHEDULERS = {"ddim": DDIMScheduler, "lms": LMSDiscreteScheduler, "pndm": PNDMScheduler}


def program(**limits):
    """Import examples/serve.py afresh, and change its limits."""
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(limits)
    return module


def painter():
    pipe = build_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter(pipe, strength=1.0), "style")
    return pipe


def png(picture, kind="PNG"):
    picture.save(file := io.BytesIO(), kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def content(photo):
    return png(photo.resize((64, 48)))


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120)


async def ask(http, content, **values):
    values = {"prompt": "two tigers", "steps": 2, **values}
    return await http.post("/paint", data=values, files={"photo": ("photo.png", content)})


def requests(count):
    rng = random.Random(0)
    for seed in range(count):
        yield {
            "prompt": rng.choice(["two tigers", "a toy", " ", "Füße 雪 🐅"]),
            "seed": seed,
            "strength": rng.choice([0.5, 0.8, 1.0]),
            "guidance": rng.choice([1.0, 3.0, 7.5]),
            "scheduler": rng.choice([*SCHEDULERS]),
            "lora": rng.choice([0.0, 0.5, 1.0, -1.0]),
        }


def alone(pipe, content, prompt="two tigers", seed=0, strength=0.8, guidance=7.5, scheduler="ddim", lora=1.0,
          steps=2):  # fmt: skip
    """Return what a plain call gives, with a pipeline of its own."""
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    generator, kwargs = torch.Generator().manual_seed(seed), {"scale": lora}
    photo = Image.open(io.BytesIO(content))
    called = pipe(prompt, photo, strength=strength, num_inference_steps=steps, guidance_scale=guidance,
                  generator=generator, cross_attention_kwargs=kwargs)  # fmt: skip
    return np.asarray(called.images[0])


def picture(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_the_document_shows_the_program():
    text, source = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), ROOT / "examples" / "serve.py"
    assert f"```python\n{source.read_text(encoding='utf-8')}```" in text
    assert source.read_text(encoding="utf-8").count("\n") < 60


@pytest.mark.parametrize("count", [20, 100])
def test_concurrent_requests_give_what_each_gives_alone(content, count):
    """All at once, with prompts, seeds, strengths, guidance, schedulers and scales of adapters of their own."""
    asked = list(requests(count))
    app = program(MAX_JOBS=count).serve(painter())

    async def all_at_once():
        async with client(app) as http:
            answers = asyncio.gather(*(ask(http, content, **values) for values in asked))
            health = [(await http.get("/health")).json() for _ in range(5)]
            return await answers, health

    answers, health = asyncio.run(all_at_once())
    pipe = painter()
    for values, answer in zip(asked, answers, strict=True):
        assert np.array_equal(picture(answer), alone(pipe, content, **values)), values
    assert len({answer.content for answer in answers}) == count
    assert {tuple(one) for one in health} == {("full",)}


def test_a_full_queue_is_said_and_the_rest_is_painted(content):
    app = program(MAX_JOBS=3).serve(painter())

    async def rush():
        async with client(app) as http:
            first = await asyncio.gather(*(ask(http, content, seed=seed) for seed in range(12)))
            return first, await ask(http, content, seed=0), (await http.get("/health")).json()

    first, after, health = asyncio.run(rush())
    assert sorted(answer.status_code for answer in first) == [200] * 3 + [503] * 9
    full = next(answer for answer in first if answer.status_code == 503)
    assert "too many pictures are waiting" in full.json()["detail"]
    assert int(full.headers["retry-after"]) > 0
    expected = alone(painter(), content)
    assert np.array_equal(picture(after), expected)
    assert np.array_equal(picture(first[0]), expected)
    assert health == {"full": False}


def bomb():
    """A PNG of a few bytes that claims 400 million pixels."""
    content = bytearray(png(Image.new("L", (8, 8))))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


UPLOADS = {
    "text": (b"this is not a picture", "photo must be a PNG, JPEG or WebP file"),
    "empty": (b"", "photo must be a PNG, JPEG or WebP file"),
    "cut off": (png(Image.new("RGB", (64, 64), "red").resize((64, 64)))[:-30], "cannot be decoded"),
    "a bomb": (bomb(), "400000000 pixels"),
    "one pixel": (png(Image.new("RGB", (1, 1))), "at least 8x8 pixels, got 1x1"),
    "too many pixels": (png(Image.new("L", (1025, 1024))), "at most 10000000 bytes and 1048576 pixels"),
    "too many bytes": (png(Image.new("L", (64, 64))) + bytes(10_000_000), "at most 10000000 bytes"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "photo must be a PNG, JPEG or WebP file"),
    "a GIF": (png(Image.new("L", (64, 64)), "GIF"), "photo must be a PNG, JPEG or WebP file"),
}
VALUES = {
    "strength": {
        "2": "strength must be in [0, 1], got 2.0",
        "-0.1": "strength must be",
        "nan": "strength must be",
        "much": "valid number",
    },
    "steps": {"0": "num_inference_steps must be from 1", "101": "less than or equal to 100", "1.5": "valid integer"},
    "guidance": {"-1": "guidance_scale must be", "31": "less than or equal to 30", "inf": "less than or equal to 30"},
    "seed": {"-1": "greater than or equal to 0", str(2**64): "less than 9223372036854775808", "x": "valid integer"},
    "scheduler": {"euler": "'ddim', 'lms' or 'pndm'"},
    "lora": {"nan": "scale must be", "1e9": "scale must be", "x": "valid number"},
    "prompt": {"": "Field required"},
}


def reason(answer):
    """Return the one line of a refusal."""
    assert answer.status_code == 422, answer.text
    detail = answer.json()["detail"]
    [text] = [detail] if isinstance(detail, str) else [f"{one['loc'][-1]}: {one['msg']}" for one in detail]
    assert text and "\n" not in text and "Traceback" not in text
    return text


def test_bad_requests_are_refused_by_name_and_the_next_is_painted(content):
    app = program().serve(painter())

    async def send():
        async with client(app) as http:
            for name, (upload, expected) in UPLOADS.items():
                assert expected in reason(await ask(http, upload)), name
            for name, values in VALUES.items():
                for value, expected in values.items():
                    assert expected in reason(await ask(http, content, **{name: value})), (name, value)
            wrong = await http.post("/paint", data={"prompt": "a toy"}, files={"image": ("photo.png", content)})
            assert reason(wrong) == "photo: Field required"
            wrong = await http.post("/paint", data={"prompt": "a toy", "photo": "photo.png"})
            assert "photo: " in reason(wrong)
            assert (await http.post("/paint", content=b"\xff" * 99)).status_code == 422
            broken = {"content-type": "multipart/form-data; boundary=x"}
            assert (await http.post("/paint", content=b"--x\r\nnonsense", headers=broken)).status_code in (400, 422)
            latin = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--x--\r\n'
            assert (await http.post("/paint", content=latin, headers=broken)).status_code in (400, 422)
            assert (await http.get("/paint")).status_code == 405
            return await ask(http, content)

    assert np.array_equal(picture(asyncio.run(send())), alone(painter(), content))


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGBA", "P", "1", "LA"])
def test_pictures_of_other_modes_are_painted(photo, mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    content, app = png(photo.resize((64, 48)).convert(mode), kind), program().serve(painter())

    async def send():
        async with client(app) as http:
            return await ask(http, content)

    assert np.array_equal(picture(asyncio.run(send())), alone(painter(), content))


@contextmanager
def served(app):
    """Run uvicorn in a thread; yields its address and the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


READING = httpx.Timeout(120, read=0.5)
"""A client that connects and sends in peace, and then gives up: also where the machine is busy."""


class Counting:
    """Counts the steps of every run, which is slow where its prompt says so."""

    def __init__(self, pipe):
        self.steps, self.plain = {}, type(pipe).denoise
        counter = self

        class Counted(type(pipe)):
            def prepare(self, prompt, *args, **kwargs):
                run = super().prepare(prompt, *args, **kwargs)
                run.prompt = prompt
                return run

            def denoise(self, run):
                for step in super().denoise(run):
                    counter.steps[run.prompt] = step.index + 1
                    yield step
                    if "slow" in run.prompt:
                        time.sleep(0.05)

        self.pipe = Counted.from_pipe(pipe)


def test_over_a_network_clients_that_leave_stop_their_own_runs_only(content):
    """uvicorn, 100 requests; every fifth client gives up while its run of 100 slow steps is under way or waits."""
    counting = Counting(painter())
    app, asked = program(MAX_JOBS=100).serve(counting.pipe), list(requests(100))
    leave = [number for number in range(100) if number % 5 == 0]

    async def one(http, number, values):
        if number not in leave:
            return await ask(http, content, **values)
        with pytest.raises(httpx.ReadTimeout):
            slow = {"prompt": f"slow {number}", "steps": 100, "strength": 1.0, "scheduler": "ddim"}
            await http.post("/paint", data=slow, files={"photo": ("photo.png", content)}, timeout=READING)
        return None

    async def all_at_once(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            answers = asyncio.gather(*(one(http, number, values) for number, values in enumerate(asked)))
            began = time.monotonic()
            health = (await http.get("/health")).json(), time.monotonic() - began
            return await answers, health

    with served(app) as url:
        answers, health = asyncio.run(all_at_once(url))
    pipe = painter()
    for number, (values, answer) in enumerate(zip(asked, answers, strict=True)):
        if number not in leave:
            assert np.array_equal(picture(answer), alone(pipe, content, **values)), values
    assert health[0] == {"full": False} or health[0] == {"full": True}
    slow = {prompt: steps for prompt, steps in counting.steps.items() if "slow" in prompt}
    assert slow, "at least the first had begun"
    assert all(steps < 100 for steps in slow.values()), slow
    assert len(slow) < len(leave), "those that still waited were never begun"


def test_a_client_that_leaves_frees_the_worker(content):
    """Its run of 100 steps would take 5 seconds."""
    counting = Counting(painter())

    with served(program().serve(counting.pipe)) as url, httpx.Client(base_url=url, timeout=60) as http:
        slow = {"prompt": "slow", "steps": "100", "strength": "1"}
        with pytest.raises(httpx.ReadTimeout):
            http.post("/paint", data=slow, files={"photo": ("photo.png", content)}, timeout=READING)
        began = time.monotonic()
        answer = http.post("/paint", data={"prompt": "two tigers", "steps": "2"}, files={"photo": ("p.png", content)})
        assert time.monotonic() - began < 3
        stopped = counting.steps["slow"]
        time.sleep(0.2)
    assert np.array_equal(picture(answer), alone(painter(), content))
    assert counting.steps["slow"] == stopped < 60


def test_health_answers_while_a_picture_is_painted(content):
    counting = Counting(painter())
    with served(program(MAX_JOBS=1).serve(counting.pipe)) as url, httpx.Client(base_url=url, timeout=60) as http:
        slow = {"prompt": "slow", "steps": "20", "strength": "1"}
        painting = threading.Thread(target=lambda: httpx.post(f"{url}/paint", data=slow, files={"photo": content}))
        painting.start()
        deadline = time.monotonic() + 30
        while "slow" not in counting.steps and time.monotonic() < deadline:
            time.sleep(0.01)
        assert http.get("/health").json() == {"full": True}
        assert counting.steps["slow"] < 20
        painting.join()
        assert counting.steps["slow"] == 20
        assert http.get("/health").json() == {"full": False}
