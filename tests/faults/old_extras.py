"""The faults of faults.py in the rooms around the core."""

FAULTS = {
    ("formats/layout", "formats/manifest"): (
        ("thirds of in_proj", '"qkv".index', '"kqv".index'),
        ("text_projection as stored", "tensor.T.contiguous()", "tensor"),
        ("the VAE's levels from the coarsest", "levels - 1 - int(m[1])", "int(m[1])"),
        ("upsampler at index 1", "+ layers}.2", "+ layers}.1"),
        ("middle resnets", "2 * int(m[2])", "int(m[2])"),
    ),
    ("formats/lora", "formats/lora_files formats/lora_writing"): (
        (
            "alpha is not read",
            "told(layer, len(down)) if alpha is None else alpha) for",
            "told(layer, len(down))) for",
        ),
        ("alpha is not baked in", "up * (alpha / len(down))", "up"),
        (
            "the second text encoder is the first",
            '"text_encoder_2": "lora_te2_"',
            '"text_encoder_2": "lora_te1_"',
        ),
        (
            "a DoRA is a LoRA",
            "if dora := [key for key in keys if key.endswith(DORA)]:",
            "if dora := []:",
        ),
        (
            "transformers 5's names are unknown",
            'names = {name, name.removeprefix("text_model.")}',
            "names = {name}",
        ),
        (
            "peft's alpha beside is not read",
            'if Path(path).name == "adapter_model.safetensors" else {}',
            "if False else {}",
        ),
        ("NaN is put on", "if wild:", "if False:"),
    ),
    ("command/states", "cli/waiting"): (
        ("a loss under way is not saved", "    state.read()\n", "    pass\n"),
        ("it goes on from the first step", "state.losses, state.step = ", "state.losses, _ = "),
    ),
    ("methods/prior", "core/prior"): (
        (
            "the prior is a mean over both",
            "subject.mean() + prior_weight * prior.mean()",
            "torch.cat([subject, prior_weight * prior]).mean()",
        ),
        ("every class picture is the same", "FIRST_SEED + k}", "FIRST_SEED}"),
        ("of whatever settings", "png.check(path, facts)", "pass"),
    ),
    ("command/lessons", "core/prior"): (
        ("class pictures are drawn again", "pictures if not picture[0].exists()]", "pictures]"),
    ),
    ("methods/dreambooth", "extras/dreambooth"): (
        (
            "text encoders stay as they were",
            "sdxl.read(name, torch.float32).requires_grad_(True)",
            'sdxl.read(name, torch.float32).requires_grad_(name == "unet")',
        ),
    ),
    ("methods/textual_inversion", "extras/textual_inversion"): (
        (
            "the table learns",
            "self.weight, self.first = table.weight, first",
            "self.weight, self.first = table.weight.requires_grad_(True), first",
        ),
        (
            "the first row for all",
            "(ids - self.first).clamp(min=0)",
            "(ids - self.first).clamp(min=0, max=0)",
        ),
        ("a word's first piece alone", "ids[k % len(ids)]", "ids[0]"),
    ),
    ("formats/embeddings", "extras/textual_inversion cli/converting"): (
        ("the two encoders' rows swapped", "dict(zip(KEYS, rows))", "dict(zip(KEYS, rows[::-1]))"),
        ("clip_g is read as clip_l", "sorted(file.keys(), reverse=True)", "sorted(file.keys())"),
    ),
    ("formats/folder", "cli/converting"): (
        (
            "the originals of merged weights are kept",
            "layer.base_weight, layer.lora = None, torch",
            "layer.lora = torch",
        ),
        ("a LoRA is written beside its weight", "        layer.merge()\n", "        pass\n"),
    ),
    ("formats/checkpoint", "cli/converting"): (
        (
            "the old VAE's configuration is written",
            '"config.json") or configs["vae"]',
            '"config.json") and configs["vae"]',
        ),
        (
            "the schedule is written as the folder has it",
            '"scheduler/scheduler_config.json": schedule,',
            '"scheduler/scheduler_config.json": config_of(folder, "scheduler/scheduler_config.json"),',
        ),
    ),
    ("methods/captions", "extras/captions"): (
        ("no caption is dropped", "None if lot < dropout else prompt", "prompt"),
        (
            "buckets upside down",
            "picture_size[0] / picture_size[1]",
            "picture_size[1] / picture_size[0]",
        ),
        (
            "every bucket as often",
            "[len(buckets[size]) for size in sizes]",
            "[1 for size in sizes]",
        ),
        (
            "only the widest bucket of each height",
            "range(-(-3 * most // (4 * h)), most // h + 1)",
            "range(most // h, most // h + 1)",
        ),
        (
            "small buckets too",
            "range(-(-3 * most // (4 * h)), most // h + 1)",
            "range(1, most // h + 1)",
        ),
    ),
    ("command/training", "extras/distributed"): (
        (
            "every rank writes the state",
            "        if not distributed.rank():\n            save_state",
            "        if True:\n            save_state",
        ),
    ),
    ("methods/captions", "extras/distributed"): (
        ("every rank drops the first's captions", ".tolist()[rank * count:]", ".tolist()"),
    ),
    ("methods/textual_inversion", "extras/distributed"): (
        ("every rank takes the first's templates", "[rank * count:][:count]", "[:count]"),
    ),
    ("command/results", "cli/sample"): (
        ("a picture tells where it was written", "if k not in PLACES}", "}"),
    ),
    ("command/training", "extras/inspect"): (
        ("no preview of before", "if args.preview_every and not state.step:", "if False:"),
    ),
    ("command/lessons", "extras/inspect"): (
        ("the error at the batch's own timesteps", "t=batch.t * 0 + t", "t=batch.t"),
    ),
    ("extras/counting", "extras/memory"): (
        ("what is freed counts on", "self.now -= self.known.pop(key)", "self.known.pop(key)"),
        ("weights count as made", "self.note(x.untyped_storage(), 0)", "pass"),
        (
            "attention keeps its matrix",
            "torch.empty(q.shape[:-1], dtype",
            "torch.empty((*q.shape[:-1], q.shape[-2]), dtype",
        ),
        ("norms stay half under autocast", "F.layer_norm: torch.float32", "F.layer_norm: lower"),
    ),
    ("extras/memory", "extras/memory"): (
        ("one moment is forgotten", "for n in (3, 1))", "for n in (2, 1))"),
        (
            "checkpointing is not asked for",
            "sdxl.unet.checkpointing = run.checkpointing",
            "sdxl.unet.checkpointing = False",
        ),
    ),
    ("command/fitting", "extras/memory"): (
        ("nothing to spare", "ROOM = 0.9", "ROOM = 1.0"),
        (
            "a flag is overruled",
            'getattr(args, "checkpointing", True) is None',
            'hasattr(args, "checkpointing")',
        ),
        ("fp8 is chosen beside --merge", ' and not getattr(args, "merge", False)', ""),
        (
            "fp8 is chosen where it cannot be compiled",
            "missing_for_fp8(sdxl.device, args.compile)",
            "missing_for_fp8(sdxl.device)",
        ),
        (
            "both sizes are named",
            "names = {flag.split()[0]: flag for flag, _ in some}.values()",
            "names = [flag for flag, _ in some]",
        ),
    ),
    ("methods/masks", "extras/captions"): (
        ("a mask is not turned", "ImageOps.exif_transpose(opened)", "opened"),
    ),
}
