"""Loops as diffusers' training scripts write them, the same code on its classes and on ours: equal losses and weights.

The loops make the calls of train_text_to_image, train_dreambooth, their LoRA forms and textual_inversion.
"""

from __future__ import annotations

import functools
import itertools
import os
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from safetensors.torch import load_file

import depthdiff
from depthdiff.checkpoint.hub import bundled

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable", "ignore:It is deprecated to pass a")
LOSSES = 1e-4  # absolute; observed: 0
WEIGHTS = 1e-6  # absolute; observed: 0
SIDES = {
    "ours": depthdiff,
    "reference": SimpleNamespace(
        **{name: getattr(diffusers, name) for name in ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler")},
        **{name: getattr(transformers, name) for name in ("CLIPTextModel", "CLIPTokenizer")},
    ),
}
CAPTIONS = ["a red ball on a table", "a blue cube", "a green cone and a white box", "a yellow ring at night"]
WORD = "<toy>"


def load(side: str) -> SimpleNamespace:
    """Load the parts of the bundled model, as the scripts do."""
    package = SIDES[side]

    def part(name: str, folder: str):
        return getattr(package, name).from_pretrained(bundled(), subfolder=folder)

    return SimpleNamespace(
        package=package,
        tokenizer=part("CLIPTokenizer", "tokenizer"),
        noise_scheduler=part("DDIMScheduler", "scheduler"),
        text_encoder=part("CLIPTextModel", "text_encoder").float(),
        vae=part("AutoencoderKL", "vae").float(),
        unet=part("UNet2DConditionModel", "unet").float(),
    )


def text_model(encoder: torch.nn.Module) -> torch.nn.Module:
    """Return the level that transformers 5 does without."""
    return getattr(encoder, "text_model", encoder)


def examples(p: SimpleNamespace, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    """Make up pictures (3, 48, 64), depth (1, 12, 16) and token ids."""
    draws = torch.Generator().manual_seed(5)
    ids = p.tokenizer(
        captions, max_length=p.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return [
        {
            "pixel_values": F.interpolate(torch.rand(1, 3, 6, 8, generator=draws) * 2 - 1, size=(48, 64))[0],
            "depth": F.interpolate(torch.rand(1, 1, 3, 4, generator=draws) * 2 - 1, size=(12, 16))[0],
            "input_ids": row,
        }
        for row in ids
    ]


def forward(p: SimpleNamespace, batch, snr_gamma=None, prior: float | None = None) -> torch.Tensor:
    """Compute a step's loss; with `prior`, the second half of the batch keeps the class as it is."""
    latents = p.vae.encode(batch["pixel_values"].to(dtype=torch.float32)).latent_dist.sample().detach()
    latents = latents * p.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, p.noise_scheduler.config.num_train_timesteps, (latents.shape[0],)).long()
    noisy = p.noise_scheduler.add_noise(latents, noise, timesteps)
    states = p.text_encoder(batch["input_ids"], return_dict=False)[0]
    if p.noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = p.noise_scheduler.get_velocity(latents, noise, timesteps)
    pred = p.unet(torch.cat([noisy, batch["depth"]], dim=1), timesteps, states).sample
    if prior is not None:
        pred, prior_pred = torch.chunk(pred, 2, dim=0)
        target, prior_target = torch.chunk(target, 2, dim=0)
        loss = F.mse_loss(pred.float(), target.float(), reduction="mean")
        return loss + prior * F.mse_loss(prior_pred.float(), prior_target.float(), reduction="mean")
    if snr_gamma is None:
        return F.mse_loss(pred.float(), target.float(), reduction="mean")
    snr = compute_snr(p.noise_scheduler, timesteps)
    divisor = snr + 1 if p.noise_scheduler.config.prediction_type == "v_prediction" else snr
    weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / divisor
    loss = F.mse_loss(pred.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()


def full(p: SimpleNamespace, accelerator, steps: int, train_text_encoder: bool = False) -> SimpleNamespace:
    """Fine-tune the UNet with a moving average; for DreamBooth the text encoder too, with prior preservation."""
    networks = [p.unet, p.text_encoder] if train_text_encoder else [p.unet]
    p.vae.requires_grad_(False)
    p.text_encoder.requires_grad_(train_text_encoder)
    p.unet.train()
    p.unet.enable_gradient_checkpointing()
    ema = EMAModel(p.unet.parameters(), decay=0.9, model_cls=p.package.UNet2DConditionModel, model_config=p.unet.config)
    parameters = itertools.chain(*(network.parameters() for network in networks))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    lr = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=1, num_training_steps=steps)
    if train_text_encoder:
        p.text_encoder.gradient_checkpointing_enable()
        p.text_encoder.train()
    *trained, optimizer, lr = accelerator.prepare(*networks, optimizer, lr)
    assert accelerator.unwrap_model(trained[0]).dtype == torch.float32
    more = {"prior": 0.7} if train_text_encoder else {"snr_gamma": 5.0}
    return SimpleNamespace(
        optimizer=optimizer, lr=lr, trained=trained, after=lambda: ema.step(p.unet.parameters()), ema=ema, more=more
    )


def dreambooth(p: SimpleNamespace, accelerator, steps: int) -> SimpleNamespace:
    return full(p, accelerator, steps, train_text_encoder=True)


def lora(p: SimpleNamespace, accelerator, steps: int) -> SimpleNamespace:
    """Train layers that PEFT adds to UNet and text encoder."""
    for network in (p.unet, p.vae, p.text_encoder):
        network.requires_grad_(False)
    torch.manual_seed(1)
    p.unet.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    p.text_encoder.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]
        )
    )
    p.unet.enable_gradient_checkpointing()
    p.text_encoder.gradient_checkpointing_enable()
    cast_training_params([p.unet, p.text_encoder], dtype=torch.float32)
    layers = [x for network in (p.unet, p.text_encoder) for x in network.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-3)
    lr = get_scheduler("constant", optimizer=optimizer)
    p.unet.train()
    p.text_encoder.train()
    *trained, optimizer, lr = accelerator.prepare(p.unet, p.text_encoder, optimizer, lr)
    return SimpleNamespace(optimizer=optimizer, lr=lr, trained=trained, after=None, more={})


