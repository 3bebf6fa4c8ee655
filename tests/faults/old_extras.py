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
    ("extras/distributed", "extras/distributed"): (
        ("the loss of one rank alone", "return value + (mean - value).detach()", "return value"),
        (
            "gradients are averaged twice",
            "return value + (mean - value).detach()",
            "return mean + (value - value.detach()) / world()",
        ),
        (
            "the first part is averaged, not the last",
            "if part == accumulation - 1 else",
            "if part == 0 else",
        ),
    ),
    ("extras/distributed", "extras/distributed_apart"): (
        ("every rank draws all", "slice(rank(), None, world())", "slice(None)"),
        ("every rank speaks", "io.StringIO() if rank() else sys.stderr", "sys.stderr"),
        ("an error of one rank is not said", "if end.code and is_mine() and rank()", "if False"),
        (
            "an error that all have met is said by each",
            'return said.add("said", 1) == 1',
            'return said.add("said", 1) > 0',
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
    ("extras/inspect/preflight", "cli/check"): (
        (
            "the sheet darkens what is learned",
            "Image.composite(picture, picture.point(lambda value: value // 4), mask)",
            "Image.composite(picture.point(lambda value: value // 4), picture, mask)",
        ),
    ),
    ("extras/inspect/pictures", "extras/inspect"): (
        ("the map to colours has no constant", "(0, 1), value=1.0)", "(0, 1), value=0.0)"),
        (
            "a film is cut into columns of its height",
            "k % columns * w:k % columns * w + w]",
            "k % columns * h:k % columns * h + w]",
        ),
        ("a long run loses its last step", "(count - 1) / max(", "(count - 2) / max("),
    ),
    ("extras/inspect/record", "extras/inspect"): (
        (
            "attention of the half that is told nothing",
            "probabilities[-1].mean(0)",
            "probabilities[0].mean(0)",
        ),
        ("layers of a level are added, not their mean", "total / count for key", "total for key"),
        (
            "self-attention by its largest of each column",
            "p.amax(1, keepdim=True)",
            "p.amax(0, keepdim=True)",
        ),
        ("sigma without eta", "step.alpha_bar_prev, self.eta, ", "step.alpha_bar_prev, 1.0, "),
        ("sigma of a sampler whose noise is all fresh", "self.eta, self.row.fresh)", "self.eta)"),
        ("levels are rounded down", "-(-side // 2 ** level)", "side // 2 ** level"),
    ),
    ("extras/inspect/stage", "extras/inspect"): (
        (
            "told and untold change places",
            'recorder.stacked(f"eps_{name}")',
            'recorder.stacked("eps_cond" if name == "uncond" else "eps_uncond")',
        ),
        ("a level counts by its size", "m / m.mean((2, 3), keepdim=True).clamp(min=1e-9)", "m"),
    ),
    ("extras/inspect/record", "extras/inspect_more"): (
        ("a hook stays on the network", "watched.callback(called.remove)", "pass"),
        (
            "self-attention from the second step on",
            "spread(total, LOOKS)",
            "(k + 1 for k in spread(total - 1, LOOKS))",
        ),
    ),
    ("extras/inspect/stage", "extras/inspect_size"): (
        ("every map of a long prompt", "max(10, MAPS // level.shape[1])", "len(level)"),
        (
            "the mean of the maps that are shown",
            "level.mean(0, keepdim=True)])",
            "level[at].mean(0, keepdim=True)])",
        ),
    ),
    ("extras/inspect/placing", "extras/inspect_size"): (
        (
            "a crop that is the scene is told again",
            "if made.crop != made.scene else {}",
            "if made.crop else {}",
        ),
    ),
    ("command/results", "cli/sample"): (
        ("a picture tells where it was written", "if k not in PLACES}", "}"),
    ),
    ("command/inspecting", "extras/inspect_more"): (
        (
            "a name that is too long is no bad input",
            "except OSError as error:  # a name",
            "except KeyError as error:  # a name",
        ),
    ),
    ("command/training", "extras/inspect_more"): (
        ("no preview of before", "if args.preview_every and not state.step:", "if False:"),
    ),
    ("extras/inspect/stage", "extras/inspect_more"): (
        (
            "a level counts once, however many layers it has",
            "layers[n] * p.float().mean(0)",
            "p.float().mean(0)",
        ),
        ("a run that diverges ends at its page", "except FloatingPointError", "except KeyError"),
    ),
    ("extras/inspect/page", "extras/inspect"): (
        ("a prompt can end the script", '.replace("<", "\\\\u003c")', ""),
    ),
    ("extras/inspect/placing", "extras/inspect_more"): (
        ("raw attention is sharpened already", "watcher.maps.heat(0)", "watcher.maps.heat(power)"),
        (
            "the latents' mask is of the whole picture",
            "made.mask[None, top:top + height, left:left + width]",
            "made.feathered[None]",
        ),
        ("a difference wraps around", "np.int16", "np.uint8"),
        (
            "the difference is looked for inside",
            "made.feathered.cpu().numpy() == 0",
            "made.feathered.cpu().numpy() > 0",
        ),
    ),
    ("extras/inspect/teaching", "extras/inspect_more"): (
        (
            "the norm is not by the weights'",
            "adapter.delta().norm() / weight_of(layer).norm()",
            "adapter.delta().norm()",
        ),
        (
            "a lost step counts as nothing, not as no step",
            "else (total, weight)",
            "else (0.95 * total, 0.95 * weight + 1)",
        ),
    ),
    ("command/lessons", "extras/inspect_more"): (
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
    ("extras/inspect/samplers", "extras/samplers_sheet"): (
        (
            "Euler steps in the level itself",
            "(level(ab_prev) - level(ab)) * step.eps",
            "(ab_prev - ab) * step.eps",
        ),
        (
            "DDPM with the larger variance",
            "(beta * (1 - ab_prev) / (1 - ab)) ** 0.5",
            "beta ** 0.5",
        ),
        (
            "the row of samplers draws other noise",
            "generators=made, hook",
            "generators=sampling.generators([SEED]), hook",
        ),
    ),
}
