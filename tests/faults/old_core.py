"""The faults that mutations.py puts into the code, one at a time.

(file in alchemy/, the test files to run): (what it is, the exact old text, the new text), ...
"""

FAULTS = {
    ("training", "core/training core/loss"): (
        (
            "min-SNR of v without the one",
            '(snr if schedule.prediction == "epsilon" else snr + 1)',
            "snr",
        ),
        (
            "the prior's target has the LoRA on",
            "lora.lora_scale(unet, 0)",
            "lora.lora_scale(unet, 1)",
        ),
        (
            "the prior weighs nothing",
            "subject.mean() + prior_weight * prior.mean()",
            "subject.mean()",
        ),
        ("accumulated, not averaged", "loss_of(step, part) / accumulation", "loss_of(step, part)"),
        ("a step of NaN is applied", "if state.late or total.isfinite():", "if True:"),
    ),
    ("training", "cli/waiting"): (
        ("read late, a step of NaN is applied", "total.isnan().float()", "torch.zeros_like(total)"),
        ("the loss is waited for", "but=int(state.late and state.step not in (1, steps))", "but=0"),
        ("the last loss is not read", "state.step not in (1, steps)", "state.step != 1"),
        ("a run that is lost goes on", "if len(last) > MAX_BAD_STEPS and", "if False and"),
    ),
    ("dataset", "core/dataset extras/captions"): (
        ("a crop's left is its top", "top * factor, left * factor", "top * factor, top * factor"),
        (
            "the same noise at every step",
            "generator(seed, 2, step, index)",
            "generator(seed, 2, index)",
        ),
        (
            "every place counts",
            "mean, std, weight = (part[:, top:top + h, left:left + w] for part in parts)",
            "mean, std, weight = (part[:, top:top + h, left:left + w] for part in (*parts[:2], torch.ones_like(parts[2])))",
        ),
        ("the mean, never a sample", "mean + std * torch.randn(mean.shape, generator=rng)", "mean"),
    ),
    ("dataset", "extras/distributed"): (
        ("every rank draws the same samples", "* world + rank) * count", "* world) * count"),
        (
            "a part of all ranks begins where one rank's would",
            "((step * accumulation + part) * world + rank)",
            "(step * accumulation + part + rank)",
        ),
    ),
}
