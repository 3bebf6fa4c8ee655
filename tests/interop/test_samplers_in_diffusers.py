"""The samplers dpmpp_2m and lcm against diffusers' schedulers: trajectories with a network."""

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers.checkpoints import SCHEDULER  # noqa: E402
from test_checkpoints import PROMPT, SIZE, agree, built, noise  # noqa: E402, F401

import alchemy  # noqa: E402
from alchemy.schedule import Schedule  # noqa: E402

GUIDANCE = 1.5
NAMES = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
SETTINGS = {name: SCHEDULER[name] for name in NAMES}
SDXL = Schedule.from_config(SCHEDULER)


@torch.no_grad()
def check_trajectory(folder, noise, scheduler, **options):  # noqa: F811
    """Our latents are the scheduler's, whose timesteps are set, after every step."""
    pipe = built()
    pipe.save_pretrained(folder)
    sdxl = alchemy.load(folder, "cpu")
    pair = [sdxl.encode_prompt([prompt], SIZE) for prompt in (PROMPT, None)]
    rngs, (rng,) = alchemy.generators([7]), alchemy.generators([7])
    ours = list(alchemy.denoise(sdxl, noise, *pair, guidance=GUIDANCE, generators=rngs, **options))
    assert scheduler.timesteps.tolist() == [step.t for step in ours]
    x = noise.clone()
    for t, step in zip(scheduler.timesteps, ours):
        predictions = []
        for c in pair:
            added = {"text_embeds": c.pooled, "time_ids": c.time_ids}
            predictions.append(pipe.unet(x, t, c.context, added_cond_kwargs=added).sample)
        cond, uncond = predictions
        guided = uncond + GUIDANCE * (cond - uncond)
        x = scheduler.step(guided, t, x, generator=rng).prev_sample
        agree([step.x_prev], [x], 3e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 20])
def test_dpmpp_2m_has_the_same_trajectory(tmp_path, noise, spacing, steps):  # noqa: F811
    kind = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    solver = diffusers.DPMSolverMultistepScheduler(**SETTINGS, **kind)
    # Its own leading timesteps are others than those of all other samplers.
    solver.set_timesteps(timesteps=[t for t, _ in SDXL.timesteps(steps, spacing)])
    check_trajectory(tmp_path, noise, solver, sampler="dpmpp_2m", spacing=spacing, steps=steps)


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_lcm_has_the_same_trajectory(tmp_path, noise, steps):  # noqa: F811
    scheduler = diffusers.LCMScheduler(**SETTINGS)
    scheduler.set_timesteps(steps)
    check_trajectory(tmp_path, noise, scheduler, sampler="lcm", steps=steps)


def test_lcm_has_the_same_timesteps_for_every_number_of_steps():
    scheduler = diffusers.LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert [t for t, _ in SDXL.timesteps(steps, "lcm")] == scheduler.timesteps.tolist()
