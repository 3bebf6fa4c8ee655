"""A checkpoint in use: its networks, read when needed, and the prompt's way to what the UNet is told."""

import warnings
from dataclasses import dataclass

import torch

from . import defaults


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told: context (B,77,C), pooled (B,P), time_ids (B,6) float32 (see UNet.forward)."""

    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor

    def parts(self):
        return self.context, self.pooled, self.time_ids

    @staticmethod
    def cat(several):
        return Conditioning(*(torch.cat(parts) for parts in zip(*(c.parts() for c in several))))


def to_device(x, device):
    """x on the device; on CUDA, nobody waits: the copy is from pinned memory, and takes its turn there."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda" and not x.is_cuda
        else x.to(device)
    )


class SDXL:
    """A checkpoint. tokenizers and text_encoders are pairs; unet, vae, schedule. What is not in memory yet is read on first use."""

    def __init__(
        self, source, read, configs, tokenizers, schedule, device, dtype, zeros_for_none=True
    ):
        """read(name, dtype): the network of that name, filled. zeros_for_none: see encode_prompt."""
        self.source, self.read, self.configs, self.tokenizers, self.schedule = (
            source,
            read,
            configs,
            tokenizers,
            schedule,
        )
        self.device, self.dtype, self.zeros_for_none = device, dtype, zeros_for_none
        self.loaded = {}

    def network(self, name):
        if name not in self.loaded:
            # The official VAE's activations overflow float16, and its config says so.
            unsafe = (
                name == "vae" and self.dtype == torch.float16 and self.configs[name].force_upcast
            )
            self.loaded[name] = self.read(name, torch.float32 if unsafe else self.dtype)
        return self.loaded[name]

    unet = property(lambda self: self.network("unet"))
    vae = property(lambda self: self.network("vae"))
    text_encoders = property(
        lambda self: (self.network("text_encoder"), self.network("text_encoder_2"))
    )

    def named_modules(self):
        """(dotted name, module) over the networks in memory: unet.down_blocks.0.…, text_encoder.text_model.…"""
        for name, network in self.loaded.items():
            yield from network.named_modules(prefix=name)

    def free(self, name):
        """Drop "unet", "vae" or "text_encoders" from memory; it is read again when next used (without adapters)."""
        for part in ("text_encoder", "text_encoder_2") if name == "text_encoders" else (name,):
            self.loaded.pop(part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def defaults(self):
        """The column of defaults.TABLE for this checkpoint."""
        return defaults.column(
            "mini" if self.configs["unet"].block_out_channels[0] < 320 else "sdxl"
        )

    @property
    def vae_scale_factor(self):  # pixels per latent along a side
        return 2 ** (len(self.configs["vae"].block_out_channels) - 1)

    @property
    def size(self):
        """(H, W) in pixels that the checkpoint was trained to draw."""
        return (self.configs["unet"].sample_size * self.vae_scale_factor,) * 2

    def encode_prompt(self, prompts, size=None, *, original=None, crop=(0, 0)):
        """Prompts to Conditioning, on the device. None as a prompt is zeros, as SDXL base was trained; "" is encoded.

        size: (H, W) of the picture wanted; original: (H, W) of the picture it is cut from (size, if None), crop: its (top, left).
        A prompt of more than 77 tokens is cut, with a warning that names the lost words.
        """
        size = size or self.size
        for prompt in prompts:
            lost = prompt and self.tokenizers[0].truncated_text(prompt)
            if lost:
                warnings.warn(f"prompt too long, these words are lost: {lost!r}", stacklevel=2)
        ids = [
            to_device(torch.tensor([tokenizer(prompt or "") for prompt in prompts]), self.device)
            for tokenizer in self.tokenizers
        ]
        (first, _), (second, pooled) = (encoder(i) for encoder, i in zip(self.text_encoders, ids))
        for name, x in (
            ("first text encoder's context", first),
            ("second text encoder's context", second),
            ("pooled vector", pooled),
        ):
            if (
                not x.requires_grad and not x.isfinite().all()
            ):  # of what learns, the training loop looks at the loss
                raise FloatingPointError(
                    f"the {name} became NaN or infinite: is a LoRA or an embedding damaged? If not, use --dtype bfloat16 or float32"
                )
        keep = to_device(
            torch.tensor([prompt is not None or not self.zeros_for_none for prompt in prompts]),
            self.device,
        )
        context = torch.cat([first, second], dim=-1) * keep[:, None, None]  # (B, 77, 768 + 1280)
        time_ids = to_device(
            torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32), self.device
        )
        return Conditioning(context, pooled * keep[:, None], time_ids.expand(len(prompts), -1))
