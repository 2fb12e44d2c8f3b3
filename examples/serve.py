"""Repaint photos over HTTP, one at a time: `uvicorn --factory serve:serve`, then POST /paint."""

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from PIL import Image

from depthdiff import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, StableDiffusionDepth2ImgPipeline

MAX_BYTES, MAX_PIXELS, MAX_JOBS = 10_000_000, 1024 * 1024, 16
UNKNOWN = "photo must be a PNG, JPEG or WebP file"


def paint(pipe, gone, content, prompt, strength, steps, guidance, seed, scale):
    """Return a PNG; runs on the worker, and stops between two steps once nobody waits for it."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as photo:
        if len(content) > MAX_BYTES or photo.width * photo.height > MAX_PIXELS:
            raise ValueError(f"photo must have at most {MAX_BYTES} bytes and {MAX_PIXELS} pixels; make it smaller")
        how = {"generator": torch.Generator().manual_seed(seed), "cross_attention_kwargs": {"scale": scale}}
        run = pipe.prepare(prompt, photo, strength=strength, num_inference_steps=steps, guidance_scale=guidance, **how)
    for _ in pipe.denoise(run):
        if gone.is_set():
            return None
    pipe.decode(run.latents)[0].save(png := io.BytesIO(), "PNG")
    return png.getvalue()


def serve(pipe=None):
    """Return the application. What requests share is made here, and no request changes it."""
    pipe = pipe or StableDiffusionDepth2ImgPipeline.from_pretrained("mini")
    kinds, config = {"ddim": DDIMScheduler, "lms": LMSDiscreteScheduler, "pndm": PNDMScheduler}, pipe.scheduler.config
    pipes = {name: pipe.from_pipe(pipe, scheduler=kind.from_config(config)) for name, kind in kinds.items()}
    app, worker, places = FastAPI(), ThreadPoolExecutor(1), asyncio.Semaphore(MAX_JOBS)
    app.get("/health")(lambda: {"full": places.locked()})

    @app.post("/paint")
    async def post(request: Request, photo: UploadFile, prompt: str = Form(), seed: int = Form(0, ge=0, lt=2**63),
                   strength: float = Form(0.8), steps: int = Form(20, le=100), guidance: float = Form(7.5, le=30),
                   scheduler: Literal["ddim", "lms", "pndm"] = Form("ddim"), lora: float = Form(1.0)):  # fmt: skip
        content, gone = await photo.read(MAX_BYTES + 1), threading.Event()
        if places.locked():
            raise HTTPException(503, "too many pictures are waiting; try again later", {"Retry-After": "10"})
        async with places:
            job = worker.submit(paint, pipes[scheduler], gone, content, prompt, strength, steps, guidance, seed, lora)
            try:
                while not (job.done() or await request.is_disconnected()):
                    await asyncio.sleep(0.02)
                return Response(job.result() if job.done() else None, media_type="image/png")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise HTTPException(422, UNKNOWN if isinstance(error, OSError) else str(error)) from error
            finally:
                job.cancel() or gone.set()  # one that waits never begins; one under way stops

    return app
