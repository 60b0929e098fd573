"""Shared by all tests: a tiny toy world, rollouts and scores that stages made, what a refusal looks like."""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a network, or on there being none
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["PYTHONPATH"] = os.path.join(ROOT, "kernels")  # for the stages that tests start
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  which reads TORCHDYNAMO_DISABLE once: before vLLM's tests set it

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (make test does it beside torch's CPU build)",
)
STAGES = ("rollout", "score_teacher", "train", "grpo", "evaluate")


def stage_of(name):
    return importlib.import_module(name)


class Parsed(Exception):
    pass


def actions_of(stage):
    """{flag: argparse action} of a stage's parser."""

    def stop(parser, argv=None):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        stage_of(stage).get_args([])
    return {action.dest: action for action in caught.value.args[0]._actions if action.dest != "help"}


def run_line(stage, line):
    """Runs a stage in this process with the flags in a line; of a repeated flag the last counts."""
    stage.main(stage.get_args(line.split()))


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def untimed(path):
    """The rows of a file without their times and their memory."""
    measured = lambda name: "second" in name or name == "peak_memory"
    return [{key: row[key] for key in row if not measured(key)} for row in read_rows(path)]


def replace_text(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def swap_ids(model, a, b):
    """Gives two tokens of a model's tokenizer each other's ids."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed_in_call(number, owner, name):
    """Within it call `number` of owner.name raises Killed, which must end the block."""
    real, calls = getattr(owner, name), itertools.count(1)

    def killed(*given, **named):
        if next(calls) == number:
            raise Killed
        return real(*given, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killed)
        yield


@pytest.fixture(autouse=True, scope="session")
def traces_are_kept():
    """Tracing a tiny model takes as long as training it for a step, so equal traces are made once."""
    from runs import plan

    real, kept = plan.trace, {}

    def trace(directory, *how, **named):
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            key = (file.read(), *how, *named.items())
        kept[key] = kept.get(key) or real(directory, *how, **named)
        return kept[key]

    trace.real = real
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "trace", trace)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world's path: train, heldout, test problems; teacher_init, student_init; gold, hasty rollouts."""
    from recipes import toy_world

    path = tmp_path_factory.mktemp("toy") / "world"
    run_line(toy_world, f"--out {path} --train 12 --heldout 3 --test 4 --terms 2 4")
    return path


@pytest.fixture(scope="session")
def rollouts(world):
    """Rollouts of the untrained teacher: 12 short responses, some stopped and some truncated."""
    import rollout

    path = world.parent / "rollouts"
    line = f"--model {world}/teacher_init --data {world}/train.jsonl --out {path} --limit 6 --n 2"
    run_line(rollout, f"{line} --engine hf --dtype float32 --max_response_tokens 12")
    return path


@pytest.fixture(scope="session")
def scores(world, rollouts):
    """The teacher's scores of those rollouts, in several shards."""
    import score_teacher

    path = world.parent / "scores"
    line = f"--teacher {world}/teacher_init --rollouts {rollouts} --out {path}"
    run_line(score_teacher, f"{line} --dtype float32 --shard_tokens 30")
    return path


@pytest.fixture(scope="session")
def prefix_flags(world, rollouts, scores):
    """For each --prefix the flags of train.py that name its models and data."""
    student = f"--engine hf --dtype float32 --student {world}/student_init"
    return {
        "teacher": f"{student} --prefix teacher --rollouts {rollouts} --scores {scores}",
        "student": f"{student} --prefix student --teacher {world}/teacher_init --data {world}/train.jsonl",
    }


@pytest.fixture
def refused(capsys):
    """refused(call, *words): the call must exit with code 2 and a message on stderr that holds the words."""

    def check(call, *words, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call()
        message = capsys.readouterr().err
        assert end.value.code == code, message
        for word in words:
            assert str(word) in message
        return message

    return check


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    """Both implementations of the KL; blocks so small that small vocabularies take several."""
    from kernel_helpers import BLOCK, HAS_TRITON, triton_kl

    if not HAS_TRITON and request.param == "torch":
        return request.param
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(triton_kl, "BLOCK", BLOCK)
    monkeypatch.setattr(triton_kl, "WARPS", 1)
    return request.param


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def no_trace_of_vllm():
    """vLLM leaves environment variables, a process group and torch.compile switched off to the next file."""
    environment = dict(os.environ)
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # on a GPU float32 attention would be TensorFloat-32, 10 bits
    torch._dynamo.config.disable = True
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch._dynamo.config.disable = False
    if torch.distributed.is_initialized():
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
