"""Runs: numbers that are not finite, refusals that leave nothing behind, longer runs, run directories."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import grpo
import rollout
import score_teacher
import train
from conftest import killed_in_call, read_rows, replace_text, run_line, swap_ids, untimed
from distil import artifacts, evaluation, jsonl, models, sampling
from distil.models import Response
from runs import diagnostics, training
from test_resume import Disk, in_fork

TINY = "--engine hf --dtype float32 --max_response_tokens 6"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(artifacts, "provenance", dict)
    monkeypatch.setattr(artifacts, "writing", False)  # as in a process that has just started


@pytest.fixture
def lines(world, prefix_flags, monkeypatch):
    """{name: (stage, flags)} of a small run of each kind; GRPO's rewards differ within a group."""
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda *args: sum(args[2].response_ids) % 2)
    common = f"{TINY} --batch_size 2 --lr 1e-2"
    return {
        "teacher": (train, f"{prefix_flags['teacher']} --kl forward {common}"),
        "student": (train, f"{prefix_flags['student']} --kl reverse --refresh_every 2 {common}"),
        "grpo": (grpo, f"--model {world}/student_init --data {world}/train.jsonl --n 4 {common}"),
    }


def files_of(path):
    """{name: bytes} of all files; None if there is no such directory."""
    if not path.exists():
        return None
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def change_weights(model, change):
    """change(name, tensor) -> tensor"""
    weights = load_file(model / "model.safetensors")
    weights = {name: change(name, tensor) for name, tensor in weights.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def are_finite(checkpoint):
    return all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


# ----------------------------------------------------------------------------------------------------------
# Numbers that are not finite


SETTINGS = ["--lr 1", "--lr 1e10", "--lr 1e37", "--lr 1e37 --warmup 1", "--lr 1e30 --max_grad_norm 1e30"]
SETTINGS += ["--lr 1e37 --max_grad_norm 1e-37"]
MORE = {"grpo": ["--updates 2 --lr 1e30", "--kl_weight 1e37", "--updates 2 --clip_high 1e37"]}


@pytest.mark.parametrize("kind", ["teacher", "student", "grpo"])
def test_no_optimiser_setting_writes_weights_or_logs_that_are_not_finite(kind, lines, tmp_path, capsys):
    stage, line = lines[kind]
    codes = set()
    for setting in SETTINGS + MORE.get(kind, []):
        for steps in (1, 2, 3):
            out, code = tmp_path / f"{setting}{steps}".replace(" ", ""), 0
            save = 2 if kind == "student" else 1
            try:
                run_line(stage, f"{line} --out {out} --steps {steps} --save_every {save} {setting}")
            except SystemExit as end:
                code = end.code
            err = capsys.readouterr().err
            assert (out / "final").exists() == (out / "meta.json").exists() == (code == 0)
            assert code == 0 or code == 1 and err.count("error:") == 1 and ("step" in err or "prompt" in err)
            assert all(are_finite(file.parent) for file in out.glob("*/model.safetensors"))
            for log in out.glob("*.jsonl"):
                assert not {"NaN", "Infinity", "-Infinity"} & set(log.read_text().replace(",", " ").split())
            codes.add(code)
    assert codes == {0, 1}


def test_weights_that_are_not_finite_are_not_saved(lines, tmp_path, monkeypatch, refused):
    """The update of step 3 writes infinity into a weight; what step 2 has saved stays."""
    stage, line = lines["teacher"]
    real = training.optimizer_step

    def spoil(args, model, optimizer, step, ids):
        found = real(args, model, optimizer, step, ids)
        if step == 2:
            with torch.no_grad():
                model.get_decoder().norm.weight[3] = torch.inf
        return found

    monkeypatch.setattr(training, "optimizer_step", spoil)
    for save_every, left in ((1, ["step_000001", "step_000002"]), (0, [])):
        out = tmp_path / str(save_every)
        more = f"--steps 3 --out {out} --save_every {save_every}"
        message = refused(lambda: run_line(stage, f"{line} {more}"), "norm.weight", "step 3", code=1)
        assert message.count("error:") == 1
        assert sorted(path.name for path in out.iterdir() if path.is_dir()) == left
        assert all(are_finite(out / name) for name in left)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_ends_the_run(value, lines, tmp_path, monkeypatch, refused):
    stage, line = lines["teacher"]
    bad = lambda top: {"overlap_mass": torch.full((len(top.student_ids),), value)}
    monkeypatch.setattr(diagnostics, "overlap", bad)
    go = lambda: run_line(stage, f"{line} --steps 1 --out {tmp_path}/run")
    refused(go, "step 1", "metrics.jsonl", "overlap_mass", code=1)
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/final").exists()


def test_json_has_no_nan(refused):
    facts = {"a": [1.0, {"b": None}], "NaN": "NaN", "c": "Infinity"}
    assert jsonl.finite(facts, "-") is facts
    for bad in (float("nan"), float("inf"), -float("inf")):
        for value in (bad, [0, bad], {"x": {"y": (bad,)}}):
            refused(lambda: jsonl.finite(facts | {"d": value}, "place"), "place: d is", code=1)


@pytest.fixture
def overflowing(world, tmp_path):
    """A student whose weights are finite in float16, which ends at 65504, and whose activations are not."""
    path = shutil.copytree(world / "student_init", tmp_path / "overflowing")
    change_weights(path, lambda name, w: w * (6e4 / w.abs().max()) if "mlp" in name else w)
    return path


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stage", [rollout, evaluate])
def test_logits_that_are_not_finite_are_not_sampled_from(
    stage, temperature, overflowing, world, tmp_path, monkeypatch, refused
):
    line = f"--model {overflowing} --data {world}/test.jsonl {TINY} --out {tmp_path}/out"
    line += f" --temperature {temperature}"
    refused(lambda: run_line(stage, f"{line} --dtype float16"), "--model", "logits are not finite")
    assert not (tmp_path / "out").exists()
    for check in ("check_generation", "check_head"):  # as if only later tokens gave such logits
        monkeypatch.setattr(models, check, lambda *given: None)
    monkeypatch.setattr(models, "check_head", lambda *given: None)
    message = refused(lambda: run_line(stage, f"{line} --dtype float16"), "--engine hf", "prompt ", code=1)
    assert message.count("error:") == 1 and not (tmp_path / "out/results.json").exists()
    run_line(stage, f"{line} --overwrite")  # the same in float32


def test_the_refusal_names_the_place_of_the_prompt(world, tmp_path, refused):
    """Among all prompts, not among those sampled together; -inf of masked tokens is no reason to refuse."""
    model = models.load_model(str(world / "student_init"), "-", "float32")
    config = sampling.SamplingConfig(2, 1.0, 0.9, 5, 4, [0, 2], 29)
    prompts = [[1, 3, 5 + i] for i in range(8)]
    real = model.forward

    def spoilt(*args, input_ids, **more):
        found = real(*args, input_ids=input_ids, **more)
        found.logits[(input_ids == 5 + 5).any(1)] = float("nan")
        return found

    model.forward = spoilt
    sampling.sample(model, prompts[:4], config, 0, range(4))
    refused(lambda: sampling.sample(model, prompts[4:6], config, 0, range(4, 6)), "prompt 5 ", code=1)


def test_entropies_that_are_not_finite_are_no_results(overflowing, world, tmp_path, monkeypatch, refused):
    """The responses come from elsewhere, as those of vLLM do."""

    def sampled(engine, prompts, sampling, seed, places):
        return [{place: [Response(p, [5, 2], False)] * sampling.n for place, p in zip(places, prompts)}]

    monkeypatch.setattr(evaluation, "sample_stream", sampled)
    monkeypatch.setattr(models, "check_generation", lambda *given: None)
    monkeypatch.setattr(models, "check_head", lambda *given: None)
    line = f"--model {overflowing} --data {world}/test.jsonl {TINY} --dtype float16 --out {tmp_path}/out"
    first = read_rows(world / "test.jsonl")[0].get("id", "test/")
    refused(lambda: run_line(evaluate, line), first, "sample 0", "entropy is NaN", code=1)
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("signal", ["hidden", "topk", "sampled"])
def test_scores_that_are_not_finite_are_not_stored(
    signal, world, rollouts, scores, tmp_path, monkeypatch, refused
):
    """The hidden state at token 2 of one response is not finite; --resume keeps the shards before it."""
    rows = read_rows(rollouts / "rollouts.jsonl")
    bad = next(row for row in rows[6:] if len(row["response_ids"]) > 3)
    real = score_teacher.forward

    def spoilt(model, responses, vocab_size):
        hidden, head = real(model, responses, vocab_size)
        start = 0
        for response in responses:
            if (response.prompt_ids, response.response_ids) == (bad["prompt_ids"], bad["response_ids"]):
                hidden[start + 2, 1] = torch.nan
            start += len(response.response_ids)
        return hidden, head

    out = tmp_path / "scores"
    line = (
        f"--teacher {world}/teacher_init --rollouts {rollouts} --out {out} --dtype float32 --signal {signal}"
    )
    with monkeypatch.context() as patch:
        patch.setattr(score_teacher, "forward", spoilt)
        go = lambda: run_line(score_teacher, f"{line} --shard_tokens 30")
        refused(
            go, "--teacher", f"token 2 (from 0) of the response {bad['id']}, sample {bad['sample']}", code=1
        )
    kept = files_of(out)
    assert "shard_00000.safetensors" in kept and not (out / "meta.json").exists()
    for file in out.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    run_line(score_teacher, f"{line} --shard_tokens 30 --resume")
    assert files_of(out)["shard_00000.safetensors"] == kept["shard_00000.safetensors"]
    if signal == "hidden":
        names = [file.name for file in scores.glob("*.safetensors")]
        assert {name: files_of(out)[name] for name in names} == {
            name: files_of(scores)[name] for name in names
        }


GENERATION = [{"temperature": 0.6, "top_p": 0.9}, {"temperature": "x"}, {"early_stopping": True}]


@pytest.mark.parametrize("own", [*GENERATION, {"pad_token_id": -1}, {"do_sample": True, "top_k": 5}])
def test_a_models_own_way_to_sample_never_costs_a_run(own, lines, world, tmp_path):
    """transformers refuses to save some generation_config.json files that it has loaded."""
    student = shutil.copytree(world / "student_init", tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **own}))
    stage, line = lines["teacher"]
    run_line(stage, f"{line} --student {student} --steps 1 --save_every 1 --out {tmp_path}/run")
    saved = json.loads((tmp_path / "run/final/generation_config.json").read_text())
    assert 2 in saved["eos_token_id"] and not own.keys() & saved.keys()


