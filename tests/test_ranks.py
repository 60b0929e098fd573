"""Two ranks on a CPU (gloo) give what one process gives. Ranks are forks, so nothing is imported again."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
import train
from conftest import ROOT, run_line, untimed
from distil import models, ranks, training
from distil.prompts import load_tokenizer
from recipes.toy_world import make_model, make_tokenizer


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, count, port, work, words):
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    values |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in values.items()}  # what torchrun sets
    ranks.start()
    work(*words)
    ranks.end()


def on_ranks(work, *words, count=2):
    mp.start_processes(as_rank, (count, free_port(), work, words), nprocs=count, start_method="fork")


def flat(row):
    """A row's numbers, but for the padding: other micro-batches have another."""
    numbers = {k: v for k, v in row.items() if k != "padding" and not isinstance(v, (dict, list, str))}
    for name, means in row.get("by_position", {}).items():
        numbers |= {f"{name} {i}": mean for i, mean in enumerate(means)}
    return numbers


@pytest.fixture(scope="module")
def untied(world):
    """A student whose output head is not its embedding."""
    path, tokenizer = world.parent / "untied", load_tokenizer(world / "student_init", "--student")
    torch.manual_seed(5)
    model = make_model(tokenizer, 32, 2, 1)
    model.config.tie_word_embeddings = False
    model = type(model)(model.config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def command_of(case, world, prefix_flags, student):
    """(stage, its flags but for --out)."""
    data, evaluation = f"{world}/train.jsonl", f"--eval_data {world}/heldout.jsonl --eval_every 2 --eval_n 2"
    stage, flags = {
        "teacher forward": (train, f"--kl forward --batch_size 5 --micro_batch_tokens 60 {evaluation}"),
        "teacher reverse": (train, "--kl reverse --batch_size 3 --normalize token"),
        "student forward": (train, "--kl forward --batch_size 4"),
        "student reverse": (train, f"--kl reverse --batch_size 3 --n 2 --position_bins 5 {evaluation}"),
        "student, one response": (train, "--kl reverse --batch_size 1 --vocab sampled"),
        "student, curriculum": (
            train,
            "--kl mix --fkl_weight 0.3 --batch_size 4 --curriculum entropy --horizons 4,8,12"
            f" --entropy_floor 0.5 --gate_every 1 {evaluation}",
        ),
        "grpo": (grpo, f"--batch_size 4 --n 3 --updates 2 --policy truncated --kl_weight 0.1 {evaluation}"),
        "grpo, equal groups": (grpo, "--batch_size 2 --n 2 --overlong mask --scale_advantages none"),
    }[case]
    common = "--engine hf --dtype float32 --steps 4 --lr 2e-3 --max_response_tokens 12 --save_every 2"
    if stage is grpo:
        return grpo, f"--model {student} --data {data} {flags} {common}"
    return train, f"{prefix_flags[case[:7]]} --student {student} {flags} {common}"


@pytest.mark.parametrize(
    "case, tied",
    [
        ("teacher forward", True),
        ("teacher reverse", False),
        ("student forward", False),
        ("student reverse", True),
        ("student, one response", True),
        ("student, curriculum", True),
        ("grpo", True),
        ("grpo", False),
        ("grpo, equal groups", True),
    ],
)
def test_two_ranks_end_as_one_process_does(world, prefix_flags, untied, tmp_path, monkeypatch, case, tied):
    def parity(args, problem, response, verdict):  # untrained models are never right
        return sum(response.response_ids) % 2

    monkeypatch.setitem(grpo.REWARDS, "correct", parity)
    student = world / "student_init" if tied else untied
    stage, flags = command_of(case, world, prefix_flags, student)
    run_line(stage, f"{flags} --out {tmp_path}/one")
    on_ranks(run_line, stage, f"{flags} --out {tmp_path}/two")
    names = [sorted(file.name for file in (tmp_path / run).glob("*.jsonl")) for run in ("one", "two")]
    assert names[0] == names[1] and "metrics.jsonl" in names[0]
    for name in names[0]:
        one, two = untimed(tmp_path / "one" / name), untimed(tmp_path / "two" / name)
        assert len(one) == len(two) > 0
        for a, b in zip(one, two):
            assert flat(a) == pytest.approx(flat(b), rel=1e-2, abs=1e-4)
    start = load_file(student / "model.safetensors")
    for checkpoint in ("step_000002", "final"):
        one, two = (load_file(tmp_path / run / checkpoint / "model.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys() == start.keys()
        for name in one:  # where a gradient is all rounding, Adam makes a step of it
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)
            assert (one[name] - two[name]).abs().mean() < 2e-5
        moved = max((one[name] - start[name]).abs().max() for name in one)
        assert moved > 1e-3  # Adam moves by the learning rate


@pytest.fixture
def family(request, tmp_path):
    """(name of a family, directory of a random model of it)."""
    sizes = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}
    sizes |= {"granite": {"logits_scaling": 0.1}, "gemma2": {"head_dim": 8}}.get(request.param, {})
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


@pytest.mark.parametrize("family", ["granite", "gpt2", "gemma2"], indirect=True)
def test_models_are_checked_when_they_are_sharded(family, world, prefix_flags, tmp_path, capfd):
    """Scaled logits, and layers that are not called layers: as in one process. Capped logits: refused."""
    name, student = family
    stage, flags = command_of("student reverse", world, prefix_flags, student)
    if name == "gemma2":
        with pytest.raises(Exception, match="exit code 2"):
            on_ranks(run_line, stage, f"{flags} --out {tmp_path}/two")
        said = capfd.readouterr().err
        assert "error: the starting model" in said and "its logits are not its last hidden states" in said
        return
    run_line(stage, f"{flags} --out {tmp_path}/one")
    on_ranks(run_line, stage, f"{flags} --out {tmp_path}/two")
    one, two = (untimed(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_resume_what_two_ranks_have_saved(world, prefix_flags, tmp_path, count):
    """On two bit for bit; on one, to rounding: a checkpoint does not depend on the number of ranks."""
    stage, flags = command_of("student reverse", world, prefix_flags, world / "student_init")
    out = tmp_path / "again/run"
    on_ranks(run_line, stage, f"{flags} --out {tmp_path}/run")
    with pytest.raises(Exception, match="cut short"):
        on_ranks(cut_short, stage, f"{flags} --out {out}")
    assert not (out / "final").exists()
    if count == 1:
        run_line(stage, f"{flags} --out {out} --resume")
    else:
        on_ranks(run_line, stage, f"{flags} --out {out} --resume")
    for name in ("metrics.jsonl", "evals.jsonl"):
        for a, b in zip(untimed(out / name), untimed(tmp_path / "run" / name), strict=True):
            a.pop("padding", None), b.pop("padding", None)
            assert (a == b) if count == 2 else flat(a) == pytest.approx(flat(b), rel=1e-2, abs=1e-4)
    whole, resumed = (load_file(path / "final/model.safetensors") for path in (tmp_path / "run", out))
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=0 if count == 2 else 1e-3)


def cut_short(stage, line):
    def step(args, model, optimizer, step, ids):
        if step == 3:
            raise RuntimeError("cut short")
        return whole_step(args, model, optimizer, step, ids)

    whole_step, training.optimizer_step = training.optimizer_step, step
    run_line(stage, line)


def test_a_rank_holds_its_share_of_weights_gradients_and_moments(world, tmp_path):
    def measure(out):
        model = ranks.load_sharded(world / "teacher_init", "--student", "float32", trained=True)
        optimizer = torch.optim.AdamW(model.parameters())
        models.response_hidden(model, [models.Response([3, 4], [5, 6, 7], False)]).sum().backward()
        optimizer.step()
        moments = [t for s in optimizer.state.values() for t in s.values()]
        held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in held]
        (out / str(ranks.rank())).write_text(str(sum(t.numel() * t.element_size() for t in local)))

    sizes = {}
    for count in (1, 2, 4):
        (tmp_path / str(count)).mkdir()
        on_ranks(measure, tmp_path / str(count), count=count)
        sizes[count] = [int(file.read_text()) for file in sorted((tmp_path / str(count)).iterdir())]
    assert sum(sizes[2]) < 1.02 * sizes[1][0] > sum(sizes[4]) / 1.02  # steps are counted on each
    assert max(sizes[2]) < 0.52 * sizes[1][0] and max(sizes[4]) < 0.27 * sizes[1][0]


def test_shares_and_sums(tmp_path):
    def check(out):
        n = ranks.world_size()
        assert ranks.gather(list(range(7))[ranks.rank_slice(7)]) == list(range(7))
        assert ranks.gather([][ranks.rank_slice(0)]) == []
        for batches in ([[0, 1, 2]], [[0], [1], [2], [3]], [[0, 1], [2, 3, 4, 5, 6], [7]], [[0]], []):
            dealt = ranks.split_micro_batches(batches)
            assert len(ranks.gather([len(dealt)])) == n and len(set(ranks.gather([len(dealt)]))) == 1
            counted = ranks.gather([i for part, counts in dealt if counts for i in part])
            assert sorted(counted) == sorted(i for batch in batches for i in batch)
        assert ranks.sum_over_ranks({"a": 1.5, "b": ranks.rank()}) == {"a": 1.5 * n, "b": n * (n - 1) / 2}
        assert ranks.largest(10 * ranks.rank()) == 10 * (n - 1)
        (out / str(ranks.rank())).write_text("checked")

    on_ranks(check, tmp_path, count=3)
    assert len(list(tmp_path.iterdir())) == 3
    assert ranks.split_micro_batches([[0, 1], [2]]) == [([0, 1], True), ([2], True)]
    assert ranks.rank_slice(5) == slice(0, 5)


FAILS = """
import sys, train
from distil import ranks, training
def optimizer_step(args, model, optimizer, step, ids):
    if step == 1 and ranks.rank() == 1:
        raise RuntimeError("this rank has lost its GPU")
    return whole_step(args, model, optimizer, step, ids)
whole_step, training.optimizer_step = training.optimizer_step, optimizer_step
ranks.start()
train.main(train.get_args(sys.argv[1:]))
"""


def torchrun(line):
    words = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node 2 --".split(),
        *line.split(),
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)


def test_torchrun_ends_when_one_rank_fails_and_shows_why(world, prefix_flags, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    _, flags = command_of("teacher reverse", world, prefix_flags, world / "student_init")
    started = time.monotonic()
    done = torchrun(f"{tmp_path}/fails.py {flags} --out {tmp_path}/run")
    assert done.returncode == 1 and "this rank has lost its GPU" in done.stderr
    assert time.monotonic() - started < 120 and not (tmp_path / "run/meta.json").exists()
    assert done.stdout.count("step 1/4") == 1  # printed by one rank


def test_bad_input_is_refused_once(world, prefix_flags, tmp_path):
    _, flags = command_of("teacher reverse", world, prefix_flags, tmp_path / "absent")
    done = torchrun(f"train.py {flags} --out {tmp_path}/run")
    assert done.returncode == 1 and len(re.findall("error: --student .*absent", done.stderr)) == 1
    assert not (tmp_path / "run").exists()
