"""In the manner of a script around MiDaS from torch.hub: a plain module, whose inverse depth becomes a numpy array."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler, StableDiffusionDepth2ImgPipeline
from PIL import Image
from torch import nn

SEED = 0


class MidasLike(nn.Module):
    """Stands for `torch.hub.load("intel-isl/MiDaS", "MiDaS_small")`."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(16, 1, 3, 1, 1)

    def forward(self, x):
        return F.interpolate(self.head(self.encoder(x)), scale_factor=4, mode="bicubic").squeeze(1).abs()


def transform(image):
    x = torch.from_numpy(np.array(image.resize((64, 64)))).float() / 255
    return (x.permute(2, 0, 1).unsqueeze(0) - 0.5) / 0.5


def main(checkpoint, photo):
    torch.manual_seed(1)
    midas = MidasLike().eval()
    img = Image.open(photo).convert("RGB")
    with torch.no_grad():
        prediction = midas(transform(img))
        prediction = F.interpolate(
            prediction.unsqueeze(1), size=img.size[::-1], mode="bicubic", align_corners=False
        ).squeeze()
    output = prediction.cpu().numpy()
    depth_min, depth_max = output.min(), output.max()
    normalized = 255 * (output - depth_min) / (depth_max - depth_min)

    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    depth_map = torch.from_numpy(normalized).unsqueeze(0).float()
    torch.manual_seed(SEED)
    image = pipe(
        prompt="a bedroom, cinematic", image=img, depth_map=depth_map, strength=0.7, num_inference_steps=6,
        output_type="np",
    ).images[0]  # fmt: skip
    flat = pipe("a bedroom", img, depth_map=1 - depth_map / 255, num_inference_steps=3, output_type="pt").images
    return {"depth": normalized / 255, "image": image, "inverted": flat}
