"""Faults and hostile input: full disks, locks, damaged files, fuzzed readers. Data is never run as code."""

import ast
import contextlib
import copy
import errno
import functools
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rollout
from conftest import ROOT
from distil import artifacts, jsonl, models, prompts
from distil.grading import grade
from distil.problems import load_problems
from distil.rollouts import read_rollouts
from distil.teacher import Scores
from recipes.toy_world import make_tokenizer
from runs import checkpoints
from test_artifacts import begun, flags, made
from test_resume import STAGES, Disk, args_of, cheap_models, in_fork, results  # noqa: F401 (a fixture)

# ---------------------------------------------------------------------------------------------------------
# The disk


@pytest.mark.parametrize("stage", STAGES)
def test_a_write_that_the_system_refuses_ends_in_one_message(stage, world, rollouts, tmp_path, cheap):
    """The kernel limits the size of a file, which fails like a full disk; --resume then ends the same."""
    no_limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(out, limit, *more):
        reader, writer = os.pipe()  # a limit on files would hold for what is printed too

        def body():
            sys.stdout = sys.stderr = os.fdopen(writer, "w")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            artifacts.run_stage(STAGES[stage].main, args_of(stage, world, rollouts, out, *more))

        code = in_fork(body)
        os.close(writer)
        with os.fdopen(reader) as said:
            return code, said.read()

    assert run(tmp_path / "whole", no_limit)[0] == 0
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    for limit in [400, *(3 * size // 4 for size in sizes[-3:])]:
        code, said = run(tmp_path / "out", limit, "--resume")
        assert code == 1 and os.strerror(errno.EFBIG) in said
        assert said.count("\nerror:") == 1 and "Traceback" not in said
        assert f"{tmp_path}/out keeps what is finished; the same command with --resume continues" in said
    assert run(tmp_path / "out", no_limit, "--resume")[0] == 0
    assert results(stage, tmp_path / "out") == results(stage, tmp_path / "whole")


def as_nobody(body):
    """Permissions do not bind root."""

    def child():
        if os.getuid() == 0:
            os.setuid(65534)
        body()

    return in_fork(child)


@pytest.mark.parametrize("name", ["out", "a/data.txt"])
def test_permission_denied_is_one_message(name, monkeypatch, capfd):
    """A directory that may not be written, a file that may not be read."""
    monkeypatch.setattr(artifacts, "writing", False)
    with tempfile.TemporaryDirectory() as folder:
        made(pathlib.Path(folder) / "a")
        monkeypatch.setattr(artifacts, "writing", False)
        os.chmod(f"{folder}/a/data.txt", 0)
        os.chmod(folder, 0o555)
        if as_nobody(lambda: os.listdir(folder)):
            pytest.skip("this process is root, and no other user can enter the directory for temporary files")
        capfd.readouterr()
        calls = {
            "out": lambda args: artifacts.start_artifact(args),
            "a/data.txt": lambda args: artifacts.read_artifact(f"{folder}/a", "--rollouts"),
        }
        code = as_nobody(lambda: artifacts.run_stage(calls[name], flags(f"{folder}/out")))
        os.chmod(folder, 0o755)
    out, err = capfd.readouterr()
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in out + err
    assert os.strerror(errno.EACCES) in err and f"{folder}/{name}" in err


def test_other_errors_keep_their_traceback(capfd):
    assert in_fork(lambda: artifacts.run_stage(lambda args: 1 / 0, flags("-"))) == 99
    assert "Traceback" in capfd.readouterr().err


def test_clocks_do_not_matter(world, rollouts, tmp_path, cheap):
    """The files of a killed run are from 1970, or from the future."""
    rollout.main(args_of("rollout", world, rollouts, tmp_path / "whole"))
    args = args_of("rollout", world, rollouts, tmp_path / "out")
    for seconds in (0, 2e9):
        assert in_fork(lambda: (Disk(20), rollout.main(args))) == -signal.SIGKILL
        for path in (tmp_path / "out").rglob("*"):
            os.utime(path, (seconds, seconds))
        rollout.main(args_of("rollout", world, rollouts, tmp_path / "out", "--resume"))
        assert results("rollout", tmp_path / "out") == results("rollout", tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_shard_that_was_damaged_before_the_resume_is_made_again(world, rollouts, tmp_path, cheap):
    stage = STAGES["score_teacher"]
    stage.main(args_of("score_teacher", world, rollouts, tmp_path / "whole"))
    names = sorted(path.name for path in (tmp_path / "whole").glob("shard_*"))
    for damage in (
        lambda data: data[:-9],
        lambda data: data[:99] + bytes([data[99] ^ 4]) + data[100:],
        lambda data: b"",
    ):
        out = tmp_path / "out"
        with pytest.raises(KeyError):  # the last step fails: all shards are finished
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(artifacts, "finish_artifact", lambda *args, **facts: {}["killed"])
                stage.main(args_of("score_teacher", world, rollouts, out))
        (out / names[1]).write_bytes(damage((out / names[1]).read_bytes()))
        cheap.reset()
        stage.main(args_of("score_teacher", world, rollouts, out, "--resume"))
        assert results("score_teacher", out) == results("score_teacher", tmp_path / "whole")
        assert cheap.chunks() == 1
        shutil.rmtree(out)


@pytest.fixture
def holder(tmp_path):
    """A process that writes to tmp_path/a until it is killed."""
    reader, writer = os.pipe()

    def hold():
        begun(tmp_path / "a")
        os.write(writer, b".")
        time.sleep(600)

    pid = in_fork(hold, wait=False)
    assert os.read(reader, 1)
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_two_runs_never_write_to_one_directory(tmp_path, holder, refused):
    before = sorted(os.listdir(tmp_path / "a"))
    for more in ({}, {"resume": True}, {"overwrite": True}):
        for call in (artifacts.check_out, artifacts.start_artifact):
            args = flags(tmp_path / "a", **more)
            refused(functools.partial(call, args), f"--out {tmp_path}/a", f"process {holder} on")
    assert sorted(os.listdir(tmp_path / "a")) == before
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    artifacts.start_artifact(flags(tmp_path / "a", resume=True))  # the kernel has let go of the lock
    artifacts.finish_artifact(flags(tmp_path / "a"), "stage", ["half.txt"])


def test_of_runs_that_start_together_one_writes(tmp_path, capfd):
    """Eight processes want one directory at once, fresh or unfinished: one gets it, seven do not."""

    def race(args, reader, writer):
        artifacts.start_artifact(args)
        print("wrote", flush=True)
        os.close(writer)
        os.read(reader, 1)  # returns once the others have ended: until then they hold the pipe open

    for more in ({}, {"resume": True}, {"overwrite": True}):
        reader, writer = os.pipe()
        body = functools.partial(race, flags(tmp_path / "a", **more), reader, writer)
        pids = [in_fork(body, wait=False) for _ in range(8)]
        os.close(writer)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        out, err = capfd.readouterr()
        assert codes == [0] + [2] * 7 and out.count("wrote") == 1, err
        assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------
# Fuzzed readers: a message that names the file, or what was written; never a traceback, never other data

fuzzed = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = [None, True, -1, 2**31, 10**30, 0.5, float("nan"), float("inf")]
HARD = st.sampled_from([*NUMBERS, "", "x", "\ud800", "\0", "<|im_end|>", [], [[]], {}])
JSON = st.recursive(
    HARD | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
EDIT = st.tuples(
    st.floats(0, 1),
    st.integers(0, 12),
    st.binary(max_size=6) | st.sampled_from([b"}", b"]", b'"', b"\n", b"NaN", b"1e999"]),
)


def edited(data, edits):
    """Bytes with a few places overwritten: (where, how many bytes go, what comes)."""
    for where, gone, new in edits:
        place = int(where * len(data))
        data = data[:place] + new + data[place + gone :]
    return data


def changed(draw, value):
    """A JSON value with something in it replaced or left out."""
    value = copy.deepcopy(value)
    spots = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = draw(st.sampled_from(spots))
    if draw(st.booleans()):
        node[key] = draw(JSON)
    else:
        del node[key]
    return value


def outcome(call, *words):
    """(what the call returns, None), or (None, its message) if it refuses with code 2 and these words."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            return call(), None
    except SystemExit as end:
        assert (
            end.code == 2
            and all(word in err.getvalue() for word in words)
            and err.getvalue().startswith("error: ")
        )
        return None, err.getvalue()


@fuzzed
@given(data=st.data())
def test_fuzzed_meta_json(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed_meta"
    if not path.exists():
        made(path)
        shutil.copy(path / "meta.json", f"{path}.json")
    text = pathlib.Path(f"{path}.json").read_bytes()
    meta = json.loads(text)
    mutated = json.dumps(changed(data.draw, meta)).encode()
    if data.draw(st.booleans()):
        mutated = edited(text, data.draw(st.lists(EDIT, min_size=1, max_size=3)))
    (path / "meta.json").write_bytes(mutated)
    found, message = outcome(
        lambda: artifacts.read_artifact(str(path), "--rollouts", "stage"), f"--rollouts {path}", "meta.json"
    )
    assert message or found == {name: value for name, value in meta.items() if name != "sha256"}
    shutil.copy(path / "meta.json", path / "meta.partial.json")
    (path / "meta.json").unlink()  # the same text as the mark of an unfinished run
    found, message = outcome(lambda: artifacts.check_out(flags(path, resume=True)))
    assert not found and (message is None or "meta.partial.json" in message or "--resume" in message)


@fuzzed
@given(
    rows=st.lists(
        st.one_of(
            st.fixed_dictionaries(
                {}, optional={name: JSON for name in ("problem", "question", "answer", "id", "unique_id")}
            ),
            st.fixed_dictionaries(
                {"problem": HARD | st.text(min_size=1), "answer": HARD | st.text(min_size=1)},
                optional={"id": JSON},
            ),
            JSON,
        ),
        min_size=1,
        max_size=3,
    ),
    edits=st.lists(EDIT, max_size=1),
)
def test_fuzzed_problems(tmp_path_factory, rows, edits):
    path, tokenizer = tmp_path_factory.getbasetemp() / "fuzzed.jsonl", make_tokenizer()
    path.write_bytes(edited("".join(json.dumps(row) + "\n" for row in rows).encode(), edits))
    problems, message = outcome(lambda: load_problems(str(path)), "fuzzed.jsonl")
    if message is None:
        assert len({problem["id"] for problem in problems}) == len(problems)
        for problem in problems:
            assert all(type(value) is str and value.strip() for value in problem.values()) and problem[
                "answer"
            ] not in ("nan", "inf")
            json.dumps(problem, ensure_ascii=False).encode()  # it can be written
            assert all(0 <= i < 29 for i in prompts.render_prompt(tokenizer, problem["problem"]))
        if not edits:
            texts = [[row.get(name) for name in ("problem", "question")] for row in rows]
            first = [next(text for text in pair if text not in (None, "") and text == text) for pair in texts]
            assert [problem["problem"] for problem in problems] == first


@fuzzed
@given(data=st.data())
def test_fuzzed_rows_of_rollouts(rollouts, tmp_path_factory, data):
    """In an artifact whose checksums are right."""
    path = tmp_path_factory.getbasetemp() / "fuzzed_rollouts"
    path.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in open(rollouts / "rollouts.jsonl")]
    place = data.draw(st.integers(0, len(rows) - 1))
    bad = [*rows[:place], changed(data.draw, rows[place]), *rows[place + 1 :]]
    text = "".join(json.dumps(row) + "\n" for row in bad).encode()
    (path / "rollouts.jsonl").write_bytes(edited(text, data.draw(st.lists(EDIT, max_size=1))))
    found, message = outcome(lambda: list(read_rollouts(str(path), 29)), "rollouts.jsonl")
    for row in found or []:
        for name in ("prompt_ids", "response_ids"):
            assert row[name] and all(type(i) is int and 0 <= i < 29 for i in row[name])
        assert (
            all(type(row[name]) is str for name in ("id", "response", "answer", "finish_reason"))
            and type(row["sample"]) is int
        )
        json.dumps(row, ensure_ascii=False).encode()


@fuzzed
@given(rows_edits=st.lists(EDIT, max_size=2), marks_edits=st.lists(EDIT, max_size=2))
def test_fuzzed_progress(tmp_path_factory, rows_edits, marks_edits):
    """What is kept of a killed run's file is what was written, to the end of a chunk."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed_progress"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file, whole = jsonl.GrowingFile(str(folder / "rows.jsonl"), chunks=0), {0: b""}
    for chunk in range(1, 5):
        file.write(f'{{"row": {chunk * 1111}}}\n' * chunk)
        file.mark(chunks=chunk, faults={"dropped": chunk})
        whole[chunk] = (folder / "rows.jsonl").read_bytes()
    for name, edits in (("rows.jsonl", rows_edits), ("progress.jsonl", marks_edits)):
        (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
    file, _ = outcome(lambda: jsonl.GrowingFile(str(folder / "rows.jsonl"), chunks=0))
    assert (folder / "rows.jsonl").read_bytes() == whole[file.done["chunks"]]
    assert file.done.get("faults", {"dropped": 0}) == {"dropped": file.done["chunks"]}


@fuzzed
@given(edits=st.lists(EDIT, min_size=1, max_size=2), step=st.integers(0, 5))
def test_fuzzed_logs(tmp_path_factory, edits, step):
    path = tmp_path_factory.getbasetemp() / "fuzzed_metrics.jsonl"
    rows = [json.dumps({"step": number, "loss": 0.1 * number}) + "\n" for number in range(1, 5)]
    path.write_bytes(edited("".join(rows).encode(), edits))
    kept, message = outcome(lambda: checkpoints.rewind_log(str(path), step), "fuzzed_metrics.jsonl line ")
    if message is None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        assert [json.loads(line) for line in lines] == kept and all(row["step"] <= step for row in kept)


@fuzzed
@given(edits=st.lists(EDIT, min_size=1, max_size=3), which=st.floats(0, 0.999))
def test_fuzzed_scores(scores, rollouts, tmp_path_factory, edits, which):
    """Headers and tensors of the shards, and the head."""
    path = tmp_path_factory.getbasetemp() / "fuzzed_scores"
    if not path.exists():
        shutil.copytree(scores, path)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    file = path / names[int(which * len(names))]
    data = file.read_bytes()
    try:
        file.write_bytes(edited(data[:300], edits) + data[300:])
        changed_it = file.read_bytes() != data
        read = lambda scores: [scores.read(row) for row in range(len(scores.places))]
        _, message = outcome(lambda: read(Scores(str(path), str(rollouts))), f"--scores {path}", file.name)
        assert bool(message) == changed_it
    finally:
        file.write_bytes(data)


@settings(fuzzed, max_examples=40)
@given(data=st.data())
def test_fuzzed_models(world, tmp_path_factory, data):
    """Configuration and tokenizer of a model: refused by its path, or usable."""
    path = tmp_path_factory.getbasetemp() / "fuzzed_model"
    if not path.exists():
        shutil.copytree(world / "student_init", path)
    names = sorted(file.name for file in path.iterdir() if file.suffix != ".safetensors")
    file = path / data.draw(st.sampled_from(names))
    original = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        mutated = json.dumps(changed(data.draw, json.loads(original))).encode()
    else:
        mutated = edited(original, data.draw(st.lists(EDIT, min_size=1, max_size=2)))
    try:
        file.write_bytes(mutated)

        def read():
            directory = models.model_dir(str(path), "--model")
            tokenizer = prompts.load_tokenizer(directory, "--model")
            prompts.check_template(tokenizer, "--model", "")
            return (
                prompts.render_prompt(tokenizer, "a=3"),
                prompts.stop_ids(tokenizer, directory, 29),
                models.context_of(directory),
            )

        found, message = outcome(read, str(path))
        assert message or all(type(i) is int for i in found[1]) and type(found[2]) is int
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"run": "a"}',
        '{"run": "a", "step": 1, "tflops": 1, "cell": {"prefix": "student"}}',
        '{"run": "a", "step": 1, "tflops": "x", "cell": {"prefix": "student", "kl": "reverse"}}',
    ],
)
def test_a_damaged_checkpoint_json_is_refused_before_anything_is_written(
    text, world, rollouts, tmp_path, cheap, refused
):
    shutil.copytree(world / "student_init", tmp_path / "model")
    (tmp_path / "model/checkpoint.json").write_text(text)
    args = args_of("evaluate", world, rollouts, tmp_path / "out", "--model", tmp_path / "model")
    refused(lambda: STAGES["evaluate"].main(args), f"--model {tmp_path}/model", "checkpoint.json")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# Nothing in the data is run


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_weights_are_refused_and_not_opened(world, tmp_path, refused):
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(world / "student_init", model)
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "tf_model.h5"):
        (model / name).write_bytes(pickle.dumps(Touch(trace)))
        refused(lambda: models.load_model(str(model), "--model", "float32"), "--model", "cannot be loaded")
    assert not trace.exists()


def test_a_models_own_code_is_refused_and_not_run(world, tmp_path, refused):
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(world / "student_init", model)
    (model / "own.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import PretrainedConfig as Own\n"
    )
    config = json.loads((model / "config.json").read_text())
    names = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
    }
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    refused(lambda: models.context_of(str(model)), str(model), "trust_remote_code")
    refused(lambda: models.load_model(str(model), "--model", "float32"), "--model", "cannot be loaded")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "OwnTokenizer", "auto_map": names})
    )
    refused(lambda: prompts.load_tokenizer(str(model), "--model"), "--model", "tokenizer")
    assert not trace.exists()


