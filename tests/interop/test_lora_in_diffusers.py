"""Our LoRA files in diffusers, and its files here: the UNet's output is the same."""

import pytest

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_checkpoints import built, pipe, saved  # noqa: E402, F401

import alchemy  # noqa: E402
from alchemy import lora  # noqa: E402
from alchemy.formats.__main__ import main as convert  # noqa: E402

RANK, ALPHA = 4, 6.0
TARGETS = [*lora.ATTENTION]


def output(unet, latents, t, context, pooled, ids):
    return unet(
        latents, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
    ).sample


@pytest.fixture
def inputs():
    made = torch.Generator().manual_seed(3)
    ids = torch.tensor([[40.0, 24, 0, 4, 40, 24]] * 2)
    return (
        torch.randn(2, 4, 10, 6, generator=made),
        torch.tensor([7, 801]),
        torch.randn(2, 77, 20, generator=made),
        torch.randn(2, 10, generator=made),
        ids,
    )


@pytest.fixture
def ours(saved):
    sdxl = alchemy.load(saved, "cpu")
    alchemy.add_lora(sdxl, RANK, ALPHA)
    for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
        layer.lora["default"].up.data = 0.1 * torch.randn(
            layer.out_features, RANK, generator=torch.Generator().manual_seed(i)
        )
    return sdxl


def agree(a, b, base):
    """float32 on both sides, sums in other orders: how the rounding of a single number falls hangs on the processor."""
    assert (a - b).norm() <= 3e-6 * b.norm() and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (a - base).norm() > 1e-2 * base.norm()  # and the LoRA does something


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_our_files_draw_the_same_there(ours, inputs, tmp_path, form, scale):
    alchemy.save_lora(
        ours,
        tmp_path / "lora.safetensors",
        format=form,
        metadata={"prompt": "a photo of a sks dog"},
    )
    pipe = built()
    base = output(pipe.unet, *inputs)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="subject")
    pipe.set_adapters("subject", scale)
    for layer in lora.attention_layers(ours.unet).values():
        layer.lora["default"].scale = scale
    agree(ours.unet(*inputs), output(pipe.unet, *inputs), base)


@torch.no_grad()
@pytest.mark.parametrize(
    "told", ["alpha in the header", "alpha by layer in the header", "no word on alpha"]
)
def test_its_files_draw_the_same_here(saved, inputs, tmp_path, told):
    pipe = built()
    base = output(pipe.unet, *inputs)
    alpha = RANK if told == "no word on alpha" else ALPHA
    pattern = (
        {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1.5, "attn2.to_k": 9.0}
        if "by layer" in told
        else {}
    )
    torch.manual_seed(0)
    pipe.unet.add_adapter(
        peft.LoraConfig(
            r=RANK,
            lora_alpha=alpha,
            target_modules=TARGETS,
            init_lora_weights=False,
            alpha_pattern=pattern,
        ),
        "default",
    )
    metadata = (
        None
        if told == "no word on alpha"
        else {
            k: list(v) if isinstance(v, set) else v
            for k, v in pipe.unet.peft_config["default"].to_dict().items()
        }
    )
    state = diffusers.utils.convert_state_dict_to_diffusers(
        peft.get_peft_model_state_dict(pipe.unet)
    )
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
    )
    sdxl = alchemy.load(saved, "cpu")
    alchemy.load_lora(sdxl, tmp_path / "pytorch_lora_weights.safetensors")
    agree(sdxl.unet(*inputs), output(pipe.unet, *inputs), base)


@torch.no_grad()
def test_its_conversion_to_kohyas_names_draws_the_same_here(saved, inputs, tmp_path):
    pipe = built()
    base = output(pipe.unet, *inputs)
    torch.manual_seed(0)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    )
    state = {f"unet.{k}": v for k, v in peft.get_peft_model_state_dict(pipe.unet).items()}
    save_file(
        {k: v.contiguous() for k, v in diffusers.utils.convert_state_dict_to_kohya(state).items()},
        tmp_path / "kohya.safetensors",
    )
    sdxl = alchemy.load(saved, "cpu")
    alchemy.load_lora(sdxl, tmp_path / "kohya.safetensors")
    agree(sdxl.unet(*inputs), output(pipe.unet, *inputs), base)


