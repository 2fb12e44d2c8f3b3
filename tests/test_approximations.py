"""Approximations: off they change nothing, on they compute what they promise, and what they leave out fits together."""

import json
from contextlib import contextmanager

import pytest
import torch
from evaluate import Evaluation
from PIL import Image

from depthdiff import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler, fast
from depthdiff.approximations import PRESETS, Approximations, DeepCache, TokenMerger, approximated, resolve_preset
from depthdiff.checkpoint.hub import bundled
from depthdiff.cli import main

STEPS = 6


@pytest.fixture
def ddim(pipe):
    """A tiny pipeline whose call for step i is at share (5 - i) / 6 of the timesteps."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def paint(pipe, photo, **options):
    """Run the whole course and return the latents."""
    how = {"strength": 1.0, "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 5.0, **options}
    how.setdefault("generator", torch.Generator().manual_seed(1))
    return pipe("two tigers", photo, **how).images


def state(unet):
    """List the attributes of all modules."""
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in unet.named_modules()}


@contextmanager
def counted(unet):
    """List (rows, whether the deeper part ran) of every call of the UNet, or of a twin, which has the same hooks."""
    calls, down = [], []

    def note(_, args, out):
        calls.append((len(out[0]), bool(down)))
        down.clear()

    handles = [
        unet.down_blocks[0].register_forward_hook(lambda *_: down.append(True)),
        unet.register_forward_hook(note),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler])
def test_what_is_off_changes_no_bit(pipe, small_photo, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = paint(pipe, small_photo)
    for off in (
        {"deep_cache": 1},
        {"token_merging": 0.0},
        {"guidance_interval": (0, 1)},
        {"preset": "fast", "deep_cache": 1, "guidance_interval": (0.0, 1.0), "token_merging": 0},
    ):
        assert torch.equal(paint(pipe, small_photo, **off), expected), off


def test_the_shallow_part_is_that_of_the_whole_network(pipe):
    """Of the same input, a call that reuses the deep part gives what the whole one gives; of another prompt not."""
    x, embeds = torch.randn(2, 5, 11, 15), torch.randn(2, 77, 40)
    fast.disable(pipe)
    with torch.no_grad():
        expected, twin = pipe.unet(x, 500, embeds).sample, approximated(pipe.unet, Approximations(deep_cache=3))
        with counted(pipe.unet) as calls:
            assert torch.equal(twin(x, 500, embeds).sample, expected)
            assert torch.equal(twin(x, torch.tensor(500), encoder_hidden_states=embeds, return_dict=False)[0], expected)
            other = twin(x, 500, embeds + 1).sample
        assert [deep for _, deep in calls] == [True, False, False]
        assert not torch.allclose(other, expected)
        assert not torch.allclose(other, pipe.unet(x, 500, embeds + 1).sample)


def test_the_network_itself_does_not_change(ddim, small_photo):
    """Its modules, their attributes and its result stay what they were; its weights are those that the run uses."""
    unet = ddim.unet
    before = state(unet)
    twin = approximated(unet, Approximations(deep_cache=2, token_merging=0.5))
    expected = paint(ddim, small_photo)
    paint(ddim, small_photo, deep_cache=2, token_merging=0.5)
    assert state(unet) == before
    assert torch.equal(paint(ddim, small_photo), expected)
    mine = dict(twin.named_parameters())
    assert all(mine[name] is parameter for name, parameter in unet.named_parameters())


def test_rows_with_an_interval(ddim, small_photo):
    with counted(ddim.unet) as calls:
        paint(ddim, small_photo, guidance_interval=(0.3, 0.7), num_images_per_prompt=2)
    run = ddim.prepare("two tigers", small_photo, strength=1.0, num_inference_steps=STEPS)
    shares = [number / 1000 for number in run.timesteps.tolist()]
    assert [rows for rows, _ in calls] == [4 if 0.3 <= share <= 0.7 else 2 for share in shares]
    assert {rows for rows, _ in calls} == {2, 4}


def test_outside_the_interval_is_the_prompt_alone(ddim, small_photo):
    """A whole run outside is a run without guidance, which knows no negative prompt."""
    expected = paint(ddim, small_photo, guidance_scale=1.0)
    result = paint(ddim, small_photo, guidance_interval=(1.0, 1.0), negative_prompt="dogs")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(paint(ddim, small_photo), expected, atol=1e-2)


def test_a_replaced_prompt_counts_outside_the_interval_too(ddim, small_photo):
    """From the step on in which the shallow part reads it, and for the deep part when that is computed again."""
    results = []
    for replace in (False, True):
        options = {"strength": 1.0, "num_inference_steps": 5, "guidance_interval": (0.5, 1), "deep_cache": 4}
        run = ddim.prepare("a", small_photo, generator=torch.Generator().manual_seed(1), **options)
        with counted(ddim.unet) as calls:
            for step in ddim.denoise(run):
                if replace and step.index == 2:
                    run.prompt_embeds = run.prompt_embeds.flip(0)
                results.append(step.latents)
        assert calls == [(2, True), (2, False), (1, False), (1, False), (1, True)]
    same = [torch.equal(first, second) for first, second in zip(results[:5], results[5:], strict=True)]
    assert same == [True, True, True, False, False]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("every", [2, 3])
def test_deep_features_are_computed_every_nth_step(pipe, small_photo, scheduler, every):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for _ in range(2):  # a second run starts anew
        with counted(pipe.unet) as calls:
            result = paint(pipe, small_photo, deep_cache=every)
        assert calls == [(2, i % every == 0) for i in range(len(calls))]
    assert len(calls) == STEPS + (scheduler is PNDMScheduler)
    assert not torch.allclose(result, paint(pipe, small_photo), atol=1e-3)
    assert torch.isfinite(result).all()


def test_deep_features_where_guidance_switches(ddim, small_photo):
    """Stopping guidance goes on with half of them; starting it needs the other half, so all are computed."""
    with counted(ddim.unet) as calls:
        paint(ddim, small_photo, deep_cache=3, guidance_interval=(0.4, 0.7))
    assert calls == [(1, True), (2, True), (2, False), (1, False), (1, True), (1, False)]


def test_the_kept_half_is_the_prompts(pipe):
    """Rows and size of the call decide: what was kept for another batch or size is computed anew."""
    x, embeds = torch.randn(1, 5, 8, 8), torch.randn(2, 77, 40)
    twin = approximated(pipe.unet, Approximations(deep_cache=9))
    with torch.no_grad(), counted(pipe.unet) as calls:
        twin(x.expand(2, -1, -1, -1), 500, embeds)
        alone = twin(x, 500, embeds[1:]).sample
        torch.testing.assert_close(alone, pipe.unet(x, 500, embeds[1:]).sample, rtol=0, atol=1e-5)
        for batch, size in ((1, 8), (2, 8), (2, 12), (3, 12), (3, 12)):
            twin(torch.randn(batch, 5, 8, size), 500, torch.randn(batch, 77, 40))
    own = [(2, True), (1, False), (1, True)]  # the third is that of the UNet itself
    assert calls == [*own, (1, False), (2, True), (2, True), (3, True), (3, False)]


def test_deep_features_are_of_one_object(pipe):
    """Two of them on one UNet do not meet."""
    x, embeds = torch.randn(1, 5, 8, 8), torch.randn(1, 77, 40)
    fast.disable(pipe)
    first, second = (approximated(pipe.unet, Approximations(deep_cache=2)) for _ in range(2))
    with torch.no_grad():
        first(x, 500, embeds)
        assert torch.equal(second(x + 1, 500, embeds).sample, pipe.unet(x + 1, 500, embeds).sample)
    assert DeepCache(2).features is None


def test_runs_do_not_disturb_each_other(ddim, small_photo):
    """Two runs in turns on one pipeline, of different approximations, end where each ends alone."""
    all_options = ({"preset": "fast", "token_merging": 0.5}, {"deep_cache": 2}, {})

    def prepare(options):
        how = {"strength": 1.0, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(3)}
        return ddim.prepare("a", small_photo, **how, **options)

    alone = []
    for options in all_options:
        run = prepare(options)
        list(ddim.denoise(run))
        alone.append(run.latents)
    runs = [prepare(options) for options in all_options]
    for _ in zip(*(ddim.denoise(run) for run in runs), strict=True):
        pass
    for run, expected in zip(runs, alone, strict=True):
        torch.testing.assert_close(run.latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9), (2, 3), (64, 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_merging_makes_groups(size, ratio):
    """Every group has a token; as many tokens go as asked for, if each 2x2 and the remainder leave so many."""
    height, width = size
    total, cells = height * width, (height // 2) * (width // 2)
    groups = TokenMerger(ratio).group(torch.randn(3, total, 6), torch.Size(size))
    if int(ratio * total) == 0:
        assert groups is None
        return
    assert groups.total == total - min(int(ratio * total), total - cells)
    assert all(row.unique().tolist() == list(range(groups.total)) for row in groups.group)


def test_a_merged_token_is_the_mean_of_its_group():
    tokens = torch.randn(2, 48, 5, dtype=torch.double)
    groups = TokenMerger(0.6).group(tokens, torch.Size((6, 8)))
    merged, back = groups.merge(tokens), groups.unmerge(groups.merge(tokens))
    for b in range(2):
        for number in range(groups.total):
            torch.testing.assert_close(merged[b, number], tokens[b, groups.group[b] == number].mean(0))
    torch.testing.assert_close(back.mean(1), tokens.mean(1))  # what is replaced by means keeps the mean
    torch.testing.assert_close(groups.merge(back), merged)  # and merges to the same again


def test_equal_tokens_come_back():
    tokens = torch.randn(2, 1, 5, dtype=torch.double).expand(2, 30, 5)
    groups = TokenMerger(0.75).group(tokens, torch.Size((5, 6)))
    torch.testing.assert_close(groups.unmerge(groups.merge(tokens)), tokens)


def test_the_most_alike_merge():
    """Each 2x2 is of its own direction but for one token that is of none: all but these go, and nothing is lost."""
    tokens = torch.eye(16, dtype=torch.double).view(4, 4, 16).repeat_interleave(2, 0).repeat_interleave(2, 1)
    tokens = tokens.reshape(1, 64, 16)
    groups = TokenMerger(0.75).group(tokens, torch.Size((8, 8)))
    assert groups.total == 16
    torch.testing.assert_close(groups.unmerge(groups.merge(tokens)), tokens)
    torch.testing.assert_close(groups.merge(tokens).sum(1), torch.ones(1, 16, dtype=torch.double))


def test_tokens_that_cannot_merge():
    for ratio, size in ((0.75, (1, 9)), (0.75, (9, 1)), (0.01, (4, 4)), (0.0, (8, 8))):
        assert TokenMerger(ratio).group(torch.randn(1, size[0] * size[1], 3), torch.Size(size)) is None


def test_merging_draws_alike_for_a_batch_and_in_every_run():
    one, size = torch.randn(1, 64, 4), torch.Size((8, 8))
    first, second = TokenMerger(0.5), TokenMerger(0.5)
    both = first.group(one.expand(2, -1, -1), size)
    assert torch.equal(both.group[0], both.group[1])
    assert torch.equal(both.group[:1], second.group(one, size).group)
    assert not torch.equal(first.group(one, size).group, both.group[:1]), "every call draws anew"


def test_merging_is_in_the_finest_level_that_attends(pipe):
    """Self-attention there has fewer tokens, elsewhere all of them."""
    x, context, seen = torch.randn(1, 5, 12, 16), torch.randn(1, 77, 40), {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1.to_q"):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].shape[1]}))
    with torch.no_grad():
        approximated(pipe.unet, Approximations(token_merging=0.5))(x, 500, context)
    finest = {name for name in seen if name.startswith(("down_blocks.0", "up_blocks.2"))}
    assert len(finest) == 3
    assert {seen[name] for name in finest} == {96}
    assert {seen[name] for name in seen.keys() - finest} == {48, 12}


@pytest.mark.parametrize("form", ["sdpa", "efficient", "sliced", "math"])
def test_merging_with_every_form_of_attention(ddim, small_photo, form):
    expected = paint(ddim, small_photo, token_merging=0.5, num_inference_steps=2)
    ddim.set_attention(form)
    result = paint(ddim, small_photo, token_merging=0.5, num_inference_steps=2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (88, 120), (72, 40), (8, 24)])
def test_all_three_at_any_size(ddim, photo, size):
    """The same picture twice, the batch's picture alone, and another one than without. Observed: at most 4e-5.

    Not so for every seed: where two tokens are nearly as much alike as others, rounding decides which of them merge.
    """
    image = photo.resize(size[::-1])
    options = {"guidance_interval": (0.3, 0.8), "deep_cache": 2, "token_merging": 0.6}
    first = paint(ddim, image, **options)
    assert first.shape[2:] == (size[0] // 8, size[1] // 8)
    assert torch.equal(paint(ddim, image, **options), first)
    batch = paint(
        ddim,
        [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)],
        generator=[torch.Generator().manual_seed(i) for i in (3, 2)],
        **options,
    )
    alone = paint(ddim, image, generator=[torch.Generator().manual_seed(3)], **options)
    torch.testing.assert_close(batch[:1], alone, rtol=0, atol=1e-3)
    assert not torch.allclose(first, paint(ddim, image), atol=1e-3)


def test_a_callback_may_end_guidance(ddim, small_photo):
    """As diffusers' guide shows: scale 0 and the prompt's half from a step on, of the deep features too."""

    def callback(pipeline, index, timestep, tensors):
        if index == 2:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            tensors["depth_mask"] = tensors["depth_mask"].chunk(2)[-1]
        return tensors

    names = ["latents", "prompt_embeds", "depth_mask"]
    with counted(ddim.unet) as calls:
        paint(
            ddim,
            small_photo,
            deep_cache=4,
            guidance_interval=(0.2, 1.0),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
        )
    assert calls == [(2, True), (2, False), (2, False), (1, False), (1, True), (1, False)]


def test_presets():
    assert resolve_preset(None) == Approximations()
    assert resolve_preset("fast") == PRESETS["fast"] != Approximations()
    assert resolve_preset("fast", deep_cache=7) == Approximations(
        PRESETS["fast"].guidance_interval, 7, PRESETS["fast"].token_merging
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance_interval": 0.5}, ValueError, "guidance_interval must be two numbers, low and high, got 0.5"),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, ValueError, "must be two numbers"),
        ({"guidance_interval": (0.8, 0.2)}, ValueError, r"low <= high, got \(0.8, 0.2\)"),
        ({"guidance_interval": (-0.1, 1)}, ValueError, r"guidance_interval must be in \[0, 1\], got -0.1"),
        ({"guidance_interval": (0, 981)}, ValueError, r"guidance_interval must be in \[0, 1\], got 981"),
        ({"guidance_interval": ("a", 1)}, TypeError, "guidance_interval must be a number, got str 'a'"),
        ({"deep_cache": 0}, ValueError, "deep_cache must be at least 1, got 0"),
        ({"deep_cache": 2.5}, TypeError, "deep_cache must be an int, got float 2.5"),
        ({"deep_cache": True}, TypeError, "deep_cache must be an int, got bool True"),
        ({"token_merging": 0.8}, ValueError, r"token_merging must be in \[0, 0.75\], got 0.8"),
        ({"token_merging": float("nan")}, ValueError, "token_merging must be in"),
        ({"preset": "faster"}, ValueError, "preset must be one of fast, or None, got 'faster'"),
    ],
)
def test_wrong_values_are_named_before_any_work(pipe, small_photo, options, error, message):
    pipe.text_encoder = pipe.vae = pipe.depth_estimator = None
    for call in (pipe, pipe.prepare):
        with pytest.raises(error, match=message):
            call("two tigers", small_photo, **options)


def test_the_command(tmp_path, tiny_folder, small_photo, capsys):
    small_photo.save(tmp_path / "photo.png")
    words = ["two tigers", str(tmp_path / "photo.png"), "--model", str(tiny_folder), "--steps", "3", "--seed", "1"]
    assert main([*words, "--preset", "fast", "--guidance-interval", "0.1", "0.9", "--token-merging", "0.5"]) == 0
    with Image.open(tmp_path / "photo-depthdiff.png") as picture:
        how = json.loads(picture.text["depthdiff"])
    assert how["guidance_interval"] == [0.1, 0.9]
    assert (how["deep_cache"], how["token_merging"]) == (PRESETS["fast"].deep_cache, 0.5)
    assert main([*words, "--deep-cache", "0"]) == 1
    assert "deep_cache must be at least 1, got 0" in capsys.readouterr().err


def test_the_bundled_model_paints_nearly_the_same():
    """Fast pictures differ from the default's far less than pictures of another seed do."""
    evaluation = Evaluation(bundled(), 2)

    def painted(seed, **options):
        how = {"strength": 1.0, "num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt", **options}
        generator = torch.Generator().manual_seed(seed)
        photos = evaluation.photos(evaluation.shown)
        return evaluation.pipe(evaluation.captions, photos, generator=generator, **how).images

    expected, fast, other = painted(0), painted(0, preset="fast"), painted(1)
    assert (fast - expected).norm() < 0.6 * (other - expected).norm()
    difference = evaluation.scores(expected)["geometry"] - evaluation.scores(fast)["geometry"]
    assert difference < 0.05
