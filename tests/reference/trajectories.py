"""Guided trajectories of the network unet_a: text to image, Img2Img, masked; by two loops.

`diffusers_loop`: scheduler.step of diffusers as it is, the network in float32.
`float64_loop`: the formulas of schedules.py, the network in float64. Both get the same noise."""

import contextlib
import itertools
from unittest import mock

import schedules
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete
from networks import TIME_IDS, unet_a
from storage import draw, write

SHAPE = (2, 4, 7, 3)
GUIDANCE = 5.0
ETAS = {"0": 0.0, "05": 0.5, "1": 1.0}
STEPS = {
    "ddpm": schedules.ddpm,
    "euler": schedules.euler,
    "euler_ancestral": schedules.euler_ancestral,
    **{"ddim_eta" + name: schedules.ddim(eta) for name, eta in ETAS.items()},
}


def inputs():
    """What all trajectories share: start noise, the z of each step, conditioning of both halves."""
    given = {"noise": draw("noise", *SHAPE), "z": draw("z", 50, *SHAPE)}
    for half in ("cond", "uncond"):
        given[half + "/context"] = draw(half + "/context", 2, 9, 15)
        given[half + "/pooled"] = draw(half + "/pooled", 2, 10)
    return given | {"time_ids": TIME_IDS[1:].clone()}


def known():
    """Latents of a picture, and a soft mask (1: repaint) with zeros, ones and values between."""
    mask = (draw("mask", 2, 1, *SHAPE[2:]) + 0.5).clamp(0, 1)
    return {"image": draw("image", *SHAPE, std=0.8), "mask": mask}


def guided(dtype):
    """The guided network as a function of x_t (variance preserving) and t."""
    net = unet_a().to(dtype)
    given = {key: value.to(dtype) for key, value in inputs().items()}
    context = torch.cat([given["uncond/context"], given["cond/context"]])
    pooled = torch.cat([given["uncond/pooled"], given["cond/pooled"]])
    added = {"text_embeds": pooled, "time_ids": given["time_ids"].repeat(2, 1)}

    def predict(x_t, t):
        out = net(torch.cat([x_t, x_t]), t, context, added_cond_kwargs=added).sample
        uncond, cond = out.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return predict


@contextlib.contextmanager
def fed(z):
    """diffusers draws z instead of fresh noise."""

    def randn_tensor(*args, **kwargs):
        return z

    with (
        mock.patch.object(scheduling_ddpm, "randn_tensor", randn_tensor),
        mock.patch.object(scheduling_euler_ancestral_discrete, "randn_tensor", randn_tensor),
    ):
        yield


def scheduler_of(case):
    """diffusers' scheduler of a case."""
    sampler = case["sampler"].partition("_eta")[0]
    settings = (case[name] for name in ("spacing", "steps", "prediction", "zero_snr"))
    return schedules.scheduler(sampler, *settings)


def diffusers_loop(case, predict, given):
    """States x_t before every step and at the end, variance preserving, (steps + 1, 2, 4, 7, 3)."""
    sampler, eta = case["sampler"].partition("_eta")[::2]
    made = scheduler_of(case)
    timesteps = made.timesteps[case["t_start"] :]
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(case["t_start"])

    def preserving(x, i):
        sigma = made.sigmas[case["t_start"] + i].double() if sampler.startswith("euler") else 0.0
        return (x.double() / (sigma**2 + 1) ** 0.5).float()

    noise, image = given["noise"], given.get("image")
    x = noise * made.init_noise_sigma
    if case["from_image"]:
        x = made.add_noise(image, noise, timesteps[:1])
    states = [preserving(x, 0)]
    for i, t in enumerate(timesteps):
        out, z = predict(made.scale_model_input(x, t), t), given["z"][i]
        extra = {"eta": ETAS[eta], "variance_noise": z} if sampler == "ddim" else {}
        with fed(z):
            x = made.step(out, t, x, **extra).prev_sample
        if case["masked"]:
            last = i == len(timesteps) - 1
            level = image if last else made.add_noise(image, noise, timesteps[i + 1 : i + 2])
            x = (1 - given["mask"]) * level + given["mask"] * x
        states.append(preserving(x, i + 1))
    return torch.stack(states)


def timesteps_and_levels(case):
    """The timesteps of diffusers in float64, and ᾱ before every step and at the end."""
    sampler = case["sampler"].partition("_eta")[0]
    timesteps = scheduler_of(case).timesteps[case["t_start"] :].double()
    table = schedules.alpha_bars(case["zero_snr"])
    if case["zero_snr"] and sampler == "euler" and not case["exact_zero"]:
        table[-1] = 2.0**-24  # as diffusers' Euler does, to keep σ finite
    levels = [schedules.alpha_bar_at(table, t.item()) for t in timesteps]
    return timesteps, levels + [table[0].item() if sampler == "ddim" else 1.0]


