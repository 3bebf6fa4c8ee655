"""The update: what it must do, what it must not, and the loop as train.py drives it."""

import itertools
import math

import pytest
import torch
from safetensors import safe_open

from alchemy import dataset, lora
from alchemy.command import lessons as lessons_of
from alchemy.training import MAX_BAD_STEPS, start, train
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.lessons import batch, losses, model, parameters, run, small, spoiled  # noqa: F401
from helpers.running import call, contents, good, photos, quick, refused, tiny  # noqa: F401


def gradients(sdxl, **options):
    state = start(parameters(sdxl), 1e-3)
    ((_, value),) = run(sdxl, state, 1, **options)
    return value, {name: p.grad.clone() for name, p in state.parameters.items()}


@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4)])
def test_accumulated_batches_are_one_larger_batch(model, batch, accumulation):
    value, expected = gradients(model(), batch=4)
    same, ours = gradients(model(), batch=batch, accumulation=accumulation)
    assert math.isclose(same, value, rel_tol=1e-5)
    for name, g in expected.items():
        assert (ours[name] - g).norm() <= 1e-4 * g.norm() and g.norm() > 0, name


def test_checkpointing_changes_no_gradient(model):
    def with_(checkpointing):
        sdxl = model()
        sdxl.unet.checkpointing = checkpointing
        return gradients(sdxl, batch=2)

    (value, expected), (same, ours) = with_(False), with_(True)
    assert value == same and all(torch.equal(ours[name], g) for name, g in expected.items())


def test_gradients_longer_than_1_are_cut_to_1(model):
    sdxl = model()
    for layer in lora.attention_layers(sdxl.unet).values():
        layer.lora["default"].up.data *= 30
    _, cut = gradients(sdxl)
    assert math.isclose(
        sum(float(g.square().sum()) for g in cut.values()) ** 0.5, 1.0, rel_tol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_half_base_the_lora_stays_float32_and_every_part_of_it_moves(model, dtype):
    sdxl = model(dtype, fresh=True)
    base = {name: p.clone() for name, p in sdxl.unet.named_parameters() if ".lora." not in name}
    state = start(parameters(sdxl), 1e-4, dtype)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    values = [value for _, value in run(sdxl, state, 3)]
    assert all(math.isfinite(v) for v in values) and state.scaler.is_enabled() == (
        dtype == torch.float16
    )
    for name, p in state.parameters.items():
        assert p.dtype == torch.float32 and not torch.equal(p, before[name]), name
        # By less than a bf16 weight can show: that is why it is float32.
        assert (p - before[name]).abs().max() < 1e-3
    assert all(
        p.dtype == dtype and torch.equal(p, base[name])
        for name, p in sdxl.unet.named_parameters()
        if name in base
    )


def test_parameters_in_half_precision_are_refused(model):
    ps = parameters(model())
    name = list(ps)[3]
    ps[name] = torch.nn.Parameter(ps[name].bfloat16())
    with pytest.raises(ValueError, match=f"{name} is not float32"):
        start(ps, 1e-3)


def test_warm_up_is_a_function_of_the_step_also_when_a_run_goes_on():
    def rates(*stops):
        sdxl = small()
        state, seen = start(parameters(sdxl), 1e-3), []
        for stop in stops:
            for _ in train(sdxl, state, losses(sdxl, class_prompt=None), steps=stop, warmup=3):
                seen.append(state.optimizer.param_groups[0]["lr"])
        return seen

    assert rates(5) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=1e-12) and rates(
        2, 5
    ) == rates(5)


def test_an_overfit_brings_the_loss_down(model, monkeypatch):
    sdxl, fixed = model(fresh=True), batch(dtype=torch.float32)
    monkeypatch.setattr(dataset, "batch", lambda *_: fixed)
    state = start(parameters(sdxl), 2e-2)
    run(sdxl, state, 15, class_prompt=None)
    assert state.losses[-1] < 0.7 * state.losses[0]


