"""Checkpoints that today's diffusers and transformers save load here, and draw what their own pipeline draws."""

import warnings
from pathlib import Path

import pytest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers.checkpoints import CONFIGS, SCHEDULER, SHIPPED  # noqa: E402

import alchemy  # noqa: E402

PROMPT, SIZE, STEPS, GUIDANCE = (
    "a photo of a dog, 2 cats and a hat!",
    (40, 24),
    4,
    5.0,
)  # latents of 10 x 6: odd from the second level on


def built():
    """A tiny pipeline of random weights, every parameter drawn."""

    def text(name, cls):
        config = {k: v for k, v in CONFIGS[name].items() if k != "architectures"}
        return cls(transformers.CLIPTextConfig(**config))

    torch.manual_seed(0)
    parts = dict(
        unet=diffusers.UNet2DConditionModel(
            **{k: v for k, v in CONFIGS["unet"].items() if k[0] != "_"}
        ),
        vae=diffusers.AutoencoderKL(**{k: v for k, v in CONFIGS["vae"].items() if k[0] != "_"}),
        text_encoder=text("text_encoder", transformers.CLIPTextModel),
        text_encoder_2=text("text_encoder_2", transformers.CLIPTextModelWithProjection),
    )
    for network in parts.values():
        for key, p in network.named_parameters():
            p.data = (torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)) + (
                p.ndim == 1 and key.endswith("weight")
            )
    scheduler = diffusers.EulerDiscreteScheduler(
        **{k: v for k, v in SCHEDULER.items() if k[0] != "_"}
    )
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(SHIPPED / name)
        for name in ("tokenizer", "tokenizer_2")
    ]
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        scheduler=scheduler,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        add_watermarker=False,
    )


def drawn_there(pipe, noise, **options):
    """(latents, picture (3,H,W) in [0,1]) of the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    made = [
        pipe(
            PROMPT,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise.clone(),
            output_type=kind,
            **options,
        ).images[0]
        for kind in ("latent", "pt")
    ]
    return made


def drawn_here(sdxl, noise, negative=None):
    told, untold = sdxl.encode_prompt([PROMPT], SIZE), sdxl.encode_prompt([negative], SIZE)
    *_, step = alchemy.denoise(
        sdxl, noise, told, untold, sampler="euler", steps=STEPS, guidance=GUIDANCE
    )
    return step.x_prev[0], (sdxl.vae.decode(step.x_prev)[0] / 2 + 0.5).clamp(0, 1)


def agree(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and b.std() > 0.02  # and there is something to compare
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1) and (
            a - b
        ).norm() <= tolerance * b.norm()


@pytest.fixture(scope="module")
def noise():
    return alchemy.noise((1, 4, 10, 6), [11])


@pytest.fixture(scope="module")
def pipe():
    return built()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def test_a_saved_pipeline_draws_the_same_here(pipe, saved, noise):
    sdxl = alchemy.load(saved, "cpu")
    agree(drawn_here(sdxl, noise), drawn_there(pipe, noise))
    agree(drawn_here(sdxl, noise, "ugly"), drawn_there(pipe, noise, negative_prompt="ugly"))
    agree(drawn_here(sdxl, noise, ""), drawn_there(pipe, noise, negative_prompt=""))


def test_every_saved_tensor_is_loaded_to_the_bit(pipe, saved):
    sdxl = alchemy.load(saved, "cpu")
    for name in CONFIGS:
        ours, theirs = sdxl.network(name).state_dict(), getattr(pipe, name).state_dict()
        theirs = {k: t for k, t in theirs.items() if not k.endswith("position_ids")}
        assert len(ours) == len(theirs)
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs.get(key, theirs.get(key.removeprefix("text_model."))))


def test_the_tokenizers_are_saved_as_tokenizer_json_alone_and_give_the_same_ids(pipe, saved):
    sdxl = alchemy.load(saved, "cpu")
    for ours, theirs, name in zip(
        sdxl.tokenizers, (pipe.tokenizer, pipe.tokenizer_2), ("tokenizer", "tokenizer_2")
    ):
        assert (saved / name / "tokenizer.json").exists() and not (
            saved / name / "vocab.json"
        ).exists()
        assert (
            ours(PROMPT)
            == theirs(PROMPT, padding="max_length", max_length=77, truncation=True).input_ids
        )


def test_a_pipeline_saved_as_fp16_variant_draws_the_same_here(noise, tmp_path):
    half = built().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert not [p for p in tmp_path.rglob("*.safetensors") if ".fp16." not in p.name]
    sdxl = alchemy.load(tmp_path, "cpu", torch.float32)
    agree(drawn_here(sdxl, noise), drawn_there(half.to(torch.float32), noise))
    assert alchemy.load(tmp_path, "cpu", torch.float16).unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_saved_in_shards_draws_the_same_here(pipe, noise, tmp_path, variant):
    pipe.save_pretrained(tmp_path, max_shard_size="90KB", variant=variant)
    for name in CONFIGS:
        files = [p.name for p in (tmp_path / name).glob("*.safetensors")]
        assert len(files) > 1 and all(
            "-of-" in f and bool(variant) == (".fp16" in f) for f in files
        )
    agree(drawn_here(alchemy.load(tmp_path, "cpu"), noise), drawn_there(pipe, noise))
    Path(next((tmp_path / "unet").glob("*-00002-of-*"))).unlink()
    with pytest.raises(ValueError, match="-00002-of-"):
        alchemy.load(tmp_path, "cpu")


def test_a_saved_vae_alone_serves_as_vae(pipe, saved, noise, tmp_path):
    vae = built().vae
    for p in vae.parameters():
        p.data *= 1.1
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    ours = drawn_here(alchemy.load(saved, "cpu", vae=tmp_path), noise)
    whole = diffusers.StableDiffusionXLPipeline(
        **(pipe.components | {"vae": vae}), add_watermarker=False
    )
    agree(ours, drawn_there(whole, noise))


def test_the_schedule_is_read_as_the_pipeline_saves_it(saved, pipe, noise, tmp_path):
    other = dict(prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **other)
    other = diffusers.StableDiffusionXLPipeline(
        **(pipe.components | {"scheduler": scheduler}), add_watermarker=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path)
    agree(drawn_here(alchemy.load(tmp_path, "cpu"), noise), drawn_there(other, noise))
