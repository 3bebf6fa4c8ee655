"""The memory of a run, foreseen on the meta device, against what the allocator gives out when it really runs; and what is chosen by it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import alchemy
from alchemy import cli
from alchemy.command import fitting
from alchemy.dataset import Batch
from alchemy.methods.textual_inversion import Live
from alchemy.extras import memory
from alchemy.extras.counting import AsOnCuda, Count, back, peak
from alchemy.extras.memory import Run
from alchemy.training import denoising_loss
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, contents, drawn, good, lora_file, quick, refused, taught, tiny  # noqa: F401


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")


def allocated(function, learned):
    """The most bytes that torch's own allocator gave out while function ran."""
    function()  # once before: what is made but once is not of it
    for p in learned:
        p.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    now = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        now += event.nbytes()
        most = max(most, now)
    return most


def training_step(sdxl, run):
    """The step that memory.step foresees, on the networks of sdxl as they are."""
    learned = memory.learners(sdxl, run)
    sdxl.unet.checkpointing = run.checkpointing
    b = memory.batch_of(sdxl, run)
    batch = Batch(
        *(
            torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x
            for x in vars(b).values()
        )
    )
    with torch.no_grad():
        told = (
            Live(sdxl, run.size)
            if run.live
            else {p: sdxl.encode_prompt([p], run.size) for p in batch.prompts}
        )

    return learned, lambda: denoising_loss(sdxl, batch, told).mean().backward()


RUNS = [
    Run((64, 64), torch.float32, 4, "lora", 4),
    Run((64, 64), torch.float32, 4, "lora", 4, True),
    Run((32, 48), torch.float32, 2, "full"),
    Run((32, 32), torch.float32, 2, "full", text_encoders=True),
    Run((32, 32), torch.float32, 2, "textual-inversion"),
]


@pytest.mark.parametrize(
    "run", RUNS, ids=lambda run: f"{run.method}-{run.checkpointing}-{run.live}"
)
def test_a_step_takes_what_was_foreseen(sdxl, run):
    blank = memory.blank(sdxl, run.dtype)
    foreseen = memory.step(blank, run, memory.learners(blank, run))
    learned, step = training_step(sdxl, run)
    counted = peak_of(step)
    assert abs(foreseen - counted) <= 0.01 * counted, (
        foreseen,
        counted,
    )  # but for loose scalars, which are much here
    # Workspaces are not foreseen; and where nobody looks on, torch adds up a table's gradients from several prompts in place.
    table = max(p.nbytes for p in learned) if run.text_encoders else 0
    assert abs(foreseen - allocated(step, learned)) <= 0.02 * foreseen + 2**18 + table
    assert foreseen > sum(p.nbytes for p in learned)


def peak_of(function):
    with Count() as count:
        function()
    return count.peak


@torch.no_grad()
def test_drawing_and_encoding_take_what_was_foreseen(sdxl):
    run = Run((32, 48), torch.float32)
    unet, vae = memory.drawing(memory.blank(sdxl, run.dtype), run)
    prompt, photo = memory.encoding(memory.blank(sdxl, run.dtype), run)
    x, told, pixels = (
        torch.zeros(2, 4, 8, 12),
        sdxl.encode_prompt(["a", "b"], run.size),
        torch.zeros(1, 3, 32, 48),
    )
    real = [
        lambda: sdxl.unet(x, 0, *told.parts()),
        lambda: sdxl.vae.decode(x[:1]),
        lambda: sdxl.encode_prompt(["a dog"], run.size),
        lambda: sdxl.vae.encode(pixels),
    ]
    for foreseen, function in zip((unet, vae, prompt, photo), real):
        function()  # networks are read before
        assert abs(foreseen - peak_of(function)) <= 0.05 * foreseen


def test_weights_gradients_and_moments_are_16_bytes_a_number_that_learns_and_nothing_is_read(sdxl):
    run = Run((32, 32), torch.bfloat16, 2, "full", text_encoders=True, previews=False)
    texts, unet = (
        sum(
            p.numel()
            for name in names
            for p in memory.blank(sdxl, torch.float32).network(name).parameters()
        )
        for names in (memory.TEXT_ENCODERS, ("unet",))
    )
    made, whole = memory.blank(sdxl, run.dtype), memory.training(sdxl, run)["steps"]
    step = memory.step(made, run, memory.learners(made, run))  # gradients and activations
    assert whole - step == pytest.approx(12 * (texts + unet), rel=0.01) and 16 * (
        texts + unet
    ) < whole < 24 * (texts + unet)
    assert memory.weights(sdxl) > 4 * (texts + unet) and not sdxl.loaded


def test_checkpointing_fp8_a_smaller_batch_and_size_each_take_less(sdxl):
    run = Run((64, 64), torch.float32, 4, "lora", 4)
    whole = max(memory.training(sdxl, run).values())
    for change in (
        dict(checkpointing=True),
        dict(batch=2),
        dict(fp8=True),
        dict(size=(32, 32)),
        dict(dtype=torch.bfloat16),
    ):
        assert max(memory.training(sdxl, replace(run, **change)).values()) < whole, change


def test_attention_counts_as_a_fused_kernel_has_it():
    q, k = (torch.empty(1, 2, n, 8, device="meta") for n in (512, 256))
    assert peak(lambda: F.scaled_dot_product_attention(q, k, k)) == q.nbytes + 4 * 2 * 512


def test_under_autocast_products_are_half_and_norms_whole():
    x, w = torch.empty(4, 8, device="meta"), torch.empty(6, 8, device="meta")
    with AsOnCuda(torch.bfloat16):
        assert (
            F.linear(x, w).dtype == torch.bfloat16
            and F.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32
        )
    assert F.linear(x, w).dtype == torch.float32


