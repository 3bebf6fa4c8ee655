"""How weights/mini is trained: an SDXL in miniature, from scratch, on the toy world.

python -m weights.toy.recipe vae       the VAE first: it defines the latents
python -m weights.toy.recipe unet      the UNet and both text encoders, on the VAE's latents
python -m weights.toy.recipe pack      writes the EMA in half precision to weights/mini

vae and unet resume from their last state in --work, and log to vae.log and unet.log there;
a larger --minutes continues a finished run. They use CUDA where there is one. Without a state,
`unet --init weights/mini` goes on from the weights that are packed, on the latents of their VAE.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

import alchemy
from alchemy import cli
from alchemy.clip import TextConfig, TextEncoder
from alchemy.schedule import Schedule
from alchemy.tokenizer import Tokenizer
from alchemy.unet import UNet, UNetConfig
from alchemy.vae import VAE, VAEConfig

from . import WEIGHTS, classifier, world
from .training import State, bfloat16, ema_of, metadata, train

CONFIGS = json.loads((Path(__file__).parent / "configs.json").read_text())
NETWORKS = CONFIGS["networks"]
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
DEFAULTS = {"vae": (30, 1.6e-3, 0.45), "unet": (50, 1.6e-3, 0.6)}  # minutes, rate, flat share
LEVELS = (200, 400, 600, 800)  # noise levels of the held-out loss


class Scenes:
    """The first `count` training scenes, rendered once into memory-mapped files of a folder."""

    def __init__(self, folder: Path, count: int, first: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{first}-{count}.{name}.npy" for name in ("images", "masks", "boxes")]
        captions = folder / f"{first}-{count}.json"
        if not captions.exists():
            self.render(files, captions, count, first)
        self.images, self.masks, self.boxes = (np.load(file, mmap_mode="r") for file in files)
        self.captions = json.loads(captions.read_text())

    @staticmethod
    def render(files: list[Path], captions: Path, count: int, first: int) -> None:
        shapes = ((count, 128, 128, 3), np.uint8), ((count, 128, 128), np.uint8), ((count, 4), int)
        images, masks, boxes = (
            np.lib.format.open_memmap(file, "w+", dtype, shape)
            for file, (shape, dtype) in zip(files, shapes, strict=True)
        )
        texts = []
        for k in range(count):
            scene = world.scene(first + k)
            mask = np.clip(sum(mask for _, _, mask in scene.objects), 0, 1)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            images[k], masks[k] = scene.image, np.uint8(255 * mask)
            boxes[k] = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            texts.append(scene.caption)
        captions.write_text(json.dumps(texts))

    def crops(self, count: int, side: int, generator: Generator) -> Tensor:
        """(count,3,side,side) in [-1,1]; two of three are centred on a point of an object."""
        crops = []
        for _ in range(count):
            k = int(torch.randint(len(self.images), (), generator=generator))
            y0, y1, x0, x1 = self.boxes[k]
            down, right, chance = torch.rand(3, generator=generator).tolist()
            y, x = down * (129 - side), right * (129 - side)
            if chance < 0.65:
                y, x = y0 + down * (y1 - y0) - side / 2, x0 + right * (x1 - x0) - side / 2
            y, x = (min(max(int(start), 0), 128 - side) for start in (y, x))
            crops.append(torch.from_numpy(self.images[k, y : y + side, x : x + side].copy()))
        return classifier.to_input(torch.stack(crops))


def recolour(x: Tensor, generator: Generator, share: float = 0.35) -> Tensor:
    """Images in [-1,1], a share of them with their hues turned by any angle around the grey axis
    and their saturation times 0.7 to 1.4: the VAE must encode colours that no sprite has."""
    angle = (2 * torch.rand(len(x), 1, 1, generator=generator) - 1) * math.pi
    strength = 0.7 + 0.7 * torch.rand(len(x), 1, 1, generator=generator)
    grey = torch.full((3, 3), 1 / 3)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    mix = grey + strength * (angle.cos() * (torch.eye(3) - grey) + angle.sin() * turn)
    mix[torch.rand(len(x), generator=generator) >= share] = torch.eye(3)
    return torch.einsum("bij,bjhw->bihw", mix, x).clamp(-1, 1)


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 of the differences between neighbours: keeps edges sharp where squares would blur."""
    return sum((y.diff(dim=dim) - x.diff(dim=dim)).abs().mean() for dim in (-2, -1)) / 2


