"""Make the reference tensors with diffusers, transformers and peft; the tests read them without those packages.

    python tests/reference/make.py [NAME ...] [--out DIR]        # all of them take about 40 seconds
    python tests/reference/make.py [NAME ...] --check            # made again elsewhere, are they what is here?

Every file's header holds `seed`, the versions of torch, diffusers, transformers and peft, and with a network's weights
`config`: the config.json that the library wrote beside them. Made twice on one machine the files are equal to
the byte. With torch's scalar code in place of AVX2 the float64 tensors move by 1e-15 (of the largest element),
float32/* and diffusers/* by 1e-6, sigmas/* by 1e-7; inputs, weights, sinusoids and timesteps not at all.

Networks: `weights/NAME` float32, NAME as in the saved folder (text_1 without the prefix `text_model.`, text_2 with it),
all random: biases 0.3 N, norm weights 1 + 0.3 N. `inputs/*` float32; cast network and inputs to float64, then compare
with `outputs/*` (float64) at 1e-9. `float32/*`: the same names, from a float32 run; they are within 2e-6 of outputs.
Time embedding: in diffusers float32 whatever the network is, with each operation in this order and rounded:
exp(float32(-log 10000) * k / half), k = 0 .. half-1, times float32(t); cat[cos, sin]; only then cast to the network's
dtype. Likewise for the six time ids. Another order of operations costs 1e-5. Everything else runs in float64.

text_1 (quick_gelu, width 6, 2 heads), text_2 (gelu, width 9, 3 heads, projection to 10); both 3 layers
  weights/*                  ...embeddings.token_embedding.weight (49411, C) is stored as float16, exactly; rows 49408 to
                             49410 are added tokens. eos_token_id is 49407 in the config
  inputs/ids                 (7, 77) int64. Rows: 0 five words, padded with 0; 1 the same words, padded with 49407; 2 ids
                             49408 and 49410 among words, pad 49407; 3 id 49409 twice, pad 0; 4 no word, pad 49407;
                             5 75 words, no padding; 6 two words, 49407, 49408, a word, 49407, pad 0: the first EOS pools
  outputs/hidden             (7, 77, C) hidden_states[-2], no final LayerNorm
  outputs/pooled             (7, 10) text_2 only: text_embeds
vae (factor 4, 8/16/24 channels, 8 groups, one layer), vae_8 (factor 8, 8/12/16/16 channels, 4 groups, two layers)
  inputs/images              (3, 3, 28, 36), vae_8 (3, 3, 40, 56), in [-1, 1]
  inputs/latents             (3, 4, 7, 9), vae_8 (3, 4, 5, 7); already times scaling_factor, as everywhere in our code
  outputs/mean, std          shape of latents: the raw posterior of encode(images), before scaling_factor
  outputs/mean_scaled, std_scaled    the two times scaling_factor 0.13025: what our vae.encode returns
  outputs/decoded            shape of images: decode(latents / scaling_factor)
                             (one bias of quant_conv is -30, so that the first channel's log-variance is clamped at -30)
unet_a (12/16/24 channels, heads 1/2/4, 4 groups, one layer), unet_b (8/12/20, heads 2/4/5, two layers);
both transformer depth 1/1/3 (none at level 0), context width 15, pooled width 10, addition_time_embed_dim 6
  inputs/I/latents           I = 0: (3, 4, 9, 7), 1: (3, 4, 13, 10), 2: (1, 4, 8, 12)
  inputs/I/t                 (B,) float64: 0: 999, 481, 1; 1: 965.55, 33.25, 0; 2: 501
  inputs/I/context           (B, 77 or 11, 15)
  inputs/I/pooled            (B, 10)
  inputs/I/time_ids          (B, 6) float32, values to 1216
  timestep_embedding/I/t, time_ids     (B, channels[0]) and (6 B, 6) float32: the embeddings before the first Linear, for finding
                             out whether a difference comes from sin and cos of another CPU
  outputs/I                  (B, 4, h, w)
lora: peft on unet_a; header: rank 4, alpha 6 (so dW = 1.5 up @ down), network, inputs
  lora/unet.*.lora.down.weight (4, in), lora.up.weight (out, 4)    to_q, to_k, to_v, to_out.0 of all 30 attentions, named
                             as StableDiffusionXLPipeline.save_lora_weights writes them (it writes no alpha tensors)
  outputs/scale_1.0, scale_0.7       (3, 4, 9, 7) unet_a with the LoRA at that scale on unet_a's inputs/0
  merged/scale_S/LAYER.weight        float64, two layers after fuse_lora(lora_scale=S)

schedule: scaled_linear 0.00085 .. 0.012, 1000 steps, steps_offset 1; N = 1, 7, 16, 20, 25, 30, 40, 50, 999,
  1000 (16: halves, rounded to even)
  alpha_bar, alpha_bar_zero_snr      (1000,) float64, by numpy; the second ends in 0 exactly
  diffusers/alpha_bar, diffusers/alpha_bar_zero_snr  (1000,) float32, DDIM's tables; 1 - alpha_bar is off by 3e-5
  timesteps/SPACING_N        (N,) int64, DDIM and DDPM; Euler's are equal except on linspace. leading_1000 starts at
                             t = 1000, which no table has; leading_1 is [1], linspace_1 is [0]
  timesteps/linspace_fractional_N    (N,) float32, Euler and Euler ancestral
  sigmas/SPACING_N           (N + 1,) float32, Euler, the final 0 included

trajectories, img2img, masked: guidance 5 with unet_a; batch 2; latents (2, 4, 7, 3). Header: `cases` (JSON): per NAME
sampler, spacing, steps, strength, t_start, prediction, zero_snr, exact_zero, masked, from_image, diffusers
  inputs/noise               (2, 4, 7, 3) unit Gaussian: the start, and the noise of Img2Img and of the mask's re-noising
  inputs/z                   (50, 2, 4, 7, 3) unit Gaussian: z[i] is the noise of the i-th step that runs (also in Img2Img)
  inputs/cond/context, cond/pooled, uncond/context, uncond/pooled, time_ids      (2, 9, 15), (2, 10), .., (2, 6)
  inputs/image               (2, 4, 7, 3) known latents (img2img, masked)
  inputs/mask                (2, 1, 7, 3) soft, with zeros and ones; 1 is repainted (masked)
  timesteps/NAME             (n,) float64; those that run
  alpha_bar/NAME             (n + 1,) float64: before every step and at the end (1; for DDIM alpha_bar[0], as published).
                             At fractional t: from sigma interpolated linearly between its neighbours
  x/NAME                     (n + 1, 2, 4, 7, 3) float64, the reference: x_t before every step and the final latents, all
                             variance preserving, after the mask's blend. By the formulas in schedules.py: ours are
                             to agree at 1e-9 in float64, at 1e-5 in float32
  diffusers/NAME             the same in float32, where the case says diffusers: its scheduler.step and float32 network,
                             Euler's x divided by sqrt(1 + sigma^2). Within 2e-6 of x (euler_trailing_v 1e-5)
trajectories: {ddpm, euler, euler_ancestral, ddim_eta0, ddim_eta05, ddim_eta1}_{leading, trailing, linspace}, 30 steps;
  ddim_eta0_trailing_25 (where diffusers' own previous t is on the grid);
  with v-prediction and zero terminal SNR: ddim_eta0_trailing_v, ddim_eta0_trailing_25_v, ddim_eta1_trailing_v,
  euler_trailing_v (alpha_bar[999] = 2^-24, as diffusers' Euler has it), euler_trailing_v_exact (alpha_bar[999] = 0)
img2img: {euler, ddim_eta0}_leading_{50, 30}_{0.3, 0.8} (steps, strength), started from image at timesteps[t_start]
masked: euler_leading_0.8, ddim_eta0_leading_0.8, euler_ancestral_leading_0.5, euler_trailing_0.6 (strength; 30 steps),
  euler_leading_1.0 (starts from noise alone). The blend: the known latents at the level just reached, clean at the end
tokens: see tokens.py
dino, clip_vision (width 12, 2 layers, 3 heads, 3 x 3 patches of 8; clip_vision: projection to 10; eps 0.1 in both)
  inputs/square, wide        (2, 3, 24, 24), (1, 3, 16, 40): normalised pixels; wide takes interpolated positions
  outputs/square, wide       dino: CLS after the last LayerNorm (B, 12); clip_vision: image_embeds (B, 10)
  pictures/tall, wide, square        clip_vision only: (H, W, 3) uint8
  pixels/clip/*, dino/*      (3, 24, 24) float32 by CLIPImageProcessorPil: shorter side 24 (dino: 27, and ImageNet's
                             mean and deviation), of which the centre is cut out
"""

