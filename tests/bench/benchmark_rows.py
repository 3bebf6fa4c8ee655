"""The rows of `python tests/benchmark.py --cuda` (benchmark_cuda.py): what is asked of an H200, with what is required and the floor that its speed sets."""

import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmark import PROMPT, ROOT, medians, process

SUBJECT = ROOT / "weights" / "subjects" / "dog-poodle"
GUIDANCE, RANK = 5.0, 16


@dataclass
class Bench:
    weights: Path
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    size: int = 1024
    steps: int = 30
    taught: int = 500  # steps of a subject
    rounds: int = 5  # of a picture; of a single call 4 times as many

    def sync(self, function):
        """function, waited for."""

        def call():
            result = function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    def turns(self, ours, theirs, rounds=None):
        """Median seconds of each, in turns, on a card that is warm."""
        x, end = (
            torch.ones(2048, 2048, device=self.device),
            time.perf_counter() + (2 if self.device == "cuda" else 0),
        )
        while time.perf_counter() < end:
            self.sync(lambda: x @ x)()
        return medians(self.sync(ours), self.sync(theirs), rounds or self.rounds)

    def alone(self, ours, rounds=None):
        return self.turns(ours, lambda: None, rounds)[0]

    def peak(self, function):
        """The most GB that tensors took while function ran, with nothing in memory before it; on a CPU, counted as memory.py does."""
        if self.device != "cuda":
            from alchemy.extras.counting import Count

            with Count() as count:
                function()
            return count.peak / 1e9
        gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def load(self):
        import alchemy

        return alchemy.load(self.weights, self.device, self.dtype)

    @cached_property
    def pipe(self):
        from diffusers import StableDiffusionXLPipeline

        pipe = StableDiffusionXLPipeline.from_pretrained(
            self.weights, variant="fp16", dtype=self.dtype, add_watermarker=False
        ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        (
            pipe.unet.to(memory_format=torch.channels_last),
            pipe.vae.to(memory_format=torch.channels_last),
        )
        return pipe

    def latents(self, scale=1):
        side = (
            scale
            * self.size
            // (
                2
                ** (
                    len(
                        json.loads((self.weights / "vae/config.json").read_text())[
                            "block_out_channels"
                        ]
                    )
                    - 1
                )
            )
        )
        return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )

    def flags(self, *more):
        return [
            "--weights",
            str(self.weights),
            "--device",
            self.device,
            "--dtype",
            str(self.dtype).removeprefix("torch."),
            "--size",
            str(self.size),
            *more,
        ]

    def teaching(self, out, steps, *more):
        """train.py's flags: one photo a step, no prior, no previews, as the figures that it is held against."""
        return [
            str(SUBJECT),
            "--class-word",
            "dog",
            "--out",
            str(out),
            "--steps",
            str(steps),
            "--batch",
            "1",
            "--prior-weight",
            "0",
            "--preview-every",
            "0",
            "--overwrite",
            *self.flags(*more),
        ]


def row(what, ours, unit, most=None, theirs=None, floor=None):
    return {
        "what": what,
        "ours": ours,
        "unit": unit,
        "at most": most,
        "theirs": theirs,
        "floor": floor,
    }


def drawing(b, sdxl):
    import alchemy
    from alchemy.extras.optimizations import cached_steps

    return lambda: alchemy.text_to_image(
        sdxl,
        PROMPT,
        size=(b.size, b.size),
        steps=b.steps,
        guidance=GUIDANCE,
        progress=partial(cached_steps, sdxl.unet),
    )


def sample(b):
    pipe, generator = b.pipe, torch.Generator()
    theirs = lambda: pipe(
        PROMPT,
        num_inference_steps=b.steps,
        guidance_scale=GUIDANCE,
        height=b.size,
        width=b.size,  # noqa: E731
        generator=generator.manual_seed(0),
    )
    ours, other = b.turns(drawing(b, b.load()), theirs)
    yield row("30 guided steps, prompt to pixels, eager", ours, "s", 2.0, other, 0.53)


def compile_(b):
    from alchemy.extras import optimizations

    sdxl = b.load()
    optimizations.prepare(sdxl, compile=True)
    draw = b.sync(drawing(b, sdxl))
    start = time.perf_counter()
    draw()
    first = time.perf_counter() - start
    ours = b.alone(draw)
    yield row("the same with --compile", ours, "s", 1.5, None, 0.53)
    yield row("of which compiling took, once", first - ours, "s")


@torch.no_grad()
def vae(b):
    sdxl, other, latents = b.load(), b.pipe.vae, b.latents()
    sdxl.loaded["vae"], other = sdxl.read("vae", torch.bfloat16), other.to(torch.bfloat16)
    scaled = (latents / other.config.scaling_factor).to(torch.bfloat16)
    ours, theirs = b.turns(
        lambda: sdxl.vae.decode(latents), lambda: other.decode(scaled).sample, 4 * b.rounds
    )
    yield row("VAE decode, bfloat16", 1e3 * ours, "ms", 40, 1e3 * theirs, 13)
    exact, half = sdxl.read("vae", torch.float32).decode(latents), sdxl.vae.decode(latents)
    yield row(
        "its error against float32, norm ratio", float((half - exact).norm() / exact.norm()), ""
    )
    other.to(b.dtype)


@torch.no_grad()
def vae_2048(b):
    def decode():
        b.load().vae.decode(b.latents(2))

    yield row("VAE decode of twice the side, peak", b.peak(decode), "GB", 4.5)


