"""How weights/mini was made: an SDXL in miniature, trained from nothing on the toy world.

    python weights/recipe.py vae  --minutes 24     first the VAE: it fixes what the latents are
    python weights/recipe.py unet --minutes 90     then the UNet with both text encoders, on the VAE's latents
    python weights/recipe.py pack                  write the EMA in half precision to weights/mini
    python weights/recipe.py unpack                the way back: states in --work from weights/mini, to go on training what ships

Each goes on from its last state in --work, on CUDA where there is one. The log of each is --work/vae.log and unet.log.
"""
import argparse
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from alchemy.schedule import Schedule  # noqa: E402
from alchemy.text import TextConfig, TextEncoder  # noqa: E402
from alchemy.tokenizer import Tokenizer  # noqa: E402
from alchemy.unet import UNet, UNetConfig  # noqa: E402
from alchemy.vae import VAE, VAEConfig  # noqa: E402
from miniature import CONFIGS, SCHEDULER, header_of, pack, unpack  # noqa: E402
import world  # noqa: E402


class State:
    """Modules under training with their EMA and optimizer; saved as safetensors, the old file replaced in one rename."""

    def __init__(self, modules, path, lr, decay):
        self.modules, self.path, self.decay, self.step, self.seconds = modules, Path(path), decay, 0, 0.0
        self.parameters = {f"{n}.{k}": p for n, m in modules.items() for k, p in m.named_parameters()}
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        if self.path.exists():
            self.load()

    def update(self, loss, lr):
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - keep)

    def save(self):
        tensors = {f"weights.{k}": p.detach() for k, p in self.parameters.items()} | {f"ema.{k}": v for k, v in self.ema.items()}
        for k, p in self.parameters.items():
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"{m}.{k}": moments[m] for m in ("exp_avg", "exp_avg_sq") if m in moments}
        tensors = {k: v.contiguous() for k, v in tensors.items()}  # channels_last is not for files
        new = self.path.with_suffix(".new")
        save_file(tensors, new, {"step": str(self.step), "seconds": str(self.seconds)})
        new.replace(self.path)

    @torch.no_grad()
    def load(self):
        tensors, header = load_file(self.path), header_of(self.path)
        self.step, self.seconds = int(header["step"]), float(header["seconds"])
        for k, p in self.parameters.items():
            p.copy_(tensors[f"weights.{k}"])
            self.ema[k].copy_(tensors[f"ema.{k}"])
            if f"exp_avg.{k}" in tensors:
                self.optimizer.state[p] = {m: tensors[f"{m}.{k}"].to(p) for m in ("exp_avg", "exp_avg_sq")} | {
                    "step": torch.tensor(float(self.step))}


FLAT = 0.6  # of the time the learning rate stays at its peak, then it falls linearly


def learning_rate(seconds, total, peak, warmup=60):
    return peak * min(1.0, (1 + seconds) / warmup, max(0.02, (total - seconds) / ((1 - FLAT) * total)))


def train(state, minutes, peak, loss_of, log):
    """Until the time is spent: loss_of(step) -> a scalar; a line every 50 updates, a state every 5 minutes and when interrupted."""
    total, before, mean = 60 * minutes, state.seconds, None
    start = saved = time.time()
    try:
        while state.seconds < total:
            loss = loss_of(state.step)
            if not loss.isfinite():
                raise FloatingPointError(f"loss is not finite at step {state.step}; the last good state is {state.path}")
            state.update(loss, learning_rate(state.seconds, total, peak))
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            state.seconds = before + time.time() - start
            if state.step % 50 == 0:
                log(f"step {state.step} loss {mean:.4f} at {state.seconds:.0f} of {total:.0f} s")
            if time.time() - saved > 300:
                state.save()
                saved = time.time()
    except KeyboardInterrupt:  # it may have come in the middle of an update, which EMA and Adam forgive
        log(f"interrupted at step {state.step}; the same command goes on")
        state.save()
        raise SystemExit(130) from None
    state.save()


