"""Train the vectors of a new word on a handful of pictures of one thing, and save them.

    python examples/train_textual_inversion.py PHOTOS OUT --word "<toy>" --like ball

Nothing but the rows of the new word in the text encoder's table learns. OUT holds `learned_embeds.safetensors`
afterwards, which `load_textual_inversion` reads, here and in diffusers. Source: arXiv:2208.01618.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from training import Photos, add_noise, make_loader, make_parser, positive, start, train


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the program, and return the losses."""
    parser = make_parser(__doc__, steps=150, rate=5e-3)
    parser.add_argument("--word", required=True, help="the new word, such as <toy>")
    parser.add_argument("--like", required=True, help="a known word to begin at")
    parser.add_argument("--vectors", type=positive, default=1, help="of the new word (1)")
    parser.add_argument("--prompt", default="a {}", help='what says the word of each picture, at {} ("a {}")')
    options = parser.parse_args(arguments)
    if "{}" not in options.prompt:
        parser.error(f"--prompt must hold {{}} where the word goes, got {options.prompt!r}")
    pipe, accelerator = start(options)
    tokenizer = pipe.tokenizer

    words = [options.word, *(f"{options.word}_{number}" for number in range(1, options.vectors))]
    like = tokenizer.encode(options.like, add_special_tokens=False)
    if len(like) != 1:
        raise SystemExit(f"--like must be a single token, got {options.like!r}, {len(like)}; take a simpler word")
    if tokenizer.add_tokens(words) != len(words):
        raise SystemExit(f"--word {options.word!r} is known to the tokenizer already; take another one")
    new = tokenizer.convert_tokens_to_ids(words)
    pipe.text_encoder.resize_token_embeddings(len(tokenizer))
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[new] = table[like[0]].clone()
    original = table.detach().clone()

    photos = Photos(pipe, options, options.prompt.replace("{}", " ".join(words)))
    pipe.vae.requires_grad_(False)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.text_model.encoder.requires_grad_(False)
    pipe.text_encoder.text_model.final_layer_norm.requires_grad_(False)
    pipe.text_encoder.text_model.embeddings.position_embedding.requires_grad_(False)
    pipe.text_encoder.train()
    if options.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.text_encoder.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(pipe.text_encoder.get_input_embeddings().parameters(), lr=options.rate)
    loader = make_loader(photos, options, accelerator)
    text_encoder, optimizer, loader = accelerator.prepare(pipe.text_encoder, optimizer, loader)
    kept = torch.ones(len(tokenizer), dtype=torch.bool, device=accelerator.device)
    kept[new] = False

    def compute_loss(batch: dict[str, Tensor]) -> Tensor:
        noisy, timesteps, target = add_noise(pipe, batch)
        prompt_embeds = text_encoder(batch["input_ids"])[0]
        return F.mse_loss(pipe.unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample.float(), target)

    def vectors() -> Tensor:
        return accelerator.unwrap_model(text_encoder).get_input_embeddings().weight

    @torch.no_grad()
    def after_step() -> None:
        """Undo what weight decay did to the other rows."""
        vectors()[kept] = original[kept]

    losses = train(accelerator, options, [text_encoder], optimizer, loader, compute_loss, after_step)
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        learnt = vectors().detach()[new].cpu().contiguous()
        save_file({options.word: learnt}, options.out / "learned_embeds.safetensors")
        print(options.out / "learned_embeds.safetensors")
    return losses


if __name__ == "__main__":
    main()
