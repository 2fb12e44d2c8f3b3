"""What all tests share: random pipelines, checkpoints on disk, and a photograph."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from random_checkpoint import build_pipeline

DATA = Path(__file__).parent / "data"
SLOW = (
    *("test_mini_training.py", "test_training.py", "test_kills.py", "test_second_device.py", "test_compile.py"),
    *("test_cuda_graphs.py", "test_damaged_folders.py", "test_damaged_single_files.py", "test_fuzz_files.py"),
    *("test_gpu_check.py", "test_benchmark.py", "test_calls.py", "test_hub_trouble.py", "test_hub_answers.py"),
    *("test_convolution.py", "test_tiled.py", "test_disks.py", "test_forks.py", "test_mini.py"),
    "parity/test_pictures.py::test_same_picture[small-",
    "parity/test_pictures.py::test_folders_go_back_and_forth[small-",
    "parity/test_adapters.py::test_every_spelling_at_several_scales[attn processor",
    "parity/test_adapters.py::test_every_spelling_at_several_scales[lora",
    *(
        f"parity/test_adapters.py::test_textual_inversion[{form}-1]"
        for form in ("diffusers", "tensor", "automatic1111")
    ),
    "parity/test_adapters.py::test_textual_inversion[diffusers .bin",
    "parity/test_adapters.py::test_textual_inversion[automatic1111 safetensors",
    "parity/test_pipeline_contract.py::test_a_compiled_unet_paints",
    "parity/test_tokenizer.py::test_tokens_and_text_equal",
    *(f"test_arguments.py::test_every_argument_is_handled[load_{what}" for what in ("one_", "network_", "pipeline")),
    "field/test_programs.py::test_program[",
    "parity/test_research.py::test_recipe",
    *("test_hosts.py::test_memory_is_flat", "test_hosts.py::test_schedulers_and_scales"),
    *("test_consoles.py::test_narrow_code_pages", "test_consoles.py::test_no_colours"),
    "parity/test_adapters.py::test_raw_peft_folders",
    "parity/test_compatibility.py",
    *("test_old_folders.py::test_the_same_picture", "test_serving.py::test_concurrent_requests"),
    "test_single_file.py::test_what_is_refused",
    *(f"test_state.py::test_threads_with{rest}" for rest in ("out_adapters", "_scales_of_their_own")),
    "parity/test_adapters.py::test_two_at_once",
    *(f"parity/test_solvers.py::test_{what}" for what in ("all_trajectories", "pictures_of_every", "a_checkpoint")),
    *(f"parity/test_solvers.py::test_{what}" for what in ("half_precision", "configs_between_any_two")),
    *("test_solver_purity.py", "test_solvers.py::test_stochastic_solvers"),
    "test_convert.py::test_memory_is_that_of_one_tensor",
    "test_sharing.py::test_a_compiled_unet_takes",
    "test_single_file.py::test_partial_files_load",
    "test_state.py::test_calls_take_turns_where_layers_move",
    "test_approximations.py::test_the_bundled_model_paints_nearly_the_same",
    "test_hub.py::test_moved_repository",
    "test_hub.py::test_only_what_is_needed_is_fetched",
    "test_imports.py::test_modules_can_be_asked_for",
    "test_loading.py::test_the_weights_are_in_memory_once",
    "test_old_folders.py::test_half_precision",
    "test_precision.py::test_what_overflows_works_in_float32",
    *("test_saving.py::test_killed_between_any_two_steps", "test_saving.py::test_a_component_whose_save_was_killed"),
    *("test_serving.py::test_over_a_network", "test_hosts.py::test_memory_is_flat[1000"),
    "test_serving.py::test_concurrent_requests_give_what_each_gives_alone[100",
    *(
        f"test_hosts.py::test_{what}"
        for what in ("a_pipeline_goes_to", "schedulers_and_scales_of_their_own_in_threads[a")
    ),
    "test_state.py::test_interrupted_at_any_line",
    *(f"test_call_options.py::test_{what}" for what in ("pairs_that_work", "the_same_in_a_loop", "a_saved_pipeline")),
    *(f"test_windows.py::test_multidiffusion[windows{i}" for i in (2, 3)),
    *("test_windows.py::test_with_a_photo", "test_windows.py::test_pictures_have_their_size"),
    *(
        f"test_seamless.py::test_{what}"
        for what in ("no_seam", "threads_do", "it_is_off_afterwards[False", "networks_of")
    ),
    *(f"test_masks.py::test_a_white_mask_changes_nothing[{name}" for name in ("euler", "dpmpp_2m")),
    *(
        f"test_masks.py::test_{what}[{name}"
        for what in ("the_kept_part_is_the_photo", "a_loop_of_one_s_own_does_the_same")
        for name in ("ddpm", "lms", "euler-", "dpm2-", "dpm2_a", "dpmpp_2m-", "dpmpp_2s", "deis", "unipc", "lcm", "tcd")
    ),
    *(f"test_guidance.py::test_each_picture_has_its_own_scale[{kind}" for kind in ("tuple", "tensor", "array")),
    *(f"test_hires.py::test_{what}" for what in ("enlarge_in_a_loop", "strength_nought")),
    *(f"test_depth_only.py::test_diffusers_fed_with_noise[{name}" for name in ("ddim", "dpmpp_2m")),
    *(f"test_depth_only.py::test_a_loop_of_one_s_own[{name}" for name in ("ddim", "euler-", "lms")),
    *("test_interruption.py::test_another_thread", "test_interruption.py::test_a_callback_stops_no_other"),
    *(f"test_previews.py::test_{what}" for what in ("the_command_writes", "half_precision")),
    *(f"parity/test_depth_estimators.py::test_{what}" for what in ("pictures_by_the_estimator", "the_pages_programs")),
    "test_depth_files.py::test_without_the_extra",
    *("test_redo.py", "test_command_options.py"),
    *(
        f"parity/test_pictures.py::test_{what}"
        for what in ("a_callback_may_give", "callbacks_see_and_change_the_same[small", "encode_prompt[small")
    ),
    *(
        "parity/test_pictures.py::test_folders_go_back_and_forth[tiny-theirs",
        "parity/test_pictures.py::test_same_picture[tiny-50",
    ),
    *("test_consoles.py::test_in_a_notebook", "fast/test_switch.py::test_networks_are_traced"),
    *("field/test_components.py::test_a_compiled_unet", "field/test_components.py::test_accelerates_prepare"),
    *(f"test_hub.py::test_{what}" for what in ("a_server_in_trouble", "gated_repository", "no_such_repository")),
    *("test_inspect.py::test_no_tensor_is_read", "parity/test_autoencoder_tiny.py::test_as_the_autoencoder"),
    *("test_pipeline.py::test_an_exported_unet", "parity/test_pipeline_contract.py::test_eight_threads"),
    *("parity/test_pipeline_contract.py::test_autocast", "fast/test_guidance.py::test_a_unet_that_was_changed"),
    *("parity/test_peft.py", "test_layerwise.py", "test_own_memory.py", "test_approximations.py::test_what_is_off"),
    *(f"parity/test_solvers.py::test_{what}" for what in ("some_trajectories[", "both_forms_of_callbacks")),
    *(f"test_hub.py::test_{what}" for what in ("a_repository_that_lacks", "overrides_are_not", "offline_without")),
    *(f"test_serving.py::test_{what}" for what in ("health_answers", "a_client_that_leaves", "bad_requests")),
    *("parity/test_schedulers.py::test_trajectories_equal[LMSD", "parity/test_pictures.py::test_legacy_callback[small"),
    *(f"test_saving.py::test_{what}" for what in ("saving_over_the_folder", "two_processes", "a_failure_leaves")),
    *("test_arguments.py::test_dtypes_by_name", "test_command_places.py::test_streams_that_are_closed"),
    "parity/test_pipeline_contract.py::test_under_autocast",
)
"""Files and tests, as the names of tests begin below a folder, that take long; CI runs them all."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU where there is none, and long random tests unless `-m fuzz` asks for them; say so."""
    for item in items:
        if any(f"/{name}" in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("fuzz") and "fuzz" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes; a share of it runs; -m fuzz runs the whole"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photograph, 600x400."""
    with Image.open(DATA / "coffee.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def small_photo(photo) -> Image.Image:
    """The same at 120x88: not square, and no multiple of 64."""
    return photo.resize((120, 88))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights with all widths different, written by us."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    build_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def pipe():
    """A fresh tiny pipeline without a progress bar."""
    pipeline = build_pipeline("tiny")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def seed():
    """Make every test's random numbers its own, whatever ran before."""
    torch.manual_seed(0)