# ----------------------------------------------------------------------------------------------------------
# A refusal leaves nothing behind


@pytest.fixture
def broken(world, rollouts, scores, tmp_path):
    """Paths of inputs that are spoilt, each in one way."""
    places = {
        name: tmp_path / name
        for name in ("zero", "other_tokens", "other_template", "nan", "short", "no_config")
    }
    for path in places.values():
        shutil.copytree(world / "teacher_init", path)
    change_weights(places["zero"], lambda name, tensor: torch.zeros_like(tensor))
    swap_ids(places["other_tokens"], "a", "b")
    replace_text(places["other_template"] / "chat_template.jinja", "assistant", "user")
    change_weights(places["nan"], lambda name, tensor: tensor * torch.nan)
    short = json.loads((places["short"] / "config.json").read_text()) | {"max_position_embeddings": 8}
    (places["short"] / "config.json").write_text(json.dumps(short))
    (places["no_config"] / "config.json").unlink()
    places["absent"] = tmp_path / "absent"
    places["no_json"] = tmp_path / "no_json.jsonl"
    places["no_json"].write_text("{\n")
    for name, source, file in (
        ("bad_rollouts", rollouts, "rollouts.jsonl"),
        ("bad_scores", scores, "head.safetensors"),
    ):
        places[name] = shutil.copytree(source, tmp_path / name)
        with open(places[name] / file, "ab") as stream:
            stream.write(b"\n")
    return places


