"""Our LoRA files in diffusers, and its files here: the networks' outputs are the same."""

# ruff: noqa: E402, F401, F811  fixtures are imported and given as arguments
import pytest

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import built, pipe, saved

import alchemy
from alchemy import lora
from alchemy.formats.__main__ import main as convert

RANK, ALPHA = 4, 6.0
TARGETS = [*lora.ATTENTION]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
IDS = [[49406, 320, 1929, 49407, *[49407] * 73]]
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "samplers.0.conv")
to_diffusers = diffusers.utils.convert_state_dict_to_diffusers
to_kohya = diffusers.utils.convert_state_dict_to_kohya


def output(unet, latents, t, context, pooled, ids):
    conditions = {"text_embeds": pooled, "time_ids": ids}
    return unet(latents, t, context, added_cond_kwargs=conditions).sample


def hidden_states(encoder):
    return encoder(torch.tensor(IDS), output_hidden_states=True).hidden_states[-2]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 4, 10, 6, generator=generator),
        torch.tensor([7, 801]),
        torch.randn(2, 77, 20, generator=generator),
        torch.randn(2, 10, generator=generator),
        torch.tensor([[40.0, 24, 0, 4, 40, 24]] * 2),
    )


def agree(a, b, base):
    """float32 on both sides, with sums in other orders, which depend on the processor."""
    assert (a - b).norm() <= 3e-6 * b.norm() and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (a - base).norm() > 1e-2 * base.norm()  # and the LoRA has an effect


def add_random(sdxl, endings=TARGETS):
    """A random adapter on the layers of UNet and text encoders whose names end so."""
    assert sdxl.unet and sdxl.text_encoders
    generator = torch.Generator().manual_seed(5)
    for name, layer in lora.layers(sdxl).items():
        if name.startswith(("unet.", "text_encoder")) and name.endswith(tuple(endings)):
            out, *rest = layer.weight.shape
            down = torch.randn(RANK, *rest, generator=generator)
            up = torch.randn(out, RANK, *[1] * len(rest[1:]), generator=generator)
            lora.add_adapter(layer, "default", 0.05 * down, 0.3 * up, ALPHA)


def adapter_config(alpha=ALPHA, targets=TARGETS, **options):
    options |= {"target_modules": targets, "init_lora_weights": False}
    return peft.LoraConfig(r=RANK, lora_alpha=alpha, **options)


def metadata_of(network):
    """peft's configuration of a network as diffusers takes it for the header."""
    config = network.peft_config["default"].to_dict()
    return {key: list(value) if isinstance(value, set) else value for key, value in config.items()}


def contiguous(state):
    return {key: tensor.contiguous() for key, tensor in state.items()}


# Our files there


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_our_files_give_the_same_output_there(saved, inputs, tmp_path, form, scale):
    ours, theirs = alchemy.load(saved, "cpu"), built()
    base = output(theirs.unet, *inputs)
    texts = TEXT_TARGETS if scale == 1 else []
    add_random(ours, [*TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", *texts])
    alchemy.save_lora(ours, tmp_path / "a.safetensors", format=form, metadata={"prompt": "a dog"})
    text_bases = [
        hidden_states(encoder) for encoder in (theirs.text_encoder, theirs.text_encoder_2)
    ]
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="subject")
    theirs.set_adapters("subject", scale)
    lora.set_lora_scale(ours, scale)
    agree(ours.unet(*inputs), output(theirs.unet, *inputs), base)
    if texts:
        encoders = theirs.text_encoder, theirs.text_encoder_2
        for a, b, text_base in zip(ours.text_encoders, encoders, text_bases, strict=True):
            agree(a(torch.tensor(IDS))[0], hidden_states(b), text_base)


@torch.no_grad()
def test_convolutions_in_pefts_names_give_the_same_output_there(saved, inputs, tmp_path):
    ours, theirs = alchemy.load(saved, "cpu"), built()
    add_random(ours, CONVOLUTIONS)
    alchemy.save_lora(ours, tmp_path / "a.safetensors", format="peft")
    base = output(theirs.unet, *inputs)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="subject")
    agree(ours.unet(*inputs), output(theirs.unet, *inputs), base)