def textual_inversion(p: SimpleNamespace, accelerator, steps: int) -> SimpleNamespace:
    """Train the vectors of a new word, and keep all other rows."""
    words = [WORD, f"{WORD}_1"]
    assert p.tokenizer.add_tokens(words) == 2
    [initializer] = p.tokenizer.encode("ball", add_special_tokens=False)
    new = p.tokenizer.convert_tokens_to_ids(words)
    p.text_encoder.resize_token_embeddings(len(p.tokenizer))
    table = p.text_encoder.get_input_embeddings().weight.data
    with torch.no_grad():
        for index in new:
            table[index] = table[initializer].clone()
    p.vae.requires_grad_(False)
    p.unet.requires_grad_(False)
    text_model(p.text_encoder).encoder.requires_grad_(False)
    text_model(p.text_encoder).final_layer_norm.requires_grad_(False)
    text_model(p.text_encoder).embeddings.position_embedding.requires_grad_(False)
    p.unet.train()
    p.text_encoder.gradient_checkpointing_enable()
    p.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(p.text_encoder.get_input_embeddings().parameters(), lr=5e-3)
    lr = get_scheduler("constant", optimizer=optimizer)
    p.text_encoder.train()
    encoder, optimizer, lr = accelerator.prepare(p.text_encoder, optimizer, lr)
    original = accelerator.unwrap_model(encoder).get_input_embeddings().weight.data.clone()
    kept = torch.ones((len(p.tokenizer),), dtype=torch.bool)
    kept[min(new) : max(new) + 1] = False
    p.captions = [f"a photo of {' '.join(p.tokenizer.convert_ids_to_tokens(new))} number {i}" for i in range(4)]

    def after() -> None:
        with torch.no_grad():
            accelerator.unwrap_model(encoder).get_input_embeddings().weight[kept] = original[kept]

    return SimpleNamespace(optimizer=optimizer, lr=lr, trained=[encoder], after=after, more={}, new=new)


