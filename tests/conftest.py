"""Fixtures of the numeric tests: reference files, networks with their weights, comparison.

Every comparison goes through `close`; at the end pytest prints the largest deviation of each test
file beside its tolerance.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
FOLDERS = ("core", "cli", "extras", "formats", "bench")
sys.path[:0] = [str(TESTS), str(TESTS.parent), *(str(TESTS / name) for name in FOLDERS)]
from helpers.comparison import deviation  # noqa: E402

# References and bit-equalities are the CPU's: on a machine with a GPU, hide it from the tests.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)  # the order of additions, and so the last bit, depends on it

measured = {}  # (test file, tolerance) -> the largest deviation seen


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
    from helpers.references import read_reference

    return read_reference


@pytest.fixture(scope="session")
def network():
    """network(name, dtype=float64): see helpers.references.build_network."""
    from helpers.references import build_network

    return build_network


@pytest.fixture(scope="session")
def close():
    """close(ours, theirs, tol): norm ratio and largest difference, relative, are at most tol."""
    return compare


@pytest.fixture(scope="session")
def exact(reference):
    """The tolerance of what holds a time embedding, in float64: 1e-9.

    The embedding is float32 on both sides, and sin and cos may differ in the last bit between
    CPUs: where they do, 1e-6.
    """
    from alchemy.unet import timestep_embedding

    stored = reference("unet_a")
    off = (timestep_embedding(stored["inputs/0/t"], 12) - stored["sinusoid/0/t"]).abs().max()
    return 1e-6 if 0 < off < 2e-7 else 1e-9


def pytest_terminal_summary(terminalreporter):
    if measured:
        terminalreporter.section("largest deviations from the reference")
    for (file, tol), off in sorted(measured.items()):
        terminalreporter.write_line(f"{file:<28} {off:.1e}   allowed {tol:.0e}")
