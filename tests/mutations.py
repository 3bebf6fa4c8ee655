"""Do the tests notice? One-line faults are put into a copy of the package, one at a time; each must turn a test red.

    python tests/mutations.py [-k WORD]        # all of them: about 3 minutes on one core, half of it on two

A fault is (what it is, the exact old text, the new text); its group names the file in alchemy/ and the test files to run. The exit
status is 1 if a fault is survived, or if an old text is not found exactly once (the code has changed: change the fault with it).
Needs fork (Linux, macOS): torch is imported once, not for each fault.
"""
import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FAULTS = {
    ("schedule", "schedule"): (
        ("beta grows evenly, not its root", "power = 2 if", "power = 1 if"),
        ("zero SNR shifts without scaling", "(root - root[-1]) * root[0] / (root[0] - root[-1])", "root - root[-1]"),
        ("alpha_bar is interpolated, not sigma", "return 1 / (1 + sigma ** 2)",
         "return float(self.alpha_bar[low] + (t - low) * (self.alpha_bar[low + 1] - self.alpha_bar[low]))"),
        ("a fractional t is floored", "sigma_low + (t - low) * (sigma_high - sigma_low)", "sigma_low"),
        ("no offset by default", 'get("steps_offset", 1)', 'get("steps_offset", 0)'),
        ("trailing is floored", "round(T - i * (T / steps)) - 1", "int(T - i * (T / steps)) - 1"),
        ("t_prev by subtraction", "zip(ts, ts[1:] + [None])", "zip(ts, [t - T // steps for t in ts[:-1]] + [None])"),
        ("linspace is floored", "[int(t) for t in ts.round()]", "[int(t) for t in ts]"),
        ("Euler's linspace in float64", "np.float32 if fractional else None", "None"),
        ("strength truncates 28.999", "int(steps * strength + 1e-6)", "int(steps * strength)"),
        ("strength keeps the noisy end", "[steps - kept:]", "[:kept]"),
        ("x_0 is not divided by the root of alpha_bar", "(x_t - s * prediction) / a, prediction", "x_t - s * prediction, prediction"),
        ("v has the other sign", "return a * x_t - s * prediction, a * prediction +", "return a * x_t + s * prediction, -a * prediction +"),
        ("the target of v has the other sign", "return a * eps - s * x_0", "return s * x_0 - a * eps"),
        ("SNR upside down", "return ab / (1 - ab)", "return (1 - ab) / ab"),
    ),
    ("samplers", "samplers"): (
        ("Euler's start is not scaled", 'if self.scaled_start and spacing != "leading" else z', "if False else z"),
        ("the leading grid's start is scaled", 'self.scaled_start and spacing != "leading"', "self.scaled_start"),
        ("DDIM ends at alpha_bar 1", "eta=0.0, last=None", "eta=0.0"),
        ("DDPM draws no noise", '"ddpm":            Sampler(eta=1.0)', '"ddpm":            Sampler(eta=0.0)'),
        ("the larger of DDPM's variances", "eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5 * ", "eta * "),
        ("the direction ignores sigma", "max(1 - alpha_bar_prev - sigma ** 2, 0.0)", "(1 - alpha_bar_prev)"),
        ("a root of less than 0", "max(1 - alpha_bar_prev - sigma ** 2, 0.0)", "(1 - alpha_bar_prev - sigma ** 2)"),
    ),
    ("loop", "loop"): (
        ("alpha_bar of the wrong end", "schedule.at(t)\n", "schedule.at(t_prev or 0)\n"),
        ("DDIM's last alpha_bar is 1", "row.last or float(schedule.alpha_bar[0])", "1.0"),
        ("the mask blends at the level before", "step.alpha_bar_prev if step.t_prev", "step.alpha_bar if step.t_prev"),
        ("the mask's end is not clean", "step.alpha_bar_prev if step.t_prev is not None else 1.0", "step.alpha_bar_prev"),
        ("the mask is inverted", "mask * step.x_prev + (1 - mask) * (", "(1 - mask) * step.x_prev + mask * ("),
        ("guidance leads the other way", "uncond + guidance * (cond - uncond)", "uncond + guidance * (uncond - cond)"),
        ("guidance counts from the conditional", "uncond + guidance * (cond - uncond)", "cond + guidance * (cond - uncond)"),
        ("the halves of the batch are swapped", ".cat([unconditional, conditioning])", ".cat([conditioning, unconditional])"),
        ("Img2Img adds noise without scaling", "ab ** 0.5 * image + (1 - ab) ** 0.5 * noise", "image + (1 - ab) ** 0.5 * noise"),
        ("a picture shines through at strength 1", "if image is None or strength == 1:", "if image is None:"),
        ("strength cuts steps without a picture", "strength if image is not None else 1.0", "strength"),
        ("noise depends on the batch", "[torch.randn(shape[1:], generator=g) for g in made]", "list(torch.randn(shape, generator=made[0]))"),
        ("later noise depends on the batch", "generator=g) for g in generators]", "generator=generators[0]) for g in generators]"),
        ("seed 0 is no seed", "manual_seed(seed)", "manual_seed(seed or 1)"),
        ("a thin mask is lost", "F.max_pool2d(mask[None, None], factor)", "mask[None, None, ::factor, ::factor]"),
        ("the hook's answer is dropped", "step.x_prev if changed is None else changed", "step.x_prev"),
    ),
    ("text", "text"): (
        ("quick_gelu's constant", "1.702 * x", "1.7 * x"),
        ("gelu by tanh", '"gelu": F.gelu', '"gelu": lambda x: F.gelu(x, approximate="tanh")'),
        ("the last hidden state, first encoder", "return x, None", "return model.encoder.layers[-1](x), None"),
        ("the last hidden state, second encoder", "return x, self.text_projection", "return model.encoder.layers[-1](x), self.text_projection"),
        ("LayerNorm on the context", "return x, self.text_projection", "return model.final_layer_norm(x), self.text_projection"),
        ("pooled before the projection", "self.text_projection(last[", "(last["),
        ("no LayerNorm before pooling", "model.final_layer_norm(model.encoder.layers[-1](x))", "model.encoder.layers[-1](x)"),
        ("pooled at the last EOS", "(ids == EOS).int().argmax(dim=1)", "76 - (ids == EOS).int().flip(1).argmax(dim=1)"),
        ("pooled at the highest id", "(ids == EOS).int().argmax(dim=1)", "ids.argmax(dim=1)"),
        ("no causal mask", "is_causal=True", "is_causal=False"),
        ("LayerNorm eps", "eps=cfg.layer_norm_eps) for _", "eps=1e-6) for _"),
        ("heads interleaved", "(p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)", "(p(x).unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)"),
    ),
    ("sdxl", "text"): (
        ("time ids: sizes swapped", "[*(original or size), *crop, *size]", "[*size, *crop, *(original or size)]"),
        ("time ids: width first", "*crop, *size]", "*crop, *size[::-1]]"),
        ("time ids: left before top", "*crop, *size]", "*crop[::-1], *size]"),
        ("time ids in half", "device=self.device, dtype=torch.float32)", "device=self.device, dtype=torch.bfloat16)"),
        ("None is encoded", "prompt is not None or", "True or"),
        ("the empty prompt is zeros", "prompt is not None or", "bool(prompt) or"),
        ("None leaves the pooled vector", "pooled * keep[:, None]", "pooled"),
        ("the second encoder first", "torch.cat([first, second], dim=-1)", "torch.cat([second, first], dim=-1)"),
    ),
    ("vae", "vae"): (
        ("GroupNorm eps of the UNet", "EPS = 1e-6", "EPS = 1e-5"),
        ("the encoder pads all sides", "Downsample(c_out, padding=0)", "Downsample(c_out, padding=1)"),
        ("latents are not scaled", "return mean * self.config.scaling_factor, std", "return mean, std"),
        ("scaled twice", "return mean * self.config.scaling_factor,", "return mean * self.config.scaling_factor ** 2,"),
        ("decode does not unscale", "(latents / self.config.scaling_factor)", "latents"),
        ("SD 1.5's scaling factor", "scaling_factor: float = 0.13025", "scaling_factor: float = 0.18215"),
        ("log variance unclamped below", ".clamp(-30, 20)", ".clamp(-60, 20)"),
        ("log variance unclamped above", ".clamp(-30, 20)", ".clamp(-30, 30)"),
        ("std is the variance", "torch.exp(0.5 * ", "torch.exp("),
    ),
    ("blocks", "vae"): (
        ("the encoder pads left and top", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
        ("the encoder pads by repeating", "F.pad(x, (0, 1, 0, 1))", 'F.pad(x, (0, 1, 0, 1), mode="replicate")'),
        ("upsampling smooths", 'mode="nearest"', 'mode="bilinear"'),
    ),
    ("blocks", "unet"): (
        ("the timestep without SiLU", "self.time_emb_proj(F.silu(emb))", "self.time_emb_proj(emb)"),
        ("upsampling only doubles", "size = size or (", "size = ("),
    ),
    ("unet", "unet"): (
        ("sines first", "torch.cat([angle.cos(), angle.sin()]", "torch.cat([angle.sin(), angle.cos()]"),
        ("frequencies end at 1/10000", "device=values.device) / half)", "device=values.device) / (half - 1))"),
        ("times and sizes in half", "values.float()[:, None]", "values.bfloat16().float()[:, None]"),
        ("the sinusoid in half", "torch.cat([angle.cos(), angle.sin()], dim=-1)", "torch.cat([angle.cos(), angle.sin()], dim=-1).bfloat16().float()"),
        ("sizes before pooled", "torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=-1)", "torch.cat([sizes.to(dtype), pooled.to(dtype)], dim=-1)"),
        ("skip before input", "torch.cat([x, skips.pop()], dim=1)", "torch.cat([skips.pop(), x], dim=1)"),
        ("resnet GroupNorm eps", "cfg.norm_num_groups, cfg.norm_eps, 4", "cfg.norm_num_groups, 1e-6, 4"),
        ("output GroupNorm eps", "c, eps=cfg.norm_eps)", "c, eps=1e-6)"),
        ("head sizes for head counts", "cfg.attention_head_dim[level], cfg", "cfg.block_out_channels[level] // cfg.attention_head_dim[level], cfg"),
        ("prediction in the network's dtype", "conv_norm_out(x))).to(latents.dtype)", "conv_norm_out(x)))"),
        ("UNet pads right and bottom only", "Downsample(c, padding=1)", "Downsample(c, padding=0)"),
    ),
    ("attention", "attention"): (
        ("transformer GroupNorm eps", "eps=1e-6)", "eps=1e-5)"),
        ("the gate is the first half", "h, gate = self.proj", "gate, h = self.proj"),
        ("the gate's gelu by tanh", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")'),
        ("no scale", "F.scaled_dot_product_attention(q, k, v)", "F.scaled_dot_product_attention(q, k, v, scale=1.0)"),
        ("scaled by the width, not the head's", "attention(q, k, v)", "attention(q, k, v, scale=self.to_q.out_features ** -0.5)"),
        ("watched without scale", "q.float() * q.shape[-1] ** -0.5", "q.float()"),
        ("the watch stays", "known[name].watch = None", "pass"),
        ("layers in the order of their names", '"mid_block": 1, "up_blocks": 2', '"mid_block": 2, "up_blocks": 1'),
        ("one norm for both attentions", "self.attn2(self.norm2(x), context)", "self.attn2(self.norm1(x), context)"),
    ),
    ("lora", "lora"): (
        ("alpha without rank", "self.scale * self.alpha / len(self.down)", "self.scale * self.alpha"),
        ("alpha by the wrong side", "/ len(self.down)", "/ self.down.shape[1]"),
        ("merged transposed", "self.factor * (self.up @ self.down)", "self.factor * (self.down.T @ self.up.T).view(len(self.up), -1)"),
        ("adapters in the base's dtype", "Adapter(down.to(layer.weight.device)", "Adapter(down.to(layer.weight)"),
        ("merged in half", "self.weight + change)", "self.weight + change.to(self.weight.dtype))"),
        ("un-merged by subtraction", "self.weight.copy_(self.original)", "self.weight.sub_(sum(a.delta() for a in self.lora.values()))"),
        ("merged and beside it", "if self.original is None:", "if True:"),
        ("the start by rank, not by inputs", "/ layer.in_features ** 0.5", "/ rank ** 0.5"),
        ("up does not start at zero", "torch.zeros(layer.out_features, rank)", "torch.ones(layer.out_features, rank)"),
        ("to_out is not taught", '("to_q", "to_k", "to_v", "to_out.0")', '("to_q", "to_k", "to_v")'),
        ("scales do not come back", "a.scale = old", "pass"),
        ("the last adapter wins", "y = adapter.add_to(y, x)", "y = adapter.add_to(super().forward(x), x)"),
    ),
    ("formats/layout", "manifest"): (
        ("thirds of in_proj", '"qkv".index', '"kqv".index'),
        ("text_projection as stored", "tensor.T.contiguous()", "tensor"),
        ("the VAE's levels from the coarsest", "levels - 1 - int(m[1])", "int(m[1])"),
        ("upsampler at index 1", "+ layers}.2", "+ layers}.1"),
        ("middle resnets", "2 * int(m[2])", "int(m[2])"),
    ),
    ("tokenizer", "tokenizer"): (
        ("a long prompt loses EOS", "*ids, self.vocab[EOS]] + [self.pad]", "*ids, self.vocab[EOS] if len(ids) < ROOM else ids[-1]] + [self.pad]"),
        ("both pad with EOS", "+ [self.pad] * (ROOM", "+ [self.vocab[EOS]] * (ROOM"),
        ("both pad with 0", "+ [self.pad] * (ROOM", "+ [0] * (ROOM"),
        ("not normalised", 'unicodedata.normalize("NFC", text)', "text"),
        ("lower case by neighbours", '"".join(char.lower() for char in WHITE.sub(" ", unicodedata.normalize("NFC", text)))',
         'WHITE.sub(" ", unicodedata.normalize("NFC", text)).lower()'),
        ("digits together", "|L+|N|", "|L+|N+|"),
    ),
}


def copy(to):
    """What the tests need: the package and the tests as copies, the large files as links."""
    (to / "repo").mkdir()
    shutil.copytree(ROOT / "alchemy", to / "repo" / "alchemy", ignore=shutil.ignore_patterns("__pycache__"))
    (to / "repo" / "tests").mkdir()
    for file in (ROOT / "tests").glob("*.py"):
        shutil.copy(file, to / "repo" / "tests")
    (to / "repo" / "tests" / "reference").symlink_to(ROOT / "tests" / "reference")
    (to / "repo" / "weights").symlink_to(ROOT / "weights")
    if (ROOT.parent / "shared").exists():
        (to / "shared").symlink_to(ROOT.parent / "shared")
    return to / "repo"


def test(repo, tests):
    """Run test files of a copy, in a process of its own: pytest's exit status, and what it said."""
    import pytest

    os.chdir(repo)
    sys.path.insert(0, str(repo))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    assert Path(sys.modules["alchemy"].__file__).is_relative_to(repo)
    return int(status), out.getvalue()


def attempt(answer, folder, fault):
    """Make the copy in folder, put the fault in, run its tests, and answer (what came of it, the test that noticed)."""
    module, names, _, old, new = fault
    repo, tests = copy(Path(folder).resolve()), [f"tests/test_{name}.py" for name in names]
    if not module:  # the tests must be green to begin with: otherwise a fault would prove nothing
        status, out = test(repo, [*tests, "-k", "not trajectory"])
        return answer.send(("green" if status == 0 else "RED", out))
    file = repo / "alchemy" / f"{module}.py"
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        return answer.send((f"old text found {text.count(old)} times", ""))
    file.write_text(text.replace(old, new), encoding="utf-8")
    status, out = test(repo, tests)
    red = next((line.split("::")[-1].split(" - ")[0] for line in out.splitlines() if line.startswith("FAILED")), "")
    answer.send(("caught" if red else "NOT CAUGHT" if status == 0 else f"pytest ended with {status}", red))


def results(faults, at_once=2):
    """Yield (fault, what came of it, the test) in order, a forked process for each, two at a time."""
    fork, running = multiprocessing.get_context("fork"), []
    for fault in [*faults, *[None] * at_once]:
        if len(running) == at_once or fault is None and running:
            earlier, process, folder, answer = running.pop(0)
            yield earlier, *(answer.recv() if answer.poll(120) else ("caught", "no end within two minutes"))
            process.kill(), process.join(), folder.cleanup()
        if fault:
            (answer, end), folder = fork.Pipe(duplex=False), tempfile.TemporaryDirectory()
            process = fork.Process(target=attempt, args=(end, folder.name, fault))
            process.start(), end.close()
            running.append((fault, process, folder, answer))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORD", default="", help="only the faults whose file or description has this in it")
    args = parser.parse_args(argv)
    faults = [(module, names.split(), *fault) for (module, names), group in FAULTS.items() for fault in group
              if args.k in f"{module}: {fault[0]}"]
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode, start, caught = True, time.time(), 0
    unchanged = (None, sorted({name for fault in faults for name in fault[1]}), "", "", "")
    for (module, _, name, *_), result, said in results([unchanged, *faults]):
        if result == "RED":
            sys.exit(f"{said}\nthe tests fail before any fault is made")
        if module:
            caught += result == "caught"
            print(f"{result:<12} {module}: {name}" + (f"   ({said})" if said else ""), flush=True)
    print(f"{caught} of {len(faults)} faults are caught, in {time.time() - start:.0f} s")
    return caught < len(faults)


if __name__ == "__main__":
    sys.exit(main())
