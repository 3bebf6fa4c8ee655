"""The rows of benchmark.py. Each yields entries: ours, theirs, their targets, the hardware's floor.

Targets and floors are those of an H100 or H200 at 1024 x 1024, batch 1; on the CPU there are none.
"""

import csv
import gc
import json
import os
import re
import signal
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
    resume_steps: int = 60  # of the run of the miniature that is interrupted

    @classmethod
    def cpu(cls) -> "Bench":
        return cls(MINI, "cpu", torch.float32, 128)

    @classmethod
    def tiny(cls) -> "Bench":
        """The miniature, as short as can be."""
        return cls(MINI, "cpu", torch.float32, 64, 2, 2, 1, "eager", 6)

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

    def train_flags(self, out: Path, steps: int, *more: object, prior: int = 0) -> list[str]:
        """train.py on one photo a step, without previews; published figures are without a prior."""
        from alchemy import cli

        flags = [str(cli.EXAMPLE_PHOTOS), "--class-word", cli.EXAMPLE_CLASS, "--out", str(out)]
        flags += ["--steps", str(steps), "--batch", "1", "--prior-weight", str(prior)]
        return [*flags, "--preview-every", "0", "--overwrite", *self.flags(*more)]


def entry(what, ours, unit, theirs=None, target=None, floor=None, ratio_target=None) -> dict:
    """A line of the table. target: the most that ours may be, and ratio_target ours / theirs."""
    found = dict(what=what, ours=ours, unit=unit, theirs=theirs)
    found |= dict(target=target, ratio_target=ratio_target, floor=floor)
    return found | {"verdict": verdict(**found)}


def verdict(ours, theirs, target, ratio_target, **_) -> str:
    """PASS or MISS of the targets that can be checked; "" where there is none."""
    checks = [] if target is None else [ours <= target]
    if ratio_target is not None and theirs:
        checks.append(ours <= ratio_target * theirs)
    text = "MISS" if not all(checks) else "PASS" if checks else ""
    if ratio_target is not None and not theirs:
        text = f"{text} (no ratio: diffusers or peft is missing)".strip()
    return text


def scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def run_script(*command: object, environment: dict | None = None) -> tuple[float, str]:
    """Seconds of a whole process, and its output. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    environment = os.environ | (environment or {})
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or "no message").splitlines()[-1])
    return time.perf_counter() - start, run.stdout


# Correctness


def tests(b: Bench) -> Iterator[dict]:
    """The tests that need CUDA; the others hide the GPU (tests/conftest.py)."""
    files = ("tests/core/test_synchronization.py", "tests/core/test_training.py")
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_cuda", *files]
    _, output = run_script(*command, environment=environment)
    passed = re.search(r"(\d+) passed", output)
    if b.on_gpu and not passed:
        raise RuntimeError("no CUDA test ran")
    yield entry("tests on CUDA, passed", int(passed[1]) if passed else 0, "")


@torch.no_grad()
def correctness(b: Bench) -> Iterator[dict]:
    """The miniature on this device against the CPU in float32: networks, dtypes, samplers."""
    import alchemy
    from alchemy.extras import optimizations
    from alchemy.samplers import SAMPLERS

    x, t = alchemy.noise((1, 4, 32, 32), [0]), torch.tensor([500.0])

    def outputs(device, dtype, fp8=False):
        sdxl = alchemy.load(MINI, device, dtype)
        optimizations.prepare(sdxl, fp8)
        cond = sdxl.encode_prompt([PROMPT])
        yield "text encoders", cond.context
        yield "UNet", sdxl.unet(x.to(device), t.to(device), *cond.parts())
        yield "VAE decode", sdxl.vae.decode(x.to(device))
        yield "VAE encode", sdxl.vae.encode(torch.tanh(x[:, :3]).to(device))[0]
        uncond = sdxl.encode_prompt([None])
        for sampler in SAMPLERS:
            rngs = alchemy.generators([0])
            options = dict(sampler=sampler, steps=4, generators=rngs)
            *_, last = alchemy.denoise(sdxl, x.to(device), cond, uncond, **options)
            yield sampler, last.x_prev

    expected = {name: tensor.double() for name, tensor in outputs("cpu", "float32")}
    limits = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2, "fp8": 0.5}
    torch.backends.cudnn.allow_tf32 = False  # in this row's process: convolutions in full float32
    for dtype, limit in limits.items():
        fp8 = dtype == "fp8"
        errors = {}
        for name, tensor in outputs(b.device, "bfloat16" if fp8 else dtype, fp8):
            difference = tensor.double().cpu() - expected[name]
            errors[name] = float(difference.norm() / expected[name].norm())
        worst = max(errors, key=errors.get)
        what = f"largest error against the CPU, {dtype} ({worst})"
        yield entry(what, errors[worst], "", target=limit)


def scripts(b: Bench) -> Iterator[dict]:
    """The scripts from end to end on the miniature. A run that fails is the error of the row."""
    with tempfile.TemporaryDirectory() as folder:
        base = ["--device", b.device, "--seed", 0]
        train = ["train.py", *base, "--steps", 4, "--batch", 1, "--preview-every", 0, "--out"]
        sample = ["sample.py", *base, "--steps", 4, "--out"]
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
        commands = {
            "sample.py": [*sample, f"{folder}/a.png"],
            "sample.py --dtype float16": [*sample, f"{folder}/b.png", "--dtype", "float16"],
            "insert.py": ["insert.py", *base, "--steps", 8, "--out", f"{folder}/insert"],
            "train.py --checkpointing": [*train, f"{folder}/1", "--checkpointing"],
            "train.py --fp8-base": [*train, f"{folder}/2", "--fp8-base"],
            "train.py --dtype float16": [*train, f"{folder}/3", "--dtype", "float16"],
            "train.py under torchrun, one process": [*ranks, *train, f"{folder}/4"],
        }
        for name, command in commands.items():
            yield entry(name, run_script(*command)[0], "s")


def resume(b: Bench) -> Iterator[dict]:
    """train.py --method full, interrupted and resumed, against a run that was not."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", "--device", b.device, "--seed", 0, "--method", "full"]
        command += ["--batch", 1, "--prior-weight", 0, "--preview-every", 0]
        command += ["--steps", b.resume_steps, "--out"]
        yield entry("train.py --method full", run_script(*command, f"{folder}/whole")[0], "s")
        seconds = interrupt(*command, f"{folder}/parts")
        seconds += run_script("train.py", "--resume", "--out", f"{folder}/parts")[0]
        yield entry("the same interrupted and resumed", seconds, "s")
        whole, parts = (read_losses(Path(folder, name)) for name in ("whole", "parts"))
        off = max(abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True))
        yield entry("largest difference of their losses", off, "", target=0.02)


