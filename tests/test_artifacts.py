"""artifacts.py: what is accepted as an artifact, and where a stage may write."""
import argparse
import json
import shutil

import pytest

from artifacts import finish_artifact, read_artifact, read_jsonl, start_artifact


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
    assert {"schema", "argv", "started", "finished", "commit", "dirty", "versions", "device", "python", "files"} <= meta.keys()
    assert meta["versions"]["torch"] and sorted(meta["files"]) == ["data.txt", "final/config.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["data.txt", "final", "meta.json"]


def edit_meta(path, **changes):
    file = path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("damage, words", [
    (lambda path: (path / "meta.json").unlink(), ["no meta.json"]),
    (lambda path: shutil.rmtree(path), ["no meta.json"]),
    (lambda path: (path / "meta.json").write_text('{"schema": 1, "sta'), ["damaged"]),
    (lambda path: (path / "meta.json").write_text("[]"), ["damaged"]),
    (lambda path: (path / "meta.json").write_text('{"schema": 1, "stage": "stage"}'), ["damaged", "files"]),
    (lambda path: (path / "meta.json").write_bytes(b"\xff\xfe"), ["damaged"]),
    (lambda path: edit_meta(path, schema=99), ["schema", "99"]),
    (lambda path: edit_meta(path, stage="evaluate"), ["evaluate", "stage"]),
    (lambda path: (path / "data.txt").unlink(), ["data.txt", "missing"]),
    (lambda path: (path / "data.txt").write_text("43"), ["data.txt", "changed"]),
    (lambda path: (path / "final/config.json").write_text("{ }"), ["final/config.json", "changed"]),
])
def test_damaged_artifacts_are_refused_by_flag_and_file(tmp_path, refused, damage, words):
    path = made(tmp_path / "a")
    damage(path)
    refused(lambda: read_artifact(str(path), "--rollouts", "stage"), f"--rollouts {path}", *words)


def test_an_unfinished_run_is_no_artifact(tmp_path, refused):
    refused(lambda: read_artifact(str(begun(tmp_path / "a")), "--rollouts", "stage"), "--rollouts", "meta.json")


def files_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_directories_in_use_are_refused_and_stay_as_they_are(tmp_path, refused):
    finished, unfinished, foreign = made(tmp_path / "finished"), begun(tmp_path / "unfinished"), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    before = files_of(tmp_path)
    for path, more, words in [
        (finished, {}, [f"--out {finished}", "finished artifact", "--overwrite"]),
        (finished, {"resume": True}, [finished]),
        (unfinished, {}, [f"--out {unfinished}", "unfinished run", "--resume", "--overwrite"]),
        (unfinished, {"resume": True, "lr": 0.2}, ["--lr", "0.1", "0.2"]),
        (foreign, {}, [f"--out {foreign}", "files"]),
        (foreign, {"overwrite": True}, [f"--out {foreign}", "project"]),
        (foreign, {"resume": True}, [foreign]),
        (tmp_path / "file", {"overwrite": True}, ["is a file"]),
        (tmp_path / "file", {"resume": True}, ["is a file"]),
        (tmp_path / "absent", {"resume": True}, ["no unfinished run"]),
    ]:
        refused(lambda: start_artifact(flags(path, **more)), *words)
        assert files_of(tmp_path) == before and not (tmp_path / "absent").exists()


def test_overwrite_replaces_what_this_project_wrote(tmp_path):
    for path in (made(tmp_path / "finished"), begun(tmp_path / "unfinished")):
        start_artifact(flags(path, overwrite=True))
        assert list(files_of(path)) == ["meta.partial.json"]
    (tmp_path / "empty").mkdir()
    start_artifact(flags(tmp_path / "empty"))


def test_resume_keeps_what_there_is_and_when_it_started(tmp_path):
    path = begun(tmp_path / "a")
    partial = json.loads((path / "meta.partial.json").read_text())
    (path / "meta.partial.json").write_text(json.dumps(partial | {"started": "2001-01-01T00:00:00+00:00"}))
    args = flags(path, resume=True)
    start_artifact(args)
    meta = finish_artifact(args, "stage", ["half.txt"])
    assert meta["started"].startswith("2001") and read_artifact(str(path), "-", "stage") == meta


def test_overwrite_never_deletes_an_input(tmp_path, refused):
    """--out that is, or holds, the directory given to another flag."""
    source = made(tmp_path / "input")
    inner = made(source / "inside")
    for out, given in [(source, source), (source, inner), (f"{tmp_path}/input/../input", inner)]:
        refused(lambda: start_artifact(flags(out, overwrite=True, model=str(given))), "--out", "--model")
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


def test_read_jsonl_names_the_line(tmp_path, refused):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": "\u2028"}\n{"a"\n')
    rows = read_jsonl(str(file))
    assert next(rows) == (f"{file} line 1", {"a": 1}) and next(rows) == (f"{file} line 3", {"a": "\u2028"})
    refused(lambda: next(rows), f"{file} line 4", "not JSON")
