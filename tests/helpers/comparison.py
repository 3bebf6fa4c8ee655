"""How far two tensors are apart."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def deviation(ours, theirs):
    """The larger of ‖ours − theirs‖ / ‖theirs‖ and max|ours − theirs| / max|theirs|."""
    ours, theirs = ours.double(), theirs.double()
    off = ours - theirs
    return max((off.norm() / theirs.norm()).item(), (off.abs().max() / theirs.abs().max()).item())
