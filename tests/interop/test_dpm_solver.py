"""dpmpp_2m against diffusers' DPMSolverMultistepScheduler: whole trajectories with a network."""

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers.checkpoints import SCHEDULER  # noqa: E402
from test_checkpoints import PROMPT, SIZE, agree, built, noise  # noqa: E402, F401

import alchemy  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("grid", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 20])
def test_the_same_trajectory(tmp_path, noise, grid, steps):  # noqa: F811
    pipe = built()
    pipe.save_pretrained(tmp_path)
    sdxl = alchemy.load(tmp_path, "cpu")
    cond, uncond = sdxl.encode_prompt([PROMPT], SIZE), sdxl.encode_prompt([None], SIZE)
    ours = [
        step.x_prev
        for step in alchemy.denoise(
            sdxl, noise, cond, uncond, sampler="dpmpp_2m", spacing=grid, steps=steps, guidance=2.0
        )
    ]

    kept = {
        k: v
        for k, v in SCHEDULER.items()
        if k
        in (
            "beta_schedule",
            "beta_start",
            "beta_end",
            "num_train_timesteps",
            "prediction_type",
            "steps_offset",
        )
    }
    solver = diffusers.DPMSolverMultistepScheduler(
        **kept, timestep_spacing=grid, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    solver.set_timesteps(
        timesteps=[t for t, _ in sdxl.schedule.timesteps(steps, grid)]
    )  # its own leading grid is another one than all other samplers have
    x = noise.clone()
    for t, mine in zip(solver.timesteps, ours):
        eps = [
            pipe.unet(
                x, t, c.context, added_cond_kwargs={"text_embeds": c.pooled, "time_ids": c.time_ids}
            ).sample
            for c in (uncond, cond)
        ]
        x = solver.step(eps[0] + 2.0 * (eps[1] - eps[0]), t, x).prev_sample
        agree([mine], [x], 3e-5)