TEACHER = "train --prefix teacher --kl forward --student {world}/student_init"
STUDENT = "train --prefix student --kl reverse --data {world}/train.jsonl --student {world}/student_init"
GRPO = "grpo --model {world}/student_init --data {world}/train.jsonl --n 2"
SCORE = "score_teacher --teacher {world}/teacher_init --rollouts {rollouts}"
ROLL = "rollout --model {world}/student_init --data {world}/train.jsonl"
EVAL = "evaluate --model {world}/student_init --data {world}/test.jsonl"
REFUSALS = [  # a command, what its message names
    (f"{ROLL} --model {{absent}}", "--model"),
    (f"{ROLL} --model {{no_config}}", "--model"),
    (f"{ROLL} --data {{absent}}.jsonl", "absent.jsonl"),
    (f"{ROLL} --data {{no_json}}", "no_json.jsonl"),
    (f"{ROLL} --extra_stop_ids 999", "--extra_stop_ids"),
    (f"{ROLL} --max_response_tokens 600", "--max_response_tokens"),
    (f"{SCORE} --teacher {{absent}}", "--teacher"),
    (f"{SCORE} --rollouts {{bad_rollouts}}", "--rollouts"),
    (f"{SCORE} --teacher {{other_tokens}}", "--teacher"),
    (f"{SCORE} --teacher {{other_template}}", "--rollouts"),
    (f"{SCORE} --teacher {{nan}}", "--teacher"),
    (f"{SCORE} --teacher {{short}}", "the teacher's context 8"),
    (f"{SCORE} --k 999", "--k"),
    (f"{TEACHER} --rollouts {{rollouts}} --scores {{bad_scores}}", "--scores"),
    (f"{TEACHER} --rollouts {{bad_rollouts}} --scores {{scores}}", "--rollouts"),
    (f"{TEACHER} --rollouts {{rollouts}} --scores {{scores}} --student {{other_tokens}}", "--student"),
    (f"{TEACHER} --rollouts {{rollouts}} --scores {{scores}} --k 999", "--k"),
    (f"{TEACHER} --rollouts {{rollouts}} --scores {{scores}} --prompt_suffix x", "--prompt_suffix"),
    (f"{TEACHER} --rollouts {{rollouts}} --scores {{scores}} --tensor_parallel 2", "--tensor_parallel"),
    (f"{STUDENT} --teacher {{zero}}", "preflight"),
    (f"{STUDENT} --teacher {{other_template}}", "--template"),
    (f"{STUDENT} --teacher {{nan}}", "--teacher"),
    (f"{STUDENT} --teacher {{short}}", "context of 8"),
    (f"{STUDENT} --teacher {{world}}/teacher_init --data {{no_json}}", "no_json.jsonl"),
    (
        f"{STUDENT} --teacher {{world}}/teacher_init --eval_data {{absent}}.jsonl --eval_every 1",
        "absent.jsonl",
    ),
    (f"{STUDENT} --teacher {{world}}/teacher_init --max_response_tokens 600", "--max_response_tokens"),
    (f"{GRPO} --model {{absent}}", "--model"),
    (f"{GRPO} --model {{nan}}", "the starting model"),
    (f"{GRPO} --kl_weight 1 --reference {{other_tokens}}", "--reference"),
    (f"{GRPO} --kl_weight 1 --reference {{short}}", "--reference"),
    (f"{GRPO} --eval_data {{no_json}} --eval_every 1", "no_json.jsonl"),
    (f"{EVAL} --model {{absent}}", "--model"),
    (f"{EVAL} --data {{no_json}}", "no_json.jsonl"),
    (f"{EVAL} --extra_stop_ids 999", "--extra_stop_ids"),
]


