"""The networks with random weights: text encoders, VAE, UNet, LoRA. Outputs are float64."""

import tempfile
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from storage import draw, write
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

transformers.utils.logging.disable_progress_bar()
BOS, EOS = 49406, 49407


def randomize(model, name, gains=None):
    """Matrices become N(0, gain^2 / fan_in), biases 0.3 N, norm weights 1 + 0.3 N."""
    for key, p in model.named_parameters():
        if p.ndim > 1:
            std = (gains or {}).get(key, 1.0) * (p[0].numel() ** -0.5)
            p.data = draw(f"{name}/{key}", *p.shape, std=std)
        else:
            p.data = draw(f"{name}/{key}", *p.shape, std=0.3) + key.endswith("weight")
    return model.eval().requires_grad_(False)


def folder(model):
    """The config.json and the tensors under the names with which the library saves them."""
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        config = (Path(tmp) / "config.json").read_text()
        weights = {}
        for file in Path(tmp).glob("*.safetensors"):
            weights |= load_file(file)
    return config, {"weights/" + key: value for key, value in weights.items()}


def both(model, outputs):
    """Run outputs(model, dtype) -> dict in float32 and in float64."""
    result = {"float32/" + k: v for k, v in outputs(model.float(), torch.float32).items()}
    result |= {"outputs/" + k: v for k, v in outputs(model.double(), torch.float64).items()}
    model.float()
    return result


# Text encoders


def prompt_ids():
    """Seven rows of 77 ids; what each is for stands in make.py."""
    words = (draw("words", 80).abs() * 1e9).long() % BOS  # ordinary ids, below 49406
    words = words.tolist()
    rows = [
        (words[:5], 0),
        (words[:5], EOS),
        ([words[5], 49408, 49410, words[6]], EOS),
        ([49409, words[7], 49409, words[8], words[9]], 0),
        ([], EOS),
        (words[:75], 0),
        ([words[10], words[11], EOS, 49408, words[12]], 0),
    ]
    return torch.tensor([[BOS, *row, EOS] + [pad] * (75 - len(row)) for row, pad in rows])


def text_encoder(name, cls, **config):
    config = CLIPTextConfig(vocab_size=49408 + 3, num_hidden_layers=3, eos_token_id=EOS, **config)
    prefix = "" if cls is CLIPTextModel else "text_model."
    gain = config.hidden_size**0.5  # embeddings have no fan-in: N(0, 1)
    gains = {
        f"{prefix}embeddings.token_embedding.weight": gain,
        f"{prefix}embeddings.position_embedding.weight": 0.5 * gain,
    }
    model = randomize(cls(config), name, gains)
    table = model.get_input_embeddings().weight
    table.data = table.half().float()
    return model


def text(path, name, cls, **config):
    model = text_encoder(name, cls, **config)
    config, tensors = folder(model)
    table = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tensors[table] = tensors[table].half()  # exact: the values were rounded to float16
    tensors["inputs/ids"] = ids = prompt_ids()

    def outputs(model, dtype):
        out = model(ids, output_hidden_states=True)
        pooled = {"pooled": out.text_embeds} if hasattr(out, "text_embeds") else {}
        return {"hidden": out.hidden_states[-2], **pooled}

    write(path, tensors | both(model, outputs), {"config": config})


def make_text_1(path):
    text(
        path,
        "text_1",
        CLIPTextModel,
        hidden_act="quick_gelu",
        hidden_size=6,
        num_attention_heads=2,
        intermediate_size=28,
        projection_dim=6,
    )


def make_text_2(path):
    text(
        path,
        "text_2",
        CLIPTextModelWithProjection,
        hidden_act="gelu",
        hidden_size=9,
        num_attention_heads=3,
        intermediate_size=40,
        projection_dim=10,
    )


# VAE