def every_layer(sdxl, kinds):
    """A random adapter on every layer of UNet and text encoders whose name ends in one of kinds."""
    assert sdxl.unet and sdxl.text_encoders
    made = torch.Generator().manual_seed(5)
    for name, layer in lora.layers(sdxl).items():
        if name.startswith(("unet.", "text_encoder")) and name.endswith(kinds):
            c = layer.weight.shape
            down, up = (
                torch.randn(RANK, *c[1:], generator=made),
                torch.randn(c[0], RANK, *(1 for _ in c[2:]), generator=made),
            )
            lora.add_adapter(layer, "default", 0.05 * down, 0.3 * up, ALPHA)


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_text_encoders_feed_forward_and_projections_draw_the_same_there(
    saved, inputs, tmp_path, form
):
    sdxl, pipe = alchemy.load(saved, "cpu"), built()
    every_layer(
        sdxl,
        (
            *lora.ATTENTION,
            "ff.net.0.proj",
            "ff.net.2",
            "proj_in",
            "proj_out",
            "q_proj",
            "k_proj",
            "v_proj",
            "out_proj",
            "fc1",
            "fc2",
        ),
    )
    alchemy.save_lora(sdxl, tmp_path / "lora.safetensors", format=form)
    ids = torch.tensor([[49406, 320, 1929, 49407, *[49407] * 73]])
    before = pipe.text_encoder_2(ids, output_hidden_states=True).hidden_states[-2]
    base = output(pipe.unet, *inputs)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="subject")
    agree(sdxl.unet(*inputs), output(pipe.unet, *inputs), base)
    for ours, theirs in zip(sdxl.text_encoders, (pipe.text_encoder, pipe.text_encoder_2)):
        a, b = ours(ids)[0], theirs(ids, output_hidden_states=True).hidden_states[-2]
        assert (a - b).norm() <= 3e-6 * b.norm()
    assert (before - b).norm() > 1e-2 * b.norm()


@torch.no_grad()
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_its_files_with_text_encoders_say_the_same_here(saved, tmp_path, form):
    """As transformers 5 has it, the first encoder's layers are encoder.layers..., the second's text_model.encoder.layers..."""
    pipe, ids = built(), torch.tensor([[49406, 320, 1929, 49407, *[49407] * 73]])
    encoders = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    before = [
        encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders.values()
    ]
    torch.manual_seed(0)
    layers, metadata = {}, {}
    for name, encoder in encoders.items():
        encoder.add_adapter(
            peft.LoraConfig(
                r=RANK,
                lora_alpha=RANK if form == "kohya" else ALPHA,
                init_lora_weights=False,
                target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            ),
            "default",
        )
        state = peft.get_peft_model_state_dict(encoder, adapter_name="default")
        layers[f"{name}_lora_layers"] = (
            diffusers.utils.convert_state_dict_to_diffusers(state) if form == "diffusers" else state
        )
        config = {
            k: list(v) if isinstance(v, set) else v
            for k, v in encoder.peft_config["default"].to_dict().items()
        }
        metadata[f"{name}_lora_adapter_metadata"] = config
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if form == "kohya":
        state = diffusers.utils.convert_state_dict_to_kohya(load_file(path))
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    sdxl = alchemy.load(saved, "cpu")
    alchemy.load_lora(sdxl, path)
    for ours, theirs, base in zip(sdxl.text_encoders, encoders.values(), before):
        agree(ours(ids)[0], theirs(ids, output_hidden_states=True).hidden_states[-2], base)


@torch.no_grad()
@pytest.mark.parametrize("by", ["save_lora_adapter", "peft"])
def test_a_unet_saved_alone_draws_the_same_here(saved, inputs, tmp_path, by):
    unet, config = (
        built().unet,
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False),
    )
    base = output(unet, *inputs)
    torch.manual_seed(0)
    if by == "peft":
        peft.get_peft_model(unet, config).save_pretrained(
            tmp_path
        )  # alpha goes to adapter_config.json
    else:
        unet.add_adapter(config, "default")
        unet.save_lora_adapter(tmp_path, adapter_name="default")
    sdxl = alchemy.load(saved, "cpu")
    alchemy.load_lora(sdxl, next(tmp_path.glob("*.safetensors")))
    agree(sdxl.unet(*inputs), output(unet, *inputs), base)


@torch.no_grad()
def test_convolutions_under_pefts_names_draw_the_same_there(saved, inputs, tmp_path):
    sdxl, pipe = alchemy.load(saved, "cpu"), built()
    every_layer(
        sdxl,
        (
            "conv1",
            "conv2",
            "conv_shortcut",
            "time_emb_proj",
            "downsamplers.0.conv",
            "upsamplers.0.conv",
        ),
    )
    alchemy.save_lora(sdxl, tmp_path / "lora.safetensors", format="peft")
    base = output(pipe.unet, *inputs)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="subject")
    agree(sdxl.unet(*inputs), output(pipe.unet, *inputs), base)


@torch.no_grad()
def test_a_merged_folder_is_a_pipeline_there(ours, saved, inputs, tmp_path):
    alchemy.save_lora(ours, tmp_path / "lora.safetensors")
    convert(
        [
            str(tmp_path / "lora.safetensors"),
            str(tmp_path / "whole"),
            "--merge",
            "--weights",
            str(saved),
            "--dtype",
            "float32",
        ]
    )
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "whole", local_files_only=True
    )
    agree(ours.unet(*inputs), output(pipe.unet, *inputs), output(built().unet, *inputs))
