"""The table of memory sizes, checked against counts on the meta device; what is chosen by it."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import peak_bytes
import pytest
import torch
from helpers.counting import AsOnCuda, Count, run_backward
from helpers.counting import peak as counted_peak

from alchemy import cli
from alchemy.extras import memory
from alchemy.extras.memory import GB, estimate, suggest_flags


def test_freed_tensors_are_not_counted_and_views_once():
    x = torch.ones(100)
    with Count() as count:
        y = x + 1
        y.view(10, 10).add_(1)
        assert count.now == 400
        del y
        assert count.now == 0
        x * 2
    assert count.peak == 400


def test_backward_under_counting_is_backward():
    x = torch.ones(3, requires_grad=True)
    run_backward((x * x).sum())
    assert x.grad.tolist() == [2, 2, 2]
    with AsOnCuda():
        q = torch.empty(2, 1, 64, 8, device="meta")
        most = counted_peak(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert most == q.nbytes + 2 * 64 * 4  # no matrix, and a float32 for each query


def test_the_parameters_of_the_official_configurations_are_those_of_the_table():
    sdxl = peak_bytes.model(rank=1)
    adapters, unet = 0, 0
    for name, p in sdxl.unet.named_parameters():
        adapters += p.numel() if ".lora." in name else 0
        unet += p.numel() if ".lora." not in name else 0
    assert adapters == memory.LORA_PER_RANK
    assert unet == pytest.approx(memory.UNET, rel=1e-3)


@pytest.mark.parametrize(
    "count, gigabytes",
    [
        (lambda: peak_bytes.decode(1024, 1024), memory.decode_activations(1024**2) / GB),
        (lambda: peak_bytes.decode(1024, 1536), memory.decode_activations(1024 * 1536) / GB),
        (lambda: peak_bytes.decode(2048, 2048), memory.decode_activations(2048**2) / GB),
        (lambda: peak_bytes.train_step("lora", 1, True), memory.STEP["lora", True][0] / GB),
        (lambda: peak_bytes.train_step("lora", 1, False), memory.STEP["lora", False][0] / GB),
    ],
)
def test_the_table_has_the_counted_sizes(count, gigabytes):
    assert count() == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    "size, options", [((1024, 1024), {"rank": 16}), ((1024, 2048), {"record": True})]
)
def test_the_steps_of_a_sampling_take_less_than_decoding(size, options):
    assert (
        0.3
        < peak_bytes.denoise(*size, **options)
        < memory.decode_activations(size[0] * size[1]) / GB
    )


@pytest.fixture
def card():
    """(args, sdxl) of a LoRA run of SDXL on a GPU that torch does not have here."""
    args = SimpleNamespace(
        method="lora",
        size=(1024, 1024),
        batch=2,
        prior_weight=1.0,
        captions=False,
        rank=16,
        checkpointing=None,
        fp8_base=None,
        compile=None,
        text_encoders=False,
        preview_every=100,
    )
    sdxl = SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        defaults={"size": 1024},
        size=(1024, 1024),
        vae_scale_factor=8,
    )
    return args, sdxl


def test_the_estimate_adds_weights_moments_and_activations(card):
    def needed(**changes):
        return estimate(*card, **changes)

    state = 3 * 4 * memory.LORA_PER_RANK * 16
    weights, decoding = 2 * memory.UNET, 2 * memory.VAE + memory.VAE_DECODE
    first, further = memory.STEP["lora", False]
    assert needed(prior_weight=0) == pytest.approx(weights + state + first + further)
    assert needed() == needed(captions=True, batch=4) == needed(prior_weight=0, batch=4)
    half = needed(size=(512, 1024), prior_weight=0)
    assert half == pytest.approx(weights + state + (first + further) / 2)
    with_previews = needed(batch=1, checkpointing=True)
    assert with_previews == pytest.approx(weights + state * 4 / 3 + decoding)
    full = needed(method="full", prior_weight=0, batch=1)
    assert full == pytest.approx(12 * memory.UNET + memory.STEP["full", False][0])
    assert needed(method=None) == pytest.approx(weights + decoding)


def test_the_readme_has_the_estimates():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(peak_bytes.readme_rows()) in text


@pytest.mark.parametrize(
    "given, gigabytes, checkpointing, fp8",
    [
        ({}, 80, False, None),
        ({}, 30.5, True, None),  # 28.0 would fit, but not with a tenth to spare
        ({}, 31.5, False, None),
        ({}, 12, True, None),
        ({}, 8, True, True),
        ({"checkpointing": False}, 8, False, True),
        ({"fp8_base": False}, 8, True, False),
        ({"fp8_base": False, "checkpointing": False}, 8, False, False),
    ],
)
def test_free_memory_decides_what_the_flags_leave_open(
    card, monkeypatch, given, gigabytes, checkpointing, fp8
):
    args, sdxl = card
    vars(args).update(given)
    monkeypatch.setattr(memory, "free_memory", lambda device: gigabytes * GB)
    monkeypatch.setattr(memory.optimizations, "prepare", lambda *args: None)
    monkeypatch.setattr(cli, "log", lambda text: None)
    memory.choose_memory_mode(args, sdxl)
    assert (args.checkpointing, args.fp8_base) == (checkpointing, fp8)


def test_fp8_is_not_chosen_where_it_does_not_apply(card, monkeypatch):
    args, sdxl = card
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for changes, expected in (
        ({}, True),
        ({"method": "full"}, False),
        ({"merge": True}, False),
        ({"compile": True}, False),
    ):
        assert memory.can_use_fp8(Namespace(**vars(args) | changes), sdxl) == expected


@pytest.mark.parametrize(
    "gigabytes, words",
    [
        (40, "with --checkpointing it would need"),
        (12, "with --checkpointing it would need"),
        (8.3, "with --checkpointing and --batch 1 it would need"),
        (6.6, "with --checkpointing and --batch 1 and --fp8-base it would need"),
        (1, None),
    ],
)
def test_the_fewest_flags_that_would_have_fitted_are_named(card, gigabytes, words):
    line = suggest_flags(*card, gigabytes * GB)
    assert line is None if words is None else line.startswith(words), line
    if words:
        assert line.count("--size") <= 1 and line.endswith(f"of {gigabytes:.3g} GB")