def calls(tree):
    """(dotted name, call) of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "pickle.load",
    "pickle.loads",
}
UNSAFE_CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput"}


def test_no_code_runs_data():
    """No shell, no eval, no pickles, no code of models: in every module of the project."""
    modules = [
        path
        for folder in ("", "distil", "runs", "reports", "kernels/streaming_kl", "recipes", "benchmarks")
        for path in sorted(pathlib.Path(ROOT, folder).glob("*.py"))
    ]
    assert len(modules) > 15
    for path in modules:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, call in calls(tree):
            assert name not in UNSAFE_CALLS, f"{path.name} line {call.lineno}: {name}"
            for keyword in call.keywords:
                assert keyword.arg != "shell", f"{path.name} line {call.lineno}: a shell"
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{path.name} line {call.lineno}"
        imported = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not imported & {"pickle", "dill", "joblib", "shelve", "marshal"}, path.name


HOSTILE = [
    "__import__('os').system('touch {0}')",
    "1+__import__('os').system('touch {0}')",
    "eval(\"open('{0}','w')\")",
    "\\text{{__import__('os').system('touch {0}')}}",
    "$(touch {0})",
    "`touch {0}`",
    "; touch {0}",
    "\\input{{|touch {0}}}",
    "\\write18{{touch {0}}}",
    "\\immediate\\write18{{touch {0}}}+1",
    "exec(\"open('{0}','w')\")",
    "(lambda: open('{0}','w'))()",
    "[open('{0}','w') for x in (1,2)]",
    "x.__class__.__base__.__subclasses__()",
    "sympify(\"open('{0}','w')\")",
    "S(\"open('{0}','w')\")",
    "\\sqrt{{__import__('os').system('touch {0}')}}",
    "\\frac{{open('{0}','w')}}{{2}}",
    "5 if open('{0}','w') else 6",
    "\\operatorname{{eval}}(open('{0}','w'))",
    "2\n__import__('os').system('touch {0}')",
    "-1*(__import__('os').system('touch {0}'))",
    "\\mathrm{{os}}.system('touch {0}')",
]


def test_the_grader_runs_nothing_of_an_answer(tmp_path):
    """Neither the response nor the gold answer, boxed or stated; the next answer is graded as ever."""
    trace = tmp_path / "trace"
    texts = [text.format(trace) for text in HOSTILE]
    forms = ["\\boxed{{{}}}", "The answer is {}", "#### {}", "Therefore, {}"]
    pairs = [(form.format(text), "7x+1") for text in texts for form in forms] + [
        ("\\boxed{7x+1}", text) for text in texts
    ]
    assert not any(verdict.correct for verdict in grade(*zip(*pairs)))
    assert not trace.exists() and not list(tmp_path.iterdir())
    assert grade(["\\boxed{1+7x}"], ["7x+1"])[0].correct


@pytest.mark.parametrize("stage", ["rollout", "score_teacher", "evaluate", "train", "grpo"])
def test_every_stage_is_run_by_run_stage(stage):
    """So that what the tests above see of run_stage is what a command line does."""
    guard = ast.parse(pathlib.Path(ROOT, f"{stage}.py").read_text(encoding="utf-8")).body[-1]
    assert ast.unparse(guard.test) == "__name__ == '__main__'"
    alone, together = (
        ["run_stage(main, get_args())"],
        ["ranks.start()", "run_stage(main, get_args())", "ranks.end()"],
    )
    assert [ast.unparse(line).removeprefix("artifacts.") for line in guard.body] == (
        together if stage in ("train", "grpo") else alone
    )