KINDS = {"full": full, "dreambooth": dreambooth, "lora": lora, "textual inversion": textual_inversion}


def start(side: str, kind: str, steps: int, precision: str = "no") -> SimpleNamespace:
    """Load everything, and prepare it for training."""
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, mixed_precision=precision, cpu=True)
    p = load(side)
    t = KINDS[kind](p, accelerator, steps)
    data = examples(p, getattr(p, "captions", CAPTIONS))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    t.batches, t.parts, t.accelerator, t.losses = accelerator.prepare(loader), p, accelerator, []
    return t


def train(t: SimpleNamespace, steps: int) -> None:
    """Take some steps, each over all batches."""
    accelerator = t.accelerator
    for _ in range(steps):
        accelerate.utils.set_seed(len(t.losses))
        for batch in t.batches:
            with accelerator.accumulate(*t.trained):
                loss = forward(t.parts, batch, **t.more)
                t.losses.append(accelerator.gather(loss.repeat(2)).mean().item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([x for net in t.trained for x in net.parameters()], 1.0)
                t.optimizer.step()
                t.lr.step()
                t.optimizer.zero_grad()
        if t.after is not None:
            t.after()


@pytest.fixture(scope="module")
def trained():
    """Return what trains a kind on both sides, once."""

    @functools.cache
    def both(kind: str) -> tuple[SimpleNamespace, SimpleNamespace]:
        runs = []
        for side in SIDES:
            runs.append(start(side, kind, steps=3))
            train(runs[-1], 3)
            runs[-1].accelerator.free_memory()
        return tuple(runs)

    return both


def plain(name: str) -> str:
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_losses_and_weights(trained, kind):
    """Gradient accumulation and checkpointing, clipping, a schedule, AdamW; every weight after three steps."""
    ours, reference = trained(kind)
    assert len(ours.losses) == 6 and len(set(ours.losses)) == 6
    assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) <= LOSSES
    for one, two in zip(ours.trained, reference.trained, strict=True):
        weights = {plain(name): weight for name, weight in two.named_parameters() if weight.requires_grad}
        found = {plain(name): weight for name, weight in one.named_parameters() if weight.requires_grad}
        assert found.keys() == weights.keys()
        assert max((found[name] - weights[name]).abs().max() for name in weights) <= WEIGHTS


@pytest.fixture
def fresh():
    """Forget accelerate's state, which keeps one precision for a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["dreambooth", "lora"])
def test_mixed_precision(fresh, kind):
    """Under bfloat16 autocast; accelerate wraps `forward` and rebuilds its outputs in float32."""
    runs = [start(side, kind, steps=1, precision="bf16") for side in SIDES]
    for t in runs:
        train(t, 1)
    ours, reference = (t.losses for t in runs)
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= LOSSES


def test_only_the_new_rows_are_learnt(trained):
    before = load("ours").text_encoder.get_input_embeddings().weight
    for t in trained("textual inversion"):
        after = t.parts.text_encoder.get_input_embeddings().weight
        assert len(after) == len(t.parts.tokenizer) == len(before) + 2
        assert after[: len(before)].equal(before)
        assert not after[t.new[0]].equal(after[t.new[1]])


@pytest.mark.parametrize("kind", ["full", "dreambooth"])
def test_the_moving_average(tmp_path, trained, kind):
    """diffusers' own EMAModel: its weights, its folder, and back on either side."""
    ours, reference = trained(kind)
    ours.ema.save_pretrained(tmp_path / "unet_ema")
    for package in SIDES.values():
        again = EMAModel.from_pretrained(tmp_path / "unet_ema", package.UNet2DConditionModel)
        assert again.optimization_step == 3 and again.decay == 0.9
        for one, two, three in zip(
            again.shadow_params, ours.ema.shadow_params, reference.ema.shadow_params, strict=True
        ):
            assert one.equal(two)
            assert (two - three).abs().max() <= WEIGHTS
    unet = ours.parts.unet
    ours.ema.store(unet.parameters())
    ours.ema.copy_to(unet.parameters())
    assert next(iter(unet.parameters())).equal(ours.ema.shadow_params[0])
    ours.ema.restore(unet.parameters())


