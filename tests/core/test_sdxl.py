"""From prompts to Conditioning, and Conditioning itself."""

import warnings

import pytest
import torch

import alchemy
from alchemy.formats import checkpoint
from alchemy.sdxl import SDXL, Conditioning
from helpers.checkpoints import vocabulary_read_once, write_folder  # noqa: F401


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return alchemy.load(write_folder(tmp_path_factory.mktemp("checkpoint")), "cpu", torch.float64)


def test_context_is_both_encoders_side_by_side_and_pooled_the_seconds(sdxl):
    made = sdxl.encode_prompt(["a photo of a dog", "two cats"])
    ids = [torch.tensor([t(p) for p in ("a photo of a dog", "two cats")]) for t in sdxl.tokenizers]
    assert not torch.equal(*ids)  # they pad differently
    first, none = sdxl.text_encoders[0](ids[0])
    second, pooled = sdxl.text_encoders[1](ids[1])
    assert none is None and made.context.shape == (2, 77, 8 + 12) and made.pooled.shape == (2, 10)
    assert (
        torch.equal(made.context[..., :8], first)
        and torch.equal(made.context[..., 8:], second)
        and torch.equal(made.pooled, pooled)
    )


def test_no_prompt_is_zeros_and_an_empty_one_is_encoded(sdxl):
    both = sdxl.encode_prompt([None, ""])
    assert both.context[0].count_nonzero() == 0 and both.pooled[0].count_nonzero() == 0
    assert both.context[1].abs().min() > 0 and both.pooled[1].abs().min() > 0
    assert torch.equal(both.time_ids[0], both.time_ids[1])  # the sizes are told in either case


def test_no_prompt_is_the_empty_one_where_the_checkpoint_says_so(sdxl):
    other = SDXL(
        sdxl.source,
        sdxl.read,
        sdxl.configs,
        sdxl.tokenizers,
        sdxl.schedule,
        sdxl.device,
        sdxl.dtype,
        zeros_for_none=False,
    )
    none, empty = (other.encode_prompt([prompt]) for prompt in (None, ""))
    assert (
        torch.equal(none.context, empty.context)
        and torch.equal(none.pooled, empty.pooled)
        and none.context.abs().min() > 0
    )


def test_a_batch_of_prompts_equals_the_single_ones(sdxl):
    prompts = ["a photo of a dog", None, "", "a very long walk on a very long beach, " * 3, "x"]
    together, alone = (
        sdxl.encode_prompt(prompts),
        Conditioning.cat([sdxl.encode_prompt([p]) for p in prompts]),
    )
    for a, b in zip(together.parts(), alone.parts()):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_lost_words(sdxl):
    with pytest.warns(UserWarning, match="these words are lost: 'zebra quartz'"):
        cut = sdxl.encode_prompt(["word " * 75 + "zebra quartz"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = sdxl.encode_prompt(["word " * 75])
    assert torch.equal(cut.context, fits.context) and torch.equal(cut.pooled, fits.pooled)


def test_time_ids_are_original_crop_target_each_height_first_in_float32(sdxl):
    made = sdxl.encode_prompt(["a", "b"], (832, 1217), original=(833, 2049), crop=(3, 1025))
    assert made.time_ids.dtype == torch.float32  # in bfloat16 833 would be 832
    assert made.time_ids.tolist() == [[833, 2049, 3, 1025, 832, 1217]] * 2


def test_time_ids_without_an_original_are_those_of_a_whole_picture_of_that_size(sdxl):
    assert sdxl.encode_prompt(["a"], (40, 24)).time_ids.tolist() == [[40, 24, 0, 0, 40, 24]]
    assert sdxl.encode_prompt(["a"]).time_ids.tolist() == [
        [32, 32, 0, 0, 32, 32]
    ]  # what the checkpoint was trained at


def test_widths_of_sdxl_base_are_77_x_2048_and_1280():
    def read(name, dtype):
        with torch.device("meta"):
            return checkpoint.BUILD[name](
                checkpoint.CONFIGS[name].from_config(checkpoint.BASE[name])
            ).to(dtype)

    configs = {
        name: kind.from_config(checkpoint.BASE[name]) for name, kind in checkpoint.CONFIGS.items()
    }
    tokenizers = [
        checkpoint.Tokenizer.from_folder(checkpoint.VOCABULARY / name)
        for name in ("tokenizer", "tokenizer_2")
    ]
    base = SDXL("base", read, configs, tokenizers, None, torch.device("meta"), torch.float16)
    made = base.encode_prompt(["a dog", None, "a cat"])
    assert [part.shape for part in made.parts()] == [(3, 77, 2048), (3, 1280), (3, 6)]
    assert [part.dtype for part in made.parts()] == [torch.float16, torch.float16, torch.float32]
    unet = configs["unet"]
    assert (
        unet.cross_attention_dim == 2048
        and unet.projection_class_embeddings_input_dim == 1280 + 6 * unet.addition_time_embed_dim
    )


def test_the_factor_is_pixels_per_latent(sdxl):
    assert sdxl.vae_scale_factor == 4 and tuple(
        sdxl.vae.encode(torch.zeros(1, 3, 32, 24, dtype=torch.float64))[0].shape[2:]
    ) == (8, 6)


def test_conditioning_is_joined_row_by_row():
    parts = torch.randn(3, 77, 4), torch.randn(3, 5), torch.randn(3, 6)
    again = Conditioning.cat(
        [Conditioning(*(p[:1] for p in parts)), Conditioning(*(p[1:] for p in parts))]
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parts(), parts))
