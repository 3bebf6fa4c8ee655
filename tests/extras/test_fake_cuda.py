"""Devices and dtypes as on a GPU, without one: networks of tensors without values, elsewhere.

torch's FakeTensorMode computes shapes, dtypes and devices, and raises where an operation mixes
devices; here also where a product mixes dtypes. What stays on the CPU is computed; what is copied
to it from the device is a bright box on black. The device is "meta": where torch is built without
CUDA, slices of fake CUDA tensors raise, and autograd ends the process.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers.checkpoints import CONFIGS, vocabulary_read_once  # noqa: F401
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy
from alchemy import lora
from alchemy.dataset import EncodeEveryStep, encode_image, encode_prompts, make_batcher
from alchemy.extras.fp8 import store_fp8
from alchemy.extras.optimizations import cached_steps
from alchemy.formats import checkpoint
from alchemy.methods import textual_inversion
from alchemy.methods.prior import teacher_batch
from alchemy.samplers import SAMPLERS
from alchemy.schedule import Schedule
from alchemy.sdxl import SDXL
from alchemy.tokenizer import Tokenizer
from alchemy.training import TrainState, loss, train

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm")
SIZE = (32, 32)
# As small as can be: each operation on fake tensors takes about a millisecond.
SMALL = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [1, 2],
}


class SameDtype(TorchDispatchMode):
    """Inside, a product of tensors of several floating dtypes raises TypeError, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        dtypes = {x.dtype for x in args if torch.is_tensor(x) and x.is_floating_point()}
        if name in PRODUCTS and len(dtypes) > 1:
            raise TypeError(f"{name} of {dtypes}")
        return func(*args, **(kwargs or {}))


def target_device(values):
    """The device that the arguments of a call name, or None."""
    for value in values:
        if isinstance(value, torch.device):
            return value
        if isinstance(value, str) and value.startswith(("cpu", "cuda", "meta")):
            return torch.device(value)
        if torch.is_tensor(value):
            return value.device
    return None


