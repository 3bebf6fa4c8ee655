"""What is read when, how much memory that takes, on which device and in which precision."""

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
    vocabulary_read_once,
    weights,
    write_folder,
    write_json,  # noqa: F401
    write_single,
    write_weights,
)

import alchemy
from alchemy.formats import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_single(
        tmp_path_factory.mktemp("single") / "model.safetensors", extras=synthetic.USUAL_EXTRAS
    )


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# What is read, and when


def test_load_reads_no_tensor_and_a_network_is_read_on_first_use(folder, single, monkeypatch):
    read = []
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda network, name, *rest: read.append(name) or network
    )
    for sdxl in (alchemy.load(folder, "cpu"), alchemy.load(single, "cpu", config=folder)):
        assert read == []
        sdxl.schedule, sdxl.tokenizers, sdxl.size, sdxl.vae_scale_factor, sdxl.defaults
        assert read == []
        sdxl.vae, sdxl.vae
        assert read == ["vae"]
        sdxl.text_encoders, sdxl.unet, sdxl.text_encoders
        assert read == ["vae", "text_encoder", "text_encoder_2", "unet"]
        read.clear()


def test_a_spoiled_network_does_not_stop_the_others(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    sdxl = alchemy.load(copy, "cpu")
    same(sdxl.vae, weights()["vae"])
    with pytest.raises(ValueError, match="unet"):
        sdxl.unet


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoders"])
def test_free_drops_a_network_and_it_is_read_again(folder, name):
    sdxl = alchemy.load(folder, "cpu")
    before = getattr(sdxl, name)
    gone = [
        weakref.ref(p)
        for network in (before if isinstance(before, tuple) else (before,))
        for p in network.parameters()
    ]
    del before
    sdxl.free(name)
    assert not any(ref() is not None for ref in gone)
    sdxl.free(name)  # nothing to drop is no error
    all_same(sdxl)


def test_loading_draws_no_random_numbers(folder, single):
    state = torch.get_rng_state()
    for sdxl in (alchemy.load(folder, "cpu"), alchemy.load(single, "cpu", config=folder)):
        [sdxl.network(name) for name in NETWORKS]
    assert torch.equal(state, torch.get_rng_state())


MEASURE = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch, alchemy

def anonymous():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

sdxl = alchemy.load(sys.argv[2], "cpu", sys.argv[3], config=sys.argv[4] if sys.argv[2].endswith(".safetensors") else None)
torch.zeros(8, 8).half().float().bfloat16()
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
for name in ("text_encoder_2", "unet"):
    sdxl.network(name)
done = True
thread.join()
parameters = [p for name in ("text_encoder_2", "unet") for p in sdxl.network(name).parameters()]
sizes, turned = ([p.numel() * p.itemsize for p in parameters if p.ndim in dims] for dims in ((1, 2, 4), (4,)))
print(max(peak, anonymous()) - before, sum(sizes), max(sizes), "torch._dynamo" in sys.modules, sum(turned))
"""
WIDE = CONFIGS | {
    "unet": CONFIGS["unet"]
    | dict(
        block_out_channels=[32, 160, 320], attention_head_dim=[1, 4, 8], cross_attention_dim=248
    ),
    "text_encoder_2": CONFIGS["text_encoder_2"] | dict(hidden_size=240, num_attention_heads=4),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """About 200 MB in float32, in both layouts, of ones: only sizes matter."""
    root, ones = tmp_path_factory.mktemp("wide"), {}
    for name in NETWORKS:
        write_json(root / "folder" / name / "config.json", WIDE[name])
        ones[name] = {
            key: torch.ones(shape) for key, shape in synthetic.shapes(name, WIDE[name]).items()
        }
        write_weights(root / "folder" / name, name, ones[name])
    write_single(
        root / "single.safetensors",
        {
            **{
                "model.diffusion_model." + k: t
                for k, t in synthetic.renamed(
                    ones["unet"], synthetic.unet_modules(WIDE["unet"])
                ).items()
            },
            **{
                "conditioner.embedders.1.model." + k: t
                for k, t in synthetic.open_clip(ones["text_encoder_2"]).items()
            },
        },
    )
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
def test_loading_takes_no_second_copy(wide, source, dtype):
    arguments = [
        str(Path(alchemy.__file__).parents[1]),
        str(wide / source),
        dtype,
        str(wide / "folder"),
    ]
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    ).stdout
    grown, loaded, largest = map(int, out.split()[:3])
    assert loaded > (80e6 if dtype != "float32" else 160e6)
    assert out.split()[3] == "False", "a compiler was imported, which takes seconds"
    # What is stored in the wanted dtype stays in the mapped file, but for the convolutions, which are turned to channels_last.
    allowed = int(out.split()[4]) + 0.05 * loaded if dtype == "float32" else 1.05 * loaded
    assert grown <= allowed + largest, f"{grown / 1e6:.0f} MB for {loaded / 1e6:.0f} MB of tensors"


# The warning of a wrong projection


def encoder(first, second, width=1280):
    weight = torch.zeros(width, width)
    weight[0, 1], weight[1, 0] = first, second
    return SimpleNamespace(text_projection=SimpleNamespace(weight=weight))


def test_the_official_projection_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            right = encoder(-0.0037, 0.0218)
            right.text_projection.weight = right.text_projection.weight.to(dtype)
            checkpoint.check_projection(right)
        checkpoint.check_projection(encoder(0.5, 0.5, width=64))  # another size has no known value


def test_a_transposed_projection_is_warned_of():
    with pytest.warns(UserWarning, match="transposed.*0.0218"):
        checkpoint.check_projection(encoder(0.0218, -0.0037))


def test_another_projection_is_warned_of():
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
    "has, expected",
    [
        (dict(), ("cpu", torch.float32)),
        (dict(mps=True), ("mps", torch.bfloat16)),
        (dict(cuda=True, bf16=True), ("cuda", torch.bfloat16)),
        (dict(cuda=True), ("cuda", torch.float16)),
        (dict(cuda=True, bf16=True, mps=True), ("cuda", torch.bfloat16)),
    ],
)
def test_auto_is_cuda_mps_cpu_and_bf16_fp16_float32(machine, has, expected):
    machine(**has)
    assert checkpoint.choose_device() == (torch.device(expected[0]), expected[1])


def test_a_dtype_asked_for_is_kept_on_any_device(machine):
    machine(cuda=True)
    assert checkpoint.choose_device("cuda:0", "bfloat16") == (
        torch.device("cuda:0"),
        torch.bfloat16,
    )
    assert checkpoint.choose_device("cpu", torch.float16) == (torch.device("cpu"), torch.float16)
    assert checkpoint.choose_device("cpu") == (
        torch.device("cpu"),
        torch.float32,
    )  # although CUDA is there


@pytest.mark.parametrize(
    "device, dtype, words",
    [
        ("cuda", "auto", "cuda"),
        ("cuda:1", "auto", "cuda:1"),
        ("mps", "auto", "mps"),
        ("gpu", "auto", "gpu"),
        ("cpu", "half!", "dtype"),
        ("cpu", "int64", "dtype"),
        ("cpu", "load", "dtype"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_named(machine, device, dtype, words):
    machine()
    with pytest.raises(ValueError, match=words):
        checkpoint.choose_device(device, dtype)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:x"])
def test_a_gpu_that_is_not_there_is_named_beside_one_that_is(machine, device):
    machine(cuda=True)
    with pytest.raises(ValueError, match=device):
        checkpoint.choose_device(device)


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