@pytest.mark.parametrize("command, word", REFUSALS, ids=[f"{c.split()[0]} {w}" for c, w in REFUSALS])
def test_a_refusal_leaves_out_as_it_was(command, word, broken, world, rollouts, scores, tmp_path, refused):
    """It does not exist, or holds a finished evaluation that --overwrite was to replace."""
    name, flags = command.format(world=world, rollouts=rollouts, scores=scores, **broken).split(" ", 1)
    stage = {"rollout": rollout, "score_teacher": score_teacher, "train": train, "grpo": grpo}.get(
        name, evaluate
    )
    small = TINY if name != "score_teacher" else "--dtype float32"
    small += " --batch_size 2 --steps 2 --lr 1e-2" if name in ("train", "grpo") else ""
    absent, old = tmp_path / "absent_out", tmp_path / "old"
    line = f"{small} {flags}"
    message = refused(lambda: run_line(stage, f"{line} --out {absent}"), word)
    assert message.count("error:") == 1 and "Traceback" not in message and not absent.exists()
    artifacts.start_artifact(args := evaluate.get_args(f"--model m --data d --out {old}".split()))
    (old / "results.json").write_text("{}")
    artifacts.finish_artifact(args, "evaluate", ["results.json"])
    artifacts.writing = False
    before = files_of(old)
    refused(lambda: run_line(stage, f"{line} --out {old} --overwrite"), word)
    assert files_of(old) == before


