"""In the manner of a FastAPI server with one shared pipeline, a lock, uploads and PNG responses."""

import asyncio
import base64
import io
import threading
from pathlib import Path

import httpx
import numpy as np
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from fastapi import FastAPI, File, Form, HTTPException, Response, UploadFile
from PIL import Image
from starlette.concurrency import run_in_threadpool

SEED = 0


def create_app(checkpoint):
    app, lock = FastAPI(), threading.Lock()
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    @app.post("/depth2img")
    async def depth2img(
        prompt: str = Form(), strength: float = Form(0.8), seed: int = Form(0), image: UploadFile = File()
    ):  # fmt: skip
        if not 0 <= strength <= 1:
            raise HTTPException(422, "strength must be in [0, 1]")
        picture = Image.open(io.BytesIO(await image.read())).convert("RGB")

        def work():
            with lock, torch.inference_mode():
                generator = torch.Generator().manual_seed(seed)
                return pipe(prompt, picture, None, strength, 4, generator=generator).images[0]

        buffer = io.BytesIO()
        (await run_in_threadpool(work)).save(buffer, format="PNG")
        return Response(base64.b64encode(buffer.getvalue()), media_type="text/plain")

    return app


async def session(app, photo):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:

        def post(seed, strength):
            data = {"prompt": "a forest", "seed": seed, "strength": strength}
            return client.post("/depth2img", data=data, files={"image": Path(photo).read_bytes()})

        answers = await asyncio.gather(*(post(SEED + i, 0.5) for i in range(3)))
        assert (await post(0, 1.5)).status_code == 422
    return [np.array(Image.open(io.BytesIO(base64.b64decode(answer.content)))) for answer in answers]


def main(checkpoint, photo):
    return asyncio.run(session(create_app(checkpoint), photo))
