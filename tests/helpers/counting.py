"""What tensors take at most while something runs, counted as they come and go; on the meta device, as CUDA would have them."""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """The bytes of the tensors that are made inside: `now`, and `peak`. What was there before does not count, wherever it is used."""

    _should_skip_dynamo = classmethod(
        lambda cls: False
    )  # else torch imports its compiler at the first call: seconds

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tensors((args, tuple((kwargs or {}).values()))):
            self.note(x.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        for x in tensors(
            (made,)
        ):  # a view's storage, and that of what was changed in place, is known already
            self.note(x.untyped_storage(), x.untyped_storage().nbytes())
        return made

    def note(self, storage, size):
        if storage._cdata not in self.known:
            self.known[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key):
        self.now -= self.known.pop(key)


def tensors(nested):
    for x in nested:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from tensors(x)


class Fused(torch.autograd.Function):
    """Scaled dot product attention by what a fused kernel keeps: q, k, v, the result and a float32 for each query, no (N, M) matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = (
            torch.empty_like(q),
            torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device),
        )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class AsOnCuda(TorchFunctionMode):
    """What the meta device does otherwise than CUDA: it has no fused attention (it would be taken apart, with its matrix) and no autocast.

    lower: autocast's dtype, or None. Under it, products are of that dtype, normalisations float32. What is asked of all of a tensor is true,
    since nothing here can be looked at.
    """

    def __init__(self, lower=None):
        super().__init__()
        self.to = (
            {
                F.linear: lower,
                F.conv2d: lower,
                torch.addmm: lower,
                F.scaled_dot_product_attention: lower,
                F.layer_norm: torch.float32,
                F.group_norm: torch.float32,
            }
            if lower
            else {}
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs, dtype = list(args), dict(kwargs or {}), self.to.get(func)
        for place in (
            ([(args, i) for i in range(len(args))] + [(kwargs, k) for k in kwargs]) if dtype else ()
        ):
            x = place[0][place[1]]
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                place[0][place[1]] = x.to(dtype)
        if func is torch.Tensor.all:  # somebody looks for NaN
            return True
        return (
            Fused.apply(*args[:3])
            if func is F.scaled_dot_product_attention
            else func(*args, **kwargs)
        )


def peak(function, lower=None):
    """The most bytes of tensors that function() holds at once of its own making."""
    with AsOnCuda(lower), Count() as count:
        function()
    return count.peak


def back(loss):
    """loss.backward(), but for AsOnCuda, which that call would leave, though what is checkpointed is computed again in it."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )
