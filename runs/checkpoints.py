"""What a run resumes from: its checkpoints, the optimizer's moments in them, its logs up to there."""

import glob
import json
import os
import shutil

from safetensors.torch import load_file

from distil import ranks
from distil.artifacts import DAMAGE, refuse


def checkpoints(out):
    """The run's checkpoints to resume from, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out), "step_" + "[0-9]" * 6)))


def files_in(folder):
    found = glob.glob("**", root_dir=folder, recursive=True, include_hidden=True)
    return sorted(name for name in found if os.path.isfile(os.path.join(folder, name)))


def link(source, target):
    """A second name for a file, which nothing changes from then on; a copy where no hard link can be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def on_rank_0(pairs):
    """The pairs (name, tensor) as a dict on the CPU of rank 0; the other ranks help to gather them."""
    return {name: tensor.cpu() for name, tensor in pairs if ranks.rank() == 0}


def optimizer_state(model, optimizer):
    """("parameter/key", tensor) of AdamW's step and moments, for every parameter that has had a gradient."""
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", ranks.full_tensor(tensor)


def load_optimizer(path, model, optimizer):
    state = load_file(path)
    for name, parameter in model.named_parameters():
        if f"{name}/step" not in state:
            continue  # no gradient so far
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][key] = ranks.local_shard(state[f"{name}/{key}"], parameter)
        optimizer.state[parameter]["step"] = state[f"{name}/step"].to(parameter.device)  # for fused=True


def rewind_log(path, step):
    """Cut a .jsonl log behind its rows up to `step`, and return them. A log without rows is removed."""
    rows, good = [], 0
    if not os.path.isfile(path):
        return rows
    with open(path, "r+b") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n") or int(json.loads(line)["step"]) > step:
                    break  # a row cut by a kill, or a later one
            except DAMAGE as error:
                refuse(f"--resume: {path} line {number} is damaged ({error!r})")
            good += len(line)
            rows.append(json.loads(line))
        file.truncate(good)
    if not rows:
        os.remove(path)
    return rows
