"""How much memory a run takes, before anything of it is read: the run itself on torch's meta device, where a tensor has a shape and no data.

    python -m alchemy.extras.memory            SDXL at 1024 x 1024, from its configuration alone

Each result of an operation counts from when it is made until nothing refers to it, forward and backward; weights, gradients and the
optimizer's moments are added. What is not in it: the caching allocator's gaps, and the workspaces of cuDNN and cuBLAS (see ROOM in fitting.py).
"""

from dataclasses import dataclass, replace

import torch

from .. import lora
from ..dataset import Batch
from ..formats.checkpoint import BASE, CONFIGS, VOCABULARY, build_on_meta
from ..methods.dreambooth import TEXT_ENCODERS, whole
from ..methods.textual_inversion import Live as EncodedLive
from ..schedule import Schedule
from ..sdxl import SDXL
from ..tokenizer import Tokenizer
from ..training import denoising_loss
from .counting import AsOnCuda, back, peak


@dataclass(frozen=True)
class Run:
    """What decides a run's memory. size: (H, W) in pixels; batch: pictures through the UNet at once, class pictures and guidance included."""

    size: tuple
    dtype: torch.dtype
    batch: int = 2
    method: str | None = None  # train.py's, or None: drawing
    rank: int = 0  # of the LoRA
    checkpointing: bool = False
    fp8: bool = False
    accumulation: int = 1
    text_encoders: bool = False  # they learn too
    previews: bool = True

    @property
    def live(self):
        """Whether gradients go through the text encoders, which then stay."""
        return self.text_encoders or self.method == "textual-inversion"


def in_fp8(network, dtype):
    """The linear layers of a network without weights, as store_fp8 leaves those of one that has them."""
    from . import fp8

    class Stored(
        fp8.FP8
    ):  # FP8 asks torch for autocast, which the meta device has not; it is a cast to the dtype of the base
        def forward(self, x):
            return fp8.Product.apply(x.to(dtype), self.weight, self.scale, self.bias)

    packed = type("Packed", (lora.LoRALayer, Stored), {})
    for layer in network.modules():
        if type(layer) is lora.LoRALinear:
            layer.weight = torch.nn.Parameter(
                torch.empty_like(layer.weight, dtype=torch.float8_e4m3fn), requires_grad=False
            )
            layer.register_buffer(
                "scale", torch.empty(layer.out_features, 1, device="meta"), persistent=False
            )
            layer.__class__ = packed
    return network


def blank(sdxl, dtype, fp8=False):
    """The same checkpoint without its weights, on the meta device."""

    def read(name, dtype):
        network = (
            build_on_meta(name, sdxl.configs[name])
            .to(dtype=dtype, memory_format=torch.channels_last)
            .requires_grad_(False)
            .eval()
        )
        return in_fp8(network, dtype) if fp8 and name == "unet" else network

    return SDXL(
        sdxl.source, read, sdxl.configs, sdxl.tokenizers, sdxl.schedule, torch.device("meta"), dtype
    )


def held(sdxl, *names):
    """Bytes of the weights of those networks; whatever learns is another matter."""
    return sum(
        p.nbytes
        for name in names
        for p in (*sdxl.network(name).parameters(), *sdxl.network(name).buffers())
        if not p.requires_grad
    )


def weights(sdxl):
    """Bytes of all its networks; nothing is read."""
    return held(blank(sdxl, sdxl.dtype), "unet", "vae", *TEXT_ENCODERS)


