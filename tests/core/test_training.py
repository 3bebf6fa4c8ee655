"""The training loop: gradients, steps that are not applied, the state, and train.py around it."""

import itertools
import math

import pytest
import torch
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, contents, good, photos, quick, refused, tiny  # noqa: F401
from helpers.training import (  # noqa: F401
    encoded_prompts,
    make_batch,
    make_get_loss,
    model,
    parameters,
    run,
    same_tensors,
    small,
    spoiled,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import lora, training
from alchemy.formats.tensors import open_safetensors
from alchemy.training import MAX_BAD_STEPS, TrainState, learning_rate_factor, train


def gradients(sdxl, **options):
    state = TrainState.create(parameters(sdxl), 1e-3)
    ((_, value),) = run(sdxl, state, 1, **options)
    return value, {name: p.grad.clone() for name, p in state.parameters.items()}


@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4)])
def test_accumulated_batches_equal_one_larger_batch(model, batch, accumulation):
    value, expected = gradients(model(), batch=4)
    same, ours = gradients(model(), batch=batch, accumulation=accumulation)
    assert math.isclose(same, value, rel_tol=1e-5)
    for name, g in expected.items():
        assert (ours[name] - g).norm() <= 1e-4 * g.norm() and g.norm() > 0, name


def test_gradients_are_clipped_to_norm_1(model):
    sdxl = model()
    for layer in lora.attention_layers(sdxl.unet).values():
        layer.lora["default"].up.data *= 30
    _, clipped = gradients(sdxl)
    norm = sum(float(g.square().sum()) for g in clipped.values()) ** 0.5
    assert math.isclose(norm, 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_half_precision_base_the_lora_stays_float32_and_moves(model, dtype):
    sdxl = model(dtype, fresh=True)
    base = {name: p.clone() for name, p in sdxl.unet.named_parameters() if ".lora." not in name}
    state = TrainState.create(parameters(sdxl), 1e-4, dtype)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    assert all(math.isfinite(value) for _, value in run(sdxl, state, 3))
    assert state.scaler.is_enabled() == (dtype == torch.float16)
    for name, p in state.parameters.items():
        assert p.dtype == torch.float32 and not torch.equal(p, before[name]), name
        assert (p - before[name]).abs().max() < 1e-3  # less than bfloat16 could show
    for name, p in sdxl.unet.named_parameters():
        assert name not in base or p.dtype == dtype and torch.equal(p, base[name])


def test_parameters_in_half_precision_are_refused(model):
    half = parameters(model())
    name = list(half)[3]
    half[name] = torch.nn.Parameter(half[name].bfloat16())
    with pytest.raises(ValueError, match=f"{name} is not float32"):
        TrainState.create(half, 1e-3)


def test_the_learning_rate_is_a_function_of_the_step_across_a_resume():
    def rates(*stops):
        sdxl = small()
        state, seen = TrainState.create(parameters(sdxl), 1e-3), []
        for stop in stops:
            for _ in train(
                sdxl, state, make_get_loss(sdxl, class_prompt=None), steps=stop, warmup=3
            ):
                seen.append(state.optimizer.param_groups[0]["lr"])
        return seen

    assert rates(5) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=1e-12)
    assert rates(2, 5) == rates(5)
    cosine = [learning_rate_factor(step, 4, 0, "cosine") for step in range(4)]
    assert cosine == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5], rel=1e-12)


def test_overfitting_one_batch_lowers_the_loss(model):
    sdxl = model(fresh=True)
    batch = make_batch(sdxl.schedule, dtype=torch.float32)
    state, prompts = TrainState.create(parameters(sdxl), 2e-2), encoded_prompts(sdxl)
    for _ in train(sdxl, state, lambda *_: training.loss(sdxl, batch, None, prompts), steps=15):
        pass
    assert state.losses[-1] < 0.7 * state.losses[0]


# Steps that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_applied(value):
    sdxl = small()
    state, kept = TrainState.create(parameters(sdxl), 1e-2), []
    get_loss = make_get_loss(spoiled(sdxl, {2, 3}, value), class_prompt=None)
    for step, total in train(sdxl, state, get_loss, steps=4):
        values = list(state.parameters.values())
        for moments in state.optimizer.state.values():
            values += moments.values()
        kept.append([value.detach().clone() for value in values])
        assert math.isfinite(total) == (step not in (2, 3)) and state.step == step
    for i, same in ((1, True), (2, True), (3, False)):
        assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[i])) == same
    assert [math.isfinite(v) for v in state.losses] == [True, False, False, True]


