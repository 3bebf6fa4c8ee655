"""Faults of the schedule, the samplers, the denoising loop, segmentation and insertion.

(module in alchemy/, test files): (what it is, the exact old text, the new text), ...
"""

FAULTS = {
    ("attention", "core/segmentation core/attention"): (
        ("the unconditional half is recorded", "slice(-1, None) if", "slice(0, 1) if"),
    ),
    ("schedule", "core/schedule"): (
        ("β grows linearly, not its root", "first**0.5, last**0.5, count", "first, last, count"),
        (
            "linear betas are squared",
            "torch.linspace(first, last, count, dtype=torch.float64)\n",
            "torch.linspace(first, last, count, dtype=torch.float64) ** 2\n",
        ),
        (
            "zero SNR shifts without scaling",
            "(root - root[-1]) * root[0] / (root[0] - root[-1])",
            "root - root[-1]",
        ),
        (
            "alpha_bar is interpolated, not sigma",
            "return 1 / (1 + sigma**2)",
            "return float(torch.lerp(*self.alpha_bar[low : low + 2], t - low))",
        ),
        (
            "a fractional t is floored",
            "sigma_low + (t - low) * (sigma_high - sigma_low)",
            "sigma_low",
        ),
        ("no offset by default", 'get("steps_offset", 1)', 'get("steps_offset", 0)'),
        (
            "trailing is floored",
            "round(total - i * (total / steps)) - 1",
            "int(total - i * (total / steps)) - 1",
        ),
        (
            "t_prev by subtraction",
            "zip(ts, ts[1:] + [None], strict=True)",
            "zip(ts, [t - len(self.alpha_bar) // steps for t in ts[:-1]] + [None], strict=True)",
        ),
        ("linspace is floored", "in ts.round()]", "in ts]"),
        ("Euler's linspace in float64", "steps, dtype=np.float32)", "steps)"),
        (
            "LCM's timesteps from the clean end",
            "LCM_TIMESTEPS - LCM_TIMESTEPS * i // steps for",
            "LCM_TIMESTEPS * (i + 1) // steps for",
        ),
        ("strength truncates 28.999", "int(steps * strength + 1e-6)", "int(steps * strength)"),
        ("strength keeps the noisy end", "pairs[steps - count :]", "pairs[:count]"),
        (
            "x_0 is not divided by the root of alpha_bar",
            "(x_t - s * prediction) / a, prediction",
            "x_t - s * prediction, prediction",
        ),
        (
            "v has the other sign",
            "return a * x_t - s * prediction, a * prediction +",
            "return a * x_t + s * prediction, -a * prediction +",
        ),
        (
            "the target of v has the other sign",
            "return a * eps - s * x_0",
            "return s * x_0 - a * eps",
        ),
        ("SNR upside down", "return ab / (1 - ab)", "return (1 - ab) / ab"),
        ("trained betas are ignored", 'config.get("trained_betas") is not None', "False"),
        ("flow matching is accepted", 'if "flow" in', 'if "no such" in'),
    ),
    ("samplers", "core/samplers"): (
        (
            "DDIM ends at alpha_bar 1",
            "Sampler(ddim_step, final_alpha_bar=None)",
            "Sampler(ddim_step)",
        ),
        (
            "DDPM draws no noise",
            '"ddpm": Sampler(ddim_step, eta=1.0)',
            '"ddpm": Sampler(ddim_step)',
        ),
        ("the larger of DDPM's variances", "eta * variance_ratio**0.5 *", "eta *"),
        (
            "the direction ignores sigma",
            "max(1 - alpha_bar - sigma**2, 0.0)",
            "(1 - alpha_bar)",
        ),
        (
            "a root of less than 0",
            "max(1 - alpha_bar - sigma**2, 0.0)",
            "(1 - alpha_bar - sigma**2)",
        ),
        (
            "the last x_0 counts double",
            "(then - now) / (now - before) / 2",
            "(then - now) / (now - before)",
        ),
        (
            "extrapolated the other way",
            "step.x_0 + (step.x_0 - previous.x_0)",
            "step.x_0 - (step.x_0 - previous.x_0)",
        ),
        (
            "extrapolated to the clean end",
            "if previous is None or step.t_prev is None:",
            "if previous is None:",
        ),
        (
            "ε is not of the extrapolated x_0",
            "return renoise(x_0, eps, step",
            "return renoise(x_0, step.eps, step",
        ),
        (
            "LCM keeps noise",
            "sigma = eta * (1 - step.alpha_bar_prev) ** 0.5",
            "sigma = ddim_sigma(step.alpha_bar, step.alpha_bar_prev, eta)",
        ),
        (
            "LCM without its boundary condition",
            "20 * step.t / scaled_time**0.5 * step.x_0",
            "step.x_0",
        ),
        ("LCM's time is not scaled", "400 * step.t * step.t + 1", "4 * step.t * step.t + 1"),
        ("LCM on the checkpoint's timesteps", 'eta=1.0, spacing="lcm"', "eta=1.0"),
    ),
    ("samplers", "core/sampling"): (
        (
            "Euler's start is not scaled",
            'if self.scaled_start and spacing != "leading":',
            "if False:",
        ),
        (
            "the leading start is scaled",
            'self.scaled_start and spacing != "leading"',
            "self.scaled_start",
        ),
        (
            "DDIM's last alpha_bar is 1",
            "return float(schedule.alpha_bar[0])",
            "return 1.0",
        ),
        ("Euler's timesteps are rounded", "strength, self.fractional)", "strength)"),
    ),
    ("sampling", "core/sampling"): (
        (
            "alpha_bar of the wrong end",
            "        ab_t = schedule.alpha_bar_at(t)\n        ab_prev",
            "        ab_t = schedule.alpha_bar_at(t_prev or 0)\n        ab_prev",
        ),
        (
            "the mask blends at the level before",
            "step.alpha_bar_prev if step.t_prev",
            "step.alpha_bar if step.t_prev",
        ),
        (
            "the background's end is not clean",
            "step.alpha_bar_prev if step.t_prev is not None else 1.0",
            "step.alpha_bar_prev",
        ),
        (
            "the mask is inverted",
            "mask * step.x_prev + (1 - mask) * background",
            "(1 - mask) * step.x_prev + mask * background",
        ),
        (
            "guidance goes the other way",
            "uncond + guidance * (cond - uncond)",
            "uncond + guidance * (uncond - cond)",
        ),
        (
            "guidance counts from the conditional",
            "uncond + guidance * (cond - uncond)",
            "cond + guidance * (cond - uncond)",
        ),
        (
            "the halves of the batch are swapped",
            ".cat([unconditional, conditioning])",
            ".cat([conditioning, unconditional])",
        ),
        (
            "Img2Img adds noise without scaling",
            "ab_t**0.5 * image + (1 - ab_t) ** 0.5 * noise",
            "image + (1 - ab_t) ** 0.5 * noise",
        ),
        (
            "the image has an influence at strength 1",
            "if image is None or strength == 1:",
            "if image is None:",
        ),
        (
            "strength cuts steps without an image",
            "strength if image is not None else 1.0",
            "strength",
        ),
        (
            "noise depends on the batch",
            "[torch.randn(shape[1:], generator=rng) for rng in rngs]",
            "list(torch.randn(shape, generator=rngs[0]))",
        ),
        ("seed 0 is no seed", "manual_seed(int(seed))", "manual_seed(int(seed) or 1)"),
        ("the hook's answer is dropped", "if replacement is not None:", "if False:"),
        (
            "the step before is not remembered",
            "x_t, previous = step.x_prev, step",
            "x_t = step.x_prev",
        ),
    ),
    ("pipeline", "core/sampling"): (
        (
            "a thin mask is lost",
            "F.max_pool2d(mask[None, None], factor)",
            "mask[None, None, ::factor, ::factor]",
        ),
    ),
    ("arguments", "core/insertion core/public"): (
        ("a seed of None is 0", "secrets.randbits(31) if", "0 if"),
        ("arguments are not checked", "if not holds(value):", "if False:"),
        (
            "None is always right",
            "and not (value is None and ruled[name])",
            "and value is not None",
        ),
        ("True is a whole number", "Integral) and not isinstance(value, bool)", "Integral)"),
        ("0 is above 0", " and not (above and x == low)", ""),
        ("other tools' arguments give no hint", 'if here.startswith("--"):', "if False:"),
    ),
    ("pipeline", "core/insertion"): (
        ("any size is accepted", "if min(size) < factor or height % factor or", "if False and"),
        (
            "no composite by the mask",
            "generated if mask is None else images",
            "generated if True else images",
        ),
    ),
    ("segmentation", "core/segmentation"): (
        ("one head for all", "probabilities[-1].mean(0)", "probabilities[-1][0]"),
        ("the window is ignored", "if self.in_window(t):", "if True:"),
        ("attention is recorded outside the window", " and self.in_window(step.t_prev)", ""),
        ("recorded to the end", "                recording.close()\n", ""),
        ("all levels halve down", "math.ceil(height / 2**level)", "height // 2**level"),
        ("self-attention transposed", "p = transition @ p", "p = transition.T @ p"),
        ("self-attention is not normalized", "total / total.sum(1, keepdim=True)", "total"),
        ("levels count by their scale", "m / m.mean()", "m"),
        ("the threshold is strict", "mask = soft >= threshold", "mask = soft > threshold"),
        ("holes stay", " | enlarge(enclosed)", ""),
        ("specks stay", "(areas >= min_share * areas.max())[labels] & coarse", "coarse"),
        ("the guided filter without its mean", "mean_mask - a * mean_guide", "mean_mask"),
        ("the region is not grown", "round(dilate * min(mask.shape))", "0"),
        (
            "an unknown word is no warning",
            '    warn_if_weak(word, maps, defaults["image_word_strength"])\n',
            "",
        ),
        ("strength is a probability", "return 77 * float(", "return float("),
        ("an image is segmented without noise", "int(noise_level * ", "int(0 * "),
    ),
    ("insertion", "core/insertion"): (
        ("the class word is doubled", "if len(words) > 1 and", "if False and"),
        ("the token is doubled", 'if before.endswith(f"{token} "):', "if False:"),
    ),
    ("insertion", "core/insertion core/segmentation"): (
        (
            "the LoRA generates the scene",
            "with lora.lora_scale(sdxl, 0):\n        if image",
            "with lora.lora_scale(sdxl, 1):\n        if image",
        ),
        (
            "the LoRA encodes the scene's prompt",
            "with lora.lora_scale(sdxl, 0):\n        plain",
            "with lora.lora_scale(sdxl, 1):\n        plain",
        ),
        ("the text encoders stay", '        sdxl.free("text_encoders")', "        pass"),
        (
            "stage 2 has the class word alone",
            "encode_pair(sdxl, subject_prompt,",
            "encode_pair(sdxl, prompt,",
        ),
        ("stage 2 has the scene's noise", "seed + 1,", "seed,"),
        (
            "composite by the hard mask",
            "images.composite(scene, pasted, weight)",
            "images.composite(scene, pasted, mask)",
        ),
        ("a found mask fades within", "fade if fade_outwards else None", "None"),
        ("a given mask fades beyond", "fade if fade_outwards else None", "fade"),
        ("a found mask fades by another width", "FADE_LATENTS = 2", "FADE_LATENTS = 3"),
        (
            "an unknown word is no warning",
            '    warn_if_weak(class_word, maps, sdxl.defaults["scene_word_strength"])\n',
            "",
        ),
        ("no composite", "images.composite(scene, pasted, weight)", "pasted"),
        (
            "top and left swapped",
            "(self.left, self.top, right, bottom)",
            "(self.top, self.left, right, bottom)",
        ),
        ("the box is not moved inside", "min(max(top, 0), rows - height)", "top"),
        (
            "the feather goes beyond the mask",
            "return torch.minimum((x * peak).to(mask), mask)",
            "return (x * peak).to(mask)",
        ),
        ("the box has another aspect ratio", "min(cover, rows / size[0], ", "min(rows / size[0], "),
        (
            "the token replaces the class word",
            "{token} {prompt[found.start() :]}",
            "{token} {prompt[found.end() :]}",
        ),
    ),
    ("images", "core/images"): (
        ("EXIF is ignored", "ImageOps.exif_transpose(image)", "image"),
        ("16 bits are clipped", '.mode.startswith("I")', '.mode.startswith("no")'),
        (
            "a mask's transparency goes onto white",
            '"white" if mode == "RGB" else "black"',
            '"white"',
        ),
        ("a palette's transparency is lost", ' or "transparency" in image.info', ""),
        ("rounded down", "pixels.round().byte()", "pixels.byte()"),
        ("composited the other way", "* (b - a)", "* (a - b)"),
        ("a composite is rounded down", "np.round(mixed)", "mixed"),
        ("a line of an image is read", "max(size) > MAX_ASPECT_RATIO", "0 > MAX_ASPECT_RATIO"),
        ("a mask of another size is accepted", "if mask.shape != size:", "if False:"),
    ),
}