def feature_loss(network: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """Relative L1 of the features of a classifier that was trained on training renders."""
    with torch.no_grad():
        targets = network.maps(x)[:3]
    total = 0.0
    for a, b in zip(network.maps(y)[:3], targets, strict=True):
        total += (a.float() - b.float()).abs().mean() / (b.float().abs().mean() + 1e-3)
    return total / 3


def fresh_vae() -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_config(NETWORKS["vae"]))
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    # Latents of a wide scale and sharp posteriors at first: from a posterior of standard deviation
    # 1 the decoder would see noise alone, and the KL term would collapse the latents.
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
        vae.quant_conv.bias[4:] = -5
        for k in range(4):
            vae.quant_conv.weight[k, k] = 3
    return vae


def train_vae(args, log: Callable[[str], None], device: torch.device) -> None:
    scenes = Scenes(args.work / "scenes", args.scenes)
    path = args.work / "critic.safetensors"
    if not path.exists():
        log("training the classifier of the feature loss, 4 minutes")
        classifier.train(path, 4, lambda seed: classifier.example(seed, "train"), log)
    critic = classifier.load(path).to(device).requires_grad_(False)
    vae = fresh_vae().to(device, memory_format=torch.channels_last)
    state = State({"vae": vae}, args.work / "vae.safetensors", 0.998)

    def loss_of(step: int) -> Tensor:
        # Crops of 64 pixels; at times whole images, which the attention must see too.
        generator = Generator().manual_seed(step)
        x = scenes.crops(*((2, 128) if step % 12 == 0 else (8, 64)), generator)
        x = recolour(x, generator).to(device).contiguous(memory_format=torch.channels_last)
        with bfloat16(device):
            mean, std = (part.float() for part in vae.encode(x))
            # Up to 8 % more noise than the posterior has: what the UNet makes is not exact.
            extra = 0.08 * torch.rand(len(x), 1, 1, 1, generator=generator).to(device)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            sigma = (std**2 + (extra * mean.detach().std()) ** 2).sqrt()
            y = vae.decode(mean + sigma * noise).float()
            features = feature_loss(critic, y, x)
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        pixels = F.l1_loss(y, x) + F.mse_loss(y, x) + edge_loss(y, x)
        return pixels + 0.03 * features + 5e-5 * kl

    train(state, args.minutes, args.lr, DEFAULTS["vae"][2], loss_of, log)
    state.use_ema()
    with torch.no_grad():
        mean, std = vae.encode(classifier.to_input(scenes.images[:64]).to(device))
    log(f"latents: std {mean.std():.4f}, posterior std {std.mean():.4f}")
    factor = {"scaling_factor": round(1 / float(mean.std()), 5)}
    (args.work / "scaling.json").write_text(json.dumps(factor))


def trained_vae(work: Path, device: torch.device, init: Path | None = None) -> VAE:
    """The VAE in `work`; without one there, that of weights/mini, where the UNet starts from it."""
    if (work / "scaling.json").exists():
        config = NETWORKS["vae"] | json.loads((work / "scaling.json").read_text())
        vae = VAE(VAEConfig.from_config(config))
        vae.load_state_dict(ema_of(work / "vae.safetensors", "vae"))
    elif init and init.resolve() == (WEIGHTS / "mini").resolve():
        vae = alchemy.load(init, dtype="float32").vae
    else:
        raise ValueError(f"{work}: no trained VAE there; run the part vae first")
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class Latents:
    """Latents, object masks and captions of scenes, encoded a few at a time and then reused."""

    def __init__(self, vae: VAE, scenes: Scenes, device: torch.device):
        self.vae, self.scenes, self.device, self.ready = vae, scenes, device, 0
        self.latents = torch.empty(len(scenes.captions), 4, 32, 32, dtype=torch.float16)
        self.masks = torch.empty(len(scenes.captions), 1, 32, 32, dtype=torch.float16)

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """Encode `count` scenes more, while there are some."""
        end = min(self.ready + count, len(self.latents))
        for start in range(self.ready, end, 32):
            rows = slice(start, min(start + 32, end))
            x = classifier.to_input(self.scenes.images[rows]).to(self.device)
            with bfloat16(self.device):
                mean, _ = self.vae.encode(x.contiguous(memory_format=torch.channels_last))
            masks = torch.from_numpy(self.scenes.masks[rows].copy()).float()[:, None] / 255
            self.latents[rows], self.masks[rows] = mean.cpu(), F.avg_pool2d(masks, 4)
        self.ready = end

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        captions = [self.scenes.captions[k] for k in indices.tolist()]
        return self.latents[indices].float(), self.masks[indices].float(), captions


