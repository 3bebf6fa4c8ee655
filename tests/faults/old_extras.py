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
    ("command/results", "cli/sample"): (
        ("a picture tells where it was written", "if k not in PLACES}", "}"),
    ),
}
