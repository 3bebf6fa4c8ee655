"""Faults of the file formats."""

FAULTS = {
    ("formats/layout", "formats/manifest"): (
        ("thirds of in_proj in another order", '"qkv".index', '"kqv".index'),
        ("text_projection as stored", "tensor.T.contiguous()", "tensor"),
        ("the VAE's levels from the coarsest", "levels - 1 - int(m[1])", "int(m[1])"),
        ("upsampler at index 1", '"upsamplers": 2', '"upsamplers": 1'),
        ("middle resnets", "{2 * index}", "{index}"),
        (
            "up blocks count a block less",
            "block = level * (layers + 1) + (",
            "block = level * layers + (",
        ),
    ),
    ("formats/layout", "formats/saving"): (
        ("in_proj written in another order", 'for part in "qkv"]', 'for part in "kqv"]'),
        ("text_projection written as it is", "tensor = tensor.T\n", "pass\n"),
        ("the VAE's attention written as matrices", "tensor = tensor[:, :, None, None]", "pass"),
    ),
    ("formats/vocabulary", "formats/tokenizer_files"): (
        (
            "merges that were cut short are accepted",
            "LAST_MERGED.get(vocab[EOS], made) != made",
            "False",
        ),
        (
            "the padding is EOS where no file names it",
            "min(special.keys() - {BOS}, key=special.get)",
            "EOS",
        ),
        ("an id may be negative", "not 0 <= i < MAX_ID", "i >= MAX_ID"),
        ("two tokens may have an id", "if i in tokens:", "if False:"),
        ("an added token may have any id", "tokens.get(i, token) != token or ", ""),
        ("tokens may be missing", "if missing:", "if False:"),
    ),
    ("formats/configs", "formats/bad_checkpoints"): (
        ("settings that are not supported are ignored", "not in BUILT_IN[name]:", "in ():"),
        ("names of any type", 'isinstance(config.get(name, ""), str)', "True"),
    ),
    ("formats/checkpoint", "formats/bad_checkpoints"): (
        ("ids beyond the vocabulary are accepted", "if last >= size:", "if False:"),
    ),
    ("formats/saving", "formats/saving"): (
        ("v-prediction is not marked", 'tensors["v_pred"] = torch.zeros(0)', "pass"),
        ("zero terminal SNR is not marked", 'tensors["ztsnr"] = torch.zeros(0)', "pass"),
        ("an existing file is replaced", "if path.is_file() or (", "if ("),
        ("base weights are kept after merging", "        layer.base_weight = None\n", ""),
        ("a LoRA is written beside its weight", "        layer.merge()\n", ""),
    ),
    ("formats/lora", "formats/tool_names"): (
        (
            "the second text encoder is the first",
            '"text_encoder_2": "lora_te2_"',
            '"text_encoder_2": "lora_te1_"',
        ),
        ("ComfyUI's names are unknown", ', "diffusion_model.")', ")"),
        ("OneTrainer's dotted names are unknown", ', "lora_te1."', ""),
    ),
    ("formats/lora", "formats/lora_files"): (
        (
            "alpha is not multiplied into up",
            "up = adapter.up * (adapter.alpha / len(adapter.down))",
            "up = adapter.up",
        ),
        (
            "transformers 5's names are unknown",
            'inner_names = {name, name.removeprefix("text_model.")}',
            "inner_names = {name}",
        ),
        (
            "peft's alpha beside the file is not read",
            'elif path.name == "adapter_model.safetensors":',
            "elif False:",
        ),
        ("a DoRA is a LoRA", r"\.dora_scale|", ""),
        ("rank-stabilized alpha is plain", "(rank**0.5 if rslora else 1.0)", "1.0"),
    ),
    ("formats/lora", "formats/updates"): (
        ("alpha_pattern matches any end", r'rf"(.*\.)?({key})$"', r'rf"(.*)?({key})$"'),
        ("alpha_pattern matches a beginning", r'({key})$")', r'({key})")'),
        (
            "the last pattern wins",
            "                value = pattern_alpha\n                break\n",
            "                value = pattern_alpha\n",
        ),
    ),
    ("formats/updates", "formats/updates"): (
        (
            "LoHa adds its factors",
            "return w1 * w2, rank",
            "return w1 + w2, rank",
        ),
        (
            "LoHa without alpha over rank",
            "rank is None else alpha / rank\n",
            "rank is None else alpha\n",
        ),
        (
            "LoKr's factors swapped",
            "torch.kron(w1, w2)",
            "torch.kron(w2, w1)",
        ),
        (
            "LoKr's alpha by the first factor",
            '("lokr_w2_b", "lokr_w1_b")',
            '("lokr_w1_b", "lokr_w2_b")',
        ),
        ("whole LoKr scaled by alpha", "if alpha is None or rank is None", "if alpha is None"),
        (
            "Tucker's core transposed",
            '"r s k l, r o, s i -> o i k l"',
            '"s r k l, r o, s i -> o i k l"',
        ),
        ("LoCon's mid transposed", '"r s k l, s i -> r i k l"', '"s r k l, s i -> r i k l"'),
        ("a full update at any scale", "return y + self.scale * change", "return y + change"),
        ("a full update merged at any scale", "return self.scale * self.down", "return self.down"),
        (
            "a full convolution without padding",
            "padding=layer.padding)\n        else",
            "padding=0)\n        else",
        ),
    ),
    ("formats/configs", "formats/fuzz_files"): (
        ("types are not checked", "if type(value) not in accepted:", "if False:"),
        ("heads need not divide", "if channels % heads:", "if False:"),
    ),
    ("formats/text", "formats/fuzz_files"): (
        ("deep JSON is not caught", "except RecursionError:", "except KeyError:"),
        (
            "messages of any length",
            'text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"',
            "text",
        ),
    ),
    ("formats/png", "formats/png"): (
        ("width and height swapped", 'f"{width}x{height}"', 'f"{height}x{width}"'),
    ),
    ("formats/checkpoint", "formats/checkpoint"): (
        (
            "transformers 5's names are unknown",
            'inner.removeprefix("text_model.") if is_short',
            "inner if is_short",
        ),
        ("zero terminal SNR is not read", 'if "ztsnr" in tensors:', "if False:"),
        (
            "a VAE's own configuration is not read",
            'for path in (vae / "config.json", vae / "vae/config.json"):',
            "for path in ():",
        ),
    ),
    ("formats/embeddings", "formats/converting"): (
        (
            "the two encoders' rows swapped",
            "{path: dict(zip(KEYS, rows, strict=True))}",
            "{path: dict(zip(KEYS, rows[::-1], strict=True))}",
        ),
        ("clip_g is read as clip_l", "sorted(file.keys(), reverse=True)", "sorted(file.keys())"),
        ("bundled embeddings swapped", "for part in KEYS]", "for part in KEYS[::-1]]"),
    ),
    ("formats/tensors", "formats/lora_files"): (
        ("NaN is loaded", "if not tensor.isfinite().all():", "if False:"),
    ),
}
