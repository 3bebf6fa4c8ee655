"""Checkpoints that diffusers and transformers save load here, and give their pipeline's outputs."""

import warnings

import pytest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers.checkpoints import CONFIGS, SCHEDULER, SHIPPED, refused  # noqa: E402

import alchemy  # noqa: E402

PROMPT = "a photo of a dog, 2 cats and a hat!"
SIZE, STEPS, GUIDANCE = (40, 24), 4, 5.0  # latents of 10 x 6: odd from the second level on


def public(config):
    return {key: value for key, value in config.items() if key[0] != "_"}


def built():
    """A tiny pipeline in which every parameter is random."""
    texts = []
    for name in ("text_encoder", "text_encoder_2"):
        config = {key: value for key, value in CONFIGS[name].items() if key != "architectures"}
        texts.append(transformers.CLIPTextConfig(**config))
    torch.manual_seed(0)
    networks = {
        "unet": diffusers.UNet2DConditionModel(**public(CONFIGS["unet"])),
        "vae": diffusers.AutoencoderKL(**public(CONFIGS["vae"])),
        "text_encoder": transformers.CLIPTextModel(texts[0]),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(texts[1]),
    }
    for network in networks.values():
        for key, p in network.named_parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            is_norm = p.ndim == 1 and key.endswith("weight")
            p.data = scale * torch.randn_like(p) + is_norm
    tokenizers = {}
    for name in ("tokenizer", "tokenizer_2"):
        tokenizers[name] = transformers.CLIPTokenizer.from_pretrained(SHIPPED / name)
    scheduler = diffusers.EulerDiscreteScheduler(**public(SCHEDULER))
    return pipeline(**networks, **tokenizers, scheduler=scheduler)


def pipeline(**components):
    return diffusers.StableDiffusionXLPipeline(**components, add_watermarker=False)


def their_outputs(pipe, noise, **options):
    """(latents, image (3,H,W) in [0,1]) of the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    options |= {"height": SIZE[0], "width": SIZE[1]}
    options |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    outputs = []
    for kind in ("latent", "pt"):
        output = pipe(PROMPT, latents=noise.clone(), output_type=kind, **options)
        outputs.append(output.images[0])
    return outputs


def our_outputs(sdxl, noise, negative=None):
    cond, uncond = sdxl.encode_prompt([PROMPT], SIZE), sdxl.encode_prompt([negative], SIZE)
    options = {"sampler": "euler", "steps": STEPS, "guidance": GUIDANCE}
    *_, step = alchemy.denoise(sdxl, noise, cond, uncond, **options)
    return step.x_prev[0], (sdxl.vae.decode(step.x_prev)[0] / 2 + 0.5).clamp(0, 1)


def agree(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and b.std() > 0.02  # and there is something to compare
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)
        assert (a - b).norm() <= tolerance * b.norm()


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


@pytest.mark.parametrize("negative", [None, "ugly", ""])
def test_a_saved_pipeline_gives_the_same_outputs_here(pipe, saved, noise, negative):
    options = {} if negative is None else {"negative_prompt": negative}
    ours = our_outputs(alchemy.load(saved, "cpu"), noise, negative)
    agree(ours, their_outputs(pipe, noise, **options))


def test_every_saved_tensor_is_loaded_to_the_bit(pipe, saved):
    sdxl = alchemy.load(saved, "cpu")
    for name in CONFIGS:
        ours, theirs = sdxl.network(name).state_dict(), getattr(pipe, name).state_dict()
        theirs = {k: t for k, t in theirs.items() if not k.endswith("position_ids")}
        assert len(ours) == len(theirs)
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs.get(key, theirs.get(key.removeprefix("text_model."))))


@pytest.mark.parametrize("n, name", [(0, "tokenizer"), (1, "tokenizer_2")])
def test_tokenizers_are_saved_as_tokenizer_json_alone_and_give_the_same_ids(pipe, saved, n, name):
    assert (saved / name / "tokenizer.json").exists()
    assert not (saved / name / "vocab.json").exists()
    theirs = getattr(pipe, name)(PROMPT, padding="max_length", max_length=77, truncation=True)
    assert alchemy.load(saved, "cpu").tokenizers[n](PROMPT) == theirs.input_ids


def test_a_pipeline_saved_as_fp16_variant_gives_the_same_outputs_here(noise, tmp_path):
    half = built().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert not [p for p in tmp_path.rglob("*.safetensors") if ".fp16." not in p.name]
    sdxl = alchemy.load(tmp_path, "cpu", torch.float32)
    agree(our_outputs(sdxl, noise), their_outputs(half.to(torch.float32), noise))
    assert alchemy.load(tmp_path, "cpu", torch.float16).unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_saved_in_shards_gives_the_same_outputs_here(pipe, noise, tmp_path, variant):
    pipe.save_pretrained(tmp_path, max_shard_size="90KB", variant=variant)
    for name in CONFIGS:
        files = [p.name for p in (tmp_path / name).glob("*.safetensors")]
        assert len(files) > 1 and all("-of-" in file for file in files)
        assert all((".fp16" in file) == bool(variant) for file in files)
    agree(our_outputs(alchemy.load(tmp_path, "cpu"), noise), their_outputs(pipe, noise))
    next((tmp_path / "unet").glob("*-00002-of-*")).unlink()
    refused(lambda: alchemy.load(tmp_path, "cpu"), "-00002-of-")


def test_a_saved_vae_alone_serves_as_vae(pipe, saved, noise, tmp_path):
    vae = built().vae
    for p in vae.parameters():
        p.data *= 1.1
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    ours = our_outputs(alchemy.load(saved, "cpu", vae=tmp_path), noise)
    agree(ours, their_outputs(pipeline(**(pipe.components | {"vae": vae})), noise))


def test_the_schedule_is_read_as_the_pipeline_saves_it(saved, pipe, noise, tmp_path):
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **changes)
    other = pipeline(**(pipe.components | {"scheduler": scheduler}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path)
    agree(our_outputs(alchemy.load(tmp_path, "cpu"), noise), their_outputs(other, noise))
