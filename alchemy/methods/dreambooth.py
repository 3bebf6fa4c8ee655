"""DreamBooth (Ruiz et al. 2023): all weights of the UNet learn the subject, held to their class by class pictures (prior.py)."""
import torch


def whole_unet(sdxl):
    """{name: parameter} of the UNet, float32 and to be trained; read anew, since the checkpoint's dtype may be half."""
    sdxl.free("unet")
    sdxl.loaded["unet"] = sdxl.read("unet", torch.float32).requires_grad_(True)
    return dict(sdxl.unet.named_parameters())


def memory(parameters):
    """Bytes that weights, gradients and the two moments of AdamW take, all float32; activations come on top."""
    return 16 * sum(p.numel() for p in parameters.values())