def test_the_run_ends_after_a_few_bad_steps_in_a_row_and_not_before():
    sdxl = small()
    state, ended = TrainState.create(parameters(sdxl), 1e-3), MAX_BAD_STEPS + 1
    get_loss = make_get_loss(spoiled(sdxl, range(3, 99)), class_prompt=None)
    with pytest.raises(FloatingPointError, match=f"{ended} steps in a row.*--learning-rate"):
        list(train(sdxl, state, get_loss, steps=20))
    assert state.step == len(state.losses) == 2 + ended
    assert all(p.isfinite().all() for p in state.parameters.values())
    sdxl = small()
    state = TrainState.create(parameters(sdxl), 1e-3)
    never_six = {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}
    get_loss = make_get_loss(spoiled(sdxl, never_six), class_prompt=None)
    assert len(list(train(sdxl, state, get_loss, steps=12))) == 12


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling_skips_an_overflow_and_halves_its_scale(overflow):
    sdxl = small()
    state = TrainState.create(parameters(sdxl), 1e-2)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    before = [p.detach().clone() for p in state.parameters.values()]
    get_loss = make_get_loss(sdxl, class_prompt=None)
    limit = 1 if overflow else torch.finfo(torch.float16).max

    def get_half_loss(step, micro_step):
        value = get_loss(step, micro_step)
        value.register_hook(lambda g: torch.where(g.abs() > limit, torch.inf, g))
        return value

    next(train(sdxl, state, get_half_loss, steps=1))
    moved = [not torch.equal(a, b) for a, b in zip(before, state.parameters.values())]
    assert any(moved) != overflow and math.isnan(state.losses[0]) == overflow
    assert state.scaler.get_scale() == 2.0 ** (14 if overflow else 15)


@pytest.mark.parametrize("limit, steps", [(2.0**7, None), (0, 16)])
def test_a_run_survives_overflows_until_the_loss_scale_is_1(limit, steps):
    sdxl = small()
    state = TrainState.create(parameters(sdxl), 1e-2)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    get_loss = make_get_loss(sdxl, class_prompt=None)

    def get_half_loss(step, micro_step):
        value = get_loss(step, micro_step)
        value.register_hook(lambda g: torch.where(g.abs() > limit, torch.inf, g))
        return value

    if steps is None:
        list(train(sdxl, state, get_half_loss, steps=12))
        assert [math.isfinite(v) for v in state.losses] == [False] * 9 + [True] * 3
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            list(train(sdxl, state, get_half_loss, steps=40))
        assert state.step == steps and state.scaler.get_scale() == 1


# The state


