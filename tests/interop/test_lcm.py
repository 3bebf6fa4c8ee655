"""The sampler lcm against diffusers' LCMScheduler: whole trajectories with a network."""

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers.checkpoints import SCHEDULER  # noqa: E402
from test_checkpoints import PROMPT, SIZE, agree, built, noise  # noqa: E402, F401

import alchemy  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_the_same_trajectory(tmp_path, noise, steps):  # noqa: F811
    pipe = built()
    pipe.save_pretrained(tmp_path)
    sdxl = alchemy.load(tmp_path, "cpu")
    cond, uncond = sdxl.encode_prompt([PROMPT], SIZE), sdxl.encode_prompt([None], SIZE)
    ours = list(
        alchemy.denoise(
            sdxl,
            noise,
            cond,
            uncond,
            sampler="lcm",
            steps=steps,
            guidance=1.5,
            generators=alchemy.generators([7]),
        )
    )

    kept = {
        k: v
        for k, v in SCHEDULER.items()
        if k
        in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
    }
    lcm, generator = diffusers.LCMScheduler(**kept), alchemy.generators([7])[0]
    lcm.set_timesteps(steps)
    assert lcm.timesteps.tolist() == [step.t for step in ours]
    x = noise.clone()
    for t, mine in zip(lcm.timesteps, ours):
        eps = [
            pipe.unet(
                x, t, c.context, added_cond_kwargs={"text_embeds": c.pooled, "time_ids": c.time_ids}
            ).sample
            for c in (uncond, cond)
        ]
        x, x_0 = lcm.step(
            eps[0] + 1.5 * (eps[1] - eps[0]), t, x, generator=generator, return_dict=False
        )
        agree([mine.x_prev, mine.x_0], [x, x_0], 3e-5)


def test_every_number_of_steps_has_diffusers_timesteps():
    lcm, schedule = diffusers.LCMScheduler(), alchemy.schedule.Schedule.from_config({})
    for steps in range(1, 51):
        lcm.set_timesteps(steps)
        assert [t for t, _ in schedule.timesteps(steps, "lcm")] == lcm.timesteps.tolist()
