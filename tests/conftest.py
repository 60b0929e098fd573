"""Shared by all tests: a tiny toy world, rollouts and scores that stages made, what a refusal looks like."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a network, or on there being none
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["PYTHONPATH"] = os.path.join(
    ROOT, "kernels"
)  # for the stages that tests start, as pytest's own pythonpath
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world's path: train, heldout, test problems; teacher_init, student_init; gold, hasty rollouts."""
    from recipes import toy_world

    path = tmp_path_factory.mktemp("toy") / "world"
    toy_world.main(
        toy_world.get_args(
            ["--out", str(path), "--train", "12", "--heldout", "3", "--test", "4", "--terms", "2", "4"]
        )
    )
    return path


@pytest.fixture(scope="session")
def rollouts(world):
    """Rollouts of the untrained teacher: 12 short responses, some stopped and some cut off."""
    import rollout

    path = world.parent / "rollouts"
    rollout.main(
        rollout.get_args(
            [
                *"--limit 6 --n 2 --engine hf --dtype float32 --max_response_tokens 12".split(),
                "--model",
                str(world / "teacher_init"),
                "--data",
                str(world / "train.jsonl"),
                "--out",
                str(path),
            ]
        )
    )
    return path


@pytest.fixture(scope="session")
def scores(world, rollouts):
    """The teacher's scores of those rollouts, in several shards."""
    import score_teacher

    path = world.parent / "scores"
    score_teacher.main(
        score_teacher.get_args(
            [
                *"--dtype float32 --shard_tokens 30".split(),
                "--out",
                str(path),
                "--teacher",
                str(world / "teacher_init"),
                "--rollouts",
                str(rollouts),
            ]
        )
    )
    return path


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
