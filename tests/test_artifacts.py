"""artifacts.py: what is accepted as an artifact, and where a stage may write."""

import argparse
import functools
import hashlib
import json
import shutil

import pytest

from distil.artifacts import finish_artifact, is_finished, provenance, read_artifact, start_artifact
from distil.jsonl import GrowingFile, read_jsonl
from runs.checkpoints import rewind_log


def flags(out, **more):
    return argparse.Namespace(**({"out": str(out), "overwrite": False, "resume": False, "lr": 0.1} | more))


def made(path, **more):
    """A finished artifact of one file and one file in a folder."""
    args = flags(path, **more)
    start_artifact(args)
    (path / "data.txt").write_text("42")
    (path / "final").mkdir()
    (path / "final/config.json").write_text("{}")
    finish_artifact(args, "stage", ["data.txt", "final/config.json"], counts={"rows": 1})
    return path


def begun(path, **more):
    """An unfinished run."""
    start_artifact(flags(path, **more))
    (path / "half.txt").write_text("4")
    return path


def test_a_finished_artifact_is_read_back(tmp_path):
    meta = read_artifact(str(made(tmp_path / "a")), "--rollouts", "other", "stage")
    assert meta["counts"] == {"rows": 1} and meta["args"]["lr"] == 0.1 and meta["stage"] == "stage"
    fields = "schema argv started finished commit dirty versions device python files"
    assert set(fields.split()) <= meta.keys()
    assert meta["versions"]["torch"] and sorted(meta["files"]) == ["data.txt", "final/config.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["data.txt", "final", "meta.json"]


def edit_meta(path, seal=False, **changes):
    """Change fields of meta.json, with its own sha256 made anew or not."""
    file = path / "meta.json"
    meta = json.loads(file.read_text()) | changes
    if seal:
        del meta["sha256"]
        meta["sha256"] = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    file.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / "meta.json").unlink(), ["no meta.json"]),
        (lambda path: shutil.rmtree(path), ["no meta.json"]),
        (lambda path: (path / "meta.json").write_text('{"schema": 1, "sta'), ["damaged"]),
        (lambda path: (path / "meta.json").write_text("[]"), ["damaged"]),
        (
            lambda path: (path / "meta.json").write_text('{"schema": 2, "stage": "stage"}'),
            ["damaged", "changed"],
        ),
        (lambda path: (path / "meta.json").write_bytes(b"\xff\xfe"), ["damaged"]),
        (lambda path: edit_meta(path, schema=99), ["schema", "99"]),
        (lambda path: edit_meta(path, seal=True, stage="evaluate"), ["evaluate", "stage"]),
        (lambda path: edit_meta(path, counts={"rows": 2}), ["meta.json", "damaged", "changed"]),
        (
            lambda path: edit_meta(path, finished="2030-01-01T00:00:00+00:00"),
            ["meta.json", "damaged", "changed"],
        ),
        (lambda path: (path / "meta.json").write_text("[" * 100_000), ["meta.json", "damaged"]),
        (lambda path: (path / "data.txt").unlink(), ["data.txt", "missing"]),
        (lambda path: (path / "data.txt").write_text("43"), ["data.txt", "changed"]),
        (lambda path: (path / "final/config.json").write_text("{ }"), ["final/config.json", "changed"]),
    ],
)
def test_damaged_artifacts_are_refused_by_flag_and_file(tmp_path, refused, damage, words):
    path = made(tmp_path / "a")
    damage(path)
    refused(lambda: read_artifact(str(path), "--rollouts", "stage"), f"--rollouts {path}", *words)


def test_an_unfinished_run_is_no_artifact(tmp_path, refused):
    refused(
        lambda: read_artifact(str(begun(tmp_path / "a")), "--rollouts", "stage"), "--rollouts", "meta.json"
    )


def files_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_directories_in_use_are_refused_and_stay_as_they_are(tmp_path, refused):
    finished, unfinished = made(tmp_path / "finished"), begun(tmp_path / "unfinished")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    before = files_of(tmp_path)
    for path, more, words in [
        (finished, {}, [f"--out {finished}", "finished artifact", "--overwrite"]),
        (finished, {"resume": True, "lr": 0.2}, ["--lr", "0.1", "0.2"]),
        (unfinished, {}, [f"--out {unfinished}", "unfinished run", "--resume", "--overwrite"]),
        (unfinished, {"resume": True, "lr": 0.2}, ["--lr", "0.1", "0.2"]),
        (foreign, {}, [f"--out {foreign}", "files"]),
        (foreign, {"overwrite": True}, [f"--out {foreign}", "project"]),
        (foreign, {"resume": True}, [foreign]),
        (tmp_path / "file", {"overwrite": True}, ["is a file"]),
        (tmp_path / "file", {"resume": True}, ["is a file"]),
    ]:
        refused(functools.partial(start_artifact, flags(path, **more)), *words)
        assert files_of(tmp_path) == before


