"""The loss of training, sample by sample against its formula."""

import math
from dataclasses import replace

import pytest
import torch

import alchemy
from alchemy import lora
from alchemy.schedule import Schedule
from alchemy.training import loss, min_snr
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.lessons import PROMPTS, batch, model, parameters, told  # noqa: F401
from helpers.running import tiny  # noqa: F401


def by_hand(sdxl, base, drawn, prior_weight, gamma):
    """The formula at the top of alchemy/train.py, sample by sample and number by number."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    total, prompts, v = 0.0, told(sdxl), sdxl.schedule.prediction != "epsilon"
    for i, t in enumerate(drawn.t.tolist()):
        ab = math.prod(1 - float(b) for b in beta[: t + 1])
        x_0, eps, ids = drawn.x_0[i : i + 1], drawn.eps[i : i + 1], drawn.time_ids[i : i + 1]
        x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps
        target = ab**0.5 * eps - (1 - ab) ** 0.5 * x_0 if v else eps
        snr = ab / (1 - ab)
        weight = min(gamma, snr) / (snr + 1 if v else snr) if gamma else 1.0
        subject, of_class = (
            (unet(x_t, t, prompts[p].context, prompts[p].pooled, ids))
            for unet, p in ((sdxl.unet, PROMPTS[0]), (sdxl.unet, PROMPTS[1]))
        )
        kept = base.unet(
            x_t, t, prompts[PROMPTS[1]].context, prompts[PROMPTS[1]].pooled, ids
        ).detach()
        total = (
            total
            + weight * ((target - subject) ** 2).mean()
            + prior_weight * weight * ((kept - of_class) ** 2).mean()
        )
    return total / len(drawn.t)


@pytest.mark.parametrize(
    "prediction, prior_weight, gamma",
    [
        ("epsilon", 0.0, 5.0),
        ("epsilon", 0.7, 1.5),
        ("v_prediction", 1.0, 5.0),
        ("v_prediction", 0.25, 0.0),
    ],
)
def test_the_loss_is_its_formula_and_so_is_its_gradient(
    model, tiny, prediction, prior_weight, gamma
):
    sdxl, base, drawn = (
        model(torch.float64, prediction=prediction),
        alchemy.load(tiny, "cpu", torch.float64),
        batch(),
    )
    ours = loss(sdxl, drawn, told(sdxl), PROMPTS[1], prior_weight, gamma)
    theirs = by_hand(sdxl, base, drawn, prior_weight, gamma)
    assert abs((ours - theirs).item()) <= 1e-9 * theirs.item() and theirs.item() > 1e-3
    ps = list(parameters(sdxl).values())
    for a, b in zip(torch.autograd.grad(ours, ps), torch.autograd.grad(theirs, ps)):
        assert (a - b).norm() <= 1e-6 * b.norm()  # the adapter is float32


def test_without_a_class_prompt_there_is_no_prior(model):
    sdxl, drawn = model(torch.float64), batch()
    assert torch.equal(
        loss(sdxl, drawn, told(sdxl)), loss(sdxl, drawn, told(sdxl), PROMPTS[1], prior_weight=0)
    )
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


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("epsilon", lambda snr: min(5, snr) / snr),
        ("v_prediction", lambda snr: min(5, snr) / (snr + 1)),
    ],
)
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