def hook(t: SimpleNamespace) -> None:
    """Register the hooks by which the scripts save networks in their published layout, and load them again."""
    accelerator, package = t.accelerator, t.parts.package

    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            t.ema.save_pretrained(os.path.join(output_dir, "unet_ema"))
            for model in models:
                is_unet = isinstance(model, type(accelerator.unwrap_model(t.parts.unet)))
                model.save_pretrained(os.path.join(output_dir, "unet" if is_unet else "text_encoder"))
                weights.pop()

    def load_model_hook(models, input_dir):
        load_model = EMAModel.from_pretrained(os.path.join(input_dir, "unet_ema"), package.UNet2DConditionModel)
        t.ema.load_state_dict(load_model.state_dict())
        t.ema.to(accelerator.device)
        while len(models) > 0:
            model = models.pop()
            if isinstance(model, type(accelerator.unwrap_model(t.parts.text_encoder))):
                load_model = package.CLIPTextModel.from_pretrained(input_dir, subfolder="text_encoder")
                model.config = load_model.config
            else:
                load_model = package.UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet")
                model.register_to_config(**load_model.config)
            model.load_state_dict(load_model.state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)


@pytest.mark.parametrize("side", SIDES)
def test_saving_hooks_and_resuming(tmp_path, trained, side):
    """Two steps, save_state, a new process's objects, load_state, one more: as three steps at once."""
    whole = trained("dreambooth")[list(SIDES).index(side)]
    first = start(side, "dreambooth", steps=3)
    hook(first)
    train(first, 2)
    first.accelerator.save_state(str(tmp_path / "checkpoint-2"))
    assert {"unet", "unet_ema", "text_encoder"} <= {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    second = start(side, "dreambooth", steps=3)
    hook(second)
    second.accelerator.load_state(str(tmp_path / "checkpoint-2"))
    second.losses = list(first.losses)
    train(second, 1)
    assert second.losses == pytest.approx(whole.losses, abs=LOSSES)
    for one, two in zip(second.trained, whole.trained, strict=True):
        for weight, expected in zip(one.parameters(), two.parameters(), strict=True):
            assert (weight - expected).abs().max() <= WEIGHTS
    assert second.ema.optimization_step == 3


def test_trained_layers_in_a_file(tmp_path, trained):
    """`get_peft_model_state_dict`, `convert_state_dict_to_diffusers` and `save_lora_weights`: the same tensors."""
    ours, reference = trained("lora")
    for t, folder in ((ours, tmp_path / "ours"), (reference, tmp_path / "reference")):
        states = [
            diffusers.utils.convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(network))
            for network in (t.parts.unet, t.parts.text_encoder)
        ]
        pipeline = (depthdiff if t is ours else diffusers).StableDiffusionDepth2ImgPipeline
        pipeline.save_lora_weights(
            save_directory=folder,
            unet_lora_layers=states[0],
            text_encoder_lora_layers={f"text_model.{plain(name)}": value for name, value in states[1].items()},
            safe_serialization=True,
        )
    published = "lora_linear_layer.down", "lora_linear_layer.up", "lora.down", "lora.up"  # older names of the same
    peft_names = dict(zip(published, ("lora_A", "lora_B") * 2, strict=True))
    files = [load_file(tmp_path / side / "pytorch_lora_weights.safetensors") for side in SIDES]
    for old, new in peft_names.items():
        files[1] = {name.replace(old, new): value for name, value in files[1].items()}
    assert files[0].keys() == files[1].keys()
    assert max((files[0][name] - files[1][name]).abs().max() for name in files[0]) <= WEIGHTS
