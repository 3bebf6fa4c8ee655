"""The loader on whole checkpoints: both layouts, precisions, what is read when, and how much memory that takes."""
import json
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import alchemy
from alchemy import checkpoint, layout
from alchemy.schedule import Schedule
import checkpoints as synthetic
from checkpoints import (CONFIGS, NETWORKS, SCHEDULER, VAE, vocabulary_read_once, weights, write_folder, write_json,  # noqa: F401
                         write_single, write_weights)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_single(tmp_path_factory.mktemp("single") / "model.safetensors", extras=synthetic.USUAL_EXTRAS)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same(network, expected, dtype=torch.float32):
    """Every tensor of the network is, to the bit, the expected one in that dtype, and there are no others."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key].to(dtype)), key


def all_same(sdxl, seed=0, dtype=torch.float32):
    for name in NETWORKS:
        same(sdxl.network(name), weights(seed)[name], dtype)


# The folder layout

def test_folder_loads_bit_equal(folder):
    all_same(alchemy.load(folder, "cpu"))


def test_loaded_parameters_take_no_gradient_and_the_networks_are_in_eval_mode(folder):
    sdxl = alchemy.load(folder, "cpu")
    for name in NETWORKS:
        assert not sdxl.network(name).training
        assert not any(p.requires_grad for p in sdxl.network(name).parameters())


@pytest.mark.parametrize("dtype, seed", [("float32", 0), ("float16", 1), ("bfloat16", 1)])
def test_with_both_precisions_there_half_takes_fp16_files_and_float32_the_others(tmp_path, dtype, seed):
    write_folder(tmp_path, seed=0)
    write_folder(tmp_path, seed=1, dtype=torch.float16, variant=".fp16")
    expected = weights(seed)["unet"] if seed == 0 else {k: t.half() for k, t in weights(seed)["unet"].items()}
    same(alchemy.load(tmp_path, "cpu", dtype).unet, expected, getattr(torch, dtype))


def test_fp16_files_alone_serve_float32(tmp_path):
    write_folder(tmp_path, dtype=torch.float16, variant=".fp16")
    same(alchemy.load(tmp_path, "cpu").unet, {k: t.half() for k, t in weights()["unet"].items()})


@pytest.mark.parametrize("how", [dict(shards=3), dict(shards=3, dtype=torch.float16, variant=".fp16"),
                                 dict(shards=2, dtype=torch.float16, variant=".fp16", old=True)], ids=["fp32", "fp16", "fp16-old-names"])
def test_shards_load_as_one(tmp_path, how):
    sdxl = alchemy.load(write_folder(tmp_path, **how), "cpu", how.get("dtype", torch.float32))
    same(sdxl.unet, weights()["unet"], how.get("dtype", torch.float32))
    same(sdxl.text_encoders[1], weights()["text_encoder_2"], how.get("dtype", torch.float32))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_missing_shards_are_named_before_anything_is_read(tmp_path, variant):
    write_folder(tmp_path, shards=4, variant=variant)
    for i in (2, 4):
        (tmp_path / "unet" / f"diffusion_pytorch_model{variant}-0000{i}-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="2 of 4 shards") as caught:
        alchemy.load(tmp_path, "cpu")
    assert all(f"diffusion_pytorch_model{variant}-0000{i}-of-00004.safetensors" in str(caught.value) for i in (2, 4))


def test_first_encoder_as_transformers_5_saves_it_loads(copy):
    (copy / "text_encoder" / "model.safetensors").unlink()
    write_weights(copy / "text_encoder", "text_encoder", {k.removeprefix("text_model."): t for k, t in weights()["text_encoder"].items()})
    same(alchemy.load(copy, "cpu").text_encoders[0], weights()["text_encoder"])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_position_ids_are_dropped_by_name(copy, prefix):
    for name in ("text_encoder", "text_encoder_2"):
        extra = {f"{prefix}embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
        write_weights(copy / name, name, weights()[name] | extra)
    all_same(alchemy.load(copy, "cpu"))


def test_tokenizer_json_alone_gives_the_same_ids(copy):
    source = synthetic.SHIPPED / "tokenizer"
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [line.split() for line in (source / "merges.txt").read_text().splitlines() if line and line[0] != "#"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        added = [{"id": vocab[token], "content": token} for token in sorted({pad, "<|startoftext|>", "<|endoftext|>"}, key=vocab.get)]
        write_json(copy / name / "tokenizer.json", {"added_tokens": added, "model": {"vocab": vocab, "merges": merges}})
    ours, shipped = alchemy.load(copy, "cpu").tokenizers, [checkpoint.Tokenizer.from_folder(synthetic.SHIPPED / n) for n in (
        "tokenizer", "tokenizer_2")]
    for a, b in zip(ours, shipped):
        assert a("a photo of a dog, 2 cats!") == b("a photo of a dog, 2 cats!")
    assert [a("x")[-1] for a in ours] == [49407, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_float32_file_becomes_the_dtype_asked_for(folder, dtype):
    sdxl = alchemy.load(folder, "cpu", dtype)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        same(sdxl.network(name), weights()[name], getattr(torch, dtype))


def test_scheduler_config_sets_the_schedule(copy):
    write_json(copy / "scheduler" / "scheduler_config.json", SCHEDULER | dict(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0, beta_end=0.02, num_train_timesteps=500))
    schedule = alchemy.load(copy, "cpu").schedule
    beta = torch.linspace(0.00085 ** 0.5, 0.02 ** 0.5, 500, dtype=torch.float64) ** 2
    assert torch.equal(schedule.alpha_bar, torch.cumprod(1 - beta, 0))
    assert (schedule.prediction, schedule.spacing, schedule.steps_offset) == ("v_prediction", "trailing", 0)


def test_force_zeros_for_empty_prompt_is_read_from_model_index(tmp_path, folder):
    assert alchemy.load(folder, "cpu").zeros_for_none is True
    write_folder(tmp_path, index={"force_zeros_for_empty_prompt": False})
    assert alchemy.load(tmp_path, "cpu").zeros_for_none is False


# Another VAE

OTHER = VAE | dict(scaling_factor=0.7, force_upcast=False)


def other_vae():
    return weights(1)["vae"]


def test_vae_as_a_folder_brings_its_configuration(folder, tmp_path):
    write_json(tmp_path / "config.json", OTHER)
    write_weights(tmp_path, "vae", other_vae())
    sdxl = alchemy.load(folder, "cpu", vae=tmp_path)
    same(sdxl.vae, other_vae())
    same(sdxl.unet, weights()["unet"])
    assert sdxl.vae.config.scaling_factor == 0.7


def test_vae_as_a_checkpoint_takes_its_vae_folder(folder, tmp_path):
    write_folder(tmp_path, seed=1, configs=CONFIGS | {"vae": OTHER})
    for place in (tmp_path, tmp_path / "vae"):
        sdxl = alchemy.load(folder, "cpu", vae=place)
        same(sdxl.vae, other_vae())
        assert sdxl.vae.config.scaling_factor == 0.7


@pytest.mark.parametrize("form", ["prefixed", "ldm", "diffusers", "whole"])
def test_vae_as_a_single_file_in_each_spelling(folder, single, tmp_path, form):
    tensors = synthetic.ldm_vae(other_vae())
    if form == "prefixed":
        tensors = {"first_stage_model." + key: t for key, t in tensors.items()}
    tensors = {"diffusers": other_vae(), "whole": synthetic.single_tensors(1)}.get(form, tensors)
    file = write_single(tmp_path / "vae.safetensors", tensors)
    same(alchemy.load(folder, "cpu", vae=file).vae, other_vae())
    same(alchemy.load(single, "cpu", config=folder, vae=file).vae, other_vae())
    assert alchemy.load(folder, "cpu", vae=file).vae.config.scaling_factor == VAE["scaling_factor"]  # a file brings none of its own


def test_a_checkpoint_without_a_vae_loads_with_another(copy, tmp_path):
    shutil.rmtree(copy / "vae")
    write_json(tmp_path / "vae" / "config.json", OTHER)
    write_weights(tmp_path / "vae", "vae", other_vae())
    same(alchemy.load(copy, "cpu", vae=tmp_path / "vae").vae, other_vae())
    with pytest.raises(ValueError, match="vae/config.json"):
        alchemy.load(copy, "cpu")


# The single-file layout

def test_single_file_with_the_usual_extras_loads_bit_equal_to_the_folder(folder, single):
    all_same(alchemy.load(single, "cpu", config=folder))


def test_one_fp16_file_loads_in_each_precision(folder, tmp_path):
    file = write_single(tmp_path / "tune.safetensors", dtype=torch.float16, extras=synthetic.USUAL_EXTRAS)
    half = {name: {key: t.half() for key, t in tensors.items()} for name, tensors in weights().items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        sdxl = alchemy.load(file, "cpu", dtype, config=folder)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            same(sdxl.network(name), half[name], dtype)


def test_single_file_projection_is_transposed_and_in_proj_cut_in_three(folder, single):
    stored, second = synthetic.single_tensors(), alchemy.load(single, "cpu", config=folder).text_encoders[1]
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(second.text_projection.weight, stored[prefix + "text_projection"].T)
    fused = stored[prefix + "transformer.resblocks.2.attn.in_proj_weight"]
    assert torch.equal(second.text_model.encoder.layers[2].self_attn.k_proj.weight, fused[12:24])


@pytest.mark.parametrize("levels, layers", [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_single_file_unet_names_count_as_the_original_code_does(levels, layers):
    types = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1)
    for ours, theirs in synthetic.unet_modules(dict(layers_per_block=layers, down_block_types=types)).items():
        assert layout.unet(ours + ".weight", layers) == theirs + ".weight"


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_single_file_vae_names_count_the_decoder_from_its_finest_level(levels):
    for ours, theirs in synthetic.vae_modules(dict(layers_per_block=2, block_out_channels=[8] * levels)).items():
        assert layout.vae(ours + ".weight", levels) == theirs + ".weight"


def test_v_pred_and_ztsnr_keys_set_the_schedule(folder, tmp_path):
    plain = write_single(tmp_path / "plain.safetensors")
    v = write_single(tmp_path / "v.safetensors", extras={"v_pred": torch.tensor([])})
    z = write_single(tmp_path / "z.safetensors", extras={"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])})
    schedules = [alchemy.load(file, "cpu", config=folder).schedule for file in (plain, v, z)]
    assert [s.prediction for s in schedules] == ["epsilon", "v_prediction", "v_prediction"]
    assert torch.equal(schedules[0].alpha_bar, schedules[1].alpha_bar) and schedules[0].alpha_bar[-1] > 0
    assert schedules[2].alpha_bar[-1] == 0 and schedules[2].grid(30)[0][0] == 999  # it starts from pure noise


def test_single_file_without_config_is_sdxl_base(tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    sdxl = alchemy.load(write_single(tmp_path / "base.safetensors", {name: torch.zeros(320, 4, 3, 3)}), "cpu")
    c = sdxl.configs
    assert c["unet"].block_out_channels == (320, 640, 1280) and c["unet"].transformer_layers_per_block[1:] == (2, 10)
    assert (c["text_encoder"].hidden_size, c["text_encoder"].num_hidden_layers, c["text_encoder"].hidden_act) == (768, 12, "quick_gelu")
    assert (c["text_encoder_2"].hidden_size, c["text_encoder_2"].num_hidden_layers, c["text_encoder_2"].hidden_act) == (1280, 32, "gelu")
    assert c["text_encoder_2"].projection_dim == 1280 and c["vae"].scaling_factor == 0.13025 and c["vae"].force_upcast
    assert torch.equal(sdxl.schedule.alpha_bar, Schedule.from_config({}).alpha_bar) and sdxl.size == (1024, 1024)
    assert [t("x")[-1] for t in sdxl.tokenizers] == [49407, 0] and sdxl.zeros_for_none  # the vocabulary that ships serves


@pytest.mark.skipif(not SHARED.is_dir(), reason="the manifest of the official checkpoint is not here")
def test_what_a_single_file_assumes_is_what_the_official_configurations_say():
    official = json.loads((SHARED / "sdxl_base_manifest.json").read_text())["configs"]
    for name, kind in checkpoint.CONFIGS.items():
        assert kind.from_config(checkpoint.BASE[name]) == kind.from_config(official[name])


# What is read, and when

def test_load_reads_no_tensor_and_a_network_is_read_on_first_use(folder, single, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint, "fill", lambda network, name, *rest: read.append(name) or network)
    for sdxl in (alchemy.load(folder, "cpu"), alchemy.load(single, "cpu", config=folder)):
        assert read == []
        sdxl.schedule, sdxl.tokenizers, sdxl.size, sdxl.factor, sdxl.defaults
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
    gone = [weakref.ref(p) for network in (before if isinstance(before, tuple) else (before,)) for p in network.parameters()]
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

sdxl = alchemy.load(sys.argv[2], "cpu", sys.argv[3], config=sys.argv[4])
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
sizes = [p.numel() * p.itemsize for name in ("text_encoder_2", "unet") for p in sdxl.network(name).parameters()]
print(max(peak, anonymous()) - before, sum(sizes), max(sizes), "torch._dynamo" in sys.modules)
"""
WIDE = CONFIGS | {"unet": CONFIGS["unet"] | dict(block_out_channels=[32, 160, 320], attention_head_dim=[1, 4, 8]),
                  "text_encoder_2": CONFIGS["text_encoder_2"] | dict(hidden_size=240, num_attention_heads=4)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """About 200 MB in float32, in both layouts, of ones: only sizes matter."""
    root, ones = tmp_path_factory.mktemp("wide"), {}
    for name in NETWORKS:
        write_json(root / "folder" / name / "config.json", WIDE[name])
        with torch.device("meta"):
            shapes = {key: p.shape for key, p in checkpoint.BUILD[name](checkpoint.CONFIGS[name].from_config(WIDE[name])).state_dict().items()}
        ones[name] = {key: torch.ones(shape) for key, shape in shapes.items()}
        write_weights(root / "folder" / name, name, ones[name])
    write_single(root / "single.safetensors", {
        **{"model.diffusion_model." + k: t for k, t in synthetic.renamed(ones["unet"], synthetic.unet_modules(WIDE["unet"])).items()},
        **{"conditioner.embedders.1.model." + k: t for k, t in synthetic.open_clip(ones["text_encoder_2"]).items()}})
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("source, dtype", [("folder", "float32"), ("folder", "float16"), ("folder", "bfloat16"), ("single.safetensors", "bfloat16")])
def test_loading_takes_no_second_copy(wide, source, dtype):
    arguments = [str(Path(alchemy.__file__).parents[1]), str(wide / source), dtype, str(wide / "folder")]
    out = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True).stdout
    grown, loaded, largest = map(int, out.split()[:3])
    assert loaded > (80e6 if dtype != "float32" else 160e6)
    assert out.split()[3] == "False", "a compiler was imported, which takes seconds"
    assert grown <= 1.05 * loaded + largest, f"{grown / 1e6:.0f} MB for {loaded / 1e6:.0f} MB of tensors"


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
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return pretend


