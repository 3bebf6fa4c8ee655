"""Write a whole checkpoint as one file in the original layout, which ComfyUI and A1111 load."""

from pathlib import Path

import torch

from ..files import save_tensors
from . import layout
from .checkpoint import BUILD
from .folder import merge_for_good

POSITION_IDS = "text_model.embeddings.position_ids"


def save_single_file(
    sdxl, path: str | Path, metadata: dict | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write all networks of sdxl to one .safetensors file; return its path.

    dtype: of the written weights (default: that of sdxl). metadata goes into the header. Adapters
    of sdxl are merged for good. v-prediction and zero terminal SNR are marked as ComfyUI does, by
    empty tensors. Raises ValueError for a file that exists or is not called .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a checkpoint in one file must end in .safetensors")
    if path.exists():
        raise ValueError(f"{path} exists already; name another")
    # Not a weight, but in the official file; older loaders ask for it.
    tensors = {layout.PREFIX["text_encoder"] + POSITION_IDS: torch.arange(77)[None]}
    for name in BUILD:
        network = sdxl.network(name)
        merge_for_good(network)
        stored = layout.to_single_file(name, network.state_dict(), network.config)
        for key, tensor in stored.items():
            tensors[key] = tensor.to(dtype or sdxl.dtype)
    if sdxl.schedule.prediction == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
    if sdxl.schedule.alpha_bar[-1] == 0:
        tensors["ztsnr"] = torch.zeros(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {"format": "pt"} | (metadata or {}))
    return path