def test_overwrite_replaces_what_this_project_wrote(tmp_path):
    for path in (made(tmp_path / "finished"), begun(tmp_path / "unfinished")):
        start_artifact(flags(path, overwrite=True))
        assert sorted(files_of(path)) == ["meta.lock", "meta.partial.json"]
    (tmp_path / "empty").mkdir()
    start_artifact(flags(tmp_path / "empty"))


def test_resume_begins_what_was_never_begun_and_leaves_what_is_finished(tmp_path, capsys):
    """So that a scheduler can always start a job with the same command."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        args = flags(path, resume=True)
        start_artifact(args)
        assert not args.resume  # no later code takes it for a resumed run
        assert (path / "meta.partial.json").exists()
    path = made(tmp_path / "finished")
    before = files_of(path)
    (path / "meta.lock").touch()  # killed between its last two steps
    with pytest.raises(SystemExit) as end:
        start_artifact(flags(path, resume=True))
    assert end.value.code == 0 and files_of(path) == before and "is finished" in capsys.readouterr().out
    assert is_finished(flags(path, resume=True))
    assert not is_finished(flags(path)) and not is_finished(flags(tmp_path / "absent"))


def test_a_replacement_that_was_killed_needs_overwrite_again(tmp_path, refused):
    path = made(tmp_path / "a")
    (path / "meta.json").unlink()
    (path / "meta.lock").touch()
    for more in ({}, {"resume": True}):
        refused(functools.partial(start_artifact, flags(path, **more)), f"--out {path}", "--overwrite")
    start_artifact(flags(path, overwrite=True, resume=True))
    assert sorted(files_of(path)) == ["meta.lock", "meta.partial.json"]


def test_resume_keeps_what_there_is_and_when_it_started(tmp_path):
    path = begun(tmp_path / "a")
    started = json.loads((path / "meta.partial.json").read_text())["started"]
    args = flags(path, resume=True)
    start_artifact(args)
    meta = finish_artifact(args, "stage", ["half.txt"])
    assert meta["started"] == started and read_artifact(str(path), "-", "stage").items() >= meta.items()
    assert list(meta["files"]) == ["half.txt"]


def test_overwrite_never_deletes_an_input(tmp_path, refused):
    """--out that is, or holds, the directory given to another flag."""
    source = made(tmp_path / "input")
    inner = made(source / "inside")
    for out, given in [(source, source), (source, inner), (f"{tmp_path}/input/../input", inner)]:
        args = flags(out, overwrite=True, model=str(given))
        refused(functools.partial(start_artifact, args), "--out", "--model")
    assert (source / "data.txt").exists() and (inner / "data.txt").exists()


def test_resume_is_refused_after_an_input_changed(tmp_path, refused):
    data, source = tmp_path / "problems.jsonl", made(tmp_path / "rollouts")
    data.write_text("{}\n")
    given = {"data": str(data), "rollouts": str(source)}
    path = begun(tmp_path / "a", **given)
    start_artifact(flags(path, resume=True, **given))
    data.write_text("{}\n{}\n")
    refused(lambda: start_artifact(flags(path, resume=True, **given)), "--resume", "--data")
    data.write_text("{}\n")
    shutil.rmtree(source)
    made(source, lr=0.3)
    refused(lambda: start_artifact(flags(path, resume=True, **given)), "--resume", "--rollouts")


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-9], lambda text: text.replace("0.1", "0.2"), lambda text: "[]", lambda text: ""],
)
def test_a_damaged_mark_of_an_unfinished_run_is_refused(tmp_path, refused, damage):
    path = begun(tmp_path / "a")
    file = path / "meta.partial.json"
    file.write_text(damage(file.read_text()))
    refused(lambda: start_artifact(flags(path, resume=True)), "--resume", "meta.partial.json", "damaged")
    start_artifact(flags(path, overwrite=True))


def test_a_model_that_the_output_was_put_into_has_not_changed(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    path = begun(model / "eval", model=str(model))
    (path / "more").mkdir()
    start_artifact(flags(path, resume=True, model=str(model)))


def test_read_jsonl_names_the_line(tmp_path, refused):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": "\u2028"}\n{"a"\n')
    rows = read_jsonl(str(file))
    assert next(rows) == (f"{file} line 1", {"a": 1}) and next(rows) == (f"{file} line 3", {"a": "\u2028"})
    refused(lambda: next(rows), f"{file} line 4", "not JSON")


CHUNKS = [["a\n", "b\n"], [], ["\u00e9\n"], ["c\n"]]


def grown(folder, count):
    """A file of the first `count` chunks."""
    folder.mkdir(exist_ok=True)
    file = GrowingFile(str(folder / "rows.jsonl"), chunks=0)
    for number in range(file.done["chunks"], count):
        for row in CHUNKS[number]:
            file.write(row)
        file.mark(chunks=number + 1)
    return file


def test_a_growing_file_goes_on_after_its_last_whole_chunk(tmp_path):
    """Cut at every byte of either file, it goes on from the last mark that both reach, and ends the same."""
    whole = grown(tmp_path / "whole", 4)
    rows, marks = ((tmp_path / "whole" / name).read_bytes() for name in ("rows.jsonl", "progress.jsonl"))
    assert rows == "a\nb\n\u00e9\nc\n".encode() and whole.done["bytes"] == len(rows)
    ends, lines = [0, 4, 4, 7, 9], marks.splitlines(keepends=True)
    for cut in range(len(rows) + 1):
        for cut_marks in (0, 1, len(lines[0]), len(lines[0] + lines[1]) - 1, len(marks) - 1, len(marks)):
            folder = tmp_path / "cut"
            folder.mkdir()
            (folder / "rows.jsonl").write_bytes(rows[:cut])
            (folder / "progress.jsonl").write_bytes(marks[:cut_marks])
            whole_marks = [line for line in marks[:cut_marks].splitlines(keepends=True) if line in lines]
            expected = max(chunks for chunks in range(len(whole_marks) + 1) if ends[chunks] <= cut)
            assert GrowingFile(str(folder / "rows.jsonl"), chunks=0).done["chunks"] == expected
            grown(folder, 4)
            assert (folder / "rows.jsonl").read_bytes() == rows
            assert (folder / "progress.jsonl").read_bytes() == marks
            shutil.rmtree(folder)


def test_a_growing_file_does_not_trust_what_was_changed(tmp_path, capsys):
    """A flipped bit anywhere in the rows or the marks: what is before it is kept, the rest made again."""
    grown(tmp_path / "whole", 4)
    files = {name: (tmp_path / "whole" / name).read_bytes() for name in ("rows.jsonl", "progress.jsonl")}
    for name, data in files.items():
        for place in range(0, len(data), 1 if name == "rows.jsonl" else 7):
            grown(tmp_path / "flipped", 4)
            (tmp_path / "flipped" / name).write_bytes(
                data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            )
            done = GrowingFile(str(tmp_path / "flipped/rows.jsonl"), chunks=0).done["chunks"]
            ends = (4, 4, 7, 9)
            before = (
                data[:place].count(b"\n") if name == "progress.jsonl" else sum(end <= place for end in ends)
            )
            assert done == before
            assert f"{4 - done} cut or damaged chunks" in capsys.readouterr().out
            grown(tmp_path / "flipped", 4)
            assert {name: (tmp_path / "flipped" / name).read_bytes() for name in files} == files


def test_a_mark_of_more_bytes_than_there_are_is_not_trusted(tmp_path):
    grown(tmp_path, 2)
    with open(tmp_path / "progress.jsonl", "a") as file:
        file.write('{"chunks": 3, "bytes": 1000000000000000000, "sha256": ""}\n')
    assert GrowingFile(str(tmp_path / "rows.jsonl"), chunks=0).done["chunks"] == 2


def test_git_need_not_be_installed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert provenance()["commit"] is None and provenance()["versions"]["torch"]


def test_a_log_is_rewound_to_a_step(tmp_path, refused):
    rows = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 2, 3)]
    file = tmp_path / "metrics.jsonl"
    for step, kept in [(1, 1), (2, 3), (3, 4), (9, 4)]:
        file.write_text("".join(rows) + '{"step": 4, "lo')
        assert rewind_log(str(file), step) == [json.loads(row) for row in rows[:kept]]
        assert file.read_text() == "".join(rows[:kept])
    assert rewind_log(str(file), 0) == rewind_log(str(tmp_path / "absent.jsonl"), 5) == []
    assert not list(tmp_path.iterdir())  # no log is empty
    for bad in ('{"step": 2, "loss"\n', '{"loss": 1}\n', "7\n", '{"step": Infinity}\n', '{"step": "x"}\n'):
        file.write_text(rows[0] + bad + rows[3])
        refused(lambda: rewind_log(str(file), 9), f"{file} line 2", "damaged")
        assert file.read_text() == rows[0] + bad + rows[3]
