"""Random numbers and safetensors files that are the same on every machine."""

import json
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

SEED = 2505


def draw(name, *shape, std=1.0):
    """A float32 Gaussian tensor that depends on SEED and its name alone.

    numpy's generator, because torch.randn differs in the last bit between CPUs."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    return torch.from_numpy((rng.standard_normal(shape) * std).astype(np.float32))


def write(path, tensors, metadata):
    """Save tensors; the header gets the metadata (strings or JSON) and versions of libraries."""
    strings = {"seed": str(SEED)}
    for library in ("torch", "diffusers", "transformers", "peft"):
        strings[library] = version(library)
    for key, value in metadata.items():
        strings[key] = value if isinstance(value, str) else json.dumps(value)
    copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    data = save(copies, strings)
    # safetensors writes the metadata in a random order: sort it, at the same length
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(strings.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
