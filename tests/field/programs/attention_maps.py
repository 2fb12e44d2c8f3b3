"""In the manner of DAAM and attention-map viewers: heat maps per word, gathered by attention processors."""

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionDepth2ImgPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image

SEED = 0


class StoreProcessor:
    def __init__(self, name, store):
        self.name, self.store = name, store

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        batch_size, sequence_length, _ = hidden_states.shape
        attention_mask = attn.prepare_attention_mask(attention_mask, sequence_length, batch_size)
        query = attn.to_q(hidden_states)
        is_cross = encoder_hidden_states is not None
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        attention_probs = attn.get_attention_scores(query, key, attention_mask)
        if is_cross:
            conditional = attention_probs.chunk(2)[1]  # (heads, pixels, tokens)
            self.store.setdefault(self.name, []).append(conditional.mean(0))
        hidden_states = attn.batch_to_head_dim(torch.bmm(attention_probs, value))
        return attn.to_out[1](attn.to_out[0](hidden_states))


def heat_maps(store, words, size):
    maps = []
    for layer in store.values():
        for step in layer:
            pixels = step.shape[0]
            h = round((pixels * size[1] / size[0]) ** 0.5)
            grid = step.T.reshape(1, -1, h, pixels // h)
            maps.append(F.interpolate(grid, size=size[::-1], mode="bicubic").clamp(min=0))
    mean = torch.cat(maps).mean(0)
    return {word: (mean[i] / mean[i].max()).numpy() for word, i in words.items()}


def main(checkpoint, photo):
    pipe, store = StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint), {}
    pipe.unet.set_attn_processor({name: StoreProcessor(name, store) for name in pipe.unet.attn_processors})
    image, prompt = Image.open(photo).convert("RGB").resize((128, 64)), "a cat and a dog"
    tokens = pipe.tokenizer.tokenize(prompt)
    words = {token: 1 + i for i, token in enumerate(tokens)}
    out = pipe(prompt, image, generator=torch.manual_seed(SEED), num_inference_steps=4, output_type="np").images
    assert len(store) == len([name for name in pipe.unet.attn_processors if "attn2" in name])
    maps = heat_maps(store, words, (16, 8))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    again = pipe(prompt, image, generator=torch.manual_seed(SEED), num_inference_steps=4, output_type="np").images
    return {"maps": list(maps.values()), "images": [out, again]}