class Far(TorchFunctionMode):
    """Inside, only tensors of another device are fake; a value that is read there is 1."""

    READS = {"item": 1.0, "__float__": 1.0, "__int__": 1, "__bool__": True}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        values = [*args, *kwargs.values()]
        for value in args:
            values += value if isinstance(value, (list, tuple)) else ()
        is_fake = any(isinstance(value, fake_tensor.FakeTensor) for value in values)
        if is_fake and name in self.READS:
            return self.READS[name]
        target = target_device([*args[name in ("to", "cpu") :], *kwargs.values()])
        to_cpu = name == "cpu" or name == "to" and str(target) == "cpu"
        if is_fake and to_cpu:
            return self.box(args[0])
        if is_fake or str(target or "cpu") != "cpu":
            return func(*args, **kwargs)
        with fake_tensor.unset_fake_temporarily():
            return func(*args, **kwargs)

    def box(self, x):
        with fake_tensor.unset_fake_temporarily():
            values = torch.zeros(x.shape, dtype=x.dtype)
            if x.ndim > 1:
                height, width = x.shape[-2:]
                values[..., height // 4 : height // 2, width // 4 : width // 2] = 1
            return values


@pytest.fixture
def fake():
    """fake(dtype): a small SDXL whose networks are elsewhere."""
    sizes = CONFIGS | {"unet": CONFIGS["unet"] | SMALL}
    configs = {name: kind.from_config(sizes[name]) for name, kind in checkpoint.CONFIGS.items()}
    places = [checkpoint.VOCABULARY / name for name in ("tokenizer", "tokenizer_2")]
    tokenizers = [Tokenizer.from_folder(place) for place in places]
    schedule = Schedule.from_config({})

    def load(dtype):
        device = torch.device("meta")

        def read(name, dtype):
            with fake_tensor.unset_fake_temporarily():
                network = checkpoint.build_on_meta(name, configs[name])
            for key, parameter in list(network.named_parameters()):
                module, _, leaf = key.rpartition(".")
                tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
                value = torch.nn.Parameter(tensor, requires_grad=False)
                setattr(network.get_submodule(module), leaf, value)
            return network.eval()

        return SDXL("fake", read, configs, tokenizers, schedule, device, dtype)

    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Far(), SameDtype():
        yield load


def test_mixed_devices_and_dtypes_are_noticed(fake):
    there = torch.empty(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(2, 3)
    with pytest.raises(TypeError, match="mm of"):
        torch.mm(there.half(), there.T)
    assert torch.ones(2, 3).sum() == 6 and there.cpu().shape == (2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_with_adapters_merged_in_fp8_and_insertion(fake, dtype):
    sdxl = fake(dtype)
    lora.add_lora(sdxl, 2)
    cond, uncond = (sdxl.encode_prompt([prompt], SIZE) for prompt in ("a dog", None))
    noise = alchemy.noise((1, 4, 8, 8), [0]).to(sdxl.device)
    for sampler in SAMPLERS:
        options = {"sampler": sampler, "steps": 2, "generators": alchemy.generators([0])}
        list(cached_steps(sdxl.unet, alchemy.denoise(sdxl, noise, cond, uncond, **options)))
    alchemy.insert(
        sdxl, "a dog on grass", "dog", "sks", size=SIZE, steps=4, free_text_encoders=True
    )
    lora.merge(sdxl)
    next(alchemy.denoise(sdxl, noise, cond, uncond))
    lora.unmerge(sdxl)
    store_fp8(sdxl.unet)
    next(alchemy.denoise(sdxl, noise, cond, uncond))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "fp8", "full"])
def test_training_with_prior_preservation(fake, tmp_path, monkeypatch, kind, checkpointing):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    sdxl = fake(torch.float32 if kind == "full" else torch.bfloat16)
    path = tmp_path / "photo.png"
    Image.new("RGB", SIZE).save(path)
    photo = encode_image(sdxl, path, SIZE, "a sks dog")
    prompts = encode_prompts(sdxl, ["a sks dog", "a dog"], SIZE)
    get_batch = make_batcher(sdxl, [photo], SIZE, 0, 2)
    if kind == "full":
        parameters = dict(sdxl.unet.requires_grad_(True).named_parameters())
    else:
        lora.add_lora(sdxl, 2)
        parameters = {n: p for n, p in sdxl.unet.named_parameters() if ".lora." in n}
    if kind == "fp8":
        store_fp8(sdxl.unet)
    sdxl.unet.checkpointing = checkpointing

    def get_loss(step, micro_step):
        batch = get_batch(step, micro_step)
        return loss(sdxl, batch, teacher_batch(sdxl, batch, prompts, "a dog"), prompts)

    state = TrainState.create(parameters, 1e-3, sdxl.dtype)
    assert len(list(train(sdxl, state, get_loss, steps=1))) == 1
    for p in parameters.values():
        assert p.grad.device == p.device and state.optimizer.state[p]["exp_avg"].device == p.device


@pytest.mark.parametrize("dtype", DTYPES)
def test_textual_inversion(fake, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    sdxl = fake(dtype)
    path = tmp_path / "photo.png"
    Image.new("RGB", SIZE).save(path)
    photo = encode_image(sdxl, path, SIZE, "a photo of <sks>")
    rows = [torch.zeros(2, table.embedding_dim) for table in textual_inversion.tables(sdxl)]
    words = textual_inversion.add_word(sdxl, "<sks>", rows)
    parameters = {f"word_{i}": word.requires_grad_(True) for i, word in enumerate(words)}
    get_batch = make_batcher(sdxl, [photo], SIZE, 0, 2)
    prompts = EncodeEveryStep(sdxl, SIZE)

    def get_loss(step, micro_step):
        return loss(sdxl, get_batch(step, micro_step), None, prompts)

    state = TrainState.create(parameters, 1e-3, sdxl.dtype)
    assert len(list(train(sdxl, state, get_loss, steps=1))) == 1
    assert all(word.grad.device == word.device == sdxl.device for word in words)