def quadratic(fused):
    """A state on one 3 x 3 convolution in channels_last, as --method full trains them."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state = TrainState.create({"weight": conv.weight}, 1e-2)
    state.optimizer = torch.optim.AdamW([conv.weight], lr=1e-2, fused=fused)
    return state, lambda *_: conv.weight.square().sum()


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_state_continues_to_the_bit_in_channels_last(tmp_path, fused):
    (whole, whole_loss), (first, first_loss), (second, second_loss) = map(quadratic, [fused] * 3)
    list(train(small(), whole, whole_loss, steps=4))
    list(train(small(), first, first_loss, steps=2))
    first.save(tmp_path / "state.safetensors", {})
    second.restore(open_safetensors(tmp_path / "state.safetensors"), 4)
    weight = second.parameters["weight"]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert second.optimizer.state[weight][moment].stride() == weight.stride()
    list(train(small(), second, second_loss, steps=4))
    assert torch.equal(weight, whole.parameters["weight"]) and second.losses == whole.losses


def test_a_damaged_state_is_refused_with_nothing_changed(tmp_path):
    state, get_loss = quadratic(False)
    list(train(small(), state, get_loss, steps=2))
    path = tmp_path / "state.safetensors"
    state.save(path, {})
    intact = path.read_bytes()
    fresh, _ = quadratic(False)
    before = fresh.parameters["weight"].detach().clone()
    with pytest.raises(ValueError, match="after the last; raise --steps"):
        fresh.restore(open_safetensors(path), 1)
    begin = 8 + int.from_bytes(intact[:8], "little")
    for place in range(begin, len(intact), 37):  # one bit of weights, moments, step or losses
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 4]) + intact[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            fresh.restore(open_safetensors(path), 4)
    header = intact.replace(b'"step":"2"', b'"step":"1"')
    path.write_bytes(header)
    with pytest.raises(ValueError, match="damaged"):
        fresh.restore(open_safetensors(path), 4)
    assert header != intact and torch.equal(fresh.parameters["weight"], before)
    assert fresh.step == 0 and not fresh.losses and not fresh.optimizer.state


def test_a_state_with_a_valid_checksum_is_still_checked(tmp_path):
    path = tmp_path / "state.safetensors"
    for break_it, message in (
        (lambda state: state.parameters["weight"].data.fill_(float("nan")), r"damaged \(weight\)"),
        (lambda state: state.losses.append(0.0), r"damaged \(its step\)"),
    ):
        state, get_loss = quadratic(False)
        list(train(small(), state, get_loss, steps=2))
        break_it(state)
        state.save(path, {})
        fresh, _ = quadratic(False)
        with pytest.raises(ValueError, match=message):
            fresh.restore(open_safetensors(path), 4)
        assert fresh.step == 0 and not fresh.optimizer.state


# train.py and the notebook's call


def flags(tiny, folder, *more):
    photos(folder / "photos")
    common = ("--class-word", "dog", "--weights", tiny, "--size", 16, "--rank", 2, "--batch", 1)
    rate = ("--learning-rate", 1e-3, "--preview-every", 0)
    return "train.py", folder / "photos", *common, *rate, *more


def test_a_run_that_breaks_down_leaves_a_good_state(tiny, tmp_path, monkeypatch):
    whole = training.loss

    def break_from(first):
        calls = itertools.count(1)

        def broken(*args):
            return whole(*args) * (float("nan") if next(calls) >= first else 1)

        monkeypatch.setattr(training, "loss", broken)

    base = flags(tiny, tmp_path, "--prior-weight", 0, "--steps", 30)
    break_from(3)
    words = ("not finite", "--learning-rate", "--resume", "new/state.safetensors")
    refused(call(*base, "--out", "new"), *words)
    assert sorted(contents("new")) == [
        "log.csv",
        "log.jsonl",
        "settings.json",
        "state.safetensors",
    ]
    with safe_open("new/state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "0"
    # An earlier state is kept: the last steps before NaN have often gone wrong already.
    break_from(3)
    refused(call(*base, "--out", "old", "--save-every", 2), "not finite")
    monkeypatch.setattr(training, "loss", whole)
    again = call("train.py", "--out", "old", "--resume", "--learning-rate", 1e-4, "--steps", 9)
    assert "resuming at step 6 of 9" in good(again).err


def test_previews_do_not_disturb_training_and_their_loras_are_kept(tiny, tmp_path):
    results = {}
    for every in (0, 1):
        more = ("--steps", 2, "--out", f"{every}/run", "--preview-every", every)
        prompts = ("--preview-prompt", "a cat", "--preview-prompt", "a sks dog")
        good(call(*flags(tiny, tmp_path, *more, *prompts)))
        results[every] = contents(f"{every}/run")
        assert ("preview.png" in results[every]) == (every > 0)
    assert results[0]["lora.safetensors"] == results[1]["lora.safetensors"]
    kept = [name for name in results[1] if name.startswith("previews/")]
    assert kept == ["previews/step-000001.safetensors", "previews/step-000002.safetensors"]
    log = results[0]["log.csv"].decode().splitlines()
    assert log[0] == "step,loss,learning_rate,seconds" and len(log) == 3
    assert len(results[0]["log.jsonl"].splitlines()) == 2


@pytest.mark.parametrize("given", ["first", "first/lora.safetensors"])
def test_init_lora_continues_training_a_file_or_the_one_of_a_run(tiny, tmp_path, given):
    good(call(*flags(tiny, tmp_path, "--steps", 2, "--out", "first")))
    more = ("--init-lora", given, "--out", "second")
    good(call(*flags(tiny, tmp_path, "--steps", 1, "--learning-rate", 1e-9, *more)))
    first, second = (load_file(f"{name}/lora.safetensors") for name in ("first", "second"))
    for name, tensor in first.items():
        assert torch.allclose(second[name], tensor, atol=1e-7), name


def test_an_update_of_full_rank_is_refused_before_it_is_trained(tiny, tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = alchemy.load(tiny, "cpu").unet.get_submodule(layer.removeprefix("unet.")).weight
    save_file({f"{layer}.diff": torch.ones_like(weight)}, tmp_path / "full.safetensors")
    run = call(*flags(tiny, tmp_path, "--init-lora", "full.safetensors", "--out", "run"))
    assert run.status == 2 and "full rank" in run.err and not (tmp_path / "run").exists()


def test_train_lora_without_photos_is_refused(tiny):
    with pytest.raises(ValueError, match="at least one photo"):
        next(alchemy.train_lora(alchemy.load(tiny, "cpu"), [], "dog"))


def test_train_lora_is_what_train_py_does(tiny, tmp_path):
    base = flags(tiny, tmp_path, "--steps", 2, "--out", "run", "--batch", 4, "--size", 32)
    good(call(*base))
    sdxl = alchemy.load(tiny, "cpu")
    alchemy.load_lora(sdxl, "run/lora.safetensors", 0.0, name="other")  # is not trained
    paths = sorted((tmp_path / "photos").iterdir())
    options = dict(steps=2, rank=2, learning_rate=1e-3)
    steps = alchemy.train_lora(sdxl, paths, "dog", "sks dog", **options)
    assert [step for step, _ in steps] == [1, 2]
    alchemy.save_lora(sdxl, "again.safetensors")
    alchemy.save_lora(sdxl, "other.safetensors", name="other")
    assert same_tensors(load_file("again.safetensors"), load_file("run/lora.safetensors"))
    assert same_tensors(load_file("other.safetensors"), load_file("run/lora.safetensors"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_train_py_runs_on_cuda(tiny, tmp_path, dtype):
    more = ("--steps", 3, "--out", "run", "--device", "cuda", "--dtype", dtype)
    good(call(*flags(tiny, tmp_path, *more, "--preview-every", 3)))
