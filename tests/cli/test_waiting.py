"""Nothing waits on the device: no value is read from it inside the denoising loop, nor in a training step, and nothing is copied so that it waits."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy
from alchemy import sampling
from alchemy.extras import optimizations
from alchemy.command.states import restore, save_state
from alchemy.formats.tensors import open_safetensors
from alchemy.segmentation import AttentionMaps
from alchemy.sdxl import Conditioning
from alchemy.training import MAX_BAD_STEPS, State, start, train
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.lessons import losses, model, parameters, run, small, spoiled  # noqa: F401
from helpers.running import tiny  # noqa: F401

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
    """The tiny checkpoint's UNet and VAE on the meta device, where a value that is read raises, and a prompt for them."""
    sdxl = alchemy.load(tiny, "cpu", "float32")
    told = [
        Conditioning(*(part.to("meta") for part in sdxl.encode_prompt([prompt]).parts()))
        for prompt in ("a dog", None)
    ]
    return SimpleNamespace(unet=sdxl.unet.to("meta"), schedule=sdxl.schedule), *told


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
    assert reads.copies == drawn * [
        ("cpu", "meta")
    ]  # of the schedule, which is on the CPU, values are read; of the latents that would raise


def test_reads_are_noticed(far):
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(2).to("meta")
    assert reads.values and ("cpu", "meta") in reads.copies
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.ones((), device="meta"))


def fused(sdxl, rate=1e-2):
    """A State as CUDA has it, where AdamW itself leaves out a step: its CPU kernel does so too."""
    state = start(parameters(sdxl), rate)
    return State(
        state.parameters,
        torch.optim.AdamW(state.parameters.values(), lr=rate, weight_decay=0.01, fused=True),
        state.scaler,
    )


def test_a_training_step_reads_but_the_loss_of_the_one_before():
    sdxl = small()
    state, seen = fused(sdxl), []
    loss_of = losses(sdxl, class_prompt=None)
    drawn = {
        step: loss_of(step, 0) for step in range(6)
    }  # what a batch is made of is read on the CPU; what it is made for is not
    running = train(
        sdxl,
        state,
        lambda step, part: (
            sum(p.square().sum() for p in state.parameters.values()) + drawn[step].detach()
        ),
        steps=6,
    )
    for _ in range(6):
        with Reads() as reads:
            next(running)
        seen.append((len(reads.values), len(state.losses), len(state.unread)))
    assert seen == [(1, 1, 0), (0, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 6, 0)]


def test_read_late_a_step_that_is_not_finite_is_not_applied_either(tmp_path):
    ends = []
    for make in (fused, lambda sdxl: start(parameters(sdxl), 1e-2)):
        sdxl = small()
        state, kept, yielded = make(sdxl), [], []
        for _, loss in train(
            sdxl, state, losses(spoiled(sdxl, {2, 3, 5}), class_prompt=None), steps=7
        ):
            kept.append(
                [p.detach().clone() for p in state.parameters.values()]
                + [v.clone() for s in state.optimizer.state.values() for v in s.values()]
            )
            yielded.append(loss)
        for i, same in enumerate((True, True, False, True, False, False)):
            assert all(torch.equal(a, b) for a, b in zip(kept[i], kept[i + 1])) == same
        assert [math.isfinite(loss) for loss in state.losses] == [
            True,
            False,
            False,
            True,
            False,
            True,
            True,
        ] and not state.unread
        ends.append((state.losses, yielded, kept[-1]))
    (late, told_late, far), (now, told_now, near) = ends
    assert late == pytest.approx(now, rel=1e-5, nan_ok=True) and told_now == pytest.approx(
        now, rel=1e-9, nan_ok=True
    )
    assert told_late == pytest.approx([late[0], *late[:5], late[6]], rel=1e-9, nan_ok=True)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(far, near)
    )  # fused AdamW rounds in another order


