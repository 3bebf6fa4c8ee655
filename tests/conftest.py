"""Fixtures of the numeric tests: reference files, networks with their weights, comparison.

Every comparison goes through `close`; at the end pytest prints the largest deviation of each test
file beside its tolerance.
"""

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / "tests"),
    str(ROOT),
    *(str(ROOT / "tests" / part) for part in ("core", "cli", "extras", "formats", "bench")),
]
from helpers.comparison import deviation  # noqa: E402

# References and bit-equalities are the CPU's: on a machine with a GPU, hide it from the tests.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)  # the order of additions, and so the last bit, depends on it

KINDS = {
    "text_1": "text_encoder",
    "text_2": "text_encoder_2",
    "vae": "vae",
    "vae_8": "vae",
    "unet_a": "unet",
    "unet_b": "unet",
}
measured = {}  # (test file, tolerance) -> the largest deviation seen


class Reference(dict):
    """The tensors of a reference file by name; facts is its header, the JSON in it read."""

    def group(self, prefix):
        """The tensors below a prefix, named without it."""
        return {
            key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)
        }


@lru_cache
def read(name):
    with safe_open(ROOT / "tests" / "reference" / f"{name}.safetensors", "pt") as file:
        found = Reference({key: file.get_tensor(key) for key in file.keys()})
        found.facts = {k: json.loads(v) if v[0] in "{[" else v for k, v in file.metadata().items()}
    return found


def build(name, dtype=torch.float64):
    from alchemy.formats.checkpoint import BUILD, CONFIGS

    kind, stored = KINDS[name], read(name)
    prefix = (
        "text_model." if name == "text_1" else ""
    )  # transformers 5 saves the first encoder without it
    with torch.device("meta"):
        net = BUILD[kind](CONFIGS[kind].from_config(stored.facts["config"]))
    weights = {
        prefix + key: value.to(dtype, copy=True) for key, value in stored.group("weights/").items()
    }
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def compare(ours, theirs, tol):
    assert ours.shape == theirs.shape and ours.isfinite().all()
    assert ours.dtype == torch.float64 or tol > 1e-8, f"{ours.dtype} cannot be held to {tol}"
    off = deviation(ours, theirs)
    key = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[0], tol
    measured[key] = max(off, measured.get(key, 0.0))
    assert off <= tol, f"deviation {off:.2e}, allowed {tol:.0e}"


@pytest.fixture(scope="session")
def reference():
    """reference(name): the tensors of tests/reference/NAME.safetensors."""
    return read


@pytest.fixture(scope="session")
def network():
    """network(name, dtype=float64): our network of that name's configuration and weights, a new one at each call."""
    return build


@pytest.fixture(scope="session")
def close():
    """close(ours, theirs, tol): norm ratio and largest difference, both relative, are at most tol."""
    return compare


@pytest.fixture(scope="session")
def exact():
    """The tolerance of what holds a time embedding, in float64: 1e-9, more only where this machine's sine is another.

    The embedding is float32 on both sides, and sin and cos may differ in the last bit between CPUs.
    """
    from alchemy.unet import timestep_embedding

    stored = read("unet_a")
    off = (timestep_embedding(stored["inputs/0/t"], 12) - stored["sinusoid/0/t"]).abs().max()
    return 1e-6 if 0 < off < 2e-7 else 1e-9


def pytest_terminal_summary(terminalreporter):
    if measured:
        terminalreporter.section("largest deviations from the reference")
    for (file, tol), off in sorted(measured.items()):
        terminalreporter.write_line(f"{file:<28} {off:.1e}   allowed {tol:.0e}")