def test_after_a_refusal_of_the_preflight_the_corrected_command_runs(broken, lines, world, tmp_path, refused):
    stage, line = lines["student"]
    line = (
        f"{line} --steps 2 --eval_data {world}/heldout.jsonl --eval_every 1 --eval_n 1 --out {tmp_path}/run"
    )
    refused(lambda: run_line(stage, f"{line} --teacher {broken['zero']}"), "weights are missing")
    run_line(stage, line)
    assert artifacts.read_artifact(f"{tmp_path}/run", "-", "train")["args"]["teacher"] != str(broken["zero"])


def test_a_refusal_of_the_preflight_leaves_a_run_that_is_resumed_as_it_was(
    lines, tmp_path, monkeypatch, refused
):
    stage, line = lines["student"]
    with killed_in_call(2, training, "optimizer_step"):
        run_line(stage, f"{line} --steps 2 --out {tmp_path}/run")
    before = files_of(tmp_path / "run")
    assert "meta.partial.json" in before and "metrics.jsonl" in before

    def refusing(*args):
        artifacts.refuse("preflight: no")

    monkeypatch.setattr(train.preflight, "preflight", refusing)
    refused(lambda: run_line(stage, f"{line} --steps 4 --out {tmp_path}/run --resume"), "preflight")
    assert files_of(tmp_path / "run") == before


# ----------------------------------------------------------------------------------------------------------
# Longer runs


def logs_of(out):
    return {file.name: untimed(file) for file in out.glob("*.jsonl")}


def weights_of(out):
    return (out / "final/model.safetensors").read_bytes()


def steps_in(out):
    return sorted(path.name for path in out.glob("step_*"))


@pytest.fixture
def longer(lines, world):
    """longer(kind, out, steps, more) runs; evaluations every 3 steps and at the end, checkpoints every 2."""
    common = (
        f"--eval_data {world}/heldout.jsonl --eval_every 3 --eval_n 1 --save_every 2 --keep_checkpoints 1"
    )

    def run(kind, out, steps, more="--warmup 0"):
        stage, line = lines[kind]
        run_line(stage, f"{line} {common} --out {out} --steps {steps} {more}")

    return run


@pytest.mark.parametrize("kind", ["teacher", "student", "grpo"])
def test_a_finished_run_goes_on_to_a_larger_number_of_steps(kind, longer, tmp_path, capsys):
    """And ends as a run of that length does. It was evaluated at step 4, its last; the longer one is not."""
    longer(kind, tmp_path / "whole/run", 7)
    out = tmp_path / "again/run"
    longer(kind, out, 4)
    assert [row["step"] for row in read_rows(out / "evals.jsonl")] == [0, 3, 4]
    capsys.readouterr()
    longer(kind, out, 7, "--warmup 0 --resume --log_every 2 --keep_checkpoints 3")
    said = capsys.readouterr().out
    for line in ("--resume: --steps 4 -> 7", "--resume: --log_every 1 -> 2", "--keep_checkpoints 1 -> 3"):
        assert line in said
    assert said.count("--steps 4 -> 7") == 1 and "learning rates" not in said and "resumed from" in said
    assert logs_of(out) == logs_of(tmp_path / "whole/run") and set(logs_of(out)) == {
        "metrics.jsonl",
        "evals.jsonl",
    }
    assert [row["step"] for row in read_rows(out / "evals.jsonl")] == [0, 3, 6, 7]
    assert weights_of(out) == weights_of(tmp_path / "whole/run")
    meta, whole = (artifacts.read_artifact(str(one), "-") for one in (out, tmp_path / "whole/run"))
    assert meta["args"]["steps"] == 7 and meta["tflops"] == whole["tflops"]
    assert steps_in(out) == ["step_000002", "step_000004", "step_000006"]


@pytest.mark.parametrize("kind", ["teacher", "grpo"])
def test_an_unfinished_run_goes_on_to_a_larger_number_of_steps(kind, longer, tmp_path, capsys):
    longer(kind, tmp_path / "whole/run", 7)
    for calls in (2, 4):  # before and after its first checkpoint
        out = tmp_path / str(calls) / "run"
        with killed_in_call(calls, training, "optimizer_step"):
            longer(kind, out, 5)
        longer(kind, out, 7, "--warmup 0 --resume --save_every 0")
        assert "--steps 5 -> 7" in capsys.readouterr().out
        assert logs_of(out) == logs_of(tmp_path / "whole/run")
        assert weights_of(out) == weights_of(tmp_path / "whole/run")