def test_read_late_a_run_that_is_lost_ends_a_step_later_and_its_weights_are_the_last_good_ones():
    sdxl = small()
    state = fused(sdxl)
    run(sdxl, state, 2, class_prompt=None)
    good = [p.detach().clone() for p in state.parameters.values()]
    with pytest.raises(
        FloatingPointError,
        match=f"{MAX_BAD_STEPS + 1} steps in a row, the last is {MAX_BAD_STEPS + 3}; lower",
    ):
        run(spoiled(sdxl, range(1, 99)), state, 20, class_prompt=None)
    assert state.step == MAX_BAD_STEPS + 4 and all(
        torch.equal(a, b) for a, b in zip(good, state.parameters.values())
    )


def test_a_state_that_is_saved_holds_every_loss_and_goes_on_to_the_bit(tmp_path):
    def state_at(step, state, sdxl):
        for done, _ in train(sdxl, state, losses(sdxl, class_prompt=None), steps=6):
            if done == step:
                return state
        return state

    sdxl = small()
    whole = state_at(6, fused(sdxl), sdxl)
    expected = {name: p.detach().clone() for name, p in whole.parameters.items()}

    sdxl = small()
    state = state_at(3, fused(sdxl), sdxl)
    assert len(state.unread) == 1
    save_state(state, tmp_path / "state.safetensors", {})
    assert state.losses == whole.losses[:3] and not state.unread
    sdxl = small()
    again, file = fused(sdxl), open_safetensors(tmp_path / "state.safetensors")
    restore(again, file, file.metadata())
    state_at(6, again, sdxl)
    assert again.losses == whole.losses and all(
        torch.equal(p, expected[name]) for name, p in again.parameters.items()
    )


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling_leaves_out_what_overflows_and_halves_its_scale(overflow):
    # On the CPU, with the scaler of float16 cards: their gradients overflow where the scale is too large.
    sdxl = small()
    state = fused(sdxl)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    before = [p.detach().clone() for p in state.parameters.values()]
    whole = losses(sdxl, class_prompt=None)
    most = 1 if overflow else torch.finfo(torch.float16).max

    def half(step, part):
        loss = whole(step, part)
        loss.register_hook(lambda g: torch.where(g.abs() > most, torch.inf, g))
        return loss

    run_ = train(sdxl, state, half, steps=1)
    next(run_)
    moved = [not torch.equal(a, b) for a, b in zip(before, state.parameters.values())]
    assert (
        any(moved) != overflow
        and state.scaler.get_scale() == 2.0 ** (14 if overflow else 15)
        and math.isnan(state.losses[0]) == overflow
    )


# On CUDA, where torch itself tells


@pytest.fixture
def errors_where_it_waits():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_on_cuda_the_denoising_loop_never_waits(tiny, sampler, errors_where_it_waits):
    sdxl = alchemy.load(tiny, "cuda")
    told = [sdxl.encode_prompt([prompt]) for prompt in ("a dog", None)]
    noise, unet = sampling.noise((1, 4, 8, 8), [0]).to("cuda"), sdxl.unet
    loop_ = lambda: list(
        sampling.denoise(
            sdxl, noise, *told, steps=4, sampler=sampler, generators=sampling.generators([0])
        )
    )  # noqa: E731
    loop_()
    errors_where_it_waits()
    with optimizations.cache_prompt_kv(unet):
        loop_()


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_a_training_step_never_waits_and_loss_scaling_works(
    tiny, dtype, errors_where_it_waits
):
    sdxl = alchemy.load(tiny, "cuda", dtype)
    alchemy.add_lora(sdxl, 2)
    state = start(parameters(sdxl), 1e-3, dtype)
    running = train(sdxl, state, losses(sdxl), steps=8)
    before = [p.detach().clone() for p in state.parameters.values()]
    next(running), next(running)
    errors_where_it_waits()
    for _ in range(4):
        next(running)
    torch.cuda.set_sync_debug_mode("default")
    list(running)
    # A scale that is too large at first may cost a step of float16 or two.
    assert (
        len(state.losses) == 8
        and all(map(math.isfinite, state.losses[3:]))
        and state.scaler.is_enabled() == (dtype == torch.float16)
    )
    assert all(
        p.isfinite().all() and not torch.equal(p, b)
        for p, b in zip(state.parameters.values(), before)
    )
