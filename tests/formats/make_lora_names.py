"""Write lora_names.txt.xz: the name of every layer of SDXL base in each tool's LoRA files.

    python tests/formats/make_lora_names.py sdxl_base_manifest.json

The layers are those of the official checkpoint's manifest (names and shapes in both layouts), the
names follow the rules that the tools publish:

    kohya        sd-scripts, networks/lora.py: "lora_unet" or "lora_te1", "lora_te2" and the module
                 names, joined by "_"; the UNet of library/sdxl_original_unet.py has the single
                 file's names. A1111 (extensions-builtin/Lora/networks.py) and ComfyUI
                 (comfy/lora.py) read them.
    legacy       OneTrainer's default, modules/util/convert/lora/convert_lora_util.py: the same
                 with diffusers' module names. A1111 (convert_diffusers_name_to_compvis) and
                 ComfyUI (unet_to_diffusers) read them too.
    omi          OneTrainer, modules/util/convert/lora/convert_sdxl_lora.py: "unet.", "clip_l.",
                 "clip_g." and the single file's names of the UNet.
    internal     OneTrainer's backups: "lora_unet." and diffusers' names with dots.
    comfyui      comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip: the names of
                 ComfyUI's own weights.
    simpletuner  comfy/lora.py: "lycoris_" and diffusers' names; of the UNet alone.
"""

import json
import lzma
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from helpers.checkpoints import unet_modules  # noqa: E402

FILE = Path(__file__).with_name("lora_names.txt.xz")
TOOLS = ("kohya", "legacy", "omi", "internal", "comfyui", "simpletuner")
PREFIXES = {  # kohya and legacy, omi, comfyui
    "unet": ("lora_unet", "unet", "diffusion_model"),
    "text_encoder": ("lora_te1", "clip_l", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("lora_te2", "clip_g", "text_encoders.clip_g.transformer"),
}


def is_layer(key, shape):
    """Linear layers and convolutions, not embeddings."""
    return key.endswith(".weight") and len(shape) in (2, 4) and ".embeddings." not in key


def single_file_names(manifest):
    """{layer of the UNet in diffusers' names: its name in the single file}."""
    modules, names = unet_modules(manifest["configs"]["unet"]), {}
    for key, shape in manifest["folder_layout"]["unet"].items():
        if is_layer(key, shape):
            module = max((m for m in modules if key.startswith(m + ".")), key=len)
            name = key.removesuffix(".weight")
            names[name] = modules[module] + name.removeprefix(module)
    prefix = "model.diffusion_model."
    official = {key for key in manifest["single_file_layout"] if key.startswith(prefix)}
    assert {f"{prefix}{name}.weight" for name in names.values()} <= official
    return names


def rows(manifest):
    """(our name of a layer, its name in each of TOOLS, - where there is none), in order."""
    single = single_file_names(manifest)
    for network, (kohya, omi, comfyui) in PREFIXES.items():
        for key, shape in manifest["folder_layout"][network].items():
            if not is_layer(key, shape):
                continue
            name = key.removesuffix(".weight")
            inner = single[name] if network == "unet" else name
            underscored = name.replace(".", "_")
            yield (
                f"{network}.{name}",
                f"{kohya}_{inner.replace('.', '_')}",
                f"{kohya}_{underscored}",
                f"{omi}.{inner}",
                f"{kohya}.{name}",
                f"{comfyui}.{inner}",
                f"lycoris_{underscored}" if network == "unet" else "-",
            )


def text(manifest):
    return "".join("\t".join(row) + "\n" for row in rows(manifest))


def read():
    """[{"layer": our name, tool: its name}] of every layer."""
    lines = lzma.decompress(FILE.read_bytes()).decode().splitlines()
    return [dict(zip(("layer", *TOOLS), line.split("\t"), strict=True)) for line in lines]


if __name__ == "__main__":
    content = text(json.loads(Path(sys.argv[1]).read_text()))
    FILE.write_bytes(lzma.compress(content.encode(), preset=9))
