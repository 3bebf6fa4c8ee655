"""The denoising loop never waits for the device: it reads no value and copies only noise."""

from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy
from alchemy import sampling
from alchemy.extras import optimizations
from alchemy.sdxl import Conditioning
from alchemy.segmentation import AttentionMaps

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item")


class Reads(TorchDispatchMode):
    """Inside, which operations wanted a value, and which copies crossed devices."""

    def __init__(self):
        super().__init__()
        self.values, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in READS:
            self.values.append(name)
        if name in ("_to_copy", "copy_") and args[0].device != result.device:
            self.copies.append((args[0].device.type, result.device.type))
        return result


@pytest.fixture
def far(tiny):
    """The tiny UNet on the meta device, where a value that is read raises, and two prompts."""
    sdxl = alchemy.load(tiny, "cpu", "float32")
    encoded = []
    for prompt in ("a dog", None):
        parts = sdxl.encode_prompt([prompt]).parts()
        encoded.append(Conditioning(*(part.to("meta") for part in parts)))
    return SimpleNamespace(unet=sdxl.unet.to("meta"), schedule=sdxl.schedule), *encoded


@pytest.mark.parametrize(
    "sampler, drawn",
    [("euler", 0), ("ddim", 0), ("dpmpp_2m", 0), ("euler_ancestral", 3), ("ddpm", 3)],
)
def test_no_step_of_any_sampler_reads_a_value_and_only_fresh_noise_is_sent(far, sampler, drawn):
    sdxl, cond, uncond = far
    noise = torch.empty(1, 4, 8, 8, device="meta")
    hook = sampling.keep_background(noise, noise, torch.empty(1, 1, 8, 8, device="meta"))
    maps = AttentionMaps(sdxl.unet, [2, 3], (8, 8))
    steps = sampling.denoise(
        sdxl,
        noise,
        cond,
        uncond,
        steps=4,
        sampler=sampler,
        generators=sampling.generators([0]),
        hook=hook,
    )
    with Reads() as reads, optimizations.cache_prompt_kv(sdxl.unet):
        assert len(list(maps.follow(steps))) == 4 and maps.cross
    assert reads.copies == drawn * [("cpu", "meta")]


def test_reads_are_noticed(far):
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(2).to("meta")
    assert reads.values and ("cpu", "meta") in reads.copies
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.ones((), device="meta"))


# On CUDA, torch itself can report every wait


@pytest.fixture
def errors_where_it_waits():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_on_cuda_the_denoising_loop_never_waits(tiny, sampler, errors_where_it_waits):
    sdxl = alchemy.load(tiny, "cuda")
    encoded = [sdxl.encode_prompt([prompt]) for prompt in ("a dog", None)]
    noise = sampling.noise((1, 4, 8, 8), [0]).to("cuda")

    def run():
        rngs = sampling.generators([0])
        list(sampling.denoise(sdxl, noise, *encoded, steps=4, sampler=sampler, generators=rngs))

    run()
    errors_where_it_waits()
    with optimizations.cache_prompt_kv(sdxl.unet):
        run()