def learning(b, checkpointing=False, compile=False):
    """A LoRA step of ours: the loop of train.py itself, one step at each call."""
    import alchemy
    from alchemy.extras import optimizations
    from alchemy.dataset import Batch
    from alchemy.training import denoising_loss, start, train

    sdxl, x = b.load(), b.latents()
    alchemy.add_lora(sdxl, RANK)
    optimizations.prepare(sdxl, compile=compile)
    sdxl.unet.checkpointing = checkpointing
    with torch.no_grad():
        prompts = {PROMPT: sdxl.encode_prompt([PROMPT], (b.size, b.size))}
    sdxl.free("text_encoders")
    batch = Batch(
        x,
        x.flip(-1),
        torch.ones_like(x[:, :1]),
        torch.tensor([500]),
        prompts[PROMPT].time_ids,
        [PROMPT],
    )
    state = start(
        {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}, 1e-4, b.dtype
    )
    running = train(
        sdxl, state, lambda step, part: denoising_loss(sdxl, batch, prompts, 0).mean(), steps=10**6
    )
    return lambda: next(running)


def theirs_learning(b, checkpointing=False):
    """The same with peft: adapters float32, autocast, clipping, the same optimizer."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(
        b.weights / "unet", variant="fp16", dtype=b.dtype
    ).to(b.device, memory_format=torch.channels_last)
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    learned = [p for p in unet.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer, x = (
        torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.01, fused=b.device == "cuda"),
        b.latents(),
    )
    cfg, t = unet.config, torch.tensor([500], device=b.device)
    context = torch.randn(1, 77, cfg.cross_attention_dim).to(b.device, b.dtype)
    told = {
        "text_embeds": torch.randn(
            1, cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        ).to(b.device, b.dtype),
        "time_ids": torch.full((1, 6), float(b.size), device=b.device),
    }

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(b.device, b.dtype, enabled=b.dtype != torch.float32):
            loss = F.mse_loss(
                unet(
                    x.to(b.dtype), t, encoder_hidden_states=context, added_cond_kwargs=told
                ).sample.float(),
                x,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return step


def step(b):
    ours, theirs = b.turns(learning(b), theirs_learning(b), 4 * b.rounds)
    yield row("LoRA step, rank 16, batch 1, eager", 1e3 * ours, "ms", 75, 1e3 * theirs, 18.6)


def checkpointing(b):
    ours, theirs = b.turns(learning(b, True), theirs_learning(b, True), 4 * b.rounds)
    yield row("the same with checkpointing", 1e3 * ours, "ms", 105, 1e3 * theirs, 27.2)


def step_compiled(b):
    yield row(
        "the same compiled, no checkpointing",
        1e3 * b.alone(learning(b, compile=True), 4 * b.rounds),
        "ms",
        60,
        None,
        18.6,
    )


def subject(b):
    with tempfile.TemporaryDirectory() as out:
        seconds, _ = process([sys.executable, "train.py", *b.teaching(out, b.taught)], 1)
    yield row(f"a subject in {b.taught} steps, the whole process", seconds, "s", 60)


def memory(b):
    """train.py and sample.py themselves, in this process."""
    sys.path.insert(0, str(ROOT))
    import sample as drawn
    import train as taught

    for name, fp8, of_training, of_drawing in (
        ("bfloat16", [], 7.0, 7.5),
        ("base in fp8", ["--fp8-base"], 4.5, 5.0),
    ):
        with tempfile.TemporaryDirectory() as out:
            teach = b.peak(
                lambda: taught.main(b.teaching(Path(out) / "run", 3, "--checkpointing", *fp8))
            )
            draw = b.peak(
                lambda: drawn.main(
                    [PROMPT, "--out", f"{out}/a.png", "--steps", "2", *b.flags(*fp8)]
                )
            )
        yield row(
            f"peak memory, LoRA training with checkpointing, {name}", teach, "GB", of_training
        )
        yield row(f"peak memory, sampling, {name}", draw, "GB", of_drawing)


def merging(b):
    import alchemy
    from alchemy import lora
    from alchemy.extras import optimizations

    sdxl, plain = b.load(), b.load()
    for p in alchemy.add_lora(sdxl, RANK):
        p.data = 0.02 * torch.randn_like(p)
    before = {
        name: p.clone() for name, p in sdxl.unet.named_parameters() if name.endswith("weight")
    }
    lora.merge(sdxl)
    merged, without = b.turns(drawing(b, sdxl), drawing(b, plain))
    yield row("30 guided steps, a merged LoRA (right: without one)", merged, "s", None, without)
    changed = sum(
        not torch.equal(p, before[name])
        for name, p in sdxl.unet.named_parameters()
        if name in before
    )
    lora.unmerge(sdxl)
    left = sum(
        not torch.equal(p, before[name])
        for name, p in sdxl.unet.named_parameters()
        if name in before
    )
    yield row(f"tensors that un-merging left changed, of {changed}", left, "", 0)
    try:
        optimizations.store_fp8(sdxl.unet), lora.merge(sdxl)
        refused = False
    except ValueError:
        refused = True
    yield row("fp8 bases that take a merge", int(not refused), "", 0)


ROWS = {
    "sample": sample,
    "compile": compile_,
    "vae": vae,
    "vae-2048": vae_2048,
    "step": step,
    "checkpointing": checkpointing,
    "step-compiled": step_compiled,
    "subject": subject,
    "memory": memory,
    "merging": merging,
}
