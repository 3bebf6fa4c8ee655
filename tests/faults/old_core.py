"""The faults that mutations.py puts into the code, one at a time.

(file in alchemy/, the test files to run): (what it is, the exact old text, the new text), ...
"""

FAULTS = {
    ("clip", "core/clip"): (
        ("quick_gelu's constant", "1.702 * x", "1.7 * x"),
        ("gelu by tanh", '"gelu": F.gelu', '"gelu": lambda x: F.gelu(x, approximate="tanh")'),
        (
            "the last hidden state, first encoder",
            "return x, None",
            "return model.encoder.layers[-1](x), None",
        ),
        (
            "the last hidden state, second encoder",
            "return x, self.text_projection",
            "return model.encoder.layers[-1](x), self.text_projection",
        ),
        (
            "LayerNorm on the context",
            "return x, self.text_projection",
            "return model.final_layer_norm(x), self.text_projection",
        ),
        ("pooled before the projection", "self.text_projection(last[", "(last["),
        (
            "no LayerNorm before pooling",
            "model.final_layer_norm(model.encoder.layers[-1](x))",
            "model.encoder.layers[-1](x)",
        ),
        (
            "pooled at the last EOS",
            "(ids == EOS).int().argmax(dim=1)",
            "76 - (ids == EOS).int().flip(1).argmax(dim=1)",
        ),
        ("pooled at the highest id", "(ids == EOS).int().argmax(dim=1)", "ids.argmax(dim=1)"),
        ("no causal mask", "is_causal=self.causal", "is_causal=False"),
        ("LayerNorm eps", "eps=cfg.layer_norm_eps) for _", "eps=1e-6) for _"),
        (
            "heads interleaved",
            "(p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)",
            "(p(x).unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)",
        ),
    ),
    ("sdxl", "core/clip"): (
        (
            "time ids: sizes swapped",
            "[*(original or size), *crop, *size]",
            "[*size, *crop, *(original or size)]",
        ),
        ("time ids: width first", "*crop, *size]", "*crop, *size[::-1]]"),
        ("time ids: left before top", "*crop, *size]", "*crop[::-1], *size]"),
        ("time ids in half", "*size]], dtype=torch.float32)", "*size]], dtype=torch.bfloat16)"),
        ("None is encoded", "prompt is not None or", "True or"),
        ("the empty prompt is zeros", "prompt is not None or", "bool(prompt) or"),
        ("None leaves the pooled vector", "pooled * keep[:, None]", "pooled"),
        (
            "the second encoder first",
            "torch.cat([first, second], dim=-1)",
            "torch.cat([second, first], dim=-1)",
        ),
    ),
    ("vae", "core/vae"): (
        ("GroupNorm eps of the UNet", "EPS = 1e-6", "EPS = 1e-5"),
        (
            "the encoder pads all sides",
            "Downsample(c_out, padding=0)",
            "Downsample(c_out, padding=1)",
        ),
        (
            "latents are not scaled",
            "return mean * self.config.scaling_factor, std",
            "return mean, std",
        ),
        (
            "scaled twice",
            "return mean * self.config.scaling_factor,",
            "return mean * self.config.scaling_factor ** 2,",
        ),
        ("decode does not unscale", "(latents / self.config.scaling_factor)", "latents"),
        (
            "SD 1.5's scaling factor",
            "scaling_factor: float = 0.13025",
            "scaling_factor: float = 0.18215",
        ),
        ("log variance unclamped below", ".clamp(-30, 20)", ".clamp(-60, 20)"),
        ("log variance unclamped above", ".clamp(-30, 20)", ".clamp(-30, 30)"),
        ("std is the variance", "torch.exp(0.5 * ", "torch.exp("),
    ),
    ("blocks", "core/vae"): (
        ("the encoder pads left and top", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
        (
            "the encoder pads by repeating",
            "F.pad(x, (0, 1, 0, 1))",
            'F.pad(x, (0, 1, 0, 1), mode="replicate")',
        ),
        ("upsampling smooths", 'mode="nearest"', 'mode="bilinear"'),
    ),
    ("blocks", "core/unet"): (
        ("the timestep without SiLU", "self.time_emb_proj(F.silu(emb))", "self.time_emb_proj(emb)"),
        ("upsampling only doubles", "size = size or (", "size = ("),
    ),
    ("unet", "core/unet"): (
        (
            "sines first",
            "torch.cat([angle.cos(), angle.sin()]",
            "torch.cat([angle.sin(), angle.cos()]",
        ),
        (
            "frequencies end at 1/10000",
            "device=values.device) / half)",
            "device=values.device) / (half - 1))",
        ),
        (
            "times and sizes in half",
            "values.float()[:, None]",
            "values.bfloat16().float()[:, None]",
        ),
        (
            "the timestep_embedding in half",
            "torch.cat([angle.cos(), angle.sin()], dim=-1)",
            "torch.cat([angle.cos(), angle.sin()], dim=-1).bfloat16().float()",
        ),
        (
            "sizes before pooled",
            "torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=-1)",
            "torch.cat([sizes.to(dtype), pooled.to(dtype)], dim=-1)",
        ),
        (
            "skip before input",
            "torch.cat([x, skips.pop()], dim=1)",
            "torch.cat([skips.pop(), x], dim=1)",
        ),
        (
            "resnet GroupNorm eps",
            "cfg.norm_num_groups, cfg.norm_eps, 4",
            "cfg.norm_num_groups, 1e-6, 4",
        ),
        ("output GroupNorm eps", "c, eps=cfg.norm_eps)", "c, eps=1e-6)"),
        (
            "head sizes for head counts",
            "cfg.attention_head_dim[level], cfg",
            "cfg.block_out_channels[level] // cfg.attention_head_dim[level], cfg",
        ),
        (
            "prediction in the network's dtype",
            "conv_norm_out(x))).to(latents.dtype)",
            "conv_norm_out(x)))",
        ),
        ("UNet pads right and bottom only", "Downsample(c, padding=1)", "Downsample(c, padding=0)"),
    ),
    ("attention", "core/attention"): (
        ("transformer GroupNorm eps", "eps=1e-6)", "eps=1e-5)"),
        ("the gate is the first half", "h, gate = self.proj", "gate, h = self.proj"),
        ("the gate's gelu by tanh", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")'),
        (
            "no scale",
            "F.scaled_dot_product_attention(q, k, v)",
            "F.scaled_dot_product_attention(q, k, v, scale=1.0)",
        ),
        (
            "scaled by the width, not the head's",
            "attention(q, k, v)",
            "attention(q, k, v, scale=self.to_q.out_features ** -0.5)",
        ),
        ("watched without scale", "q.float() * q.shape[-1] ** -0.5", "q.float()"),
        ("the watch stays", "known[name].watch = known[name].watch[:-1]", "pass"),
        ("a watch within ends the one around it", "known[name].watch[:-1]", "()"),
        (
            "layers in the order of their names",
            '"mid_block": 1, "up_blocks": 2',
            '"mid_block": 2, "up_blocks": 1',
        ),
        (
            "one norm for both attentions",
            "self.attn2(self.norm2(x), told)",
            "self.attn2(self.norm1(x), told)",
        ),
    ),
    ("lora", "core/lora formats/lora_files"): (
        (
            "alpha without rank",
            "self.scale * self.alpha / len(self.down)",
            "self.scale * self.alpha",
        ),
        ("alpha by the wrong side", "/ len(self.down)", "/ self.down.shape[1]"),
        (
            "merged transposed",
            "(self.up.flatten(1) @ self.down.flatten(1))",
            "(self.down.flatten(1).T @ self.up.flatten(1).T)",
        ),
        (
            "adapters in the base's dtype",
            "Adapter(down.to(layer.weight.device)",
            "Adapter(down.to(layer.weight)",
        ),
        ("merged in half", "self.weight + change)", "self.weight + change.to(self.weight.dtype))"),
        (
            "un-merged by subtraction",
            "self.weight.copy_(self.base_weight)",
            "self.weight.sub_(sum(a.delta() for a in self.lora.values()))",
        ),
        ("merged and beside it", "if self.base_weight is None:", "if True:"),
        ("the start by rank, not by inputs", "/ layer.in_features ** 0.5", "/ rank ** 0.5"),
        (
            "up does not start at zero",
            "torch.zeros(layer.out_features, rank)",
            "torch.ones(layer.out_features, rank)",
        ),
        (
            "to_out is not taught",
            '("to_q", "to_k", "to_v", "to_out.0")',
            '("to_q", "to_k", "to_v")',
        ),
        ("scales do not come back", "a.scale = old", "pass"),
        (
            "a convolution's adapter goes without its stride",
            "stride=layer.stride, padding",
            "padding",
        ),
        (
            "the last adapter wins",
            "y = adapter.add_to(y, x, self)",
            "y = adapter.add_to(super().forward(x), x, self)",
        ),
    ),
    ("tokenizer", "core/tokenizer"): (
        (
            "a long prompt loses EOS",
            "*ids, self.vocab[EOS]] + [self.pad]",
            "*ids, self.vocab[EOS] if len(ids) < ROOM else ids[-1]] + [self.pad]",
        ),
        ("both pad with EOS", "+ [self.pad] * (ROOM", "+ [self.vocab[EOS]] * (ROOM"),
        ("both pad with 0", "+ [self.pad] * (ROOM", "+ [0] * (ROOM"),
        ("not normalised", 'unicodedata.normalize("NFC", text)', "text"),
        (
            "lower case by neighbours",
            '"".join(char.lower() for char in WHITE.sub(" ", unicodedata.normalize("NFC", text)))',
            'WHITE.sub(" ", unicodedata.normalize("NFC", text)).lower()',
        ),
        ("digits together", "|L+|N|", "|L+|N+|"),
    ),
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
    ("unet", "cli/waiting"): (
        (
            "a timestep waits for the device",
            "torch.full((), t, device=latents.device)",
            "torch.tensor(t).to(latents.device)",
        ),
    ),
    ("sdxl", "core/finite"): (
        ("a prompt of NaN is drawn", "if not x.requires_grad and not", "if False and not"),
    ),
    ("vae", "core/finite"): (
        ("a photo of NaN is taught", "if not moments.isfinite().all():", "if False:"),
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
