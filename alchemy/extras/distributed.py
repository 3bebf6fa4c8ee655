"""Several processes at once, as torchrun starts them: which of them this one is, and what all of them do together.

torchrun calls them ranks. Rank 0 speaks and writes; of every batch, class picture and preview, each has its share. Without torchrun there
is one rank, nothing here does anything, and torch.distributed is not imported. Imports no torch.
"""

import io
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

STEP = timedelta(
    minutes=10
)  # within which all have to come together for a gradient; the end of a process is noticed at once
JOB = timedelta(days=7)  # the same for all else: one may still be drawing, or writing what is large
FIRST_WORD = timedelta(seconds=10)  # left to rank 0 where all have met the same error
agreed = None  # the process group of what is on the CPU, and does not wait for a GPU


def launched():
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world():
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def share():
    """The slice of a list of independent jobs that is this rank's."""
    return slice(rank(), None, world())


def join():
    """Meet the other ranks. Each has a GPU, where there are any: it is what "cuda" means from now on."""
    global agreed
    import torch
    from torch import distributed

    here, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < here < wanted:
        raise ValueError(
            f"--nproc-per-node {wanted} is more than the GPUs here, {here}: each process needs one (CUDA_VISIBLE_DEVICES= hides them all)"
        )
    if here:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group("nccl" if here else "gloo", timeout=STEP)
    agreed = distributed.new_group(backend="gloo", timeout=JOB)


def most(number):
    """The largest of all ranks' whole numbers, on each of them; none goes on before all have come."""
    if not launched():
        return number
    import torch
    from torch import distributed

    value = torch.tensor(int(number))
    distributed.all_reduce(value, distributed.ReduceOp.MAX, agreed)
    return int(value)


def meet():
    """None goes on before all have come."""
    most(0)


def added(tensor):
    """The sum of all ranks' tensors, on the CPU, in place."""
    if launched():
        from torch import distributed

        distributed.all_reduce(tensor, group=agreed)
    return tensor


def averaged(loss_of, parameters, accumulation=1, unused=False):
    """loss_of(step, part), on each rank of its own samples, as the mean over all ranks, whose gradient is that of the mean.

    parameters: what learns; unused: whether some of them may have no part in the loss. The value is the same on each rank to rounding, and
    on all of them NaN or infinite where it is on one; so then are the gradients: all take a step, or none.
    """
    if not launched():
        return loss_of
    from torch import distributed, nn

    # DistributedDataParallel watches parameters, not the network: the loss may call that as often as it likes.
    module = nn.Module()
    module.learns, module.forward = nn.ParameterList(parameters), loss_of
    group = agreed if module.learns[0].device.type == "cpu" else None
    parallel = nn.parallel.DistributedDataParallel(
        module, process_group=group, gradient_as_bucket_view=True, find_unused_parameters=unused
    )

    def mean_of(step, part):
        with (
            nullcontext() if part == accumulation - 1 else parallel.no_sync()
        ):  # the last part's backward pass brings the mean of all
            value = parallel(step, part)
        mean = value.detach() / world()
        distributed.all_reduce(mean, group=group)
        return (
            value + (mean - value).detach()
        )  # the mean's value, with the gradient of this rank's: those are averaged already

    return mean_of


@contextmanager
def one_voice():
    """Around all that a script does: rank 0 alone speaks on stderr, an error is said once, and all end together."""
    if not launched():
        yield
        return
    voice, sys.stderr = sys.stderr, io.StringIO() if rank() else sys.stderr
    try:
        try:
            join()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        yield
        meet()  # rank 0 may still be writing, and the others' end would look like a fault to it
        from torch import distributed

        distributed.destroy_process_group()
    except SystemExit as end:
        if end.code and is_mine() and rank():
            print(
                f"rank {rank()}: {sys.stderr.getvalue().splitlines()[-1]}", file=voice, flush=True
            )
        raise
    except RuntimeError as error:
        from torch import distributed

        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        if is_mine():
            print(
                "error: another rank has ended or is out of reach, so this run ends (torchrun says which it was, and how); what is drawn and the last "
                "state stay: train.py --resume, or sample.py --prompts again, goes on from there. "
                + str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0],
                file=voice,
                flush=True,
            )  # gloo's place in its code, and its advice, left out
        os._exit(2)  # an orderly end would wait for the rank that is gone
    finally:
        sys.stderr = voice


def is_mine():
    """Whether an error is this rank's to say: of several that have met it, rank 0's; else that of the first."""
    from torch import distributed

    if not distributed.is_initialized():
        time.sleep(
            FIRST_WORD.seconds if rank() else 0
        )  # torchrun ends this process as soon as rank 0 has ended
        return True
    said = distributed.distributed_c10d._get_default_store()
    with suppress(RuntimeError):  # in time, nobody has
        if rank():
            said.wait(["said"], FIRST_WORD)
    with suppress(
        RuntimeError
    ):  # torchrun keeps the store; where nobody does, it has ended with its rank
        return said.add("said", 1) == 1
    return True
