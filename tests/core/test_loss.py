"""The loss of training, sample by sample against its formula."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401
from helpers.training import PROMPTS, encoded_prompts, make_batch, model, parameters  # noqa: F401

import alchemy
from alchemy import lora
from alchemy.methods.prior import teacher_batch
from alchemy.schedule import Schedule
from alchemy.training import denoising_loss, loss, min_snr


def errors_by_hand(sdxl, batch, gamma, base=None):
    """w_t · ‖target − prediction‖² of each sample, with ᾱ from the betas themselves.

    base: the model whose prediction is the target, in place of the noise (or v).
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    errors, is_v = [], sdxl.schedule.prediction != "epsilon"
    for i, t in enumerate(batch.t.tolist()):
        ab = math.prod(1 - float(b) for b in beta[: t + 1])
        x_0, eps = batch.x_0[i : i + 1], batch.eps[i : i + 1]
        x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps
        cond = encoded_prompts(sdxl)[batch.prompts[i]]
        inputs = x_t, t, cond.context, cond.pooled, batch.time_ids[i : i + 1]
        target = ab**0.5 * eps - (1 - ab) ** 0.5 * x_0 if is_v else eps
        if base is not None:
            target = base.unet(*inputs).detach()
        snr = ab / (1 - ab)
        weight = min(gamma, snr) / (snr + 1 if is_v else snr) if gamma else 1.0
        errors.append(weight * ((target - sdxl.unet(*inputs)) ** 2).mean())
    return torch.stack(errors)


def check_equal(sdxl, ours, theirs):
    """Value and gradient; the adapters are float32."""
    assert abs((ours - theirs).item()) <= 1e-9 * theirs.item() and theirs.item() > 1e-3
    adapters = list(parameters(sdxl).values())
    gradients = torch.autograd.grad(ours, adapters), torch.autograd.grad(theirs, adapters)
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize(
    "prediction, prior_weight, gamma",
    [("epsilon", 0.7, 1.5), ("v_prediction", 1.0, 5.0), ("v_prediction", 0.25, 0.0)],
)
def test_loss_with_a_teacher_batch_equals_its_formula(model, tiny, prediction, prior_weight, gamma):
    sdxl = model(torch.float64, prediction=prediction)
    batch, prompts = make_batch(sdxl.schedule), encoded_prompts(sdxl)
    prior = teacher_batch(sdxl, batch, prompts, PROMPTS[1])
    ours = loss(sdxl, batch, prior, prompts, prior_weight, gamma)
    base = alchemy.load(tiny, "cpu", torch.float64)
    class_batch = replace(batch, prompts=[PROMPTS[1]] * 3)
    subject = errors_by_hand(sdxl, batch, gamma).mean()
    check_equal(
        sdxl, ours, subject + prior_weight * errors_by_hand(sdxl, class_batch, gamma, base).mean()
    )


@pytest.mark.parametrize("subjects, class_images", [(1, 1), (2, 1), (1, 3), (3, 0)])
def test_both_terms_are_means_whatever_the_batch_sizes(model, subjects, class_images):
    sdxl, prior = model(torch.float64), None
    batch = make_batch(sdxl.schedule, subjects)
    theirs = errors_by_hand(sdxl, batch, 2.0).mean()
    if class_images:
        prior = make_batch(sdxl.schedule, class_images, prompt=PROMPTS[1], offset=1.0)
        theirs = theirs + 0.3 * errors_by_hand(sdxl, prior, 2.0).mean()
    check_equal(sdxl, loss(sdxl, batch, prior, encoded_prompts(sdxl), 0.3, 2.0), theirs)


def test_the_loss_mask_weights_positions_and_its_scale_cancels(model):
    sdxl = model(torch.float64)
    batch, prompts = make_batch(sdxl.schedule), encoded_prompts(sdxl)
    mask = torch.ones_like(batch.loss_mask)
    mask[..., 4:] = 0
    changed = replace(batch, target=batch.target.clone(), loss_mask=mask)
    changed.target[..., 4:] += 7  # where the mask is 0
    expected = denoising_loss(sdxl, replace(batch, loss_mask=mask), prompts)
    assert torch.equal(denoising_loss(sdxl, changed, prompts), expected)
    tripled = denoising_loss(sdxl, replace(batch, loss_mask=3 * mask), prompts)
    assert torch.allclose(tripled, expected, rtol=1e-12)
    assert not torch.allclose(denoising_loss(sdxl, batch, prompts), expected, rtol=1e-3)


def test_the_teacher_batch_counts_every_position_and_restores_the_scales(model):
    sdxl = model()
    adapters = [layer.lora["default"] for layer in lora.attention_layers(sdxl.unet).values()]
    for i, adapter in enumerate(adapters):
        adapter.scale = 0.1 * i
    batch = make_batch(sdxl.schedule, dtype=torch.float32)
    masked = replace(batch, loss_mask=batch.loss_mask * 0)
    prior = teacher_batch(sdxl, masked, encoded_prompts(sdxl), PROMPTS[1])
    assert prior.loss_mask.min() == 1 and prior.prompts == [PROMPTS[1]] * 3
    assert not prior.target.requires_grad
    assert [adapter.scale for adapter in adapters] == [0.1 * i for i in range(len(adapters))]


def test_the_min_snr_weight_of_v_is_0_at_pure_noise_and_not_nan():
    schedule = replace(Schedule.from_config({}), prediction="v_prediction").zero_terminal_snr()
    assert min_snr(schedule, torch.tensor([999]), 5).tolist() == [0]
