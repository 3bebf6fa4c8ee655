"""How visible is the edge of what was put into a scene?"""

from ... import images


def seam(made):
    """Of an Insertion: the mean jump from outside the mask to inside, over the scene's own at the same place; 1 is a seam that nobody can see."""
    jumps = [
        boundary_jump(images.to_tensor(p)[0], made.feathered > 0) for p in (made.result, made.scene)
    ]
    return jumps[0] / max(jumps[1], 1 / 127.5)  # a flat scene counts as one grey level


def boundary_jump(x, inside):
    """The mean absolute difference of x (3,H,W) between neighbours of which one is inside (H,W) and one is not; 0 where there are none."""
    total = count = 0
    for dim in (0, 1):
        a, b = (inside.narrow(dim, k, inside.shape[dim] - 1) for k in (0, 1))
        crossing = a != b
        jump = x.narrow(dim + 1, 1, x.shape[dim + 1] - 1) - x.narrow(
            dim + 1, 0, x.shape[dim + 1] - 1
        )
        total, count = (
            total + float(jump.abs().mean(0)[crossing].sum()),
            count + int(crossing.sum()),
        )
    return total / max(count, 1)
