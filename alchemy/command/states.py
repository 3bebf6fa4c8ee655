"""The state of a run as a file, from which --resume goes on to the same weights."""

import json

import torch

from ..files import save_tensors


def save_state(state, path, facts):
    """Weights, moments and losses, with the step, the loss scale and the thread count in the header."""
    state.read()
    tensors = dict(state.parameters) | {"losses": torch.tensor(state.losses, dtype=torch.float64)}
    for name, p in state.parameters.items():
        tensors |= {
            f"{moment}:{name}": value for moment, value in state.optimizer.state.get(p, {}).items()
        }
    save_tensors(
        tensors,
        path,
        facts
        | {
            "step": str(state.step),
            "scaler": state.scaler.state_dict(),
            "threads": str(torch.get_num_threads()),
        },
    )


@torch.no_grad()
def restore(state, tensors, header):
    """From an open safetensors file and its header. Raises ValueError, with nothing changed, where it is of another kind of run."""
    shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    if "step" not in header or any(
        shapes.get(name) != p.shape for name, p in state.parameters.items()
    ):
        raise ValueError(
            "the state is of another kind of run (other layers or rank): resume with its settings, or --overwrite it"
        )
    for name, p in state.parameters.items():
        p.copy_(tensors.get_tensor(name))
        moments = {
            key.split(":")[0]: tensors.get_tensor(key) for key in shapes if key.endswith(":" + name)
        }
        # Fused AdamW counts steps on the device, the other one on the CPU.
        state.optimizer.state[p] = {
            moment: value.to("cpu" if moment == "step" and not state.late else p.device)
            for moment, value in moments.items()
        }
    state.losses, state.step = tensors.get_tensor("losses").tolist(), int(header["step"])
    if state.scaler.is_enabled() and header["scaler"] != "{}":
        state.scaler.load_state_dict(json.loads(header["scaler"]))