def pixels(scenes, device):
    """Scenes to (B,3,H,W) in [-1,1]."""
    return torch.stack([torch.from_numpy(s.image) for s in scenes]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1


def edges(x):
    return torch.cat([x.diff(dim=-2).flatten(1), x.diff(dim=-1).flatten(1)], dim=1)


def train_vae(args, log, device):
    vae = VAE(VAEConfig.from_config(CONFIGS["vae"])).to(device, memory_format=torch.channels_last)
    state = State({"vae": vae}, args.work / "vae.safetensors", args.lr, 0.999)
    for part in (vae.encoder, vae.quant_conv) if args.decoder_only else ():
        part.requires_grad_(False)  # what a UNet has learned on these latents stays true

    def loss_of(step):
        # Mostly crops, two of each scene; now and then whole pictures go through the attention.
        generator = torch.Generator().manual_seed(step)
        side, count = (128, args.batch // 4) if step % 16 == 0 else (64, args.batch)
        scenes = pixels([world.scene(step * 64 + i) for i in range(max(1, count // 2))], device)
        corners = torch.randint(0, 129 - side, (count, 2), generator=generator).tolist()
        x = torch.stack([scenes[i % len(scenes), :, y:y + side, x:x + side] for i, (y, x) in enumerate(corners)])
        x = x.contiguous(memory_format=torch.channels_last)
        mean, std = vae.encode(x)
        y = vae.decode(mean + std * torch.randn(mean.shape, generator=generator).to(device))
        kl = 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
        # The differences of neighbours keep edges sharp; squares alone would rather blur them.
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * F.l1_loss(edges(y), edges(x)) + 3e-4 * kl

    train(state, args.minutes, args.lr, loss_of, log)
    with torch.no_grad():
        for k, p in state.parameters.items():
            p.copy_(state.ema[k])
        x = pixels([world.scene(2 ** 40 + i) for i in range(64)], device)
        mean, std = vae.encode(x)
        psnr = -10 * torch.log10(((vae.decode(mean) - x).clamp(-2, 2) / 2).square().mean((1, 2, 3))).mean()
    log(f"PSNR {psnr:.2f} dB on 64 fresh scenes; latents: std {mean.std():.4f}, posterior std {std.mean():.4f}")
    if not args.decoder_only:
        (args.work / "scaling.json").write_text(json.dumps({"scaling_factor": round(1 / float(mean.std()), 5)}))


class Pool:
    """Scenes of one size as latents, each used several times: drawing and encoding one costs a third of a training sample."""

    def __init__(self, vae, size, seed, device, most=20000):
        self.vae, self.size, self.next, self.device, self.most, self.items = vae, size, seed, device, most, []

    @torch.no_grad()
    def grow(self, count):
        """count fresh scenes: two thirds drawn at the size, the others larger and cropped, which the UNet is told."""
        scenes, told = [], []
        for _ in range(count):
            rng = torch.Generator().manual_seed(self.next)
            cut = torch.rand((), generator=rng) < 0.33
            h, w = (int(side * 1.25) // 4 * 4 if cut else side for side in self.size)
            top, left = (int(torch.randint(extra // 4 + 1, (), generator=rng)) * 4 for extra in (h - self.size[0], w - self.size[1]))
            scene = world.scene(self.next, size=(h, w))
            window = slice(top, top + self.size[0]), slice(left, left + self.size[1])
            scenes.append(torch.from_numpy(scene.image[window].copy()))
            alpha = torch.from_numpy(sum(mask for _, _, mask in scene.objects)[window].copy())
            told.append((F.avg_pool2d(alpha[None], 4).half(), scene.caption, [h, w, top, left, *self.size]))
            self.next += 1
        x = torch.stack(scenes).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        mean, std = (part.half().cpu() for part in self.vae.encode(x.contiguous(memory_format=torch.channels_last)))
        self.items = (self.items + [(m, s, *what) for m, s, what in zip(mean, std, told)])[-self.most:]

    def draw(self, count, generator):
        chosen = [self.items[i] for i in torch.randint(len(self.items), (count,), generator=generator).tolist()]
        mean, std, alpha, captions, time_ids = zip(*chosen)
        mean, std, alpha = (torch.stack(part).float() for part in (mean, std, alpha))
        x = mean + std * torch.randn(mean.shape, generator=generator)
        return x.to(self.device), alpha.to(self.device), captions, torch.tensor(time_ids).float().to(self.device)


def fresh_networks(device):
    """UNet and text encoders; what ends a branch starts at zero, so that the first prediction is none at all."""
    torch.manual_seed(0)
    modules = {"unet": UNet(UNetConfig.from_config(CONFIGS["unet"])),
               "text_encoder": TextEncoder(TextConfig.from_config(CONFIGS["text_encoder"])),
               "text_encoder_2": TextEncoder(TextConfig.from_config(CONFIGS["text_encoder_2"]), projection=True)}
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
    attention = F.scaled_dot_product_attention

    def in_float32(q, k, v, **options):
        with torch.autocast(device.type, enabled=False):
            return attention(q.float(), k.float(), v.float(), **options)

    try:
        F.scaled_dot_product_attention = attention if device.type == "cuda" else in_float32
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()):
            yield
    finally:
        F.scaled_dot_product_attention = attention


def trained_vae(args, device):
    vae = VAE(VAEConfig.from_config(CONFIGS["vae"] | json.loads((args.work / "scaling.json").read_text())))
    tensors = load_file(args.work / "vae.safetensors")
    vae.load_state_dict({k.removeprefix("ema.vae."): v for k, v in tensors.items() if k.startswith("ema.")})
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def train_unet(args, log, device):
    vae, modules = trained_vae(args, device), fresh_networks(device)
    state = State(modules, args.work / "unet.safetensors", args.lr, 0.999)
    tokenizers = [Tokenizer.from_folder(HERE / "mini" / name) for name in ("tokenizer", "tokenizer_2")]
    schedule = Schedule.from_config(SCHEDULER)
    # A stream of seeds for each size, and none twice after a restart. Small pictures first: they cost a quarter.
    pools = {size: Pool(vae, size, (k << 32) + 40 * state.step, device)
             for k, size in enumerate([(64, 64), (128, 128), (112, 144), (144, 112), (96, 96)])}

    def loss_of(step):
        rng = torch.Generator().manual_seed(step)
        late = state.seconds > args.small * 60 * args.minutes
        pick = float(torch.rand((), generator=rng))
        size = ((128, 128) if pick < 0.7 else (112, 144) if pick < 0.78 else (144, 112) if pick < 0.86 else (96, 96)) if late else (
            (64, 64) if pick < 0.9 else (96, 96))
        count = max(1, args.batch * 64 * 64 // (size[0] * size[1])) * (2 if late else 1)
        pool = pools[size]
        pool.grow(count if len(pool.items) < 32 * count else -(-count // 4))
        x_0, alpha, captions, time_ids = pool.draw(count, rng)

        # Captions: one in ten is dropped to zeros, three in a hundred are empty, so that both kinds of unconditional are learned.
        lot = torch.rand(count, generator=rng)
        captions = ["" if 0.10 <= lot[i] < 0.13 else c for i, c in enumerate(captions)]
        ids = [torch.tensor([tokenizer(c) for c in captions], device=device) for tokenizer in tokenizers]
        keep = (lot >= 0.10).to(device)

        eps = torch.randn(x_0.shape, generator=rng).to(device)
        t = ((torch.arange(count) + torch.rand(count, generator=rng)) * 1000 / count).long()  # spread evenly: a steadier gradient
        weight = (5 / schedule.snr(t)).clamp(max=1).float().to(device)  # min-SNR with gamma 5
        x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        with bfloat16(device):
            (first, _), (second, pooled) = (modules[name](i) for name, i in zip(("text_encoder", "text_encoder_2"), ids))
            context = torch.cat([first, second], dim=-1) * keep[:, None, None]
            prediction = modules["unet"](x_t, t.to(device), context, pooled * keep[:, None], time_ids)
        # Objects are a sixth of a picture and most of what there is to learn: they count threefold, until the learning rate falls.
        objects = 1 + 2 * alpha if state.seconds < FLAT * 60 * args.minutes else torch.ones_like(alpha)
        error = ((prediction.float() - eps).square() * objects).mean((1, 2, 3)) / objects.mean((1, 2, 3))
        return (weight * error).mean()

    train(state, args.minutes, args.lr, loss_of, log)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "unet", "pack", "unpack"))
    parser.add_argument("--minutes", type=float, default=60, help="of training in all, earlier runs counted in")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--small", type=float, default=0.6, help="share of the UNet's time that is spent on small pictures, before the others")
    parser.add_argument("--decoder-only", action="store_true", help="train the VAE's decoder on the latents as they are")
    parser.add_argument("--work", type=Path, default=HERE.parent / "out" / "mini", help="folder of states and logs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def log(line):
        print(line, flush=True)
        with open(args.work / f"{args.part}.log", "a") as f:
            f.write(line + "\n")

    if args.part in ("pack", "unpack"):
        log({"pack": pack, "unpack": unpack}[args.part](args.work))
    else:
        {"vae": train_vae, "unet": train_unet}[args.part](args, log, device)


if __name__ == "__main__":
    main()
