"""A checkpoint in use: its networks, loaded on first use, and prompts to conditioning."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import defaults
from .images import Size
from .lora import layers
from .schedule import Schedule
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Conditioning:
    """The UNet's conditioning: context (B,77,C), pooled (B,P), time_ids (B,6) float32."""

    context: Tensor
    pooled: Tensor
    time_ids: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.context, self.pooled, self.time_ids

    def to(self, device: torch.device | str) -> "Conditioning":
        return Conditioning(*(to_device(part, device) for part in self.parts()))

    @staticmethod
    def cat(several: Sequence["Conditioning"]) -> "Conditioning":
        """The batches of several, one after the other."""
        return Conditioning(
            torch.cat([each.context for each in several]),
            torch.cat([each.pooled for each in several]),
            torch.cat([each.time_ids for each in several]),
        )

    def at_size(
        self,
        size: Size,
        original: Size | None = None,
        crop: Size = (0, 0),
    ) -> "Conditioning":
        """The same prompts for an image of another size (H, W).

        original: (H, W) of the image that it is cropped from (None: size); crop: top and left of
        that crop. All in pixels.
        """
        # Height before width, original before crop before target; bfloat16 would round them.
        time_ids = torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32)
        time_ids = to_device(time_ids, self.context.device)
        time_ids = time_ids.expand(len(self.context), -1)
        return replace(self, time_ids=time_ids)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. To CUDA asynchronously, from pinned memory, so that the CPU goes on."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def check_finite(x: Tensor, name: str) -> None:
    # While an encoder is trained, the training loop checks the loss instead.
    if not x.requires_grad and not x.isfinite().all():
        raise FloatingPointError(
            f"the {name} became NaN or infinite: is a LoRA or an embedding damaged? "
            "If not, use --dtype bfloat16 or float32"
        )


class SDXL:
    """A checkpoint: unet, vae, text_encoders and tokenizers (pairs), schedule.

    read(name, dtype) returns the network of that name, with its weights; it is called on first
    use. zeros_for_none: see encode_prompt. `loaded` holds the networks in memory by name.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[str, torch.dtype], nn.Module],
        configs: dict[str, Any],
        tokenizers: Sequence[Tokenizer],
        schedule: Schedule,
        device: torch.device,
        dtype: torch.dtype,
        zeros_for_none: bool = True,
    ):
        self.source = source
        self.read = read
        self.configs = configs
        self.tokenizers = tokenizers
        self.schedule = schedule
        self.device = device
        self.dtype = dtype
        self.zeros_for_none = zeros_for_none
        self.loaded: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        loras = {}
        for layer in layers(self).values():
            loras |= dict.fromkeys(layer.lora)
        parts = [f"networks in memory: {', '.join(self.loaded) or 'none'}"]
        if loras:
            parts.append(f"LoRAs: {', '.join(loras)}")
        return f"SDXL({self.source!r}, {dtype} on {self.device}; {'; '.join(parts)})"

    def network(self, name: str) -> nn.Module:
        """The network "unet", "vae", "text_encoder" or "text_encoder_2"."""
        if name not in self.loaded:
            # The official VAE's activations overflow float16, and its config says so.
            upcast = name == "vae" and self.configs[name].force_upcast
            in_float32 = upcast and self.dtype == torch.float16
            self.loaded[name] = self.read(name, torch.float32 if in_float32 else self.dtype)
        return self.loaded[name]

    @property
    def unet(self) -> nn.Module:
        return self.network("unet")

    @property
    def vae(self) -> nn.Module:
        return self.network("vae")

    @property
    def text_encoders(self) -> tuple[nn.Module, nn.Module]:
        return self.network("text_encoder"), self.network("text_encoder_2")

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(dotted name, module) of the networks in memory: unet.down_blocks.0…, text_encoder.…"""
        for name, network in self.loaded.items():
            yield from network.named_modules(prefix=name)

    def free(self, name: str) -> None:
        """Drop "unet", "vae" or "text_encoders" from memory.

        The network is read again when next used, without adapters.
        """
        names = ("text_encoder", "text_encoder_2") if name == "text_encoders" else (name,)
        for part in names:
            self.loaded.pop(part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def defaults(self) -> dict[str, Any]:
        """The column of defaults.TABLE for this checkpoint."""
        is_mini = self.configs["unet"].block_out_channels[0] < 320
        return defaults.column("mini" if is_mini else "sdxl")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.configs["vae"].block_out_channels) - 1)

    @property
    def size(self) -> Size:
        """(H, W) in pixels that the checkpoint was trained to generate."""
        side = self.configs["unet"].sample_size * self.vae_scale_factor
        return side, side

    def encode_prompt(
        self, prompts: Sequence[str | None], size: Size | None = None
    ) -> Conditioning:
        """B prompts to Conditioning, on the device, for images of size (H, W) in pixels.

        None as a prompt is zeros, as SDXL base was trained and released; "" is encoded.
        A prompt longer than 75 tokens is cut, with a warning that quotes the words left out.
        Raises ValueError for one prompt that is not in a list, and for what is no text.
        """
        if not isinstance(prompts, (list, tuple)):
            raise ValueError(f"encode_prompt takes a list of prompts: [{prompts!r:.42}]")
        for prompt in prompts:
            if not isinstance(prompt, str | None):
                raise ValueError(f"a prompt is a text or None, not {prompt!r:.60}")
            rest = self.tokenizers[0].truncated_text(prompt or "")
            if rest:
                warnings.warn(f"prompt too long, these words are cut off: {rest!r}", stacklevel=2)

        # Both encoders; each tokenizer pads in its own way.
        outputs = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = torch.tensor([tokenizer(prompt or "") for prompt in prompts])
            outputs.append(encoder(to_device(ids, self.device)))
        (first, _), (second, pooled) = outputs
        check_finite(first, "first text encoder's context")
        check_finite(second, "second text encoder's context")
        check_finite(pooled, "pooled vector")

        # Zeros for None.
        keep = [prompt is not None or not self.zeros_for_none for prompt in prompts]
        keep = to_device(torch.tensor(keep), self.device)
        context = torch.cat([first, second], dim=-1)  # (B, 77, 768 + 1280)
        context = context * keep[:, None, None]
        no_size = torch.zeros(len(prompts), 6)
        conditioning = Conditioning(context, pooled * keep[:, None], no_size)
        return conditioning.at_size(size or self.size)
