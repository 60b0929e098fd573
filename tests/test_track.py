"""--track: what a tracker is given, and that nothing a tracker does costs a run."""

import importlib
import json
import subprocess
import sys

import pytest

import train
from conftest import ROOT, killed_in_call, read_rows, run_line
from distil import track, training

FAKE = """
import json, os
given = []
class Run:
    def log(self, numbers, step):
        given.append((step, numbers))
        if FAILS == "log" and step == 2:
            raise ValueError("no disk,\\nno network")
    def finish(self):
        given.append("finish")
        if FAILS == "finish":
            raise OSError("offline")
def init(**about):
    given.append(about)
    if FAILS == "init":
        raise RuntimeError("no key")
    return Run()
"""


@pytest.fixture
def line(prefix_flags, world):
    return (
        f"{prefix_flags['student']} --kl forward --steps 3 --batch_size 2 --max_response_tokens 4"
        f" --save_every 2 --eval_data {world}/heldout.jsonl --eval_every 3 --eval_n 2 --position_bins 2"
    )


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, fails) installs a tracker that raises in `fails`, and returns its module."""

    def install(name, fails=None):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(f"FAILS = {fails!r}\n{FAKE}")
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setitem(sys.modules, name, None)  # to be as before after the test
        del sys.modules[name]
        return importlib.import_module(name)

    return install


def numbers_in(out):
    """{(name, step): number} of all logs of a run, found in another way than track does."""
    found = {}

    def add(name, value, step):
        if type(value) in (int, float):
            found[name, step] = value
        for key in value if type(value) is dict else ():
            add(f"{name}/{key}", value[key], step)

    for log in ("metrics", "evals"):
        for row in read_rows(out / f"{log}.jsonl"):
            step = row.pop("step")
            for key, value in row.items():
                add(f"{log}/{key}", value, step)
    return found


def test_numbers_of_a_row():
    row = {"step": 3, "avg": 0.5, "n": 2, "pass": {"4": 1.0}, "avg_interval": [0.0, 1.0], "tflops": None}
    row |= {"decision": "hold", "pass_interval": {"4": [0.0, 1.0]}}
    assert track.numbers_of(row, "evals") == {"evals/avg": 0.5, "evals/n": 2, "evals/pass/4": 1.0}


def test_tensorboard_shows_what_the_logs_hold_after_a_kill_too(line, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with killed_in_call(4, training, "optimizer_step"):
        run_line(train, f"{line} --steps 5 --out {out} --track tensorboard")
    run_line(train, f"{line} --steps 5 --out {out} --track tensorboard --resume")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = [
        (name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)
    ]
    assert {(name, step): value for name, step, value in shown} == pytest.approx(numbers_in(out), rel=1e-6)
    assert len(shown) == len(numbers_in(out))  # what was logged before the kill and again is there once


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_rows_and_a_resumed_run_keeps_its_name(name, line, fake, tmp_path):
    module, out = fake(name), tmp_path / "mine/run"
    with killed_in_call(2, training, "optimizer_step"):
        run_line(train, f"{line} --out {out} --track {name}")
    first = module.given[0]
    del module.given[:]
    run_line(train, f"{line} --out {out} --track {name} --resume")
    again, *rows, end = module.given
    found = {(key, step): value for step, numbers in rows for key, value in numbers.items()}
    assert found == numbers_in(out) and end == "finish"
    assert first["name"] == "run" and first["project"] == "mine" and first["config"]["steps"] == 3
    same = {"name", "project", "id", "dir"}
    assert {key: first[key] for key in same & {*first}} == {key: again[key] for key in same & {*again}}
    assert (first["resume"], again["resume"]) == ("never", "allow") and ("id" in first) == (name == "wandb")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(fails, line, fake, tmp_path, capsys):
    module = fake("trackio", fails)
    run_line(train, f"{line} --out {tmp_path}/run --track trackio")
    said = capsys.readouterr().out
    assert said.count("WARNING: --track trackio failed") == 1 and "Traceback" not in said
    assert {"init": "no key", "log": "no disk", "finish": "offline"}[fails] in said
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run/meta.json").exists()
    assert len(module.given) == {"init": 1, "log": 4, "finish": 7}[fails]  # init, step 0, 1, 2, 3, 3, finish


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_a_model_is_loaded(
    name, line, tmp_path, monkeypatch, refused
):
    """Nor is a directory of its name a package, such as the one that wandb makes where a process starts."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(
        training.ranks, "load_sharded", lambda *given, **more: pytest.fail("a model was loaded")
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    out = tmp_path / "run"
    said = refused(
        lambda: run_line(train, f"{line} --out {out} --track {name}"), f"--track {name}", "pip install"
    )
    assert said.count("\n") == 1 and not out.exists()


def test_no_tracker_is_imported_without_the_flag():
    code = "import train, sys; assert not {'tensorboard', 'wandb', 'trackio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_real_trackio(line, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils

    for module in (storage, trackio.utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run_line(train, f"{line} --out {tmp_path}/mine/run --track trackio")
    rows = storage.SQLiteStorage.get_logs("mine", "run")
    found = {(key, row["step"]): row[key] for row in rows for key in row if "/" in key}
    assert found == numbers_in(tmp_path / "mine/run")


def records_in(path):
    """The records of a .wandb file: a LevelDB log, in blocks of 32 KiB, after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 0 < (left := -at % 32768) < 7:  # too little for a header
            at += left
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_the_real_wandb_offline(line, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_line(train, f"{line} --out {tmp_path}/mine/run --track wandb")
    [path] = (tmp_path / "mine/run/wandb").glob("offline-run-*/*.wandb")
    found, run = {}, None
    for data in records_in(path):
        record = Record.FromString(data)
        run = record.run if record.HasField("run") else run
        names = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        values = {name: json.loads(value) for name, value in names.items()}
        found |= {(name, values["_step"]): value for name, value in values.items() if name[0] != "_"}
    assert found == numbers_in(tmp_path / "mine/run")
    assert (run.project, run.display_name) == ("mine", "run")