def test_a_longer_run_whose_warm_up_would_have_been_another_warns(longer, tmp_path, capsys):
    """20 and 29 steps have a warm-up of 1 by default, 40 one of 2: step 1 had twice the rate."""
    out, default = tmp_path / "run", "--eval_every 50 --save_every 10"
    longer("teacher", out, 20, default)
    capsys.readouterr()
    longer("teacher", out, 29, f"{default} --resume")
    assert "WARNING" not in capsys.readouterr().out
    longer("teacher", out, 40, f"{default} --resume")
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "learning rates" in said and "--warmup 0" in said
    longer("teacher", tmp_path / "whole", 40, default)
    rates = [[row["lr"] for row in read_rows(one / "metrics.jsonl")] for one in (out, tmp_path / "whole")]
    assert rates[0][0] == 2 * rates[1][0] and rates[0][1:] == rates[1][1:]


def test_flags_that_change_the_past_are_refused_and_a_finished_run_needs_a_checkpoint(
    longer, tmp_path, refused, capsys
):
    out = tmp_path / "run"
    longer("teacher", out, 4)
    before = files_of(out)
    for more, words in [
        ("--steps 3", ["--steps", "4", "3"]),
        ("--steps 7 --lr 1e-3", ["--lr"]),
        ("--steps 7 --eval_every 2", ["--eval_every"]),
        ("--steps 7 --warmup 0.5", ["--warmup"]),
    ]:
        refused(lambda: longer("teacher", out, 4, f"--warmup 0 {more} --resume"), "--resume", *words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:  # nothing is left to do
        longer("teacher", out, 4, "--warmup 0 --save_every 1 --log_every 3 --resume")
    assert end.value.code == 0 and "is finished" in capsys.readouterr().out and files_of(out) == before
    shutil.rmtree(out / "step_000002")
    before = files_of(out)
    go = lambda: longer("teacher", out, 7, "--warmup 0 --resume")
    assert refused(go, "--resume", "without a checkpoint", "--save_every").count("error:") == 1
    assert files_of(out) == before


def test_a_finished_result_is_not_lost_whenever_its_longer_run_is_killed(longer, tmp_path, capsys):
    """Killed at every change to the disk until after its first step: either the finished run is whole, or
    the longer one has its mark and final/ is still that of 4 steps. Each goes on to the same end."""
    longer("teacher", tmp_path / "whole/run", 7)
    out, shorter = tmp_path / "again/run", tmp_path / "shorter"
    longer("teacher", out, 4)
    shutil.copytree(out, shorter)
    again = lambda: longer("teacher", out, 7, "--warmup 0 --resume")
    seen = []
    for kill_at in range(1, 19):
        shutil.rmtree(out)
        shutil.copytree(shorter, out)
        assert in_fork(lambda: (Disk(kill_at), again())) == -signal.SIGKILL
        assert weights_of(out) == weights_of(shorter)
        if (out / "meta.json").exists():
            artifacts.read_artifact(str(out), "-", "train")
            seen.append("finished")
        else:
            assert artifacts.read_sealed(str(out / "meta.partial.json"), "-")["args"]["steps"] == 7
            seen.append("longer")
        if kill_at % 3 == 0 or seen[-2:] == ["finished", "longer"]:
            assert in_fork(again) == 0
            assert logs_of(out) == logs_of(tmp_path / "whole/run")
            assert weights_of(out) == weights_of(tmp_path / "whole/run")
            assert not list(out.glob("*.tmp")) and not (out / "meta.partial.json").exists()
    assert seen == sorted(seen) and seen.count("finished") > 3 and seen.count("longer") > 3


# ----------------------------------------------------------------------------------------------------------
# Tables and comparisons of runs


def show(line, capsys):
    capsys.readouterr()
    run_line(evaluate, line)
    tables = capsys.readouterr().out.strip()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in tables.splitlines()]


@pytest.fixture
def evaluated(world, tmp_path):
    """evaluated(model, out, more) evaluates a model on two problems."""

    def run(model, out, more=""):
        data = "" if "--benchmarks" in more else f"--data {world}/test.jsonl"
        run_line(evaluate, f"--model {model} {data} --limit 2 --n 2 {TINY} --out {out} {more}")

    return run


