"""Several GPUs: torchrun --nproc_per_node N -- train.py ... (FSDP2). In one process all of this does nothing.

All ranks read the same inputs and compute the same batches, metrics and decisions. What is shared out:

    memory           weights, gradients and optimizer state are sharded            load_sharded
    sampling         each rank samples for its slice of the prompts                rank_slice, gather
    forward passes   each rank takes every N-th micro-batch; gradients are summed  split_micro_batches

so the loss and the weights equal those of one process, up to rounding. Only rank 0 writes files and prints.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from distil.artifacts import refuse
from distil.models import check_head, config_of, decoder_layers, load_model


def start():
    """Join the process group, if torchrun started this process."""
    if not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # all ranks show their errors, on stderr


def end():
    """Leave the process group together: otherwise gloo's threads can abort a rank that has finished."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def rank_slice(length):
    """This rank's consecutive slice of `length` items. 10 items on 3 ranks -> 0:3, 3:6, 6:10"""
    return slice(rank() * length // world_size(), (rank() + 1) * length // world_size())


def gather(values):
    """The lists of all ranks, joined in the order of the ranks, on every rank."""
    if world_size() == 1:
        return values
    lists = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]


def sum_over_ranks(sums):
    """{name: number} summed over the ranks; every rank has the same names."""
    every = gather([sums])
    return {name: sum(one[name] for one in every) for name in sums}


def largest(value):
    """The largest of the ranks' numbers, such as the signal that asked one of them to stop."""
    return max(gather([value]))


def split_micro_batches(batches):
    """This rank's share of micro-batches, as pairs (indices, is_real).

    FSDP's ranks must pass through the model together, so every rank gets equally many micro-batches: the
    largest are halved until the number fits; if that is not enough, a rank repeats one with is_real False.
    split_micro_batches([[0, 1, 2]]) on 2 ranks -> [([0, 1], True)] and [([2], True)]"""
    batches = list(batches)
    while len(batches) % world_size() and any(len(batch) > 1 for batch in batches):
        i = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = (len(batches[i]) + 1) // 2
        batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
    pairs = [(batch, True) for batch in batches]
    if batches:
        pairs += [(batches[-1], False)] * (-len(batches) % world_size())
    return pairs[rank() :: world_size()]


def load_sharded(directory, flag, dtype, trained=False):
    """models.load_model, sharded over the ranks by fully_shard if there are several; its head checked."""
    if trained and hasattr(config_of(directory, flag), "quantization_config"):
        refuse(f"{flag} {directory}: is quantised, and only whole weights can be trained")
    several = world_size() > 1
    model = load_model(directory, flag, dtype, "cpu" if several else None)  # fully_shard moves it
    model.requires_grad_(trained)
    if several:
        shard(model)
    check_head(model, f"{flag} {directory}")
    reshard(model)
    return model


def shard(model):
    """fully_shard, layer by layer."""
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    # Forward passes enter through get_decoder() (models.response_hidden), which gathers what belongs to no
    # layer: embeddings and output head. They stay gathered until reshard() or the end of the backward pass.
    register_fsdp_forward_method(model, "get_decoder")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # a sum: token weights refer to the whole batch


def reshard(model):
    """Free what a forward pass without gradient has left gathered, before shards are changed or read."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor):
    """A sharded tensor put together, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_weights(model):
    """(name, full tensor) of the state dict; a tied tensor comes twice. All ranks iterate together."""
    reshard(model)
    for name, tensor in model.state_dict().items():
        yield name, full_tensor(tensor.detach())


def local_shard(tensor, like):
    """This rank's shard of a full tensor, sharded as the parameter `like` is."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "device_mesh"):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)