class Denoiser:
    """UNet and text encoders from scratch. Branches end in zeros: the first prediction is 0."""

    def __init__(self, config: dict, device: torch.device):
        torch.manual_seed(0)
        self.modules = {"unet": UNet(UNetConfig.from_config(config))}
        for name in TEXT_ENCODERS:
            text_config = TextConfig.from_config(NETWORKS[name])
            self.modules[name] = TextEncoder(text_config, projection=name == TEXT_ENCODERS[1])
            for embedding in self.modules[name].text_model.embeddings.children():
                nn.init.normal_(embedding.weight, std=0.05)
        for name, parameter in self.modules["unet"].named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight")) or name.startswith("conv_out"):
                nn.init.zeros_(parameter)
        for module in self.modules.values():
            module.to(device, memory_format=torch.channels_last)
        self.tokenizers = [Tokenizer.from_folder(WEIGHTS / "mini" / name) for name in TOKENIZERS]
        self.schedule, self.device = Schedule.from_config(CONFIGS["scheduler"]), device

    def predict(self, x_t: Tensor, t: Tensor, captions: list[str], keep: Tensor) -> Tensor:
        """The predicted noise. keep (B,): 0 where the caption is dropped to zeros."""
        keep, encoded = keep.to(self.device), []
        with bfloat16(self.device):
            for name, tokenizer in zip(TEXT_ENCODERS, self.tokenizers, strict=True):
                ids = torch.tensor([tokenizer(caption) for caption in captions])
                encoded.append(self.modules[name](ids.to(self.device)))
            (first, _), (second, pooled) = encoded
            context = torch.cat([first, second], dim=-1) * keep[:, None, None]
            x_t = x_t.to(self.device).contiguous(memory_format=torch.channels_last)
            time_ids = torch.tensor([128.0, 128, 0, 0, 128, 128], device=self.device)
            conditioning = context, pooled * keep[:, None], time_ids.expand(len(x_t), 6)
            return self.modules["unet"](x_t, t.to(self.device), *conditioning).float()

    def loss(self, batch: tuple, generator: Generator, object_weight: float) -> Tensor:
        """Min-SNR weighted (gamma 5) error of the noise; pixels of objects count more."""
        x_0, masks, captions = batch
        count = len(x_0)
        chance = torch.rand(count, generator=generator)
        for k in range(count):
            if 0.10 <= chance[k] < 0.12:
                captions[k] = ""
        x_0 = x_0 + 0.02 * torch.randn(x_0.shape, generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        # Timesteps spread evenly over the batch: a steadier gradient.
        even = torch.arange(count) + torch.rand(count, generator=generator)
        t = (even * 1000 / count).long().clamp(max=999)
        weight = (5 / self.schedule.snr(t)).clamp(max=1).float().to(self.device)
        x_t = self.schedule.add_noise(x_0, eps, t)
        prediction = self.predict(x_t, t, captions, (chance >= 0.10).float())
        pixels = (1 + object_weight * masks).to(self.device)
        error = (prediction - eps.to(self.device)).square() * pixels
        return (weight * error.mean((1, 2, 3)) / pixels.mean((1, 2, 3))).mean()

    @torch.no_grad()
    def held_out(self, latents: Latents) -> list[float]:
        """Mean squared error of the noise at LEVELS, on scenes that are never trained on."""
        errors = []
        for level in LEVELS:
            generator, total = Generator().manual_seed(level), 0.0
            for rows in torch.arange(latents.ready).split(32):
                x_0, _, captions = latents.batch(rows)
                eps = torch.randn(x_0.shape, generator=generator)
                t = torch.full((len(rows),), level)
                x_t = self.schedule.add_noise(x_0, eps, t)
                prediction = self.predict(x_t, t, captions, torch.ones(len(rows)))
                total += float((prediction.cpu() - eps).square().mean()) * len(rows)
            errors.append(total / latents.ready)
        return errors


@torch.no_grad()
def warm_start(denoiser: Denoiser, vae: VAE, scenes: Scenes, folder: Path) -> float:
    """Start from the weights of a packed folder, whose VAE may be another one.

    The rotation R that turns latents of `vae` into those of the folder's VAE with the least
    squared error (orthogonal Procrustes) goes into the UNet's first and last convolution. Being a
    rotation, it leaves white noise white. Returns the share of variance that it explains.
    """
    before = alchemy.load(folder, dtype="float32")
    for name, module in denoiser.modules.items():
        source = before.text_encoders[TEXT_ENCODERS.index(name)] if name != "unet" else before.unet
        module.load_state_dict(source.state_dict())
    images = classifier.to_input(scenes.images[:64])
    old = torch.cat([before.vae.encode(part)[0] for part in images.split(16)])
    new = torch.cat([vae.encode(part)[0] for part in images.split(16)])
    old, new = (latents.transpose(0, 1).flatten(1) for latents in (old, new))  # (4, N)
    u, _, v = torch.linalg.svd(old @ new.T)
    rotation = u @ v  # old ≈ rotation @ new
    unet = denoiser.modules["unet"]
    unet.conv_in.weight.copy_(torch.einsum("oikl,ij->ojkl", unet.conv_in.weight, rotation))
    unet.conv_out.weight.copy_(torch.einsum("oikl,oj->jikl", unet.conv_out.weight, rotation))
    unet.conv_out.bias.copy_(rotation.T @ unet.conv_out.bias)
    error = (old - rotation @ new).square().mean() / old.square().mean()
    return 1 - float(error)


def train_unet(args, log: Callable[[str], None], device: torch.device) -> None:
    denoiser = Denoiser(NETWORKS["unet"], device)
    vae = trained_vae(args.work, device, args.init)
    scenes = Scenes(args.work / "scenes", args.scenes)
    if args.init:
        share = warm_start(denoiser, vae, scenes, args.init)
        log(f"starts from {args.init}; its latents explained by a rotation: {share:.2f}")
    latents = Latents(vae, scenes, device)
    fresh = Scenes(args.work / "scenes", min(512, args.scenes), world.FRESH)
    held_out = Latents(vae, fresh, device)
    latents.grow(2500)
    held_out.grow(512)
    state = State(denoiser.modules, args.work / "unet.safetensors", 0.999)
    flat = DEFAULTS["unet"][2]

    def loss_of(step: int) -> Tensor:
        generator = Generator().manual_seed(step)
        latents.grow(max(1, args.batch // 4))  # encoding costs half as much as a step
        batch = latents.batch(torch.randint(latents.ready, (args.batch,), generator=generator))
        # Objects are a third of an image and most of what there is to learn: they count
        # threefold until the learning rate falls.
        object_weight = 2.0 if state.seconds < flat * 60 * args.minutes else 0.0
        return denoiser.loss(batch, generator, object_weight)

    train(state, args.minutes, args.lr, flat, loss_of, log)
    state.use_ema()
    errors = denoiser.held_out(held_out)
    log("held-out loss at t = 200, 400, 600, 800: " + ", ".join(f"{e:.4f}" for e in errors))


def pack(work: Path) -> str:
    """Write the EMA of the states to weights/mini, beside the tokenizers that are there already."""
    if not (work / "unet.safetensors").exists():
        raise ValueError(f"{work}: no unet.safetensors; run the part unet first")
    out = WEIGHTS / "mini"
    for name, config in NETWORKS.items():
        if name == "vae" and not (work / "vae.safetensors").exists():
            continue  # the UNet was trained on the latents of the VAE that is packed already
        file = "model" if name in TEXT_ENCODERS else "diffusion_pytorch_model"
        tensors = ema_of(work / ("vae.safetensors" if name == "vae" else "unet.safetensors"), name)
        if name == "vae":
            config = config | json.loads((work / "scaling.json").read_text())
        tensors = {key: tensor.half().contiguous() for key, tensor in tensors.items()}
        (out / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / name / f"{file}.fp16.safetensors", {"format": "pt"})
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "scheduler").mkdir(exist_ok=True)
    for file, key in (("scheduler/scheduler_config", "scheduler"), ("model_index", "model_index")):
        (out / f"{file}.json").write_text(json.dumps(CONFIGS[key], indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    step = metadata(work / "unet.safetensors")["step"]
    return f"packed step {step}, {size / 1e6:.1f} MB with the vocabularies"


def main(argv=None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=("vae", "unet", "pack"))
    text = "in all, earlier runs included (30; 50)"
    parser.add_argument("--minutes", type=cli.POSITIVE, help=text)
    parser.add_argument(
        "--init", type=Path, metavar="FOLDER", help="of a packed miniature that unet starts from"
    )
    parser.add_argument("--lr", type=cli.POSITIVE, help="peak learning rate (1.6e-3)")
    parser.add_argument("--batch", type=cli.COUNT, default=16, help="of the UNet (default: 16)")
    parser.add_argument(
        "--scenes", type=cli.COUNT, default=80000, help="rendered for training (default: 80000)"
    )
    parser.add_argument("--work", type=Path, default=WEIGHTS.parent / "out" / "mini")
    parser.add_argument("--threads", type=cli.COUNT, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.part == "pack":
        print(pack(args.work))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    minutes, lr, _ = DEFAULTS[args.part]
    args.minutes, args.lr = args.minutes or minutes, args.lr or lr
    torch.set_num_threads(args.threads)

    def log(line: str) -> None:
        print(line, flush=True)
        with open(args.work / f"{args.part}.log", "a") as f:
            f.write(line + "\n")

    run = train_vae if args.part == "vae" else train_unet
    run(args, log, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    cli.run(main)
