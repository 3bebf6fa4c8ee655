"""Faults of the inspection pages, the seam figure and the ranks."""

FAULTS = {
    ("extras/distributed", "extras/distributed"): (
        ("the loss of one rank alone", "return loss + (mean - loss).detach()", "return loss"),
        (
            "gradients are averaged twice",
            "return loss + (mean - loss).detach()",
            "return mean + (loss - loss.detach()) / world()",
        ),
        (
            "the first micro-step is averaged, not the last",
            "last = micro_step == accumulation - 1",
            "last = micro_step == 0",
        ),
        ("every rank generates all images", "slice(rank(), None, world())", "slice(None)"),
        (
            "every rank logs",
            "sys.stderr = stderr if rank() == 0 else io.StringIO()",
            "sys.stderr = stderr",
        ),
        (
            "the error of one rank is not reported",
            "if end.code and is_first_to_report() and rank() != 0:",
            "if False:",
        ),
        (
            "an error that all ranks met is reported by each",
            'return store.add("reported", 1) == 1',
            'return store.add("reported", 1) > 0',
        ),
    ),
    ("extras/inspect/preflight", "cli/check"): (
        (
            "the sheet darkens what is trained on",
            "Image.composite(image, image.point(lambda value: value // 4), mask)",
            "Image.composite(image.point(lambda value: value // 4), image, mask)",
        ),
    ),
    ("extras/inspect/sprites", "extras/inspect"): (
        ("the map to colours has no constant", "(0, 1), value=1.0)", "(0, 1), value=0.0)"),
        ("a frame's column is its height wide", "column * w\n", "column * h\n"),
        ("the last step of a long run is lost", "(count - 1) / max(", "(count - 2) / max("),
        ("NaN latents spoil the colours", "if latents.isfinite().all():", "if True:"),
    ),
    ("extras/inspect/record", "extras/inspect"): (
        (
            "attention is that of uncond",
            "self.accumulate, True)",
            "lambda name, p: self.accumulate(name, p[:1]))",
        ),
        ("layers of a level are summed", "mean = total / count", "mean = total"),
        (
            "self-attention is scaled by its columns",
            "mean.amax(1, keepdim=True)",
            "mean.amax(0, keepdim=True)",
        ),
        ("sigma without eta", "step.alpha_bar_prev, self.eta)", "step.alpha_bar_prev, 1.0)"),
        ("LCM's sigma is DDIM's", 'if self.sampler == "lcm":', "if False:"),
        (
            "levels are rounded down",
            "h, w = -(-h // 2), -(-w // 2)",
            "h, w = h // 2, w // 2",
        ),
        ("a hook stays on the network", "stack.callback(handle.remove)", "pass"),
        (
            "self-attention is recorded from the second step on",
            "in even_indices(total, SELF_STEPS)",
            "in [k + 1 for k in even_indices(total - 1, SELF_STEPS)]",
        ),
    ),
    ("extras/inspect/stage", "extras/inspect"): (
        (
            "uncond and cond change places",
            '(("x_0_uncond", uncond), ("x_0_cond", cond))',
            '(("x_0_uncond", cond), ("x_0_cond", uncond))',
        ),
        (
            "a level counts by its size",
            "level / level.mean((2, 3), keepdim=True).clamp(min=1e-9)",
            "level",
        ),
        (
            "every map of a long prompt",
            "max(10, MAX_MAPS // level.shape[1])",
            "len(level)",
        ),
        (
            "the mean of the shown maps alone",
            "mean = level.mean(0, keepdim=True)",
            "mean = level[at].mean(0, keepdim=True)",
        ),
        (
            "a level counts once, however many layers it has",
            "counts[n] * p.float().mean(0)",
            "p.float().mean(0)",
        ),
        ("a diverged run has no page", "except FloatingPointError", "except KeyError"),
    ),
    ("extras/inspect/page", "extras/inspect"): (
        ("a prompt can end the script", 'text.replace("<", "\\\\u003c")', "text"),
    ),
    ("extras/inspect/insertion_page", "extras/inspect"): (
        (
            "a crop that is the scene is stored again",
            "if made.crop != made.scene:",
            "if made.crop:",
        ),
        (
            "raw attention is walked already",
            "recorder.maps.heatmap(0)",
            "recorder.maps.heatmap(1)",
        ),
        (
            "the latent mask is that of the whole image",
            "made.mask[None, top : top + height, left : left + width]",
            "torch.ones_like(made.mask)[None]",
        ),
        ("the difference wraps around", "result.int() - scene.int()", "result - scene"),
        (
            "the difference outside is measured inside",
            "changed[made.feathered.cpu() == 0]",
            "changed[made.feathered.cpu() > 0]",
        ),
    ),
    ("extras/inspect/training_page", "extras/inspect"): (
        (
            "the norm is not relative to the weights",
            "adapter.delta().norm() / weight_of(layer).norm()",
            "adapter.delta().norm()",
        ),
    ),
    ("extras/inspect/sheets", "extras/inspect"): (
        (
            "the running mean has a start-up bias",
            "means.append(total / weight if weight else None)",
            "means.append(total / 20 if weight else None)",
        ),
    ),
    ("extras/inspect/seam", "extras/seam"): (
        ("texture hides a seam", "(there - here) * crossing", "(there - here).abs() * crossing"),
        ("only the pixels at the edge count", "scale * pixel, REACH", "pixel, REACH"),
        ("a flat scene divides by nothing", "max(before, VISIBLE)", "max(before, 1e-3)"),
        (
            "one textured side hides a seam at the other",
            "return sum(ratios) / len(ratios)",
            "return min(ratios)",
        ),
    ),
    ("../tests/bench/samplers_sheet", "extras/samplers_sheet"): (
        (
            "Euler steps in the level itself",
            "(noise_ratio(ab_prev) - noise_ratio(ab)) * step.eps",
            "(ab_prev - ab) * step.eps",
        ),
        (
            "DDPM with the larger variance",
            "(beta * (1 - ab_prev) / (1 - ab)) ** 0.5",
            "beta**0.5",
        ),
    ),
}
