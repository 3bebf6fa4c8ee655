"""Write a random checkpoint of SDXL's full size (6.9 GB in float16) in an official layout.

Speed, memory and loading do not depend on the values.

python tests/helpers/full_size.py out/full.safetensors   the single-file layout
python tests/helpers/full_size.py out/full/              the folder layout, as diffusers has it
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from alchemy.formats import layout  # noqa: E402
from alchemy.formats.checkpoint import BASE, BUILD, CONFIGS  # noqa: E402

# Its files that have no size are those of the official folder.
MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


def random(shape, block=torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))):
    """A float16 Gaussian tensor, scaled so that activations stay near 1.

    Cut from one block, since drawing billions of numbers takes minutes."""
    count = 1
    for side in shape:
        count *= side
    scale = (count // shape[0]) ** -0.5 if len(shape) > 1 else 0.02
    return (block.repeat(-(-count // len(block)))[:count] * scale).to(torch.float16).view(shape)


def networks(base=BASE):
    """(name, network on the meta device, its random tensors) of each.

    base: {name: configuration}; what a configuration leaves out is as in SDXL."""
    for name, build in BUILD.items():
        with torch.device("meta"):
            network = build(CONFIGS[name].from_config(base[name]))
        tensors = {key: random(tuple(p.shape)) for key, p in network.named_parameters()}
        for key, tensor in tensors.items():
            if key.endswith(".weight") and tensor.ndim == 1:  # of a norm: near 1, as trained ones
                tensor += 1
        yield name, network, tensors


def to_single(name, network, tensors):
    """The tensors by the single file's names, fused, transposed and shaped as there."""
    stored = {}
    for key, tensor in tensors.items():
        place = layout.PREFIX[name] + layout.single_file_name(name, key, network.config)
        if name == "vae" and ".attentions." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if key == "text_projection.weight":
            tensor = tensor.T.contiguous()
        if name == "text_encoder_2" and "_proj" in key and "in_proj" in place:
            stored.setdefault(place, {})["qkv".index(key.split(".")[-2][0])] = tensor
        else:
            stored[place] = tensor
    for place, parts in stored.items():
        if isinstance(parts, dict):
            stored[place] = torch.cat([parts[i] for i in range(3)])
    return stored


def write_folder(out, base=BASE):
    """The folder layout, which both we and diffusers' pipeline load; returns it."""
    shutil.copytree(MINI, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for name, network, tensors in networks(base):
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        save_file(tensors, out / name / f"{stem}.fp16.safetensors", {"format": "pt"})
        path = out / name / "config.json"
        config = json.loads(path.read_text()) | vars(network.config)  # JSON has tuples as lists
        if name == "vae":
            levels = len(config["block_out_channels"])
            config["down_block_types"] = ["DownEncoderBlock2D"] * levels
            config["up_block_types"] = ["UpDecoderBlock2D"] * levels
        path.write_text(json.dumps(config, indent=2))
    return out


def main():
    out, everything = Path(sys.argv[1]), {}
    if not out.suffix:
        write_folder(out)
    else:
        for name, network, tensors in networks():
            everything |= to_single(name, network, tensors)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(everything, out, {"format": "pt"})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
