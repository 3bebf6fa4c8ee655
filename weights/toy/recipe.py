"""How weights/mini was made: an SDXL in miniature, trained from nothing on the toy world.

    python -m weights.toy.recipe vae        first the VAE: it fixes what the latents are
    python -m weights.toy.recipe unet       then the UNet with both text encoders, on the VAE's latents
    python -m weights.toy.recipe pack       write the EMA in half precision to weights/mini
    python -m weights.toy.recipe unpack     the way back: states in --work from weights/mini, to go on training what ships

vae and unet go on from their last state in --work, on CUDA where there is one; their logs are vae.log and unet.log there.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from alchemy import cli
from alchemy.clip import TextConfig, TextEncoder
from alchemy.schedule import Schedule
from alchemy.tokenizer import Tokenizer
from alchemy.unet import UNet, UNetConfig
from alchemy.vae import VAE, VAEConfig

from . import WEIGHTS, world
from .checkpoint import CONFIGS, SCHEDULER, pack, unpack
from .state import FLAT, State, train


def pixels(scenes, device):
    """Scenes to (B,3,H,W) in [-1,1]."""
    return (
        torch.stack([torch.from_numpy(s.image) for s in scenes])
        .permute(0, 3, 1, 2)
        .to(device)
        .float()
        / 127.5
        - 1
    )


def edges(x):
    return torch.cat([x.diff(dim=-2).flatten(1), x.diff(dim=-1).flatten(1)], dim=1)


def crops(step, count, side):
    """count crops (B,3,side,side) in [-1,1] of training scenes, two of each scene."""
    scenes = pixels([world.scene(step * 64 + i) for i in range(max(1, count // 2))], "cpu")
    corners = torch.randint(
        0, 129 - side, (count, 2), generator=torch.Generator().manual_seed(step)
    ).tolist()
    return torch.stack(
        [scenes[i % len(scenes), :, y : y + side, x : x + side] for i, (y, x) in enumerate(corners)]
    )


def train_vae(args, log, device):
    vae = VAE(VAEConfig.from_config(CONFIGS["vae"])).to(device, memory_format=torch.channels_last)
    state = State({"vae": vae}, args.work / "vae.safetensors", args.lr, 0.999)
    if args.decoder_only:  # what a UNet has learned on these latents, the EMA's, stays true
        state.use_ema()
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def loss_of(step):
        # Mostly small crops; now and then whole pictures go through the attention.
        x = crops(step, *((max(1, args.batch // 4), 128) if step % 16 == 0 else (args.batch, 64)))
        generator = torch.Generator().manual_seed(step)
        x = x.to(device).contiguous(memory_format=torch.channels_last)
        with bfloat16(device):
            mean, std = (part.float() for part in vae.encode(x))
            y = vae.decode(
                mean + std * torch.randn(mean.shape, generator=generator).to(device)
            ).float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        # The differences of neighbours keep edges sharp; squares alone would rather blur them.
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * F.l1_loss(edges(y), edges(x)) + 3e-4 * kl

    train(state, args.minutes, args.lr, loss_of, log)
    state.use_ema()
    with torch.no_grad():
        x = pixels([world.scene(world.FRESH + i) for i in range(64)], device)
        mean, std = vae.encode(x)
        psnr = (
            -10
            * torch.log10(((vae.decode(mean) - x).clamp(-2, 2) / 2).square().mean((1, 2, 3))).mean()
        )
    log(
        f"PSNR {psnr:.2f} dB on 64 fresh scenes; latents: std {mean.std():.4f}, posterior std {std.mean():.4f}"
    )
    if not args.decoder_only:
        (args.work / "scaling.json").write_text(
            json.dumps({"scaling_factor": round(1 / float(mean.std()), 5)})
        )


class Pool:
    """Scenes of one size as latents, each used several times: drawing and encoding one costs a third of a training sample."""

    def __init__(self, vae, size, seed, device, most=20000):
        self.vae, self.size, self.next, self.device, self.most, self.items = (
            vae,
            size,
            seed,
            device,
            most,
            [],
        )

    @torch.no_grad()
    def grow(self, count):
        """count fresh scenes: two thirds drawn at the size, the others larger and cropped, which the UNet is told."""
        scenes, told = [], []
        for _ in range(count):
            rng = torch.Generator().manual_seed(self.next)
            cut = torch.rand((), generator=rng) < 0.33
            h, w = (int(side * 1.25) // 4 * 4 if cut else side for side in self.size)
            top, left = (
                int(torch.randint(extra // 4 + 1, (), generator=rng)) * 4
                for extra in (h - self.size[0], w - self.size[1])
            )
            scene = world.scene(self.next, size=(h, w))
            window = slice(top, top + self.size[0]), slice(left, left + self.size[1])
            scenes.append(torch.from_numpy(scene.image[window].copy()))
            alpha = torch.from_numpy(sum(mask for _, _, mask in scene.objects)[window].copy())
            told.append(
                (F.avg_pool2d(alpha[None], 4).half(), scene.caption, [h, w, top, left, *self.size])
            )
            self.next += 1
        x = torch.stack(scenes).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        mean, std = (
            part.half().cpu()
            for part in self.vae.encode(x.contiguous(memory_format=torch.channels_last))
        )
        self.items = (
            self.items + [(m, s, *what) for m, s, what in zip(mean, std, told, strict=False)]
        )[-self.most :]

    def draw(self, count, generator):
        chosen = [
            self.items[i]
            for i in torch.randint(len(self.items), (count,), generator=generator).tolist()
        ]
        mean, std, alpha, captions, time_ids = zip(*chosen, strict=False)
        mean, std, alpha = (torch.stack(part).float() for part in (mean, std, alpha))
        x = mean + std * torch.randn(mean.shape, generator=generator)
        return (
            x.to(self.device),
            alpha.to(self.device),
            captions,
            torch.tensor(time_ids).float().to(self.device),
        )


def fresh_networks(device):
    """UNet and text encoders; what ends a branch starts at zero, so that the first prediction is none at all."""
    torch.manual_seed(0)
    modules = {
        "unet": UNet(UNetConfig.from_config(CONFIGS["unet"])),
        "text_encoder": TextEncoder(TextConfig.from_config(CONFIGS["text_encoder"])),
        "text_encoder_2": TextEncoder(
            TextConfig.from_config(CONFIGS["text_encoder_2"]), projection=True
        ),
    }
    for name, p in modules["unet"].named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")) or name.startswith("conv_out"):
            torch.nn.init.zeros_(p)
    for name in ("text_encoder", "text_encoder_2"):
        for embedding in modules[name].text_model.embeddings.children():
            torch.nn.init.normal_(embedding.weight, std=0.05)
    return {name: m.to(device, memory_format=torch.channels_last) for name, m in modules.items()}


@contextmanager
def bfloat16(device):
    """Autocast, except for attention on CPUs: its backward pass is several times slower there than in float32."""
    attention, on_cpu = F.scaled_dot_product_attention, device.type == "cpu"
    if on_cpu and not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        yield  # such a processor would only emulate it
        return

    def in_float32(q, k, v, **options):
        with torch.autocast(device.type, enabled=False):
            return attention(q.float(), k.float(), v.float(), **options)

    try:
        F.scaled_dot_product_attention = in_float32 if on_cpu else attention
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        F.scaled_dot_product_attention = attention


def trained_vae(args, device):
    if not (args.work / "scaling.json").exists():
        raise ValueError(f"{args.work}: no trained VAE there: run the part vae first, or unpack")
    vae = VAE(
        VAEConfig.from_config(CONFIGS["vae"] | json.loads((args.work / "scaling.json").read_text()))
    )
    tensors = load_file(args.work / "vae.safetensors")
    vae.load_state_dict(
        {k.removeprefix("ema.vae."): v for k, v in tensors.items() if k.startswith("ema.")}
    )
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def train_unet(args, log, device):
    vae, modules = trained_vae(args, device), fresh_networks(device)
    state = State(modules, args.work / "unet.safetensors", args.lr, 0.999)
    tokenizers = [
        Tokenizer.from_folder(WEIGHTS / "mini" / name) for name in ("tokenizer", "tokenizer_2")
    ]
    schedule = Schedule.from_config(SCHEDULER)
    # A stream of seeds for each size, and none twice after a restart. Small pictures first: they cost a quarter.
    pools = {
        size: Pool(vae, size, (k << 32) + args.batch * state.step, device)
        for k, size in enumerate([(64, 64), (128, 128), (112, 144), (144, 112), (96, 96)])
    }

    def loss_of(step):
        rng = torch.Generator().manual_seed(step)
        late = state.seconds > args.small * 60 * args.minutes
        pick = float(torch.rand((), generator=rng))
        size = (
            (
                (128, 128)
                if pick < 0.7
                else (112, 144)
                if pick < 0.78
                else (144, 112)
                if pick < 0.86
                else (96, 96)
            )
            if late
            else ((64, 64) if pick < 0.9 else (96, 96))
        )
        count = max(1, args.batch * 64 * 64 // (size[0] * size[1])) * (2 if late else 1)
        pool = pools[size]
        pool.grow(count if len(pool.items) < 32 * count else -(-count // 4))
        x_0, alpha, captions, time_ids = pool.draw(count, rng)

        # Captions: one in ten is dropped to zeros, three in a hundred are empty, so that both kinds of unconditional are learned.
        lot = torch.rand(count, generator=rng)
        captions = ["" if 0.10 <= lot[i] < 0.13 else c for i, c in enumerate(captions)]
        ids = [
            torch.tensor([tokenizer(c) for c in captions], device=device)
            for tokenizer in tokenizers
        ]
        keep = (lot >= 0.10).to(device)

        eps = torch.randn(x_0.shape, generator=rng).to(device)
        t = (
            ((torch.arange(count) + torch.rand(count, generator=rng)) * 1000 / count)
            .long()
            .clamp(max=999)
        )  # spread evenly: a steadier gradient
        weight = (5 / schedule.snr(t)).clamp(max=1).float().to(device)  # min-SNR with gamma 5
        x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        with bfloat16(device):
            (first, _), (second, pooled) = (
                modules[name](i)
                for name, i in zip(("text_encoder", "text_encoder_2"), ids, strict=False)
            )
            context = torch.cat([first, second], dim=-1) * keep[:, None, None]
            prediction = modules["unet"](
                x_t, t.to(device), context, pooled * keep[:, None], time_ids
            )
        # Objects are a sixth of a picture and most of what there is to learn: they count threefold, until the learning rate falls.
        objects = (
            1 + 2 * alpha if state.seconds < FLAT * 60 * args.minutes else torch.ones_like(alpha)
        )
        error = ((prediction.float() - eps).square() * objects).mean((1, 2, 3)) / objects.mean(
            (1, 2, 3)
        )
        return (weight * error).mean()

    train(state, args.minutes, args.lr, loss_of, log)


DEFAULTS = {
    "vae": {"minutes": 24, "batch": 16},
    "unet": {"minutes": 97, "batch": 32},
}  # as weights/mini was made, see README.md there


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=("vae", "unet", "pack", "unpack"))
    parser.add_argument(
        "--minutes",
        type=cli.POSITIVE,
        help="of training in all, earlier runs counted in (default: 24, 97)",
    )
    parser.add_argument(
        "--batch",
        type=cli.COUNT,
        help="crops of 64 pixels (default: 16), pictures of 64 pixels (default: 32; half as many later)",
    )
    parser.add_argument("--lr", type=cli.POSITIVE, default=1e-3, help="at its peak (default: 1e-3)")
    parser.add_argument(
        "--small",
        type=cli.SHARE,
        help="share of the UNet's time on small pictures, before the others (default: 0.3; 0 to go on)",
    )
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="train the VAE's decoder on the latents as they are",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=WEIGHTS.parent / "out" / "mini",
        help="folder of states and logs (default: out/mini)",
    )
    parser.add_argument("--threads", type=cli.COUNT, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.decoder_only and args.part != "vae" or args.small is not None and args.part != "unet":
        raise ValueError("--decoder-only is of the VAE, --small of the UNet")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part in ("pack", "unpack"):
        return print({"pack": pack, "unpack": unpack}[args.part](args.work))
    args.small = 0.3 if args.small is None else args.small
    for key, value in DEFAULTS[args.part].items():
        setattr(args, key, getattr(args, key) or value)
    torch.set_num_threads(args.threads)

    def log(line):
        print(line, flush=True)
        with open(args.work / f"{args.part}.log", "a") as f:
            f.write(line + "\n")

    {"vae": train_vae, "unet": train_unet}[args.part](
        args, log, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


if __name__ == "__main__":
    cli.run(main)