def read_losses(folder: Path) -> list[float]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def interrupt(*command: object) -> float:
    """Seconds of a training run that is interrupted when it has done two steps."""
    start, log = time.perf_counter(), Path(str(command[-1])) / "log.csv"
    command = [sys.executable, *map(str, command)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, output = run.communicate()
    if run.returncode != 128 + signal.SIGINT:
        last = (output.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"not interrupted: it ended with {run.returncode}, {last}")
    return time.perf_counter() - start


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
    target, floor, ratio = (1.5, 0.53, 0.8) if b.on_gpu else (None, None, None)
    what = f"{b.steps} guided steps, prompt to pixels"
    yield entry(what, ours, "s", theirs, target, floor, ratio)


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
    target, floor = (1.1, 0.53) if b.on_gpu else (None, None)
    yield entry(f"{b.steps} guided steps with --compile", ours, "s", None, target, floor)
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
    target, floor = (40, 13) if b.on_gpu else (None, None)
    yield entry("VAE decode, bfloat16", scaled(ours), "ms", scaled(theirs), target, floor)
    exact, half = sdxl.read("vae", torch.float32).decode(latents), sdxl.vae.decode(latents)
    yield entry("its error against float32", float((half - exact).norm() / exact.norm()), "")


@torch.no_grad()
def vae_2048(b: Bench) -> Iterator[dict]:
    vae, latents = b.load().vae, b.latents(2)
    gigabytes = b.peak(lambda: vae.decode(latents))
    what = f"VAE decode at {2 * b.size} x {2 * b.size}, peak beside the weights"
    yield entry(what, gigabytes, "GB", target=4.5 if b.on_gpu else None)


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
    what = f"LoRA step, rank {RANK}, batch 1" + (", checkpointing" if checkpointing else "")
    target = floor = ratio = None
    if b.on_gpu:
        target, floor = (105, 27.2) if checkpointing else (60, 18.6)
        ratio = None if checkpointing else 0.7
    yield entry(what, ours, "ms", theirs, target, floor, ratio)


def step_compiled(b: Bench) -> Iterator[dict]:
    with compile_backend(b.backend):
        (ours,) = b.median(lora_step(b, compile=True), rounds=4 * b.rounds)
    target, floor = (60, 18.6) if b.on_gpu else (None, None)
    yield entry("LoRA step, compiled", scaled(ours), "ms", None, target, floor)


def subject(b: Bench) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as out:
        seconds, _ = run_script("train.py", *b.train_flags(Path(out) / "run", b.train_steps))
    what = f"a subject in {b.train_steps} steps, whole process"
    yield entry(what, seconds, "s", target=60 if b.on_gpu else None)


def memory(b: Bench, fp8: bool = False) -> Iterator[dict]:
    """The peaks of train.py and sample.py themselves, in this process."""
    import sample as sample_script
    import train as train_script

    name, more = ("fp8", ["--fp8-base"]) if fp8 else ("bfloat16", [])
    targets = (5.0, 4.0) if fp8 else (7.5, 6.0)
    sample_target, train_target = targets if b.on_gpu else (None, None)
    with tempfile.TemporaryDirectory() as out:
        flags = [PROMPT, "--out", f"{out}/a.png", "--steps", "2", *b.flags(*more)]
        peak = b.peak(partial(sample_script.main, flags))
        yield entry(f"peak, sampling, {name}", peak, "GB", target=sample_target)
        for prior in (1, 0):
            run = Path(out) / str(prior)
            flags = b.train_flags(run, 3, "--checkpointing", *more, prior=prior)
            peak = b.peak(partial(train_script.main, flags))
            what = f"peak, LoRA training with checkpointing{' and prior' * prior}, {name}"
            yield entry(what, peak, "GB", target=train_target)


# A CUDA graph


@torch.no_grad()
def graph(b: Bench) -> Iterator[dict]:
    """A guided UNet forward as one CUDA graph, which is adopted only above 10 %."""
    from alchemy.extras.optimizations import cache_prompt_kv
    from alchemy.sdxl import Conditioning

    sdxl = b.load()
    size = (b.size, b.size)
    both = Conditioning.cat([sdxl.encode_prompt([prompt], size) for prompt in (None, PROMPT)])
    sdxl.free("text_encoders")
    x, t = torch.cat([b.latents()] * 2), torch.tensor([500.0], device=b.device)
    forward = partial(sdxl.unet, x, t, *both.parts())
    with cache_prompt_kv(sdxl.unet):
        replay, output = capture(forward) if b.on_gpu else (forward, forward())
        captured, eager = b.median(replay, forward, rounds=4 * b.rounds)
        what = "UNet forward as a CUDA graph, beside eager"
        yield entry(
            what, scaled(captured), "ms", scaled(eager), ratio_target=0.9 if b.on_gpu else None
        )
        x.mul_(0.5)
        replay()
        expected = forward()
        off = float((output - expected).norm() / expected.norm()) if b.on_gpu else 0.0
        yield entry("its error against eager on other latents", off, "", target=1e-2)


def capture(function: Callable[[], torch.Tensor]) -> tuple[Callable, torch.Tensor]:
    """function as a CUDA graph (to be called), and the tensor that holds its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch's documentation asks: warm up beside
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        output = function()
    return recorded.replay, output


@torch.no_grad()
def group_norm(b: Bench) -> Iterator[dict]:
    """GroupNorm and SiLU of the UNet's finest level, beside a compiled form that stays NHWC."""
    side, channels, groups = b.size // 8, 320, 32
    x = torch.randn(2, channels, side, side, device=b.device).to(b.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(groups, channels, device=b.device, dtype=b.dtype)

    def nhwc(x):
        rows = x.permute(0, 2, 3, 1).reshape(2, side * side, groups, channels // groups).float()
        variance, mean = torch.var_mean(rows, (1, 3), correction=0, keepdim=True)
        h = ((rows - mean) * (variance + norm.eps).rsqrt()).view(2, side, side, channels)
        h = F.silu(h * norm.weight + norm.bias).to(x.dtype)
        return h.permute(0, 3, 1, 2)

    def ours():  # what follows, a convolution, wants NHWC
        return F.silu(norm(x), inplace=True).contiguous(memory_format=torch.channels_last)

    compiled = partial(torch.compile(nhwc, backend=b.backend), x)
    kept, plain = b.median(compiled, ours, rounds=4 * b.rounds)
    what = "norm and SiLU in NHWC, compiled, beside torch's"
    yield entry(what, scaled(kept), "ms", scaled(plain), ratio_target=0.9 if b.on_gpu else None)
    off = float((compiled() - ours()).float().norm() / ours().float().norm())
    yield entry("its error against torch's", off, "", target=1e-2)


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
    "tests": tests,
    "correctness": correctness,
    "scripts": scripts,
    "resume": resume,
    "sample": sample,
    "step": train_step,
    "checkpointing": partial(train_step, checkpointing=True),
    "vae": vae,
    "vae-2048": vae_2048,
    "memory": memory,
    "memory-fp8": partial(memory, fp8=True),
    "subject": subject,
    "compiled": compiled,
    "step-compiled": step_compiled,
    "graph": graph,
    "group-norm": group_norm,
    "processes": processes,
}
CUDA_ROWS = tuple(ROWS)  # in the order in which a GPU that is lent for minutes is used best
CPU_ROWS = ("correctness", "scripts", "resume", "sample", "step", "vae", "processes")
EAGER = ("sample", "step", "checkpointing", "vae", "vae-2048")
SECONDS = {name: 90 if name in EAGER else 180 for name in ROWS}  # the most that a row may take
