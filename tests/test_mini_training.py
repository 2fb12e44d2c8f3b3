"""The training of the bundled model, in twenty steps: losses fall, and a broken run ends where an unbroken one does."""

from dataclasses import replace

import binding
import pytest
import torch
import train
from PIL import Image

from depthdiff import StableDiffusionDepth2ImgPipeline

SMALL = replace(train.TINY, geometries=3, vae_steps=16, depth_steps=8, unet_steps=16, batch=2, save_every=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of all stages."""
    run = tmp_path_factory.mktemp("mini")
    train.make_data(run, SMALL)
    train.Trainer(run, SMALL, "cpu").unet()
    return run


def losses(run, stage):
    lines = [line for line in (run / "log.txt").read_text().splitlines() if f" {stage} step" in line]
    return [float(line.split("loss ")[1]) for line in lines]


def test_losses_fall_and_the_model_runs(finished):
    for stage in ("vae", "unet"):
        first, *_, last = losses(finished, stage)
        assert last < first
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(finished / "model")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red ball", Image.new("RGB", (128, 128), "white"), num_inference_steps=2).images[0]
    assert picture.size == (128, 128)


def test_latents_are_white(finished):
    """Folded into the convolutions: mean 0 and deviation 1 over the data, and the same pictures as before."""
    vae = train.AutoencoderKL.from_pretrained(finished / "vae")
    data = train.Data(finished)
    with torch.no_grad():
        latents = vae.encode(data.pixels(range(len(data)))).latent_dist.mode().transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-3
    assert (latents.std(1) - 1).abs().max() < 1e-3
    raw = train.AutoencoderKL.from_config(train.VAE)
    train.whiten(raw_twin := train.AutoencoderKL.from_config(train.VAE), data, torch.device("cpu"))
    raw.load_state_dict(raw_twin.state_dict())
    before = raw(data.pixels(range(2))).sample
    train.whiten(raw, data, torch.device("cpu"))
    torch.testing.assert_close(raw(data.pixels(range(2))).sample, before, rtol=1e-3, atol=1e-4)


def test_a_broken_run_ends_at_the_same_weights(finished, tmp_path):
    """Stopped after the first save and started anew: bitwise the unbroken run."""
    import shutil

    shutil.copytree(finished / "data", tmp_path / "data")
    (tmp_path / "data" / "latents.npy").unlink()
    (tmp_path / "data" / "depths.npy").unlink()

    class Stop(Exception):  # noqa: N818
        pass

    count = []
    save = torch.save

    def save_and_stop(*arguments, **options):
        save(*arguments, **options)
        count.append(1)

    original = train.log

    def stop_after_save(run, text):
        original(run, text)
        if "vae step 16" in text:
            raise Stop

    torch.save = save_and_stop
    train.log = stop_after_save
    try:
        with pytest.raises(Stop):
            train.Trainer(tmp_path, SMALL, "cpu").vae()
    finally:
        torch.save, train.log = save, original
    assert len(count) == 1  # only the state of step 8 is on disk
    again = train.Trainer(tmp_path, SMALL, "cpu").vae().state_dict()
    whole = train.AutoencoderKL.from_pretrained(finished / "vae").state_dict()
    for key, value in whole.items():
        assert torch.equal(again[key], value), key


def test_training_goes_on_from_a_model(finished, tmp_path):
    """Without a step it is the model that it began with, in half precision; autoencoder and depth net stay."""
    import shutil

    shutil.copytree(finished / "data", tmp_path / "data")
    train.Trainer(tmp_path, replace(SMALL, unet_steps=0), "cpu", finished / "mini").unet()
    before, after = (StableDiffusionDepth2ImgPipeline.from_pretrained(run / "mini") for run in (finished, tmp_path))
    for name in ("unet", "text_encoder", "vae", "depth_estimator"):
        mine = getattr(after, name).state_dict()
        for key, value in getattr(before, name).state_dict().items():
            assert torch.equal(mine[key], value), key


def test_data_goes_on_where_it_stopped(finished, tmp_path):
    train.make_data(tmp_path, replace(SMALL, geometries=3))
    before = train.Data(finished), train.Data(tmp_path)
    assert (before[0].images == before[1].images).all()
    (tmp_path / "data" / "done.json").unlink()
    images = train.np.load(tmp_path / "data" / "images.npy", mmap_mode="r+")
    images[4:] = 0
    images.flush()
    train.make_data(tmp_path, replace(SMALL, geometries=3))
    assert (train.Data(tmp_path).images == before[0].images).all()


def test_the_words_that_name_an_object_are_found(finished):
    """Decoded, the marked tokens are the name; of a mirror image too."""
    tokenizer = train.make_tokenizer(finished)
    data = train.Data(finished)
    texts = [data.words(i, seed, flip=bool(seed % 2)) for i in range(len(data)) for seed in range(8)]
    ids = tokenizer([text for text, _ in texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    (marks, telling), found, places = binding.name_tokens(tokenizer, texts), 0, 0
    for n, (_, names) in enumerate(texts):
        for k in range(train.MAX_OBJECTS):
            marked = tokenizer.decode(ids[n][marks[n, k]].tolist()).split()
            assert "".join(marked) == names.get(k, "").replace(" ", "")
            found += k in names
            place = names.get(k, "").endswith(binding.PLACES)
            if place:
                assert tokenizer.decode(ids[n][telling[n, k]].tolist()).strip() == names[k].split()[-1]
                places += 1
            else:
                assert (telling[n, k] == marks[n, k]).all()
    assert found > 20 and places > 3


def test_a_mirror_image_exchanges_left_and_right():
    text = "a red cube on the left and a blue cube on the right"
    assert train.mirrored(text) == "a red cube on the right and a blue cube on the left"
    assert train.mirrored(train.mirrored(text)) == text


def test_the_looking_loss_by_hand():
    """Uniform attention gives -log(words of the name / all words); attention on the name alone gives 0."""
    places = torch.zeros(2, 32, 32, dtype=torch.int64)
    places[:, 8:24, 8:24] = 1
    tokens = torch.zeros(2, train.MAX_OBJECTS, train.TOKENS, dtype=torch.bool)
    tokens[:, 0, 3:6] = True
    nothing = torch.empty(0)
    uniform = torch.full((2, 4, 256, train.TOKENS), 1 / train.TOKENS)
    expected = -torch.tensor(3 / train.TOKENS + 1e-4).log()
    torch.testing.assert_close(binding.looking_loss([(nothing, uniform)], places, tokens), expected)
    right = torch.zeros_like(uniform)
    right[..., 4] = 1
    assert binding.looking_loss([(nothing, right), (nothing, right[:, :, :64])], places, tokens).abs() < 2e-4
    nameless = binding.looking_loss([(nothing, uniform)], places, torch.zeros_like(tokens))
    assert nameless == 0


def test_facts_agree_with_the_picture(finished):
    """In the picture and in its mirror image the places told are in the order of the objects' middles."""
    data, told = train.Data(finished), 0
    across = torch.arange(train.SIZE // 4, dtype=torch.float)
    for index in range(len(data)):
        scene = train.scene_of(index)
        for flip in (False, True):
            objects = torch.from_numpy(data.objects[index].copy())
            objects = objects.flip(1) if flip else objects
            facts = data.facts(index, flip)
            words = data.words(index, 3, flip)[1]
            for k in range(train.MAX_OBJECTS):
                shape, _, colour = facts[k].tolist()
                if not data.seen[index] >> k & 1:
                    assert shape == colour == binding.UNKNOWN
                    continue
                assert binding.SHAPES[shape] == scene.bodies[k].shape
                named = list(binding.COLOURS)[colour]
                alias = {"yellow": "golden", "white": "silver"}.get(named, named)
                assert k not in words or named in words[k] or alias in words[k]
            groups = {}
            for k, (shape, side, _) in enumerate(facts.tolist()):
                if side != binding.UNKNOWN:
                    middle = across.expand_as(objects)[objects == k + 1].mean().item()
                    alike = [k for k, body in enumerate(scene.bodies) if data.seen[index] >> k & 1]
                    alone = sum(scene.bodies[o].shape == scene.bodies[k].shape for o in alike) == 1
                    groups.setdefault("all" if alone else shape, []).append((side, middle))
            for group in groups.values():
                assert [middle for _, middle in sorted(group)] == sorted(middle for _, middle in group)
                told += len(group)
    assert told > 10


def test_guesses_by_hand():
    """Layers that know nothing are as uncertain as a throw of dice; what is not known counts for nothing."""
    unet = train.UNet2DConditionModel.from_config(train.UNET)
    guesses = binding.Guesses(unet, 128)
    for parameter in guesses.parameters():
        torch.nn.init.zeros_(parameter)
    places = torch.zeros(2, 32, 32, dtype=torch.int64)
    places[:, 8:24, 8:24] = 1
    looks = [(torch.randn(2, count, 160), torch.empty(0)) for count in (256, 64, 64, 64, 64, 256, 256)]
    looks = [
        (q[:, :, : layer.to_q.out_features], look)
        for (q, look), layer in zip(looks, binding.readers(unet), strict=True)
    ]
    tokens = torch.zeros(2, train.MAX_OBJECTS, train.TOKENS, dtype=torch.bool)
    tokens[:, 0, 3:6] = True
    facts = torch.full((2, train.MAX_OBJECTS, 3), binding.UNKNOWN)
    none = guesses(looks, torch.randn(2, train.TOKENS, 128), places, tokens, facts)
    assert [loss.item() for loss in none] == [0, 0, 0]
    facts[:, 0] = torch.tensor([4, 2, 7])
    dice = guesses(looks, torch.randn(2, train.TOKENS, 128), places, tokens, facts)
    torch.testing.assert_close(torch.stack(dice), torch.tensor([5.0, 3.0, 9.0]).log())
    # a colour is told by a name's tokens after its article alone
    context = torch.zeros(2, train.TOKENS, 128)
    context[:, 4:6, 0] = 1
    with torch.no_grad():
        guesses.colours.weight[7, 0] = 50
        guesses.things[0].bias[4] = guesses.things[0].bias[5 + 2] = 50
    sure = guesses(looks, context, places, tokens, facts)
    torch.testing.assert_close(sure[2], torch.tensor(0.0))
    torch.testing.assert_close(sure[0], torch.tensor(5.0).log() * 6 / 7)
