"""Data parallelism over processes that torchrun starts.

Rank 0 alone logs and writes files; batches, class images and previews are divided among the ranks.
Without torchrun there is one rank: no function here does anything, and torch is not imported.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

GRADIENT_TIMEOUT = timedelta(minutes=10)  # a process that ends is noticed at once
CONTROL_TIMEOUT = timedelta(days=7)  # a rank may still be generating images or writing gigabytes
RANK_0_FIRST = timedelta(seconds=10)  # how long rank 0 has to report an error that all ranks met
LOST_RANK = (
    "error: another rank has ended or cannot be reached; torchrun reports which. Images and the "
    "last state are kept: go on with train.py --resume, or the same sample.py --prompts"
)


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank_slice() -> slice:
    """The part of a list of independent jobs that is this rank's."""
    return slice(rank(), None, world())


def join() -> None:
    """Join the other ranks. Each has its own GPU, if there are any, as its device "cuda"."""
    import torch
    from torch import distributed

    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < ranks:
        raise ValueError(
            f"--nproc-per-node {ranks} is more than the {gpus} GPUs here; each process needs one "
            "(CUDA_VISIBLE_DEVICES= hides them all)"
        )
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if gpus else "gloo"
    distributed.init_process_group(backend, timeout=GRADIENT_TIMEOUT)
    control_group()  # all ranks have to create it at the same point


@cache
def control_group():
    """The process group for tensors on the CPU; it never waits for a GPU."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


def all_reduce_max(number: int) -> int:
    """The maximum over all ranks of an integer. Waits for all ranks."""
    if not launched():
        return number
    import torch
    from torch import distributed

    value = torch.tensor(int(number))
    distributed.all_reduce(value, distributed.ReduceOp.MAX, control_group())
    return int(value)


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_max(0)


def all_reduce_sum(tensor: "Tensor") -> "Tensor":
    """The sum over all ranks of a CPU tensor, in place."""
    if launched():
        from torch import distributed

        distributed.all_reduce(tensor, group=control_group())
    return tensor


def mean_over_ranks(
    get_loss: Callable[[int, int], "Tensor"],
    parameters: Iterable["nn.Parameter"],
    accumulation: int = 1,
    find_unused: bool = False,
) -> Callable[[int, int], "Tensor"]:
    """Wrap get_loss(step, micro_step): the loss and its gradient become the means over all ranks.

    accumulation: micro-steps per step; gradients are averaged in the last one.
    find_unused: whether a parameter may take no part in a loss.
    A NaN on one rank is a NaN on all of them, so all take a step or none does.
    """
    if not launched():
        return get_loss
    from torch import distributed, nn

    # DistributedDataParallel hooks into parameters, not into a network: the loss may run the
    # network as often as it likes.
    module = nn.Module()
    module.trained = nn.ParameterList(parameters)
    module.forward = get_loss
    group = control_group() if module.trained[0].device.type == "cpu" else None
    parallel = nn.parallel.DistributedDataParallel(
        module,
        process_group=group,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )

    def get_mean_loss(step: int, micro_step: int) -> "Tensor":
        last = micro_step == accumulation - 1
        with nullcontext() if last else parallel.no_sync():
            loss = parallel(step, micro_step)
        mean = loss.detach() / world()
        distributed.all_reduce(mean, group=group)
        return loss + (mean - loss).detach()  # the mean's value with this rank's gradient

    return get_mean_loss


@contextmanager
def rank_zero_output() -> Iterator[None]:
    """Around a script: only rank 0 writes to stderr, an error is printed once, all ranks end."""
    if not launched():
        yield
        return
    from torch import distributed

    stderr = sys.stderr
    sys.stderr = stderr if rank() == 0 else io.StringIO()
    try:
        try:
            join()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        yield
        barrier()  # rank 0 may still be writing; an earlier end would look like a failure to it
        distributed.destroy_process_group()
    except SystemExit as end:
        if end.code and is_first_to_report() and rank() != 0:
            message = sys.stderr.getvalue().splitlines()[-1]
            print(f"rank {rank()}: {message}", file=stderr, flush=True)
        raise
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        if is_first_to_report():
            print(LOST_RANK, file=stderr, flush=True)
        os._exit(2)  # an orderly end would wait for the rank that is gone
    finally:
        sys.stderr = stderr


def is_first_to_report() -> bool:
    """Whether this rank should report an error: rank 0 if it met it too, else the first to ask."""
    from torch import distributed

    if not distributed.is_initialized():
        time.sleep(RANK_0_FIRST.total_seconds() if rank() else 0)  # torchrun ends this one first
        return True
    store = distributed.distributed_c10d._get_default_store()
    if rank() != 0:
        with suppress(RuntimeError):  # timed out: no rank has reported
            store.wait(["reported"], RANK_0_FIRST)
    with suppress(RuntimeError):  # a store without torchrun ends with the rank that kept it
        return store.add("reported", 1) == 1
    return True
