"""The rows of benchmark.py. Each yields entries: ours, theirs, a limit, and the hardware's floor.

Limits and floors are those of an H100 or H200 at 1024 x 1024, batch 1; on the CPU there are none.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
PROMPT = "a photo of a dog in a forest"
GUIDANCE, RANK = 5.0, 16


@dataclass
class Bench:
    """What is measured, how often, and with which weights."""

    weights: Path
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    size: int = 1024
    steps: int = 30
    train_steps: int = 500
    rounds: int = 5  # of an image; of a single call 4 times as many
    backend: str = "inductor"  # of torch.compile

    @classmethod
    def cpu(cls) -> "Bench":
        return cls(MINI, "cpu", torch.float32, 128)

    @classmethod
    def tiny(cls) -> "Bench":
        """The miniature, as short as can be."""
        return cls(MINI, "cpu", torch.float32, 64, 2, 2, 1, "eager")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def load(self):
        import alchemy

        return alchemy.load(self.weights, self.device, self.dtype)

    @cached_property
    def pipe(self):
        """diffusers' pipeline with the same weights, or None if it is not installed."""
        try:
            from diffusers import StableDiffusionXLPipeline
        except ImportError:
            return None
        pipe = StableDiffusionXLPipeline.from_pretrained(
            self.weights, variant="fp16", dtype=self.dtype, add_watermarker=False
        ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        return pipe

    def latents(self, scale: int = 1) -> torch.Tensor:
        config = json.loads((self.weights / "vae/config.json").read_text())
        side = scale * self.size // 2 ** (len(config["block_out_channels"]) - 1)
        rng = torch.Generator().manual_seed(0)
        return torch.randn(1, 4, side, side, generator=rng).to(self.device)

    def median(self, *functions: Callable | None, rounds: int | None = None) -> list[float | None]:
        """Median seconds of each function, called in turns after a warm-up; None stays None."""
        times: list[list[float]] = [[] for _ in functions]
        for turn in range((rounds or self.rounds) + 1):
            for function, taken in zip(functions, times, strict=True):
                if function:
                    start = time.perf_counter()
                    function()
                    if self.on_gpu:
                        torch.cuda.synchronize()
                    taken += [time.perf_counter() - start] if turn else []  # turn 0 warms up
        return [statistics.median(taken) if taken else None for taken in times]

    def peak(self, function: Callable) -> float:
        """The most GB of tensors while function runs, beside what was there before."""
        if not self.on_gpu:
            from helpers.counting import Count

            with Count() as count:
                function()
            return count.peak / 1e9
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def flags(self, *more: object) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        flags = ["--weights", self.weights, "--device", self.device, "--dtype", dtype]
        return [str(flag) for flag in (*flags, "--size", self.size, *more)]

    def train_flags(self, out: Path, steps: int, *more: object) -> list[str]:
        """train.py as the published figures are measured: one photo a step, no prior."""
        from alchemy import cli

        flags = [str(cli.EXAMPLE_PHOTOS), "--class-word", cli.EXAMPLE_CLASS, "--out", str(out)]
        flags += ["--steps", str(steps), "--batch", "1", "--prior-weight", "0"]
        return [*flags, "--preview-every", "0", "--overwrite", *self.flags(*more)]


def entry(what, ours, unit, theirs=None, limit=None, floor=None) -> dict:
    keys = dict(what=what, ours=ours, unit=unit, theirs=theirs, limit=limit, floor=floor)
    return keys if ours is not None else keys | {"ours": float("nan")}


def scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def run_script(*command: object) -> tuple[float, str]:
    """Seconds of a whole process, and its output. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or "no message").splitlines()[-1])
    return time.perf_counter() - start, run.stdout


# Correctness


def correctness(b: Bench) -> Iterator[dict]:
    """The miniature on this device against the CPU, and the scripts from end to end."""
    import alchemy

    images, predictions = [], []
    for device in ("cpu", b.device):
        sdxl = alchemy.load(MINI, device, "float32")
        x = alchemy.noise((1, 4, 32, 32), [0]).to(device)
        parts = sdxl.encode_prompt([PROMPT]).parts()
        with torch.no_grad():
            predictions.append(sdxl.unet(x, torch.tensor([500.0], device=device), *parts).cpu())
            images.append(sdxl.vae.decode(x).cpu())
    for name, (cpu, ours) in (("UNet", predictions), ("VAE decode", images)):
        error = float((ours - cpu).norm() / cpu.norm())
        yield entry(f"{name}, float32, against the CPU", error, "", limit=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        base = ["--device", b.device, "--seed", 0]
        train = ["train.py", *base, "--steps", 4, "--preview-every", 0, "--out"]
        commands = {
            "sample.py": ["sample.py", *base, "--steps", 4, "--out", f"{folder}/a.png"],
            "insert.py": ["insert.py", *base, "--steps", 8, "--out", f"{folder}/insert"],
            "train.py": [*train, f"{folder}/lora"],
            "train.py, float16": [*train, f"{folder}/half", "--dtype", "float16"],
            "train.py --method full": [*train, f"{folder}/full", "--method", "full"],
            "and its --resume to 6 steps": [
                *("train.py", "--resume", "--steps", 6, "--out", f"{folder}/full")
            ],
            "torchrun with one process": [
                *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1),
                *(*train, f"{folder}/ranks"),
            ],
        }
        for name, command in commands.items():
            if name == "train.py, float16" and not b.on_gpu:
                continue
            yield entry(name, run_script(*command)[0], "s")


# Sampling


def sampling(b: Bench, sdxl) -> Callable:
    import alchemy
    from alchemy.extras.optimizations import cached_steps

    size, progress = (b.size, b.size), partial(cached_steps, sdxl.unet)
    options = dict(size=size, steps=b.steps, guidance=GUIDANCE, progress=progress)
    return partial(alchemy.text_to_image, sdxl, PROMPT, **options)


def sample(b: Bench) -> Iterator[dict]:
    theirs = None
    if b.pipe:
        size = dict(height=b.size, width=b.size)
        options = dict(num_inference_steps=b.steps, guidance_scale=GUIDANCE) | size
        theirs = partial(b.pipe, PROMPT, **options)
    ours, theirs = b.median(sampling(b, b.load()), theirs)
    limit, floor = (1.5, 0.53) if b.on_gpu else (None, None)
    what = f"{b.steps} guided steps, prompt to pixels"
    yield entry(what, ours, "s", theirs, limit, floor)


def compiled(b: Bench) -> Iterator[dict]:
    from alchemy.extras import optimizations

    sdxl = b.load()
    with compile_backend(b.backend):
        optimizations.prepare(sdxl, compile=True)
        generate = sampling(b, sdxl)
        start = time.perf_counter()
        generate()
        first = time.perf_counter() - start
        (ours,) = b.median(generate)
    limit, floor = (1.1, 0.53) if b.on_gpu else (None, None)
    yield entry(f"{b.steps} guided steps with --compile", ours, "s", None, limit, floor)
    yield entry("compiling, once", first - ours, "s")


def compile_backend(name: str):
    """Inside, torch.compile uses this backend: "eager" takes the graph apart and runs it."""
    from unittest import mock

    return mock.patch.object(torch, "compile", partial(torch.compile, backend=name))


@torch.no_grad()
def vae(b: Bench) -> Iterator[dict]:
    sdxl, latents, theirs = b.load(), b.latents(), None
    sdxl.loaded["vae"] = sdxl.read("vae", torch.bfloat16)
    if b.pipe:
        other = b.pipe.vae.to(torch.bfloat16)
        scaled_latents = (latents / other.config.scaling_factor).to(torch.bfloat16)
        theirs = partial(other.decode, scaled_latents)
    rounds = 4 * b.rounds
    ours, theirs = b.median(partial(sdxl.vae.decode, latents), theirs, rounds=rounds)
    limit, floor = (40, 13) if b.on_gpu else (None, None)
    yield entry("VAE decode, bfloat16", scaled(ours), "ms", scaled(theirs), limit, floor)
    exact, half = sdxl.read("vae", torch.float32).decode(latents), sdxl.vae.decode(latents)
    yield entry("its error against float32", float((half - exact).norm() / exact.norm()), "")


@torch.no_grad()
def vae_2048(b: Bench) -> Iterator[dict]:
    gigabytes = b.peak(lambda: b.load().vae.decode(b.latents(2)))
    what = f"VAE decode at {2 * b.size} x {2 * b.size}, peak"
    yield entry(what, gigabytes, "GB", limit=4.5 if b.on_gpu else None)


# Training


def lora_step(b: Bench, checkpointing: bool = False, compile: bool = False) -> Callable:
    """One optimizer step of alchemy's training loop per call."""
    import alchemy
    from alchemy.extras import optimizations
    from alchemy.training import TrainState, train

    sdxl, x = b.load(), b.latents()
    alchemy.add_lora(sdxl, RANK)
    optimizations.prepare(sdxl, compile=compile)
    sdxl.unet.checkpointing = checkpointing
    with torch.no_grad():
        parts = sdxl.encode_prompt([PROMPT], (b.size, b.size)).parts()
    sdxl.free("text_encoders")
    t = torch.tensor([500], device=x.device)

    def get_loss(step, micro_step):
        return F.mse_loss(sdxl.unet(x.to(b.dtype), t, *parts).float(), x)

    named = sdxl.unet.named_parameters()
    state = TrainState.create({name: p for name, p in named if ".lora." in name}, 1e-4, b.dtype)
    return partial(next, train(sdxl, state, get_loss, steps=10**6))


def peft_step(b: Bench, checkpointing: bool = False) -> Callable | None:
    """The same with diffusers and peft: float32 adapters, autocast, clipping, fused AdamW."""
    try:
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig
    except ImportError:
        return None
    unet = UNet2DConditionModel.from_pretrained(
        b.weights / "unet", variant="fp16", dtype=b.dtype
    ).to(b.device, memory_format=torch.channels_last)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=b.on_gpu)
    x, config, t = b.latents(), unet.config, torch.tensor([500], device=b.device)
    context = torch.randn(1, 77, config.cross_attention_dim).to(b.device, b.dtype)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.randn(1, width).to(b.device, b.dtype)
    time_ids = torch.full((1, 6), float(b.size), device=b.device)
    added = {"text_embeds": pooled, "time_ids": time_ids}

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(b.device, b.dtype, enabled=b.dtype != torch.float32):
            out = unet(x.to(b.dtype), t, encoder_hidden_states=context, added_cond_kwargs=added)
            loss = F.mse_loss(out.sample.float(), x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def train_step(b: Bench, checkpointing: bool = False) -> Iterator[dict]:
    rounds = 4 * b.rounds
    pair = lora_step(b, checkpointing), peft_step(b, checkpointing)
    ours, theirs = (scaled(seconds) for seconds in b.median(*pair, rounds=rounds))
    limit, floor = (None, None) if not b.on_gpu else (105, 27.2) if checkpointing else (60, 18.6)
    what = f"LoRA step, rank {RANK}, batch 1" + (", checkpointing" if checkpointing else "")
    yield entry(what, ours, "ms", theirs, limit, floor)


def step_compiled(b: Bench) -> Iterator[dict]:
    with compile_backend(b.backend):
        (ours,) = b.median(lora_step(b, compile=True), rounds=4 * b.rounds)
    limit, floor = (60, 18.6) if b.on_gpu else (None, None)
    yield entry("LoRA step, compiled", scaled(ours), "ms", None, limit, floor)


def subject(b: Bench) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as out:
        seconds, _ = run_script("train.py", *b.train_flags(Path(out) / "run", b.train_steps))
    what = f"a subject in {b.train_steps} steps, whole process"
    yield entry(what, seconds, "s", limit=60 if b.on_gpu else None)


def memory(b: Bench) -> Iterator[dict]:
    """The peaks of train.py and sample.py themselves, in this process."""
    import sample as sample_script
    import train as train_script

    limits = {"bfloat16": ([], 6.0, 7.5), "fp8": (["--fp8-base"], 4.0, 5.0)}
    for name, (fp8, train_limit, sample_limit) in limits.items():
        with tempfile.TemporaryDirectory() as out:
            flags = b.train_flags(Path(out) / "run", 3, "--checkpointing", *fp8)
            training = b.peak(partial(train_script.main, flags))
            flags = [PROMPT, "--out", f"{out}/a.png", "--steps", "2", *b.flags(*fp8)]
            generating = b.peak(partial(sample_script.main, flags))
        limit = train_limit if b.on_gpu else None
        yield entry(f"peak, LoRA training with checkpointing, {name}", training, "GB", limit=limit)
        limit = sample_limit if b.on_gpu else None
        yield entry(f"peak, sampling, {name}", generating, "GB", limit=limit)


# Whole processes


def processes(b: Bench) -> Iterator[dict]:
    """Loading in a new process, a script against the same with diffusers, --help."""
    weights = str(b.weights)
    ours = f"import alchemy; s = alchemy.load({weights!r}); s.unet, s.vae, s.text_encoders"
    theirs = "from diffusers import StableDiffusionXLPipeline as P; "
    theirs += f"P.from_pretrained({weights!r}, variant='fp16')"
    other = median_process(b, "-c", theirs) if b.pipe else None
    yield entry("load in a new process", median_process(b, "-c", ours), "s", other)
    for script in ("train.py", "sample.py", "insert.py"):
        yield entry(f"{script} --help", median_process(b, script, "--help"), "s")
    with tempfile.TemporaryDirectory() as folder:
        command = ["sample.py", PROMPT, "--out", f"{folder}/a.png", *b.flags()]
        plain = median_process(b, *command)
        page = median_process(b, *command, "--inspect", f"{folder}/page")
    yield entry("sample.py", plain, "s")
    yield entry("sample.py --inspect", page, "s")


def median_process(b: Bench, *command: object) -> float:
    return statistics.median(run_script(*command)[0] for _ in range(min(b.rounds, 3)))


ROWS = {
    "correctness": correctness,
    "sample": sample,
    "step": train_step,
    "checkpointing": partial(train_step, checkpointing=True),
    "vae": vae,
    "vae-2048": vae_2048,
    "memory": memory,
    "subject": subject,
    "compiled": compiled,
    "step-compiled": step_compiled,
    "processes": processes,
}
CUDA_ROWS = tuple(ROWS)  # correctness first, then eager rows, memory, compiled rows
CPU_ROWS = ("correctness", "sample", "step", "vae", "processes")
