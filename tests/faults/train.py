"""Faults of train.py's parts: the loss, the loop, the state, the data set and the methods."""

FAULTS = {
    ("training", "core/loss"): (
        (
            "min-SNR of v without the one",
            'snr if schedule.prediction == "epsilon" else snr + 1',
            "snr",
        ),
        (
            "the prior has no weight",
            "subject.mean() + prior_weight * class_.mean()",
            "subject.mean() + class_.mean()",
        ),
        (
            "one mean over subject and class",
            "subject.mean() + prior_weight * class_.mean()",
            "torch.cat([subject, prior_weight * class_]).mean()",
        ),
        ("the loss mask is ignored", "(loss_mask * difference.square())", "(difference.square())"),
        (
            "the loss mask is not normalized",
            "total / loss_mask.mean((1, 2, 3)).clamp(min=1e-6)",
            "total",
        ),
    ),
    ("training", "core/training"): (
        ("accumulated gradients are summed", ") / accumulation\n", ")\n"),
        ("a step of NaN is applied", "        if applied:\n", "        if True:\n"),
        ("a NaN loss is kept", "total if applied else math.nan", "total"),
        ("bad steps never end the run", "if len(recent) > MAX_BAD_STEPS and", "if False and"),
        (
            "warm-up restarts with the run",
            "factor = learning_rate_factor(step, steps",
            "factor = learning_rate_factor(len(state.losses) - state.step, steps",
        ),
        ("cosine rises", "0.5 * (1 + math.cos", "0.5 * (1 - math.cos"),
        (
            "moments keep the file's layout of memory",
            "torch.empty_like(p).copy_(value)",
            "value.to(p.device)",
        ),
        (
            "the checksum covers the header alone",
            "zlib.crc32(values.view(torch.uint8).numpy(), crc)",
            "crc",
        ),
        ("a state of NaN is restored", "not value.isfinite().all()", "False"),
        (
            "a state may lack losses",
            'if step < 0 or saved.get_slice("losses").get_shape() != [step]:',
            "if False:",
        ),
        ("a checksum is not compared", 'if header.get("checksum") != checksum', "if not checksum"),
        ("the step is not restored", "        self.step = step\n", ""),
    ),
    ("methods/subject", "core/training"): (
        ("no photo is needed", "if not photos:", "if False:"),
        (
            "train_lora has no prior",
            "loss(sdxl, batch, teacher_batch(",
            "loss(sdxl, batch, (None, ",
        ),
    ),
    ("training", "extras/dreambooth"): (
        (
            "autocast is always on",
            "enabled = enabled and sdxl.dtype",
            "enabled = sdxl.dtype",
        ),
        (
            "autocast is never on",
            "enabled = enabled and sdxl.dtype",
            "enabled = False and sdxl.dtype",
        ),
    ),
    ("dataset", "core/dataset"): (
        ("a crop's left is its top", "top * factor, left * factor", "top * factor, top * factor"),
        (
            "the same noise at every step",
            "generator(seed, 2, step, index)",
            "generator(seed, 2, index)",
        ),
        (
            "the whole mask for every crop",
            "target, loss_mask, t, time_ids,",
            "target, view[2][None], t, time_ids,",
        ),
        ("the mean, never a sample", "mean + std * torch.randn(mean.shape, generator=rng)", "mean"),
        (
            "every rank has the same samples",
            "* world + rank) * batch_size",
            "* world) * batch_size",
        ),
        (
            "micro-steps repeat samples",
            "((step * accumulation + micro_step) * world + rank)",
            "(step * accumulation * world + rank)",
        ),
        (
            "the mask is not mirrored",
            "ImageOps.mirror(photo), ImageOps.mirror(mask)",
            "ImageOps.mirror(photo), mask",
        ),
        (
            "the second batch keeps the first's target",
            "= torch.cat(parts)",
            "= torch.cat(parts[:1] * len(parts))",
        ),
    ),
    ("methods/prior", "core/loss"): (
        (
            "the teacher has the LoRA on",
            "lora.lora_scale(sdxl.unet, 0)",
            "lora.lora_scale(sdxl.unet, 1)",
        ),
        (
            "the teacher keeps the subject's mask",
            "torch.ones_like(batch.loss_mask)",
            "batch.loss_mask",
        ),
        (
            "the teacher sees the subject's prompt",
            "prompts=[class_prompt] * len(batch.t)",
            "t=batch.t",
        ),
    ),
    ("methods/prior", "core/prior"): (
        ("every class image is the same", '"seed": FIRST_SEED + index', '"seed": FIRST_SEED'),
        ("of any settings", "png.check(*job)", "pass"),
    ),
    ("methods/task", "core/prior"): (
        ("class images are generated again", "jobs if not job[0].exists()]", "jobs]"),
    ),
    ("methods/task", "cli/training_flags"): (
        ("repeats of a subject's folder count once", "found * repeats", "found"),
    ),
    ("methods/task", "cli/check"): (
        ("--check replaces any file", "sheet_path.exists() and not", "False and not"),
    ),
    ("methods/flags", "cli/training_flags"): (
        (
            "any token is one word",
            "cli.single_token(args.token or",
            "(lambda a, b: a)(args.token or",
        ),
        ("a LoRA to start from may be missing", "not Path(args.init_lora).is_file():", "False:"),
    ),
    ("files", "core/public cli/training_flags"): (
        (
            "the folder of a run is no LoRA",
            "if not path.is_dir():\n        return path",
            "return path",
        ),
        ("a LoRA has one name", "for name in LORA_FILES:", "for name in LORA_FILES[:1]:"),
    ),
    ("methods/outputs", "cli/training_flags"): (
        ("a file named as the unfinished result is lost", "paths.append(out / NEW)", "pass"),
    ),
    ("methods/dreambooth", "extras/dreambooth"): (
        (
            "text encoders are frozen",
            "sdxl.read(name, torch.float32).requires_grad_(True)",
            'sdxl.read(name, torch.float32).requires_grad_(name == "unet")',
        ),
    ),
    ("methods/report", "extras/dreambooth"): (
        ("previews of full in float32", 'sdxl, args.method == "full"):', "sdxl, False):"),
        ("a base model's NaN is the training's", "if failure and not step:", "if failure:"),
    ),
    ("methods/textual_inversion", "extras/textual_inversion"): (
        (
            "the table is trained",
            "self.weight, self.first = table.weight, first",
            "self.weight, self.first = table.weight.requires_grad_(True), first",
        ),
        (
            "the first row for all",
            "(ids - self.first).clamp(min=0)",
            "(ids - self.first).clamp(0, 0)",
        ),
        ("only the word's first token", "(ids * vectors)[:vectors]", "ids[:1] * vectors"),
        (
            "one template for all",
            "prompts=[prompts[k] for k in mine]",
            "prompts=[prompts[0] for k in mine]",
        ),
    ),
    ("methods/textual_inversion", "extras/distributed"): (
        ("every rank takes the first's templates", "[rank * count :][:count]", "[:count]"),
    ),
    ("methods/captions", "extras/captions"): (
        ("no caption is dropped", "None if lot < dropout else prompt", "prompt"),
        (
            "buckets are transposed",
            "image_size[0] / image_size[1]",
            "image_size[1] / image_size[0]",
        ),
        (
            "every bucket as often",
            "[len(buckets[size]) for size in sizes]",
            "[1 for size in sizes]",
        ),
        (
            "the widest bucket of each height",
            "range(-(-3 * cells // (4 * h)), ",
            "range(cells // h, ",
        ),
        ("small buckets too", "range(-(-3 * cells // (4 * h)), ", "range(1, "),
        ("repeats count once", "prompt)] * repeats", "prompt)]"),
        ("a file outside the folder is read", 'or ".." in Path(name).parts', ""),
    ),
    ("methods/captions", "extras/distributed"): (
        ("every rank drops the first's captions", ".tolist()[rank * batch_size :]", ".tolist()"),
    ),
    ("methods/prior", "extras/captions"): (
        (
            "the teacher's target is within the mask",
            "lerp(teacher.target, batch.target, batch.loss_mask)",
            "lerp(batch.target, teacher.target, batch.loss_mask)",
        ),
        ("outside the mask nothing counts", "loss_mask=teacher.loss_mask", "t=batch.t"),
    ),
    ("methods/masks", "extras/captions"): (
        ("a mask is not rotated", "ImageOps.exif_transpose(opened)", "opened"),
    ),
    ("methods/outputs", "cli/resume"): (
        ("a user's files are replaced", "if args.overwrite or not existing:", "if True:"),
        (
            "the state of a finished run is lost",
            'if args.method == "full":\n        (',
            "if True:\n        (",
        ),
        ("a finished run does not say so", "finished == args.steps or", "False or"),
    ),
    ("methods/report", "cli/resume"): (
        ("previews lost to a stop stay lost", "step == self.state.step))", "True))"),
    ),
    ("methods/outputs", "cli/crash_points"): (
        (
            "its own checkpoint stops the run",
            "    remove(path)  # of this run",
            "    pass  # of this run",
        ),
    ),
    ("extras/memory", "extras/memory"): (
        (
            "one moment is forgotten",
            "kept += 3 * 4 * trained",
            "kept += 2 * 4 * trained",
        ),
        ("nothing to spare", "MARGIN = 0.9", "MARGIN = 1.0"),
        ("a flag is overruled", "if trains and args.checkpointing is None:", "if trains:"),
        ("fp8 is chosen beside --merge", "and not merged and", "and"),
        (
            "fp8 is chosen where it cannot be compiled",
            "missing_for_fp8(sdxl.device, args.compile)",
            "missing_for_fp8(sdxl.device)",
        ),
    ),
}
