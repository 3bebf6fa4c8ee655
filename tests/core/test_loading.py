"""What is read when, the memory that it takes, device and dtype."""

import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    CONFIGS,
    NETWORKS,
    VAE,
    all_same,
    same,
    vocabulary_read_once,  # noqa: F401
    weights,
    write_folder,
    write_json,
    write_single,
    write_weights,
)

import alchemy
from alchemy.formats import checkpoint

ROOT = Path(alchemy.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    return write_single(path, extras=synthetic.USUAL_EXTRAS)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# What is read, and when


def test_load_reads_no_tensor_and_a_network_is_read_on_first_use(folder, single):
    for sdxl in (alchemy.load(folder, "cpu"), alchemy.load(single, "cpu", config=folder)):
        assert sdxl.schedule and sdxl.tokenizers and sdxl.size and sdxl.vae_scale_factor
        assert sdxl.defaults and list(sdxl.loaded) == []
        assert sdxl.vae is sdxl.vae and list(sdxl.loaded) == ["vae"]
        assert sdxl.text_encoders and sdxl.unet
        assert list(sdxl.loaded) == ["vae", "text_encoder", "text_encoder_2", "unet"]


def test_a_damaged_network_does_not_stop_the_others(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    sdxl = alchemy.load(copy, "cpu")
    same(sdxl.vae, weights()["vae"])
    with pytest.raises(ValueError, match="unet"):
        sdxl.network("unet")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoders"])
def test_free_drops_a_network_and_it_is_read_again(folder, name):
    sdxl = alchemy.load(folder, "cpu")
    before = getattr(sdxl, name)
    networks = before if isinstance(before, tuple) else (before,)
    references = []
    for network in networks:
        references += map(weakref.ref, network.parameters())
    del before, network, networks
    sdxl.free(name)
    assert not any(reference() is not None for reference in references)
    sdxl.free(name)  # freeing it twice is no error
    all_same(sdxl)


def test_loading_uses_no_random_numbers(folder, single):
    state = torch.get_rng_state()
    for sdxl in (alchemy.load(folder, "cpu"), alchemy.load(single, "cpu", config=folder)):
        for name in NETWORKS:
            sdxl.network(name)
    assert torch.equal(state, torch.get_rng_state())


# Prints: growth of anonymous memory, bytes of all parameters, of the largest, of 4-D ones, and
# whether a compiler was imported.
MEASURE = """
import sys, threading, time
root, source, dtype, folder = sys.argv[1:]
sys.path.insert(0, root)
import torch, alchemy

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

config = folder if source.endswith(".safetensors") else None
sdxl = alchemy.load(source, "cpu", dtype, config=config)
torch.zeros(8, 8).half().float().bfloat16()
peak, done, before = 0, False, anonymous()

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
networks = [sdxl.network(name) for name in ("text_encoder_2", "unet")]
done = True
thread.join()
parameters = [p for network in networks for p in network.parameters()]
sizes = [p.nbytes for p in parameters]
convolutions = sum(p.nbytes for p in parameters if p.ndim == 4)
grown = max(peak, anonymous()) - before
print(grown, sum(sizes), max(sizes), convolutions, int("torch._dynamo" in sys.modules))
"""
WIDE_UNET = dict(
    block_out_channels=[32, 160, 320], attention_head_dim=[1, 4, 8], cross_attention_dim=8 + 240
)
WIDE = CONFIGS | {
    "unet": CONFIGS["unet"] | WIDE_UNET,
    "text_encoder_2": CONFIGS["text_encoder_2"] | dict(hidden_size=240, num_attention_heads=4),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """About 200 MB in float32, in both layouts, of ones: only sizes matter."""
    root, ones = tmp_path_factory.mktemp("wide"), {}
    for name in NETWORKS:
        write_json(root / "folder" / name / "config.json", WIDE[name])
        shapes = synthetic.shapes(name, WIDE[name])
        ones[name] = {key: torch.ones(shape) for key, shape in shapes.items()}
        write_weights(root / "folder" / name, name, ones[name])
    unet = synthetic.renamed(ones["unet"], synthetic.unet_modules(WIDE["unet"]))
    encoder = synthetic.open_clip(ones["text_encoder_2"])
    stored = {"model.diffusion_model." + key: tensor for key, tensor in unet.items()}
    stored |= {"conditioner.embedders.1.model." + key: tensor for key, tensor in encoder.items()}
    write_single(root / "single.safetensors", stored)
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "source, dtype",
    [
        ("folder", "float32"),
        ("folder", "float16"),
        ("folder", "bfloat16"),
        ("single.safetensors", "bfloat16"),
    ],
)
def test_loading_takes_no_second_copy_and_imports_no_compiler(wide, source, dtype):
    arguments = [str(ROOT), str(wide / source), dtype, str(wide / "folder")]
    command = [sys.executable, "-c", MEASURE, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, loaded, largest, convolutions, compiler = map(int, out.split())
    assert loaded > (80e6 if dtype != "float32" else 160e6) and not compiler
    # Tensors stored in the wanted dtype stay in the mapped file, except convolutions, which are
    # converted to channels_last.
    allowed = convolutions + 0.05 * loaded if dtype == "float32" else 1.05 * loaded
    assert grown <= allowed + largest, f"{grown / 1e6:.0f} MB for {loaded / 1e6:.0f} MB of tensors"


# The warning of another projection


def encoder(first, second, width=1280):
    weight = torch.zeros(width, width)
    weight[0, 1], weight[1, 0] = first, second
    return SimpleNamespace(text_projection=SimpleNamespace(weight=weight))


def test_a_projection_other_than_the_official_one_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            right = encoder(-0.0037, 0.0218)
            right.text_projection.weight = right.text_projection.weight.to(dtype)
            checkpoint.check_projection(right)
        checkpoint.check_projection(encoder(0.5, 0.5, width=64))  # another size has no known value
    with pytest.warns(UserWarning, match="transposed.*0.0218"):
        checkpoint.check_projection(encoder(0.0218, -0.0037))
    with pytest.warns(UserWarning, match="not that of SDXL base.*0.5000"):
        checkpoint.check_projection(encoder(0.5, 0.25))


# Device and dtype


@pytest.fixture
def machine(monkeypatch):
    def pretend(cuda=False, bf16=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: bf16 or including_emulation,
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    "has, asked, expected",
    [
        ({}, [], ("cpu", torch.float32)),
        (dict(mps=True), [], ("mps", torch.bfloat16)),
        (dict(cuda=True, bf16=True), [], ("cuda", torch.bfloat16)),
        (dict(cuda=True), [], ("cuda", torch.float16)),
        (dict(cuda=True, bf16=True, mps=True), [], ("cuda", torch.bfloat16)),
        (dict(cuda=True), ["cuda:0", "bfloat16"], ("cuda:0", torch.bfloat16)),
        (dict(cuda=True), ["cpu", torch.float16], ("cpu", torch.float16)),
        (dict(cuda=True), ["cpu"], ("cpu", torch.float32)),
    ],
)
def test_auto_is_cuda_mps_cpu_and_bf16_fp16_float32(machine, has, asked, expected):
    machine(**has)
    assert checkpoint.choose_device(*asked) == (torch.device(expected[0]), expected[1])


@pytest.mark.parametrize(
    "has, device, dtype, words",
    [
        ({}, "cuda", "auto", "cuda"),
        ({}, "cuda:1", "auto", "cuda:1"),
        ({}, "mps", "auto", "mps"),
        ({}, "gpu", "auto", "gpu"),
        ({}, "cpu", "half!", "dtype"),
        ({}, "cpu", "int64", "dtype"),
        ({}, "cpu", "load", "dtype"),
        (dict(cuda=True), "cuda:1", "auto", "cuda:1"),
        (dict(cuda=True), "cuda:x", "auto", "cuda:x"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_named(machine, has, device, dtype, words):
    machine(**has)
    with pytest.raises(ValueError, match=words):
        checkpoint.choose_device(device, dtype)


@pytest.mark.parametrize(
    "dtype, upcast, expected",
    [
        ("float16", True, torch.float32),
        ("float16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_the_vae_stays_float32_only_where_float16_would_overflow(copy, dtype, upcast, expected):
    write_json(copy / "vae" / "config.json", VAE | dict(force_upcast=upcast))
    same(alchemy.load(copy, "cpu", dtype).vae, weights()["vae"], expected)
