"""Ours against diffusers and peft: the same weights, in one process, in turns; medians.

    python tests/benchmark.py                 on weights/mini (needs the packages of tests/interop/requirements.txt)
    python tests/benchmark.py --threads 2 --rounds 9
    python tests/benchmark.py --cuda          full size, on a GPU: see benchmark_cuda.py

Both sides have the same dtype, threads, memory format and fused attention (scaled_dot_product_attention). Ratios below 1: ours is faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MINI = ROOT / "weights" / "mini"
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
PROMPT = "a photo of a dog in a forest"


def medians(ours, theirs, rounds):
    """Median seconds of each, called in turns after one call that warms up."""
    ours(), theirs()
    times = ([], [])
    for _ in range(rounds):
        for function, taken in zip((ours, theirs), times):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def inputs(batch, dtype, side=32):
    import torch

    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return (
        draw(batch, 4, side, side),
        torch.full((batch,), 500.0),
        draw(batch, 77, 96),
        draw(batch, 64),
        torch.full((batch, 6), 128.0),
    )


def forward(sdxl, pipe, batch):
    import torch

    x, t, context, pooled, ids = inputs(batch, torch.float32)

    def ours():
        with torch.no_grad():
            return sdxl.unet(x, t, context, pooled, ids)

    def theirs():
        with torch.no_grad():
            return pipe.unet(
                x,
                t,
                encoder_hidden_states=context,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            ).sample

    assert (ours() - theirs()).abs().max() < 1e-4, "the two UNets disagree"
    return ours, theirs


def training(batch, rank=16):
    """A LoRA step, rank 16, AdamW: forward, backward, update; no prior on either side. Each side has its own copy of the UNet."""
    import torch
    import torch.nn.functional as F
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    import alchemy

    sdxl = alchemy.load(MINI, "cpu", "float32")
    mine = alchemy.add_lora(sdxl, rank)
    other = UNet2DConditionModel.from_pretrained(
        MINI / "unet", variant="fp16", dtype=torch.float32
    ).to(memory_format=torch.channels_last)
    other.requires_grad_(False)
    other.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    x, t, context, pooled, ids = inputs(batch, torch.float32)
    optimizers = [
        torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)
        for parameters in (mine, other.parameters())
    ]

    def step(predict, optimizer):
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(predict(), x).backward()
        optimizer.step()

    return (
        lambda: step(lambda: sdxl.unet(x, t, context, pooled, ids), optimizers[0]),
        lambda: step(
            lambda: (
                other(
                    x,
                    t,
                    encoder_hidden_states=context,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
                ).sample
            ),
            optimizers[1],
        ),
    )


def pipelines(sdxl, pipe):
    """Prompt to picture, 30 steps, guidance 5."""
    import torch
    import alchemy

    generator = torch.Generator()
    return (
        lambda: alchemy.text_to_image(sdxl, PROMPT, steps=30, guidance=5.0),
        lambda: pipe(
            PROMPT,
            num_inference_steps=30,
            guidance_scale=5.0,
            height=128,
            width=128,
            generator=generator.manual_seed(0),
        ),
    )


def vae(sdxl, pipe):
    import torch

    x, latents = torch.rand(1, 3, 128, 128) * 2 - 1, torch.randn(1, 4, 32, 32)

    def quiet(function):
        def call():
            with torch.no_grad():
                return function()

        return call

    scale = pipe.vae.config.scaling_factor
    return (
        (quiet(lambda: sdxl.vae.encode(x)), quiet(lambda: pipe.vae.encode(x).latent_dist)),
        (
            quiet(lambda: sdxl.vae.decode(latents)),
            quiet(lambda: pipe.vae.decode(latents / scale).sample),
        ),
    )


LOAD = {
    "ours": "import alchemy; s = alchemy.load(r'{0}', 'cpu', 'float32'); s.unet, s.vae, s.text_encoders",
    "theirs": "import torch; from diffusers import StableDiffusionXLPipeline as P; P.from_pretrained(r'{0}', variant='fp16', dtype=torch.float32)",
}
MEMORY = "; print([l.split()[1] for l in open('/proc/self/status') if l.startswith('RssAnon')][0])"
DRAW = (
    LOAD["theirs"].replace("P.from", "p = P.from")
    + "; p(r'"
    + PROMPT
    + "', num_inference_steps=30, guidance_scale=4.0, height=128, width=128).images[0].save(r'{1}')"
)


def process(command, rounds):
    """Median seconds of a whole process, and the last line of what it printed."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        times.append(time.perf_counter() - start)
    return statistics.median(times), out.strip().splitlines()[-1] if out.strip() else ""


def processes(rounds, folder):
    """Rows of whole processes: loading (with anonymous memory), drawing a picture, --help."""
    python, weights = sys.executable, str(MINI)
    loads = [
        process([python, "-c", LOAD[side].format(weights) + MEMORY], rounds)
        for side in ("ours", "theirs")
    ]
    yield "load in a new process, s", loads[0][0], loads[1][0]
    yield "anonymous memory after it, MB", *(int(out) / 1024 for _, out in loads)
    draws = [
        process(command, rounds)[0]
        for command in (
            [python, "sample.py", PROMPT, "--out", f"{folder}/ours.png"],
            [python, "-c", DRAW.format(weights, f"{folder}/theirs.png")],
        )
    ]
    yield "sample.py against a diffusers script, s", *draws
    page = process(
        [python, "sample.py", PROMPT, "--out", f"{folder}/ours.png", "--inspect", f"{folder}/page"],
        rounds,
    )[0]
    yield "sample.py --inspect (right: without), s", page, draws[0]
    for script in ("train.py", "sample.py", "insert.py"):
        yield f"{script} --help, s", process([python, script, "--help"], rounds)[0], None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--cuda" in argv:
        import benchmark_cuda

        return benchmark_cuda.main([flag for flag in argv if flag != "--cuda"])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of torch (default: its own choice)"
    )
    args = parser.parse_args(argv)
    import tempfile
    import diffusers
    import peft
    import torch
    import alchemy

    torch.set_num_threads(args.threads or torch.get_num_threads())
    sdxl = alchemy.load(MINI, "cpu", "float32")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        MINI, variant="fp16", dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last), pipe.vae.to(memory_format=torch.channels_last)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}; {torch.get_num_threads()} threads, float32, "
        f"channels_last, fused attention on both sides; medians of {args.rounds}\n"
    )
    print(
        f"| {'':44} | ours     | diffusers | ratio |\n|{'-' * 46}|---------:|----------:|------:|"
    )

    def row(name, ours, theirs):
        print(
            f"| {name:44} | {ours:8.4g} | "
            + (f"{theirs:9.4g} | {ours / theirs:5.2f} |" if theirs else f"{'':9} | {'':5} |"),
            flush=True,
        )

    encode, decode = vae(sdxl, pipe)
    for name, pair in (
        ("UNet forward, batch 2, s", forward(sdxl, pipe, 2)),
        ("UNet forward, batch 8, s", forward(sdxl, pipe, 8)),
        ("prompt to picture, 30 guided steps, s", pipelines(sdxl, pipe)),
        ("LoRA step, batch 4, rank 16 (peft), s", training(4)),
        ("VAE encode, 128 x 128, s", encode),
        ("VAE decode, 128 x 128, s", decode),
    ):
        row(name, *medians(*pair, args.rounds))
    with tempfile.TemporaryDirectory() as folder:
        for line in processes(max(3, args.rounds // 3), folder):
            row(*line)


if __name__ == "__main__":
    main()
