"""The loss against its formula, the update against what it must not do, and the loop as train.py drives it."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import alchemy
from alchemy import data, lora
from alchemy.command import training
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning
from alchemy.train import PATIENCE, loss, min_snr, start, train
from checkpoints import vocabulary_read_once  # noqa: F401
from running import call, contents, good, photos, quick, refused, tiny  # noqa: F401

SIZE = (32, 32)  # below, self-attention has but one place to look at at the lowest level, and to_q and to_k no gradient
PROMPTS = ("a photo of a sks dog", "a photo of a dog")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model(tiny):
    """model(dtype): the tiny checkpoint with a LoRA whose both halves are random, unless it is to be fresh."""
    def make(dtype=torch.float32, fresh=False, alpha=3.0, prediction="epsilon"):
        sdxl = alchemy.load(tiny, "cpu", dtype)
        sdxl.schedule = replace(sdxl.schedule, prediction=prediction)
        alchemy.add_lora(sdxl, 2, alpha)
        if not fresh:
            for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
                layer.lora["default"].up.data = 0.1 * draw(layer.out_features, 2, seed=i).float()
        return sdxl
    return make


def told(sdxl):
    """{prompt: Conditioning}, drawn and not encoded: it takes no text encoder."""
    dtype = torch.promote_types(sdxl.dtype, torch.float32)
    return {p: Conditioning(draw(1, 77, 20, seed=i).to(dtype), draw(1, 10, seed=i + 9).to(dtype), torch.zeros(1, 6)) for i, p in enumerate(PROMPTS)}


def batch(count=3, dtype=torch.float64):
    ids = torch.tensor([[40.0 + i, 44, i, 4, *SIZE] for i in range(count)])
    return data.Batch(draw(count, 4, 8, 8).to(dtype), draw(count, 4, 8, 8, seed=1).to(dtype), torch.tensor([3, 420, 981])[:count], ids,
                      [PROMPTS[0]] * count)


def encoded(count=2, std=0.3):
    """Photos as data.encode makes them."""
    return [data.Photo(((draw(4, 10, 10, seed=i).float(), torch.full((4, 10, 10), std)),), (40, 40), PROMPTS[0]) for i in range(count)]


def parameters(sdxl):
    return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}


def run(sdxl, state, steps, **options):
    """(step, loss) of each step; settings are small."""
    options = dict(size=SIZE, class_prompt=PROMPTS[1]) | options
    return list(train(sdxl, options.pop("photos", None) or encoded(), told(sdxl), state, steps=steps, **options))


class OneLayer(torch.nn.Module):
    """The least that can be trained, for what the network has no part in."""

    def __init__(self):
        super().__init__()
        self.layer = lora.LoRALinear(4, 4)
        self.layer.requires_grad_(False)
        lora.put(self.layer, "default", draw(2, 4).float(), draw(4, 2, seed=1).float(), 2)

    def forward(self, x, *_):
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def small():
    torch.manual_seed(0)
    return SimpleNamespace(unet=OneLayer(), schedule=Schedule.from_config({}), factor=4, device=torch.device("cpu"), dtype=torch.float32)


# The loss

def by_hand(sdxl, base, drawn, prior_weight, gamma):
    """The formula at the top of alchemy/train.py, sample by sample and number by number."""
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    total, prompts, v = 0.0, told(sdxl), sdxl.schedule.prediction != "epsilon"
    for i, t in enumerate(drawn.t.tolist()):
        ab = math.prod(1 - float(b) for b in beta[:t + 1])
        x_0, eps, ids = drawn.x_0[i:i + 1], drawn.eps[i:i + 1], drawn.time_ids[i:i + 1]
        x_t = ab ** 0.5 * x_0 + (1 - ab) ** 0.5 * eps
        target = ab ** 0.5 * eps - (1 - ab) ** 0.5 * x_0 if v else eps
        snr = ab / (1 - ab)
        weight = min(gamma, snr) / (snr + 1 if v else snr) if gamma else 1.0
        subject, of_class = ((unet(x_t, t, prompts[p].context, prompts[p].pooled, ids)) for unet, p in ((sdxl.unet, PROMPTS[0]), (sdxl.unet, PROMPTS[1])))
        kept = base.unet(x_t, t, prompts[PROMPTS[1]].context, prompts[PROMPTS[1]].pooled, ids).detach()
        total = total + weight * ((target - subject) ** 2).mean() + prior_weight * weight * ((kept - of_class) ** 2).mean()
    return total / len(drawn.t)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("prior_weight, gamma", [(0.0, 5.0), (1.0, 5.0), (0.25, 0.0), (0.7, 1.5)])
def test_the_loss_is_its_formula_and_so_is_its_gradient(model, tiny, prediction, prior_weight, gamma):
    sdxl, base, drawn = model(torch.float64, prediction=prediction), alchemy.load(tiny, "cpu", torch.float64), batch()
    ours = loss(sdxl, drawn, told(sdxl), PROMPTS[1], prior_weight, gamma)
    theirs = by_hand(sdxl, base, drawn, prior_weight, gamma)
    assert abs((ours - theirs).item()) <= 1e-9 * theirs.item() and theirs.item() > 1e-3
    ps = list(parameters(sdxl).values())
    for a, b in zip(torch.autograd.grad(ours, ps), torch.autograd.grad(theirs, ps)):
        assert (a - b).norm() <= 1e-6 * b.norm()  # the adapter is float32


def test_without_a_class_prompt_there_is_no_prior(model):
    sdxl, drawn = model(torch.float64), batch()
    assert torch.equal(loss(sdxl, drawn, told(sdxl)), loss(sdxl, drawn, told(sdxl), PROMPTS[1], prior_weight=0))
    assert not torch.equal(loss(sdxl, drawn, told(sdxl)), loss(sdxl, drawn, told(sdxl), PROMPTS[1]))


def test_a_fresh_lora_has_no_prior_loss_yet(model):
    sdxl, drawn = model(torch.float64, fresh=True), batch()
    a, b = loss(sdxl, drawn, told(sdxl)), loss(sdxl, drawn, told(sdxl), PROMPTS[1])
    assert abs((a - b).item()) < 1e-12


def test_the_loss_leaves_the_scales_of_adapters_as_they_were(model):
    sdxl = model()
    adapters = [layer.lora["default"] for layer in lora.attention_layers(sdxl.unet).values()]
    for i, a in enumerate(adapters):
        a.scale = 0.1 * i
    loss(sdxl, batch(dtype=torch.float32), told(sdxl), PROMPTS[1])
    assert [a.scale for a in adapters] == [0.1 * i for i in range(len(adapters))]


@pytest.mark.parametrize("prediction, expected", [
    ("epsilon", lambda snr: min(5, snr) / snr), ("v_prediction", lambda snr: min(5, snr) / (snr + 1))])
def test_min_snr_weights_are_those_of_the_paper(prediction, expected):
    schedule = replace(Schedule.from_config({}), prediction=prediction)
    t = torch.tensor([0, 100, 300, 500, 999])
    ab = schedule.alpha_bar[t]
    for weight, a in zip(min_snr(schedule, t, 5).tolist(), ab.tolist()):
        assert math.isclose(weight, expected(a / (1 - a)), rel_tol=1e-12)
    assert torch.equal(min_snr(schedule, t, 0), torch.ones(5, dtype=torch.float64))


def test_v_predictions_weights_are_finite_at_zero_terminal_snr():
    schedule = replace(Schedule.from_config({}), prediction="v_prediction").zero_terminal_snr()
    assert min_snr(schedule, torch.tensor([999]), 5).tolist() == [0.0]


# The update

def gradients(sdxl, **options):
    state = start(parameters(sdxl), 1e-3)
    (_, value), = run(sdxl, state, 1, **options)
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
    assert math.isclose(sum(float(g.square().sum()) for g in cut.values()) ** 0.5, 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_half_base_the_lora_stays_float32_and_every_part_of_it_moves(model, dtype):
    sdxl = model(dtype, fresh=True)
    base = {name: p.clone() for name, p in sdxl.unet.named_parameters() if ".lora." not in name}
    state = start(parameters(sdxl), 1e-4, dtype)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    values = [value for _, value in run(sdxl, state, 3)]
    assert all(math.isfinite(v) for v in values) and state.scaler.is_enabled() == (dtype == torch.float16)
    for name, p in state.parameters.items():
        assert p.dtype == torch.float32 and not torch.equal(p, before[name]), name
        # By less than a bf16 weight can show: that is why it is float32.
        assert (p - before[name]).abs().max() < 1e-3
    assert all(p.dtype == dtype and torch.equal(p, base[name]) for name, p in sdxl.unet.named_parameters() if name in base)


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
            for _ in train(sdxl, encoded(), told(sdxl), state, steps=stop, size=SIZE, warmup=3):
                seen.append(state.optimizer.param_groups[0]["lr"])
        return seen
    assert rates(5) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=1e-12) and rates(2, 5) == rates(5)


def test_an_overfit_brings_the_loss_down(model, monkeypatch):
    sdxl, fixed = model(fresh=True), batch(dtype=torch.float32)
    monkeypatch.setattr(data, "batch", lambda *_: fixed)
    state = start(parameters(sdxl), 2e-2)
    run(sdxl, state, 15, class_prompt=None)
    assert state.losses[-1] < 0.7 * state.losses[0]


# What is not finite

class Spoiled:
    """A UNet whose predictions are not finite at the calls of these numbers."""

    def __init__(self, unet, calls, value=float("nan")):
        self.unet, self.calls, self.value, self.count = unet, calls, value, 0

    def __call__(self, *inputs):
        self.count += 1
        out = self.unet(*inputs)
        return out * self.value if self.count in self.calls else out

    def modules(self):
        return self.unet.modules()

    def named_modules(self):
        return self.unet.named_modules()


def spoiled(sdxl, calls, value=float("nan")):
    return SimpleNamespace(unet=Spoiled(sdxl.unet, calls, value), schedule=sdxl.schedule, factor=sdxl.factor, device=sdxl.device, dtype=sdxl.dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_applied(value):
    sdxl = small()
    state, kept = start(parameters(sdxl), 1e-2), []
    for step, total in train(spoiled(sdxl, {2, 3}, value), encoded(), told(sdxl), state, steps=4, size=SIZE):
        moments = [v.clone() for s in state.optimizer.state.values() for v in s.values()]
        kept.append([p.detach().clone() for p in state.parameters.values()] + moments)
        assert math.isfinite(total) == (step not in (2, 3)) and state.step == step
    for i, same in ((1, True), (2, True), (3, False)):
        assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[i])) == same
    assert [math.isfinite(v) for v in state.losses] == [True, False, False, True]


def test_the_run_ends_after_a_few_such_steps_in_a_row_and_not_before():
    sdxl = small()
    state, ended = start(parameters(sdxl), 1e-3), PATIENCE + 1
    with pytest.raises(FloatingPointError, match=f"{ended} steps in a row.*--learning-rate"):
        run(spoiled(sdxl, range(3, 99)), state, 20, class_prompt=None)
    assert state.step == 2 + PATIENCE and all(p.isfinite().all() for p in state.parameters.values())

    sdxl = small()
    state = start(parameters(sdxl), 1e-3)
    assert len(run(spoiled(sdxl, {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}), state, 12, class_prompt=None)) == 12  # never 6 in a row


# train.py

def flags(tiny, folder, *more):
    return ("train.py", photos(folder / "photos"), "--class-word", "dog", "--weights", tiny, "--size", 16, "--rank", 2, "--batch", 1,
            "--learning-rate", 1e-3, "--preview-every", 0, *more)


def test_when_training_breaks_down_the_script_says_so_and_a_good_state_is_on_disk(tiny, tmp_path, monkeypatch):
    whole = training.train

    def breaking(sdxl, *args, **options):
        return whole(spoiled(sdxl, range(3, 999)), *args, **options)
    monkeypatch.setattr(training, "train", breaking)
    refused(call(*flags(tiny, tmp_path, "--prior-weight", 0, "--steps", 30, "--out", "new")), "not finite", "--learning-rate", "--resume", "new/state.safetensors")
    assert sorted(contents("new")) == ["settings.json", "state.safetensors"]
    with safe_open("new/state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == 2 + PATIENCE and all(file.get_tensor(k).isfinite().all() for k in file.keys() if k != "losses")

    # What was saved before it began is kept: the last steps before NaN have often gone astray already.
    refused(call(*flags(tiny, tmp_path, "--prior-weight", 0, "--steps", 30, "--out", "old", "--save-every", 2)), "not finite")
    monkeypatch.setattr(training, "train", whole)
    run = good(call("train.py", "--out", "old", "--resume", "--learning-rate", 1e-4, "--steps", 9))
    assert "resuming at step 6 of 9" in run.err


def test_previews_do_not_disturb_training(tiny, tmp_path):
    ends = {}
    for every in (0, 1):
        good(call(*flags(tiny, tmp_path, "--steps", 2, "--out", f"{every}/run", "--preview-every", every)))
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
    good(call(*flags(tiny, tmp_path, "--steps", 3, "--out", "run", "--device", "cuda", "--dtype", dtype, "--preview-every", 3)))
