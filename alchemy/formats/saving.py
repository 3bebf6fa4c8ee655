"""Write a whole checkpoint: a folder in the Hub layout, or one file in the original layout.

alchemy.load reads both; diffusers reads the folder, ComfyUI and A1111 the single file.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import lora
from ..files import TEMPORARY, save_json, save_tensors
from ..sdxl import SDXL
from . import layout
from .checkpoint import BUILD

POSITION_IDS = layout.PREFIX["text_encoder"] + "text_model.embeddings.position_ids"


def save_checkpoint(
    sdxl: SDXL, path: str | Path, metadata: dict | None = None, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write all networks of sdxl, whole or not at all; return the weight files.

    path: one .safetensors file, or a new folder. dtype: of the written weights (default: that of
    sdxl). metadata goes into each file's header. Adapters of sdxl are merged for good.
    Raises ValueError if path exists, and for a folder if sdxl was loaded from a single file alone,
    which has no configurations to write.
    """
    path, header = Path(path), {"format": "pt"} | (metadata or {})
    is_file = path.suffix == ".safetensors"
    if not is_file and not sdxl.read.json_files["unet/config.json"]:
        raise ValueError(
            f"{sdxl.source}: a single file brings no configurations; "
            "name a folder that has them with --model-config, or write a .safetensors file"
        )
    if path.is_file() or (path.exists() and any(path.iterdir())):
        raise ValueError(f"{path} exists already; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_file:
        save_tensors(single_file_tensors(sdxl, dtype or sdxl.dtype), path, header)
        return [path]
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as temporary:
        new = Path(temporary) / path.name
        write_settings(sdxl, new)
        files = []
        for name in BUILD:
            stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
            files.append(f"{name}/{stem}.safetensors")
            save_tensors(merged_tensors(sdxl, name, dtype or sdxl.dtype), new / files[-1], header)
        new.replace(path)
    return [path / file for file in files]


def single_file_tensors(sdxl: SDXL, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a single file. v-prediction and zero terminal SNR are marked as ComfyUI does,
    by empty tensors."""
    # Not a weight, but in the official file; older loaders ask for it.
    tensors = {POSITION_IDS: torch.arange(77)[None]}
    for name in BUILD:
        weights = merged_tensors(sdxl, name, dtype)
        tensors |= layout.to_single_file(name, weights, sdxl.configs[name])
    if sdxl.schedule.prediction == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
    if sdxl.schedule.alpha_bar[-1] == 0:
        tensors["ztsnr"] = torch.zeros(0)
    return tensors


def merged_tensors(sdxl: SDXL, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """{name: weight} of a network, after its adapters have been merged and dropped.

    The base weights, kept for un-merging, are dropped too: they are the network's size once more.
    """
    network = sdxl.network(name)
    for layer in lora.layers(network).values():
        layer.merge()
        layer.base_weight = None
        layer.lora = nn.ModuleDict()
    return {key: tensor.to(dtype) for key, tensor in network.state_dict().items()}


def write_settings(sdxl: SDXL, folder: Path) -> None:
    """The sub-folders, configurations and vocabularies of a checkpoint folder."""
    for name in ("scheduler", *BUILD):
        (folder / name).mkdir(parents=True)
    for path, content in sdxl.read.json_files.items():
        if content:
            save_json(content, folder / path)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(sdxl.read.vocabulary / tokenizer, folder / tokenizer)