def float64_loop(case, predict, given):
    """diffusers_loop without diffusers; the previous ᾱ is always that of the next timestep."""
    given = {key: value.double() for key, value in given.items()}
    timesteps, ab = timesteps_and_levels(case)
    # σ is infinite at ᾱ = 0; DDIM is the limit.
    step = STEPS["ddim_eta0" if case["exact_zero"] else case["sampler"]]
    noise, image = given["noise"], given.get("image")

    def noised(ab):
        return ab**0.5 * image + (1 - ab) ** 0.5 * noise

    below_one = case["sampler"].startswith("euler") and case["spacing"] != "leading"
    x_t = noise * (1 - ab[0]) ** 0.5 if below_one else noise
    if case["from_image"]:
        x_t = noised(ab[0])
    states = [x_t]
    for i, t in enumerate(timesteps):
        a, b, out = ab[i] ** 0.5, (1 - ab[i]) ** 0.5, predict(x_t, t)
        x_0, eps = (x_t - b * out) / a if a else None, out
        if case["prediction"] == "v_prediction":
            x_0, eps = a * x_t - b * out, a * out + b * x_t
        x_t = step(x_t, x_0, eps, ab[i], ab[i + 1], given["z"][i])
        if case["masked"]:
            level = image if i == len(timesteps) - 1 else noised(ab[i + 1])
            x_t = (1 - given["mask"]) * level + given["mask"] * x_t
        states.append(x_t)
    return torch.stack(states)


def case(
    sampler,
    spacing,
    steps=30,
    strength=None,
    prediction="epsilon",
    zero_snr=False,
    exact_zero=False,
    masked=False,
):
    t_start = 0 if strength is None else steps - min(int(steps * strength), steps)
    # diffusers' DDIM steps to t - 1000 // steps, which elsewhere is not its next timestep. With
    # eta 1 and zero terminal SNR its first step is nan: 1 - ᾱ_prev - σ² falls below 0 by rounding.
    exact = spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0)
    own = exact or not sampler.startswith("ddim")
    return dict(
        sampler=sampler,
        spacing=spacing,
        steps=steps,
        strength=strength,
        t_start=t_start,
        prediction=prediction,
        zero_snr=zero_snr,
        exact_zero=exact_zero,
        masked=masked,
        from_image=t_start > 0,
        diffusers=own and not exact_zero,
    )


def deviation(a, b):
    """The largest difference of a step's states, relative to the largest element of that step."""
    return ((a - b).abs().amax((1, 2, 3, 4)) / b.abs().amax((1, 2, 3, 4))).max().item()


@torch.no_grad()
def make(path, cases, given):
    tensors = {"inputs/" + key: value for key, value in given.items()}
    single, double = guided(torch.float32), guided(torch.float64)
    for name, c in cases.items():
        timesteps, levels = timesteps_and_levels(c)
        tensors["timesteps/" + name] = timesteps
        tensors["alpha_bar/" + name] = torch.tensor(levels, dtype=torch.float64)
        tensors["x/" + name] = x = float64_loop(c, double, given)
        if c["diffusers"]:
            tensors["diffusers/" + name] = other = diffusers_loop(c, single, given)
            apart = deviation(other, x)
            print(f"{name}: diffusers in float32 is {apart:.1e} from the formulas in float64")
            assert apart < 3e-5, f"{name}: the two loops do not agree"
    write(path, tensors, {"network": "unet_a", "guidance": GUIDANCE, "cases": cases})


def make_trajectories(path):
    cases = {}
    for sampler, spacing in itertools.product(STEPS, schedules.SPACINGS):
        cases[f"{sampler}_{spacing}"] = case(sampler, spacing)
    v = dict(prediction="v_prediction", zero_snr=True)
    cases |= {
        "ddim_eta0_trailing_25": case("ddim_eta0", "trailing", 25),
        "euler_trailing_v": case("euler", "trailing", **v),
        "euler_trailing_v_exact": case("euler", "trailing", exact_zero=True, **v),
        "ddim_eta0_trailing_v": case("ddim_eta0", "trailing", **v),
        "ddim_eta0_trailing_25_v": case("ddim_eta0", "trailing", 25, **v),
        "ddim_eta1_trailing_v": case("ddim_eta1", "trailing", **v),
    }
    make(path, cases, inputs())


def make_img2img(path):
    cases = {}
    for values in itertools.product(("euler", "ddim_eta0"), (50, 30), (0.3, 0.8)):
        sampler, steps, strength = values
        cases[f"{sampler}_leading_{steps}_{strength}"] = case(sampler, "leading", steps, strength)
    make(path, cases, inputs() | {"image": known()["image"]})


def make_masked(path):
    cases = {
        "euler_leading_0.8": case("euler", "leading", 30, 0.8, masked=True),
        "ddim_eta0_leading_0.8": case("ddim_eta0", "leading", 30, 0.8, masked=True),
        "euler_ancestral_leading_0.5": case("euler_ancestral", "leading", 30, 0.5, masked=True),
        "euler_trailing_0.6": case("euler", "trailing", 30, 0.6, masked=True),
        "euler_leading_1.0": case("euler", "leading", 30, 1.0, masked=True),
    }
    make(path, cases, inputs() | known())