def test_the_table_says_how_each_checkpoint_was_made(lines, world, evaluated, tmp_path, capsys):
    steps = "--steps 1 --out"
    run_line(train, f"{lines['student'][1]} --refresh_every 1 {steps} {tmp_path}/a")
    run_line(train, f"{lines['teacher'][1]} --kl mix --fkl_weight 0.8 {steps} {tmp_path}/b")
    run_line(grpo, f"{lines['grpo'][1]} --model {tmp_path}/a/final {steps} {tmp_path}/c")
    run_line(grpo, f"{lines['grpo'][1]} {steps} {tmp_path}/d")
    run_line(grpo, f"{lines['grpo'][1]} --model {tmp_path}/c/final {steps} {tmp_path}/e")
    evaluated(world / "student_init", tmp_path / "base")
    for run in "abcde":
        evaluated(tmp_path / run / "final", tmp_path / run / "eval")
    header, _, *rows = show(
        f"--table {tmp_path}/base " + " ".join(f"{tmp_path}/{run}" for run in "abcde"), capsys
    )
    assert header[:2] == ["run", "training"] and header[2] == "Avg@2 [95%]"
    assert [row[1] for row in rows] == [
        "-",
        "student reverse",
        "teacher mix 0.8",
        "student reverse, then GRPO",
        "GRPO",
        "student reverse, then GRPO, then GRPO",
    ]


def test_a_run_stands_for_its_evaluations(lines, world, evaluated, tmp_path, capsys, refused):
    """One level below it or two; several data sets are paired by name."""
    for run in "ab":
        run_line(train, f"{lines['teacher'][1]} --steps 1 --save_every 1 --out {tmp_path}/{run}")
    a, b = tmp_path / "a", tmp_path / "b"
    refused(lambda: run_line(evaluate, f"--table {a}"), f"--table {a}", "no evaluation")
    refused(lambda: run_line(evaluate, f"--compare {a} {b}"), f"--compare {a}", "no evaluation")
    refused(lambda: run_line(evaluate, f"--table {tmp_path}/absent"), f"--table {tmp_path}/absent")
    evaluated(a / "final", a / "eval")
    evaluated(b / "final", b / "eval", "--seed 1")
    one = show(f"--compare {a / 'eval'} {b / 'eval'}", capsys)
    assert one[0][0] == "metric" and show(f"--compare {a} {b}", capsys) == one
    assert show(f"--table {a} {b}", capsys) == show(f"--table {a}/eval {b}/eval", capsys)
    shutil.rmtree(a / "eval")
    more = f"--benchmarks {world}/test.jsonl {world}/heldout.jsonl"
    evaluated(a / "final", a / "evals", more)
    table = show(f"--table {a}", capsys)
    assert [row[2] for row in table[2:5]] == ["heldout", "test", "mean"]
    assert show(f"--table {a}/evals", capsys) == table
    message = refused(
        lambda: run_line(evaluate, f"--compare {a} {b}"), "--compare", a / "evals/test", b / "eval"
    )
    assert message.count("\n") == 1
    shutil.rmtree(b / "eval")
    evaluated(b / "final", b / "evals", more)
    rows = show(f"--compare {a} {b}", capsys)
    found = [row[0] for row in rows]
    assert found[0] == "heldout" and {"test", "mean"} <= {*found} and found.count("metric") == 3
    for data in ("heldout", "test"):
        own = show(f"--compare {a}/evals/{data} {b}/evals/{data}", capsys)
        start = found.index(data) + 2
        assert rows[start : start + len(own)] == own
    evaluated(b / "final", b / "again", "--seed 2")  # a second one on a data set
    refused(lambda: run_line(evaluate, f"--compare {a} {b}"), "--compare", b / "again")


def test_an_unfinished_evaluation_is_named(world, lines, evaluated, tmp_path, refused):
    run_line(train, f"{lines['teacher'][1]} --steps 1 --out {tmp_path}/a")
    evaluated(tmp_path / "a/final", tmp_path / "a/eval")
    with killed_in_call(1, evaluation, "sample_stream"):
        evaluated(tmp_path / "a/final", tmp_path / "a/more")
    refused(lambda: run_line(evaluate, f"--table {tmp_path}/a"), f"--table {tmp_path}/a/more", "unfinished")
    assert os.path.isfile(tmp_path / "a/more/samples.jsonl.tmp")