def test_what_is_freed_counts_no_more_and_a_view_once():
    x = torch.ones(100)
    with Count() as count:
        y = x + 1
        y.view(10, 10).add_(1)
        assert count.now == 400
        del y
        assert count.now == 0
        x * 2
    assert count.peak == 400


def test_back_is_backward():
    x = torch.ones(3, requires_grad=True)
    back((x * x).sum())
    assert x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "free, chosen",
    [(100, "as it is"), (99, "checkpointing"), (50, "checkpointing"), (49, "fp8"), (1, "fp8")],
)
def test_the_first_that_fits_with_a_tenth_to_spare_is_chosen(free, chosen):
    assert (
        fitting.choose(
            free,
            ["as it is", "checkpointing", "fp8"],
            {"as it is": 90, "checkpointing": 45, "fp8": 30}.get,
        )
        == chosen
    )


def test_what_a_flag_says_is_not_chosen_otherwise(taught, monkeypatch):
    monkeypatch.setattr(fitting, "free", lambda device: 1)
    monkeypatch.setattr(
        memory, "training", lambda sdxl, run: {"steps": 9 - 3 * run.checkpointing - run.fp8}
    )
    for flags, said in (
        ((), "checkpointing and fp8 storage on"),
        (("--no-checkpointing",), "free 1e-09 GB: fp8 storage on"),
        (("--no-fp8-base",), "free 1e-09 GB: checkpointing on\n"),
        (("--no-fp8-base", "--no-checkpointing"), "free 1e-09 GB\n"),
    ):
        assert said in good(taught("--check", *flags, "--out", "run")).err


def test_fp8_storage_is_not_chosen_nor_named_beside_flags_that_it_does_not_go_with(
    drawn, lora_file, monkeypatch
):
    monkeypatch.setattr(fitting, "free", lambda device: 1)
    monkeypatch.setattr(memory, "sampling", lambda sdxl, run: {"decoding": 9 - run.fp8})
    assert "fp8 storage on" in good(drawn("--lora", lora_file)).err
    assert "fp8" not in good(drawn("--lora", lora_file, "--merge")).err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    card, run = (
        SimpleNamespace(device=torch.device("cuda"), vae_scale_factor=8),
        Run((64, 64), torch.bfloat16),
    )
    for flags, goes in (
        (dict(compile=True), False),
        (dict(compile=None), True),
        (dict(compile=None, merge=True), False),
    ):
        args = SimpleNamespace(fp8_base=None, **flags)
        assert any(option.fp8 for option in fitting.options(args, card, run)) == goes
        assert ("--fp8-base" in dict(fitting.open_flags(args, card, run))) == goes


FLAGS = [
    ("--checkpointing", {"checkpointing": True}),
    ("--batch 1", {"batch": 1}),
    ("--size 6x6", {"size": (6, 6)}),
    ("--size 4x4", {"size": (4, 4)}),
]
TAKEN = {
    (False, 2, 8): 90,
    (True, 2, 8): 81,
    (False, 1, 8): 72,
    (False, 2, 6): 71,
    (False, 2, 4): 63,
    (True, 1, 8): 54,
    (True, 1, 6): 45,
    (True, 1, 4): 36,
}


@pytest.mark.parametrize(
    "room, words",
    [
        (100, "with --checkpointing it"),
        (90, "with --checkpointing it"),
        (80, "with --batch 1 it"),
        (79, "with --size 6x6 it"),
        (70, "with --size 4x4 it"),
        (60, "with --checkpointing and --batch 1 it"),
        (50, "with --checkpointing and --batch 1 and --size 6x6 it"),
        (40, "with --checkpointing and --batch 1 and --size 4x4 it would take 3.6e-08 GB"),
        (39, None),
    ],
)
def test_the_first_flags_that_would_have_fitted_are_named(room, words):
    said = fitting.leaner(
        Run((8, 8), torch.float32, 2, "lora"),
        room,
        FLAGS,
        lambda run: TAKEN[run.checkpointing, run.batch, run.size[0]],
    )
    assert said is None if words is None else said.startswith(words), said


@pytest.mark.parametrize("free, flag", [(1e3, None), (1.2e6, "--checkpointing")])
def test_out_of_memory_ends_in_a_line_that_says_which_flag_would_have_fitted(
    taught, monkeypatch, free, flag
):
    from alchemy.command import training

    monkeypatch.setattr(fitting, "free", lambda device: free)
    monkeypatch.setattr(
        memory, "training", lambda sdxl, run: {"steps": 2e6 - 1e6 * run.checkpointing}
    )

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training, "subject", full)
    run = taught("--no-checkpointing", "--out", "run")
    refused(
        run, "out of memory: ", "with --checkpointing it would take 0.001 GB" if flag else "--size"
    )
    assert not contents(".").keys() & {"run/settings.json", "run/lora.safetensors"} and cli.LEANER


def test_a_picture_out_of_memory_is_told_so_too(drawn, monkeypatch):
    monkeypatch.setattr(fitting, "free", lambda device: 1e6)
    monkeypatch.setattr(
        memory, "sampling", lambda sdxl, run: {"decoding": 1e6 if run.size[0] > 32 else 5e5}
    )
    monkeypatch.setattr(
        alchemy.sdxl.SDXL,
        "encode_prompt",
        lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    refused(
        drawn("--no-fp8-base", "--size", 64),
        "out of memory: ",
        "with --size 32x32 it",
        "of 0.001 GB that were free",
    )