import argparse
import os
from pathlib import Path

NETWORKS = ("text_1", "text_2", "vae", "vae_8", "unet_a", "unet_b", "lora")
VISION = ("dino", "clip_vision")
NAMES = (*NETWORKS, *VISION, "schedule", "trajectories", "img2img", "masked", "tokens")


def make(name, out):
    if name == "tokens":
        from tokens import make_tokens

        return make_tokens(out / "tokens.safetensors")
    if name in VISION:
        import vision

        return getattr(vision, "make_" + name)(out / f"{name}.safetensors")
    import networks
    import schedules
    import trajectories

    module = networks if name in NETWORKS else schedules if name == "schedule" else trajectories
    getattr(module, "make_" + name)(out / f"{name}.safetensors")


def differing(made, kept):
    """Names of tensors that differ: float64 by more than 1e-11 of the largest element, float32 by 5e-6, all else at all."""
    from safetensors.torch import load_file

    new, old = load_file(made), load_file(kept)
    tolerance = {"torch.float64": 1e-11, "torch.float32": 5e-6}
    wrong = sorted(new.keys() ^ old.keys())
    for name in new.keys() & old.keys():
        a, b = new[name], old[name]
        if (
            a.shape != b.shape
            or (a.double() - b.double()).abs().max()
            > tolerance.get(str(b.dtype), 0) * b.double().abs().max()
        ):
            wrong.append(name)
    return wrong


def check(names):
    """Make them in a temporary folder and compare; the exit status."""
    import tempfile

    wrong = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            make(name, Path(folder))
            wrong[name] = differing(
                Path(folder) / f"{name}.safetensors", Path(__file__).parent / f"{name}.safetensors"
            )
            print(
                f"{name}: "
                + (f"differs in {', '.join(wrong[name][:5])}" if wrong[name] else "the same")
            )
    return int(any(wrong.values()))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what to make: " + ", ".join(NAMES) + " (all)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent,
        help="folder for the files",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, compare with the files that are there"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"no reference is called {unknown[0]}; there are {', '.join(NAMES)}")
    os.environ |= {
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    import torch

    # the order of additions, and so the last bit, depends on the number of threads
    torch.set_num_threads(1)
    if args.check:
        return check(args.names or NAMES)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or NAMES:
        make(name, args.out)
    files = sorted(args.out.glob("*.safetensors"))
    print(
        f"{args.out}: {', '.join(f'{f.name} {f.stat().st_size / 1e6:.2f}' for f in files)};"
        f" {sum(f.stat().st_size for f in files) / 1e6:.2f} MB in all"
    )


if __name__ == "__main__":
    raise SystemExit(main())
