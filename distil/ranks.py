"""Several processes on one batch, one GPU each: torchrun --nproc_per_node N -- train.py ... (FSDP2); alone, every function here is the identity.

All ranks read the same inputs and keep the same books: batches, weights, metrics, decisions. Shared out are

    memory      weights, gradients and optimizer state are cut into N pieces                          shard
    sampling    each rank samples for its slice of the prompts, then all have all samples             mine, gather
    passes      each rank takes every N-th micro-batch; gradients and metrics are added up            deal, add_up

so that loss and weights are those of one process, to rounding. Only rank 0 writes files and prints.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from distil.models import load_model


def start():
    """Join the others, where torchrun started this process."""
    if not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # errors, on stderr, are shown from all


def end():
    """Part from the others, all work done: gloo's threads can abort a process that ends without."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if count() > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Work


def mine(length):
    """This rank's slice of `length` items: consecutive, and equal to within one. (10 items, 3 ranks) -> 0:3, 3:6, 6:10"""
    return slice(rank() * length // count(), (rank() + 1) * length // count())


def gather(values):
    """The lists of all ranks, joined in the order of the ranks; on every rank."""
    if count() == 1:
        return values
    lists = [None] * count()
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]


def deal(batches):
    """This rank's share of micro-batches, as pairs (indices, counts): equally many on every rank, since FSDP's ranks must pass through
    the model together. The largest are cut in two until the number fits; where that is impossible, a rank repeats one that does not
    count. deal([[0, 1, 2]]) on 2 ranks -> [([0, 1], True)] and [([2], True)]"""
    batches = list(batches)
    while len(batches) % count() and any(len(batch) > 1 for batch in batches):
        i = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = (len(batches[i]) + 1) // 2
        batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
    repeated = [(batches[-1], False)] * (-len(batches) % count()) if batches else []
    return ([(batch, True) for batch in batches] + repeated)[rank() :: count()]


def add_up(sums):
    """{name: number} added up over the ranks; all have the same names."""
    every = gather([sums])
    return {name: sum(one[name] for one in every) for name in sums}


def largest(value):
    """The largest of the ranks' numbers, such as the signal that asked one of them to stop."""
    return max(gather([value]))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def load_sharded(directory, flag, dtype, trained=False):
    """inputs.load_model, cut into pieces among the ranks where there are several (fully_shard)."""
    if count() == 1:
        return load_model(directory, flag, dtype).requires_grad_(trained)
    model = load_model(directory, flag, dtype, device="cpu").requires_grad_(
        trained
    )  # fully_shard moves the pieces
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    # The passes enter the model through get_decoder() (score_teacher.response_hidden): it gathers what belongs to no layer, the
    # embeddings and the output head, and these stay whole until reshard(), or until the backward pass is over.
    register_fsdp_forward_method(model, "get_decoder")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(
                1.0
            )  # the sum over ranks, not the mean: token weights are those of the whole batch
    return model


def reshard(model):
    """Give back what a pass without gradient has left gathered: before the optimizer changes the pieces, before they are read."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor):
    """A tensor of which each rank holds a piece, as a whole tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(model):
    """Yields (name, whole tensor) of the model's state dict; all ranks must go through it together. A tied tensor has two names."""
    reshard(model)
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor.detach())


def piece_of(tensor, like):
    """The piece of a whole tensor that this rank holds, cut as the parameter `like` is."""
    tensor = tensor.to(like.device)
    return (
        distribute_tensor(tensor, like.device_mesh, like.placements)
        if hasattr(like, "device_mesh")
        else tensor
    )