@torch.no_grad()
def test_a_merged_folder_is_a_pipeline_there(saved, inputs, tmp_path):
    ours, file, folder = alchemy.load(saved, "cpu"), tmp_path / "a.safetensors", tmp_path / "whole"
    add_random(ours)
    alchemy.save_lora(ours, file)
    merge = "--merge", "--weights", str(saved), "--dtype", "float32"
    convert([str(file), str(folder), *merge])
    merged = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    agree(ours.unet(*inputs), output(merged.unet, *inputs), output(built().unet, *inputs))


# Its files here


@torch.no_grad()
@pytest.mark.parametrize("alpha", ["in the header", "by layer in the header", "nowhere", "kohya's"])
def test_its_files_give_the_same_output_here(saved, inputs, tmp_path, alpha):
    theirs, file = built(), tmp_path / "pytorch_lora_weights.safetensors"
    base = output(theirs.unet, *inputs)
    pattern = {}
    if alpha == "by layer in the header":
        own = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        pattern = {own: 1.5, "attn2.to_k": 9.0}
    torch.manual_seed(0)
    value = ALPHA if "header" in alpha else RANK
    theirs.unet.add_adapter(adapter_config(value, alpha_pattern=pattern), "default")
    state = peft.get_peft_model_state_dict(theirs.unet)
    if alpha == "kohya's":
        named = {f"unet.{key}": tensor for key, tensor in state.items()}
        save_file(contiguous(to_kohya(named)), file)
    else:
        metadata = metadata_of(theirs.unet) if "header" in alpha else None
        save = diffusers.StableDiffusionXLPipeline.save_lora_weights
        save(tmp_path, to_diffusers(state), unet_lora_adapter_metadata=metadata)
    ours = alchemy.load(saved, "cpu")
    alchemy.load_lora(ours, file)
    agree(ours.unet(*inputs), output(theirs.unet, *inputs), base)


@torch.no_grad()
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_its_files_with_text_encoders_give_the_same_output_here(saved, tmp_path, form):
    """transformers 5 names the layers of the first encoder encoder.…, of the second text_model.…"""
    theirs, options, file = built(), {}, tmp_path / "pytorch_lora_weights.safetensors"
    encoders = {"text_encoder": theirs.text_encoder, "text_encoder_2": theirs.text_encoder_2}
    bases = [hidden_states(encoder) for encoder in encoders.values()]
    torch.manual_seed(0)
    for name, encoder in encoders.items():
        alpha = RANK if form == "kohya" else ALPHA
        encoder.add_adapter(adapter_config(alpha, TEXT_TARGETS), "default")
        state = peft.get_peft_model_state_dict(encoder, adapter_name="default")
        options[f"{name}_lora_layers"] = to_diffusers(state) if form == "diffusers" else state
        options[f"{name}_lora_adapter_metadata"] = metadata_of(encoder)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, **options)
    if form == "kohya":
        save_file(contiguous(to_kohya(load_file(file))), file)
    ours = alchemy.load(saved, "cpu")
    alchemy.load_lora(ours, file)
    for a, b, base in zip(ours.text_encoders, encoders.values(), bases, strict=True):
        agree(a(torch.tensor(IDS))[0], hidden_states(b), base)


@torch.no_grad()
@pytest.mark.parametrize("by", ["save_lora_adapter", "peft"])
def test_a_unet_saved_alone_gives_the_same_output_here(saved, inputs, tmp_path, by):
    unet = built().unet
    base = output(unet, *inputs)
    torch.manual_seed(0)
    if by == "peft":
        # alpha goes to adapter_config.json.
        peft.get_peft_model(unet, adapter_config()).save_pretrained(tmp_path)
    else:
        unet.add_adapter(adapter_config(), "default")
        unet.save_lora_adapter(tmp_path, adapter_name="default")
    ours = alchemy.load(saved, "cpu")
    alchemy.load_lora(ours, next(tmp_path.glob("*.safetensors")))
    agree(ours.unet(*inputs), output(unet, *inputs), base)
