"""A whole checkpoint as a folder in the Hub layout, which alchemy.load and diffusers read."""
import shutil
from pathlib import Path

from .. import lora
from ..files import save_tensors
from .checkpoint import BUILD, find


def save_checkpoint(sdxl, folder, config=None, facts=None, dtype=None):
    """Write all networks of sdxl, in dtype (None: its own) and with merged adapters in them, to a new folder, whole or not at all; the paths.

    Configurations and vocabularies are copies of its source's, or, where that is a single file, of the folder config. Raises ValueError
    where there are none, and where the folder is there and not empty.
    """
    folder, source = Path(folder), find(config or sdxl.source)
    if not source.is_dir():
        raise ValueError(f"{source}: a single file brings no configurations; name a folder that has them with --config")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already; name another")
    folder, wanted = folder.with_name(f".{folder.name}.new"), folder
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted attempt
    for file in sorted(source.rglob("*")):
        if file.suffix in (".json", ".txt") and ".safetensors" not in file.name and len(file.relative_to(source).parts) <= 2:
            place = folder / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    paths = []
    for name in BUILD:
        network = sdxl.network(name)
        adapted = [f"{n}.lora." for n, layer in lora.layers(network).items() if layer.lora]
        tensors = {k: v for k, v in network.state_dict().items() if not k.startswith(tuple(adapted))}
        paths.append(folder / name / ("model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"))
        save_tensors({k: v.to(dtype or sdxl.dtype) for k, v in tensors.items()}, paths[-1], {"format": "pt"} | (facts or {}))
    folder.replace(wanted)
    return [wanted / path.relative_to(folder) for path in paths]