# What is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_applied(value):
    sdxl = small()
    state, kept = start(parameters(sdxl), 1e-2), []
    for step, total in train(
        sdxl, state, losses(spoiled(sdxl, {2, 3}, value), class_prompt=None), steps=4
    ):
        moments = [v.clone() for s in state.optimizer.state.values() for v in s.values()]
        kept.append([p.detach().clone() for p in state.parameters.values()] + moments)
        assert math.isfinite(total) == (step not in (2, 3)) and state.step == step
    for i, same in ((1, True), (2, True), (3, False)):
        assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[i])) == same
    assert [math.isfinite(v) for v in state.losses] == [True, False, False, True]


def test_the_run_ends_after_a_few_such_steps_in_a_row_and_not_before():
    sdxl = small()
    state, ended = start(parameters(sdxl), 1e-3), MAX_BAD_STEPS + 1
    with pytest.raises(FloatingPointError, match=f"{ended} steps in a row.*--learning-rate"):
        run(spoiled(sdxl, range(3, 99)), state, 20, class_prompt=None)
    assert state.step == len(state.losses) == 2 + ended and all(
        p.isfinite().all() for p in state.parameters.values()
    )

    sdxl = small()
    state = start(parameters(sdxl), 1e-3)
    assert (
        len(run(spoiled(sdxl, {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}), state, 12, class_prompt=None))
        == 12
    )  # never 6 in a row


# train.py


def flags(tiny, folder, *more):
    return (
        "train.py",
        photos(folder / "photos"),
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--size",
        16,
        "--rank",
        2,
        "--batch",
        1,
        "--learning-rate",
        1e-3,
        "--preview-every",
        0,
        *more,
    )


def test_when_training_breaks_down_the_script_says_so_and_a_good_state_is_on_disk(
    tiny, tmp_path, monkeypatch
):
    whole = lessons_of.loss

    def break_from(first):
        calls = itertools.count(1)
        monkeypatch.setattr(
            lessons_of,
            "loss",
            lambda *args: whole(*args) * (float("nan") if next(calls) >= first else 1),
        )

    break_from(3)
    refused(
        call(*flags(tiny, tmp_path, "--prior-weight", 0, "--steps", 30, "--out", "new")),
        "not finite",
        "--learning-rate",
        "--resume",
        "new/state.safetensors",
    )
    assert sorted(contents("new")) == ["settings.json", "state.safetensors"]
    with safe_open("new/state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "0"

    # What was saved before it began is kept: the last steps before NaN have often gone astray already.
    break_from(3)
    refused(
        call(
            *flags(
                tiny,
                tmp_path,
                "--prior-weight",
                0,
                "--steps",
                30,
                "--out",
                "old",
                "--save-every",
                2,
            )
        ),
        "not finite",
    )
    monkeypatch.setattr(lessons_of, "loss", whole)
    run = good(call("train.py", "--out", "old", "--resume", "--learning-rate", 1e-4, "--steps", 9))
    assert "resuming at step 6 of 9" in run.err


def test_previews_do_not_disturb_training(tiny, tmp_path):
    ends = {}
    for every in (0, 1):
        good(
            call(
                *flags(
                    tiny, tmp_path, "--steps", 2, "--out", f"{every}/run", "--preview-every", every
                )
            )
        )
        ends[every] = contents(f"{every}/run")
        assert ("preview.png" in ends[every]) == (every > 0)
    assert ends[0]["lora.safetensors"] == ends[1]["lora.safetensors"]


def test_the_seed_is_what_a_run_depends_on(tiny, tmp_path):
    for out, seed in (("a/run", 0), ("b/run", 0), ("c/run", 1)):
        good(call(*flags(tiny, tmp_path, "--steps", 1, "--out", out, "--seed", seed)))
    ends = [contents(f"{out}/run")["lora.safetensors"] for out in "abc"]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_train_py_runs_on_cuda(tiny, tmp_path, dtype):
    good(
        call(
            *flags(
                tiny,
                tmp_path,
                "--steps",
                3,
                "--out",
                "run",
                "--device",
                "cuda",
                "--dtype",
                dtype,
                "--preview-every",
                3,
            )
        )
    )