def batch_of(sdxl, run):
    """A training batch of nothing, each sample with a prompt of its own."""

    def zeros(*shape):
        return torch.empty(run.batch, *shape, device="meta")

    h, w = (side // sdxl.vae_scale_factor for side in run.size)
    t = torch.zeros(run.batch, dtype=torch.long)
    return Batch(
        zeros(4, h, w),
        zeros(4, h, w),
        zeros(1, h, w),
        t,
        zeros(6),
        [f"a dog {k}" for k in range(run.batch)],
    )


def learners(sdxl, run):
    """What learns, put there as train.py does. Of a new word the rows are nothing beside the gradients that go through all the rest."""
    if run.method == "lora":
        return lora.add_lora(sdxl, run.rank)
    if run.method == "full":
        return list(whole(sdxl, ("unet", *(TEXT_ENCODERS if run.text_encoders else ()))).values())
    for encoder in sdxl.text_encoders:
        encoder.text_model.embeddings.token_embedding.register_forward_hook(
            lambda module, args, out: out.requires_grad_(True)
        )
    return []


@torch.no_grad()
def drawing(sdxl, run):
    """(UNet on a guided batch, VAE that decodes one picture): bytes, weights not counted."""
    batch, unet, vae = batch_of(sdxl, run), sdxl.unet, sdxl.vae  # before anything is counted
    with AsOnCuda():
        told = sdxl.encode_prompt(batch.prompts, run.size)
    return peak(lambda: unet(batch.x_0, 0, *told.parts())), peak(lambda: vae.decode(batch.x_0[:1]))


@torch.no_grad()
def encoding(sdxl, run):
    """(a prompt, one photo of the size that is trained at): bytes, weights not counted."""
    photo, vae, _ = torch.empty(1, 3, *run.size, device="meta"), sdxl.vae, sdxl.text_encoders
    return peak(lambda: sdxl.encode_prompt(["a dog"], run.size)), peak(lambda: vae.encode(photo))


def sampling(sdxl, run):
    """{phase: bytes} of sample.py: the text encoders go before the UNet comes, which stays while the VAE decodes."""
    sdxl = blank(sdxl, run.dtype, run.fp8)
    (unet, vae), unets = drawing(sdxl, run), held(sdxl, "unet")
    return {
        "prompts": held(sdxl, *TEXT_ENCODERS) + encoding(sdxl, run)[0],
        "denoising": unets + unet,
        "decoding": unets + held(sdxl, "vae") + vae,
    }


def step(sdxl, run, learned):
    """Bytes of a training step, its gradients included, weights and moments not."""
    batch = batch_of(sdxl, run)
    with torch.set_grad_enabled(run.live), AsOnCuda():
        told = (
            EncodedLive(sdxl, run.size)
            if run.live
            else {p: sdxl.encode_prompt([p], run.size) for p in batch.prompts}
        )
    sdxl.unet.checkpointing = run.checkpointing
    lower = run.dtype if run.dtype != torch.float32 else None
    backward = peak(lambda: back(denoising_loss(sdxl, batch, told).mean()), lower)
    return backward + (
        sum(p.nbytes for p in learned) if run.accumulation > 1 else 0
    )  # the gradients of one part wait for the next


def training(sdxl, run):
    """{phase: bytes} of train.py: photos and prompts are encoded first, and at previews the VAE comes again."""
    sdxl = blank(sdxl, run.dtype, run.fp8)
    phases = {"encoding": held(sdxl, "vae", *TEXT_ENCODERS) + max(encoding(sdxl, run))}
    learned = learners(sdxl, run)
    state, gradients = (
        sum(n * p.nbytes for p in learned) for n in (3, 1)
    )  # itself and AdamW's two moments, all float32
    kept = held(sdxl, "unet", *(TEXT_ENCODERS if run.live else ())) + state
    phases["steps"] = kept + step(sdxl, run, learned)
    if run.previews:
        unet, vae = drawing(sdxl, replace(run, batch=2))
        phases["previews"] = kept + gradients + max(unet, held(sdxl, "vae") + vae)
    return phases


def main():
    """Print what SDXL base takes at its own size, drawing and learning."""
    configs = {name: kind.from_config(BASE[name]) for name, kind in CONFIGS.items()}
    words = tuple(Tokenizer.from_folder(VOCABULARY / name) for name in ("tokenizer", "tokenizer_2"))
    sdxl = SDXL(
        "SDXL base",
        None,
        configs,
        words,
        Schedule.from_config({}),
        torch.device("meta"),
        torch.bfloat16,
    )
    of_lora = Run(sdxl.size, sdxl.dtype, 2, "lora", 16)
    rows = (
        ("drawing a picture", sampling, Run(sdxl.size, sdxl.dtype)),
        ("LoRA, rank 16, with its prior", training, of_lora),
        ("the same, --prior-weight 0", training, replace(of_lora, batch=1)),
    )
    print(
        "| SDXL at 1024 x 1024, bfloat16, batch 1: GB by estimate | --checkpointing | base in fp8 |   most | in |\n|---|---|---|---:|---|"
    )
    for name, phases, run in rows:
        for checkpointing in (False, True) if run.method else (False,):
            for fp8 in (False, True):
                parts = phases(sdxl, replace(run, checkpointing=checkpointing, fp8=fp8))
                yes = [" yes" if on else "" for on in (checkpointing, fp8)]
                print(
                    f"| {name} |{yes[0]} |{yes[1]} | {max(parts.values()) / 1e9:.1f} | "
                    + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in parts.items())
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