@pytest.mark.parametrize("has, expected", [
    (dict(), ("cpu", torch.float32)), (dict(mps=True), ("mps", torch.bfloat16)), (dict(cuda=True, bf16=True), ("cuda", torch.bfloat16)),
    (dict(cuda=True), ("cuda", torch.float16)), (dict(cuda=True, bf16=True, mps=True), ("cuda", torch.bfloat16))])
def test_auto_is_cuda_mps_cpu_and_bf16_fp16_float32(machine, has, expected):
    machine(**has)
    assert checkpoint.choose_device() == (torch.device(expected[0]), expected[1])


def test_a_dtype_asked_for_is_kept_on_any_device(machine):
    machine(cuda=True)
    assert checkpoint.choose_device("cuda:0", "bfloat16") == (torch.device("cuda:0"), torch.bfloat16)
    assert checkpoint.choose_device("cpu", torch.float16) == (torch.device("cpu"), torch.float16)
    assert checkpoint.choose_device("cpu") == (torch.device("cpu"), torch.float32)  # although CUDA is there


@pytest.mark.parametrize("device, dtype, words", [("cuda", "auto", "cuda"), ("cuda:1", "auto", "cuda:1"), ("mps", "auto", "mps"),
                                                  ("gpu", "auto", "'gpu'"), ("cpu", "half!", "dtype"), ("cpu", "int64", "dtype"),
                                                  ("cpu", "load", "dtype")])
def test_a_device_or_dtype_that_is_not_there_is_named(machine, device, dtype, words):
    machine()
    with pytest.raises(ValueError, match=words):
        checkpoint.choose_device(device, dtype)


@pytest.mark.parametrize("dtype, upcast, expected", [
    ("float16", True, torch.float32), ("float16", False, torch.float16), ("bfloat16", True, torch.bfloat16), ("float32", True, torch.float32)])
def test_the_vae_stays_float32_only_where_float16_would_overflow(copy, dtype, upcast, expected):
    write_json(copy / "vae" / "config.json", VAE | dict(force_upcast=upcast))
    same(alchemy.load(copy, "cpu", dtype).vae, weights()["vae"], expected)
