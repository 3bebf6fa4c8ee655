"""The most bytes of tensors while something runs; on the meta device, as on CUDA."""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """The bytes of the tensors made inside: `now`, and `peak`. Earlier tensors do not count."""

    # Else torch imports its compiler at the first call: seconds.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tensors((args, tuple((kwargs or {}).values()))):
            self.note(x.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        # The storage of a view, or of what was changed in place, is known already.
        for x in tensors((made,)):
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
    """Attention by what a fused kernel keeps: q, k, v, the result and a float32 for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        logsumexp = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class AsOnCuda(TorchFunctionMode):
    """Makes the meta device behave as CUDA: fused attention without its matrix, and autocast.

    lower: autocast's dtype, or None. Under it, products have that dtype, normalizations float32.
    tensor.all() is True, since no value can be read.
    """

    def __init__(self, lower=None):
        super().__init__()
        self.to = {}
        if lower:
            products = (F.linear, F.conv2d, torch.addmm, F.scaled_dot_product_attention)
            self.to |= dict.fromkeys(products, lower)
            self.to |= dict.fromkeys((F.layer_norm, F.group_norm), torch.float32)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = self.to.get(func)

        def cast(x):
            is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.to(dtype) if dtype and is_float else x

        args = [cast(x) for x in args]
        kwargs = {key: cast(x) for key, x in (kwargs or {}).items()}
        if func is torch.Tensor.all:  # a check for NaN
            return True
        if func is F.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return func(*args, **kwargs)


def peak(function, lower=None):
    """The most bytes of new tensors that function() holds at once."""
    with AsOnCuda(lower), Count() as count:
        function()
    return count.peak


def run_backward(loss):
    """loss.backward() that stays inside AsOnCuda, where checkpointed layers are run again."""
    options = dict(allow_unreachable=True, accumulate_grad=True)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), **options
    )
