"""Tokenizer, text encoders, VAE, UNet, attention, LoRA, SDXL; fp8, caches, compilation."""

FAULTS = {
    ("tokenizer", "core/tokenizer"): (
        ("a long prompt loses EOS", "ids = ids[:MAX_TOKENS]", "ids = ids[: MAX_TOKENS + 1]"),
        ("both pad with EOS", "padding = [self.pad] * (", "padding = [self.vocab[EOS]] * ("),
        ("both pad with 0", "padding = [self.pad] * (", "padding = [0] * ("),
        ("text is not normalized", 'unicodedata.normalize("NFC", text)', "text"),
        (
            "lower case depends on the context",
            'return "".join(char.lower() for char in text)',
            "return text.lower()",
        ),
        ("numbers form a word", 'if first == "N":', "if False:"),
        ("a mark continues a word of letters", '"L" if first == "L"', '"LM" if first == "L"'),
        ("a contraction is matched anywhere", "|'(?:s|t|re|ve|m|ll|d)\"", '"'),
        (
            "a pair that was just created merges first",
            "while heap and heap[0][0] == best:",
            "if heap:",
        ),
        ("outdated pairs merge", "if rank(left) != best:", "if not symbols[left]:"),
        (
            "the neighbour before does not see a merge",
            "for position in (before[left], left):",
            "for position in (left,):",
        ),
        (
            "every merge looks at all pairs again",
            "for position in (before[left], left):",
            "for position in range(len(symbols)):",
        ),
        ("find ignores what follows", "words[end].joined", "False"),
        ("find ignores the cut", "position + length <= MAX_TOKENS + 1", "True"),
        ("the cut word is lost", "if count > MAX_TOKENS:", "if count > MAX_TOKENS + 2:"),
        (
            "of two placeholders the shorter one matches",
            "sorted(special, key=len, reverse=True)",
            "sorted(special, key=len)",
        ),
    ),
    ("tokenizer", "formats/tokenizer_files"): (
        (
            "merges that were cut short are accepted",
            'vocab["".join(merges[-1])] != 49405',
            "not merges",
        ),
        (
            "the padding is EOS where no file names it",
            "min(special.keys() - {BOS}, key=special.get)",
            "EOS",
        ),
    ),
    ("clip", "core/clip"): (
        ("quick_gelu's constant", "1.702 * x", "1.7 * x"),
        (
            "gelu by tanh",
            '"gelu": F.gelu',
            '"gelu": lambda x: F.gelu(x, approximate="tanh")',
        ),
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
        (
            "LayerNorm eps",
            "self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)",
            "self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=1e-6)",
        ),
        (
            "heads interleaved",
            "x.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
            "x.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)",
        ),
    ),
    ("sdxl", "core/sdxl"): (
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
        (
            "one tokenizer for both",
            "zip(self.tokenizers, self",
            "zip(self.tokenizers[:1] * 2, self",
        ),
        ("no warning of a cut prompt", "if rest:", "if False:"),
        ("NaN in the context passes", "not x.isfinite().all()", "False"),
        ("repr omits the LoRAs", "if loras:", "if False:"),
    ),
    ("vae", "core/vae"): (
        ("NaN in an image passes", "if not x.isfinite().all():", "if False:"),
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
        ("NaN in latents passes", 'check_finite(moments, "encoded")', "pass"),
        ("NaN in an image passes", 'check_finite(images, "decoded")', "pass"),
        ("std is the variance", "torch.exp(0.5 * ", "torch.exp("),
        ("a strip has no row above", "max(start - 1, 0), min(end + 1", "start, min(end + 1"),
        ("a strip has no row below", "min(end + 1, x.shape[-2])", "min(end, x.shape[-2])"),
        (
            "each strip has its own variance",
            "(variances + (means - mean).square())",
            "variances",
        ),
        (
            "the row above is already overwritten",
            "above = h[:, :, end - 1 : end].clone()",
            "above = h[:, :, end - 1 : end]",
        ),
        (
            "upsampled strips are shifted",
            "start - 2 * top : end - 2 * top",
            "start - top : end - top",
        ),
        ("upsampled strips have no row above", "max(start // 2 - 1, 0)", "start // 2"),
        (
            "the whole is decoded at once",
            "not torch.is_grad_enabled() and factor",
            "False and factor",
        ),
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
        ("frequencies end at 1/10000", "* steps / half)", "* steps / (half - 1))"),
        (
            "times and sizes in half",
            "values.float()[:, None]",
            "values.bfloat16().float()[:, None]",
        ),
        (
            "the timestep embedding in half",
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
        ("output GroupNorm eps", "c, eps=config.norm_eps)", "c, eps=1e-6)"),
        (
            "head sizes for head counts",
            "channels, heads = cfg.block_out_channels[level], cfg.attention_head_dim[level]",
            "channels, heads = cfg.block_out_channels[level], "
            "cfg.block_out_channels[level] // cfg.attention_head_dim[level]",
        ),
        ("prediction in the network's dtype", "return x.to(latents.dtype)", "return x"),
        (
            "a timestep waits for the device",
            "torch.full((), t, device=device)",
            "torch.tensor(t).to(device)",
        ),
        ("UNet pads right and bottom only", "Downsample(c, padding=1)", "Downsample(c, padding=0)"),
    ),
    ("attention", "core/attention"): (
        ("transformer GroupNorm eps", "channels, eps=1e-6)", "channels, eps=1e-5)"),
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
        ("recorded without scale", "q[rows].float() * q.shape[-1] ** -0.5", "q[rows].float()"),
        ("the recorder stays", "known[name].callbacks = known[name].callbacks[:-1]", "pass"),
        ("a nested recorder ends the outer one", "known[name].callbacks[:-1]", "()"),
        (
            "layers in the order of their names",
            '("down_blocks", "mid_block", "up_blocks")',
            '("down_blocks", "up_blocks", "mid_block")',
        ),
        (
            "one norm for both attentions",
            "self.attn2(self.norm2(x), kv)",
            "self.attn2(self.norm1(x), kv)",
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
            "product = self.up.flatten(1) @ self.down.flatten(1)",
            "product = self.down.flatten(1).T @ self.up.flatten(1).T",
        ),
        (
            "adapters in the base's dtype",
            "Adapter(down.to(device)",
            "Adapter(down.to(layer.weight)",
        ),
        ("merged in half", "self.weight + update)", "self.weight + update.to(self.weight.dtype))"),
        (
            "un-merged by subtraction",
            "self.weight.copy_(self.base_weight)",
            "self.weight.sub_(sum(a.delta() for a in self.lora.values()))",
        ),
        (
            "merged and beside it",
            "if self.base_weight is not None:\n            return y",
            "if False:\n            return y",
        ),
        (
            "the start by rank, not by inputs",
            "bound = layer.in_features**-0.5",
            "bound = rank**-0.5",
        ),
        (
            "up does not start at zero",
            "torch.zeros(layer.out_features, rank)",
            "torch.ones(layer.out_features, rank)",
        ),
        (
            "to_out is not trained",
            '("to_q", "to_k", "to_v", "to_out.0")',
            '("to_q", "to_k", "to_v")',
        ),
        ("scales are not restored", "adapter.scale = old", "pass"),
        (
            "every adapter gets the scale of one",
            "chosen = adapters(model, name)",
            "chosen = adapters(model)",
        ),
        (
            "a convolution's adapter without its stride",
            "stride=layer.stride, padding",
            "padding",
        ),
        (
            "the last adapter wins",
            "y = adapter.apply_to(y, x, self)",
            "y = adapter.apply_to(super().forward(x), x, self)",
        ),
        ("the copies stay", "            adapter.cast = None", "            pass"),
        (
            "down and up of another adapter",
            "copies[2 * n], copies[2 * n + 1]",
            "copies[0], copies[1]",
        ),
    ),
    ("lora", "extras/kernel_counts"): (
        ("the copies are not used", "down, up = self.cast or (", "down, up = ("),
    ),
    ("extras/optimizations", "extras/optimizations"): (
        ("triton reads e4m3 on any card", "< (8, 9)", "< (0, 0)"),
        (
            "a network that is read again is not stored",
            "sdxl.read = replace(sdxl.read, ready=ready)",
            "pass",
        ),
        (
            "another scale is not noticed",
            "[(adapter.scale, adapter.alpha) for adapter in layer.lora.values()]",
            "[]",
        ),
        ("a changed weight is not noticed", "(id(p), p._version)", "id(p)"),
        ("a changed context is not noticed", "id(context), context._version,", "id(context),"),
        ("gradients end at what is kept", "if torch.is_grad_enabled():", "if False:"),
        ("the cache stays", "            del layer.project_kv\n", "            pass\n"),
        (
            "adapters are cast at every step",
            "cache_prompt_kv(unet), cast_adapters(unet, unet.conv_in.weight.dtype)",
            "cache_prompt_kv(unet)",
        ),
    ),
    ("extras/fp8", "extras/optimizations"): (
        (
            "one scale for all rows",
            "weight.abs().amax(1, keepdim=True)",
            "weight.abs().amax().expand(len(weight), 1)",
        ),
        (
            "scales that round",
            "torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)",
            "weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / E4M3_MAX",
        ),
        (
            "the unpacked weight is kept for the backward pass",
            "ctx.save_for_backward(packed, scale)",
            "ctx.save_for_backward(unpack(packed, scale, x.dtype), torch.ones_like(scale))",
        ),
        (
            "the gradient goes without the scale",
            "grad @ unpack(*ctx.saved_tensors, grad.dtype)",
            "grad @ ctx.saved_tensors[0].to(grad.dtype)",
        ),
        ("the bias is scaled too", "None if bias is None else bias / scale", "bias"),
        ("trained weights are stored", " or layer.weight.requires_grad", ""),
        ("merged weights are stored", "if layer.base_weight is not None:", "if False:"),
        (
            "a LoRA is merged into 8 bits",
            '        raise ValueError(\n            "a base',
            '        str(\n            "a base',
        ),
    ),
    ("extras/compile", "extras/compile"): (
        ("a recorded block runs compiled", "any(layer.callbacks for layer in attention)", "False"),
        (
            "resnets are not compiled",
            "for kind in (TransformerBlock, ResnetBlock)",
            "for kind in (TransformerBlock,)",
        ),
        ("the first step is all compiling", "{seconds[0] - usual:.0f}", "{seconds[0]:.0f}"),
    ),
}