def vae(path, name, images, channels, **config):
    levels = len(channels)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=0.13025,
        force_upcast=True,
        **config,
    )
    model = randomize(model, name)
    # one log-variance around -30, below which it is clamped
    model.quant_conv.bias.data[4] = -30
    config, tensors = folder(model)
    f, scale = 2 ** (levels - 1), model.config.scaling_factor
    b, h, w = images
    tensors["inputs/images"] = images = draw(name + "/images", b, 3, h, w, std=0.6).clamp(-1, 1)
    tensors["inputs/latents"] = latents = draw(name + "/latents", b, 4, h // f, w // f)

    def outputs(model, dtype):
        posterior = model.encode(images.to(dtype)).latent_dist
        return {
            "mean": posterior.mean,
            "std": posterior.std,
            "mean_scaled": posterior.mean * scale,
            "std_scaled": posterior.std * scale,
            "decoded": model.decode(latents.to(dtype) / scale).sample,
        }

    write(path, tensors | both(model, outputs), {"config": config})


def make_vae(path):
    vae(path, "vae", (3, 28, 36), [8, 16, 24], layers_per_block=1, norm_num_groups=8)


def make_vae_8(path):
    vae(path, "vae_8", (3, 40, 56), [8, 12, 16, 16], layers_per_block=2, norm_num_groups=4)


# UNet


def unet(name, layers, channels, heads, groups):
    config = dict(
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=channels,
        norm_num_groups=groups,
        attention_head_dim=heads,
        transformer_layers_per_block=[1, 1, 3],
        use_linear_projection=True,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=15,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=10 + 6 * 6,
    )
    # tame: trajectories multiply a rounding error by the network's slope at every step
    return randomize(UNet2DConditionModel(**config), name, {"conv_out.weight": 0.5})


def unet_a():
    return unet("unet_a", 1, [12, 16, 24], [1, 2, 4], 4)


def unet_b():
    return unet("unet_b", 2, [8, 12, 20], [2, 4, 5], 4)


TIME_IDS = torch.tensor(
    [
        [1024.0, 1024, 0, 0, 1024, 1024],
        [833, 1216, 16, 32, 1216, 832],
        [512, 768, 0, 256, 1152, 896],
    ]
)


def calls(name):
    """Three calls: latents, t, context, pooled, time_ids."""
    for i, (b, h, w, length, t) in enumerate(
        [(3, 9, 7, 77, [999, 481, 1]), (3, 13, 10, 11, [965.55, 33.25, 0]), (1, 8, 12, 77, [501])]
    ):
        key = f"{name}/{i}/"
        yield {
            "latents": draw(key + "latents", b, 4, h, w),
            "t": torch.tensor(t, dtype=torch.float64),
            "context": draw(key + "context", b, length, 15),
            "pooled": draw(key + "pooled", b, 10),
            "time_ids": TIME_IDS[:b] if b == 3 else TIME_IDS[1:2],
        }


def run(model, call, dtype):
    latents, context = call["latents"].to(dtype), call["context"].to(dtype)
    added = {"text_embeds": call["pooled"].to(dtype), "time_ids": call["time_ids"].to(dtype)}
    return model(latents, call["t"], context, added_cond_kwargs=added).sample


def make_unet_a(path):
    forward(path, "unet_a", unet_a())


def make_unet_b(path):
    forward(path, "unet_b", unet_b())


def forward(path, name, model):
    config, tensors = folder(model)
    for i, call in enumerate(calls(name)):
        tensors |= {f"inputs/{i}/{key}": value for key, value in call.items()}
        # float32 sinusoids, stored because sin and cos may differ in the last bit between CPUs
        for key, dim in (("t", model.config.block_out_channels[0]), ("time_ids", 6)):
            values = call[key].flatten()
            tensors[f"sinusoid/{i}/{key}"] = get_timestep_embedding(values, dim, True, 0)

    def outputs(model, dtype):
        return {str(i): run(model, call, dtype) for i, call in enumerate(calls(name))}

    tensors |= both(model, outputs)
    write(path, tensors, {"config": config})


# LoRA


def make_lora(path):
    rank, alpha, scale = 4, 6, 0.7
    model = unet_a()
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = draw("lora/" + key, *p.shape, std=0.5 * p.shape[1] ** -0.5)
    model.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as tmp:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        StableDiffusionXLPipeline.save_lora_weights(tmp, unet_lora_layers=layers)
        saved = load_file(f"{tmp}/pytorch_lora_weights.safetensors")
    tensors = {"lora/" + key: value for key, value in saved.items()}
    call = next(calls("unet_a"))

    def outputs(model, dtype):
        result = {}
        for weight in (1.0, scale):
            model.set_adapters("default", weight)
            result[f"scale_{weight}"] = run(model, call, dtype)
        return result

    tensors |= both(model, outputs)
    names = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.2.attn1.to_out.0",
    ]
    model.double().set_adapters("default", 1.0)
    for weight in (1.0, scale):
        model.fuse_lora(lora_scale=weight)
        for name in names:
            merged = model.get_submodule(name).base_layer.weight
            tensors[f"merged/scale_{weight}/{name}.weight"] = merged.clone()
        model.unfuse_lora()
    metadata = {"rank": rank, "alpha": alpha, "network": "unet_a", "inputs": "unet_a inputs/0"}
    write(path, tensors, metadata)
