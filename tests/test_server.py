"""Stages with a server that fails. It is a thread here, which answers for the toy teacher as vLLM would."""

import http.server
import json
import random
import shutil
import socket
import threading
import time

import pytest
import torch

import rollout
import score_teacher
import train
from conftest import read_rows, run_line, swap_ids, untimed
from distil import artifacts, server
from distil.models import load_model
from distil.prompts import load_tokenizer
from distil.rollouts import read_rollouts
from distil.teacher import Scores
from test_ranks import on_ranks

STOPS = [0, 2]


class Fake(http.server.ThreadingHTTPServer):
    """What it was asked for is in `asked`. fault(number of the completion, from 1): what to do instead."""

    def __init__(self, directory, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.directory, self.fault, self.asked, self.running, self.most = str(directory), None, [], 0, 0
        self.model = load_model(self.directory, "-", "float32")
        self.tokenizer = load_tokenizer(self.directory, "-")
        self.card = {"id": "served", "root": self.directory, "max_model_len": 64}
        self.models = lambda: {"data": [self.card]}
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that has given up

    @torch.no_grad()
    def complete(self, body):
        prompt, choice = body["prompt"], {}
        if "prompt_logprobs" in body:
            assert len(prompt) + body["max_tokens"] <= self.card["max_model_len"]
            logps = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            choice["prompt_logprobs"] = [None]
            for row, token in zip(logps, prompt[1:]):
                kept = {token, *row.topk(body["prompt_logprobs"]).indices.tolist()}
                entry = lambda i: {"logprob": row[i].item(), "rank": 1, "decoded_token": "?"}
                choice["prompt_logprobs"].append({str(i): entry(i) for i in kept})
            return choice
        assert body["ignore_eos"] and body["return_token_ids"] and body["stop_token_ids"] == STOPS
        draw, tokens = random.Random(f"{body['seed']} {prompt}"), []
        while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] not in STOPS):
            tokens.append(draw.randrange(29))
        return {"token_ids": tokens, "finish_reason": "stop" if tokens[-1] in STOPS else "length"}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        answer = {"/v1/models": self.server.models}[self.path]()
        if answer != "close":
            self.reply(answer)

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == fake.card["id"]
        if self.path == "/tokenize":
            ids = fake.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return self.reply({"tokens": ids})
        assert self.path == "/v1/completions"
        with fake.lock:
            fake.asked.append(body)
            number = len(fake.asked)
            fake.running += 1
            fake.most = max(fake.most, fake.running)
        try:
            fault = fake.fault(number) if fake.fault else None
            if fault == "hang":
                time.sleep(3)
            elif fault == "close" or fault is None:
                answer = fault or {"choices": [fake.complete(body)]}
            else:
                answer = fault
        finally:
            with fake.lock:
                fake.running -= 1
        if fault != "hang" and answer != "close":
            self.reply(answer)

    def reply(self, answer):
        """A dict as JSON, a text as it is, or a number as an HTTP status."""
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        text = "what vLLM says\nabout it" if isinstance(answer, int) else answer
        self.wfile.write((text if isinstance(text, str) else json.dumps(text)).encode())


@pytest.fixture
def fake(world, monkeypatch):
    monkeypatch.setattr(server, "PAUSE", 0.01)
    torch.manual_seed(0)
    with Fake(world / "teacher_init") as one:
        yield one
        one.shutdown()


def scoring(world, rollouts, url, out, more="--signal topk --k 5"):
    flags = f"--server {url} --teacher {world}/teacher_init --rollouts {rollouts} --shard_tokens 30"
    run_line(score_teacher, f"{flags} --out {out} {more}")


def sampling(world, url, out, more=""):
    flags = f"--engine server --server {url} --model {world}/teacher_init --data {world}/train.jsonl"
    run_line(rollout, f"{flags} --max_response_tokens 12 --n 3 --sample_batch 6 --out {out} {more}")


def training(world, teacher, out, more=""):
    models = f"--student {world}/student_init --teacher {world}/teacher_init --data {world}/train.jsonl"
    flags = "--prefix student --kl reverse --vocab topk --topk_set teacher --k 5 --engine hf --dtype float32"
    flags += " --steps 4 --batch_size 6 --micro_batch_tokens 60 --lr 2e-3 --max_response_tokens 12"
    run_line(train, f"{flags} --save_every 1 {models} {teacher} --out {out} {more}")


def files_of(out):
    """What a stage wrote, but for meta.json."""
    return {file.name: file.read_bytes() for file in (*out.glob("*.jsonl"), *out.glob("*.safetensors"))}


@pytest.mark.parametrize("signal", ["topk", "sampled"])
def test_scores_are_those_of_the_local_teacher(world, rollouts, fake, tmp_path, signal):
    scoring(world, rollouts, fake.url, tmp_path / "served", f"--signal {signal} --k 5 --max_tokens 7")
    local = f"--teacher {world}/teacher_init --rollouts {rollouts} --dtype float32 --max_tokens 7"
    run_line(score_teacher, f"{local} --signal {signal} --k 5 --out {tmp_path}/local")
    found, right = (Scores(str(tmp_path / name), str(rollouts)) for name in ("served", "local"))
    for row in range(len(list(read_rollouts(rollouts)))):
        for name, tensor in right.read(row).items():
            torch.testing.assert_close(found.read(row)[name], tensor, rtol=0, atol=1e-5)
    names = {"rollouts_sha256", "teacher_config", "counts", "teacher"}
    assert {n: found.meta[n] for n in names} == {n: right.meta[n] for n in names}


@pytest.mark.parametrize("fault", [500, 503, 429, "not json", "close", {"choices": []}, {"choices": [{}]}])
def test_what_fails_once_is_asked_for_again(world, rollouts, fake, tmp_path, fault):
    scoring(world, rollouts, fake.url, tmp_path / "whole")
    asked, fake.asked = len(fake.asked), []
    fake.fault = lambda number: fault if number in (2, 5) else None
    scoring(world, rollouts, fake.url, tmp_path / "again")
    assert len(fake.asked) == asked + 2
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "fault, words, tries",
    [
        (500, "failed 4 times: HTTP 500: what vLLM says about it", 4),
        (400, "failed 1 times: HTTP 400: what vLLM says about it", 1),
        ("<html>", "failed 4 times: JSONDecodeError", 4),
        ({"choices": [{"prompt_logprobs": [None] * 3}]}, "failed 4 times: ", 4),
        ("hang", "failed 4 times: TimeoutError", 4),
    ],
    ids=str,
)
def test_what_fails_for_good_ends_the_run_in_one_line(
    world, rollouts, fake, tmp_path, capsys, fault, words, tries
):
    """Whichever of the requests under way it is, and others are not tried any more."""
    fake.fault = lambda number: fault if number >= 3 else None
    more = "--signal topk --k 5 --server_requests 1 --server_timeout 1"
    line = f"--server {fake.url} --teacher {world}/teacher_init --rollouts {rollouts} --out {tmp_path}/out"
    with pytest.raises(SystemExit) as end:
        artifacts.run_stage(score_teacher.main, score_teacher.get_args([*line.split(), *more.split()]))
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and message.startswith(f"error: --server {fake.url}: /v1/completions {words}")
    assert message.endswith("keeps what is finished; the same command with --resume continues")
    assert len(fake.asked) == 2 + tries and not (tmp_path / "out/meta.json").exists()


def dies(fake, number):
    """The server ends with completion `number`: that one and all after it get no answer."""

    def fault(count):
        if count < number:
            return None
        threading.Thread(target=lambda: (fake.shutdown(), fake.server_close())).start()
        return "close"

    fake.fault = fault


def ends_in_one_line(call, capsys):
    """call(), as a stage calls its main, with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        artifacts.run_stage(lambda args: call(), type("Args", (), {"out": "OUT"}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert end.value.code == 1 and len(lines) == 1, lines
    assert "/v1/completions failed" in lines[0] and "--resume continues" in lines[0]


def test_scoring_goes_on_with_a_new_server(world, rollouts, fake, tmp_path, capsys):
    scoring(world, rollouts, fake.url, tmp_path / "whole")
    with Fake(world / "teacher_init") as other:
        dies(other, 7)
        ends_in_one_line(
            lambda: scoring(
                world, rollouts, other.url, tmp_path / "out", "--server_requests 1 --signal topk --k 5"
            ),
            capsys,
        )
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert kept
    scoring(world, rollouts, fake.url, tmp_path / "out", "--signal topk --k 5 --resume")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("more", ["", "--drop unboxed truncated --attempts 3"])
def test_rollouts_go_on_with_a_new_server(world, fake, tmp_path, capsys, monkeypatch, more):
    """They are the same whatever the number of requests at a time; --drop samples again."""
    tokenizer = load_tokenizer(str(world / "teacher_init"), "-")
    odd = lambda text, truncated, drop: "unboxed" if len(text) % 2 and drop else None
    monkeypatch.setattr(rollout, "fault", odd)
    sampling(world, fake.url, tmp_path / "whole", f"--server_requests 1 {more}")
    assert fake.most == 1
    asked = len(fake.asked)
    with Fake(world / "teacher_init") as other:
        dies(other, 20)
        few = f"{more} --server_requests 2"
        ends_in_one_line(lambda: sampling(world, other.url, tmp_path / "out", few), capsys)
    fake.fault = lambda number: time.sleep(0.02)
    sampling(world, fake.url, tmp_path / "out", f"{more} --server_requests 5 --resume")
    assert 1 < fake.most <= 5 and len(fake.asked) < 2 * asked
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    rows = read_rows(tmp_path / "out/rollouts.jsonl")
    assert len({tuple(row["response_ids"]) for row in rows}) > 24
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        assert (row["response_ids"][-1] in STOPS) == (row["finish_reason"] == "stop")
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
    faults = json.loads((tmp_path / "out/meta.json").read_text())["counts"]["faults"]
    assert bool(more) == (faults.get("unboxed", 0) > 0)


def test_what_a_request_says(world, fake, tmp_path):
    sampling(world, fake.url, tmp_path / "out", "--temperature 0.7 --top_p 0.9 --top_k 5")
    assert len({body["seed"] for body in fake.asked}) == len(fake.asked) == 36
    same = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 12}
    for body in fake.asked:  # else the model's own generation_config.json would decide
        assert {name: body[name] for name in same} == same
        assert body["min_p"] == body["presence_penalty"] == body["frequency_penalty"] == 0
        assert body["repetition_penalty"] == 1


@pytest.mark.parametrize(
    "answer, words",
    [
        ({"token_ids": [5, 29, 2], "finish_reason": "stop"}, "padding row 29; start it with --logits-proc"),
        ({"token_ids": [5, 7], "finish_reason": "length"}, "--generation-config vllm"),
        ({"token_ids": [5, 7], "finish_reason": "stop"}, "--generation-config vllm"),
        ({"token_ids": [5, 2], "finish_reason": "abort"}, "--generation-config vllm"),
        ({"token_ids": None, "finish_reason": "stop"}, "TypeError"),
        ({"token_ids": [], "finish_reason": "length"}, "ValueError"),
    ],
)
def test_responses_that_are_not_what_was_asked_for_end_the_run(world, fake, tmp_path, answer, words):
    fake.fault = lambda number: {"choices": [answer]} if number > 9 else None
    with pytest.raises(ChildProcessError, match=words):
        sampling(world, fake.url, tmp_path / "out")


def test_log_probabilities_that_are_none_end_the_run(world, rollouts, fake, tmp_path):
    """A padding row among the likeliest, and raw logits."""
    [first, *_] = read_rollouts(rollouts)
    rows = [{str(i): {"logprob": -i - 1.0} for i in range(30)} for _ in range(64)]
    count = len(first["prompt_ids"] + first["response_ids"])
    answer = {"choices": [{"prompt_logprobs": rows[:count]}]}
    fake.fault = lambda number: answer
    served = server.connect(fake.url, "--server", "served", str(world / "teacher_init"), 28, 10, 2, 5)
    response = score_teacher.Response(first["prompt_ids"], first["response_ids"], False)
    found = served.score(response, 28)
    assert found["top_ids"].tolist() == [[*range(28)]] * len(first["response_ids"])
    assert served.score(response, 0)["logps"].tolist() == [-i - 1.0 for i in first["response_ids"]]
    with pytest.raises(ChildProcessError, match="pads its head is among the 29 likeliest; use a smaller --k"):
        served.score(response, 29)
    rows[:] = [{i: {"logprob": 30.0} for i in row} for row in rows]
    answer["choices"][0]["prompt_logprobs"] = rows[:count]
    with pytest.raises(ChildProcessError, match="--logprobs-mode"):
        server.connect(fake.url, "--server", "served", str(world / "teacher_init"), 28, 10, 2, 5).score(
            response, 0
        )


# ----------------------------------------------------------------------------------------------------------
# What is served


@pytest.mark.parametrize("stage", ["score_teacher", "rollout", "train"])
def test_a_server_that_does_not_fit_is_one_line_before_anything_is_written(
    world, rollouts, fake, tmp_path, refused, stage, monkeypatch
):
    out, flag = tmp_path / "out", "--teacher_server" if stage == "train" else "--server"
    call = {
        "score_teacher": lambda: scoring(world, rollouts, fake.url, out),
        "rollout": lambda: sampling(world, fake.url, out),
        "train": lambda: training(world, f"--teacher_server {fake.url}", out),
    }[stage]

    def is_refused(*words):
        message = refused(call, f"{flag} {fake.url}: ", *words, code=1)
        assert message.count("\n") == 1 and not out.exists()

    good = fake.card
    fake.card = good | {"root": "org/other"}
    is_refused("serves org/other as served, not", "start it with --served-model-name")
    fake.card = {"id": "served"}
    is_refused("/v1/models failed 4 times: KeyError")
    fake.card = good | {"max_model_len": 9}
    is_refused("takes 9 tokens, not", "start it with --max-model-len")
    fake.card = good
    shutil.copytree(fake.directory, tmp_path / "swapped")
    swap_ids(tmp_path / "swapped", "3", "4")
    fake.tokenizer = load_tokenizer(str(tmp_path / "swapped"), "-")
    is_refused("has another tokenizer than", "teacher_init")
    assert not fake.asked
    fake.shutdown()
    fake.server_close()
    monkeypatch.setattr(server, "PAUSE", 99)
    is_refused("no server answers there (", "refused); is it running")


def test_a_host_that_does_not_exist_is_one_line_at_once(world, monkeypatch, refused):
    def unknown(*given):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(server, "PAUSE", 99)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    about = "http://host.invalid:8000", "--server", "served", str(world / "teacher_init"), 29, 64, 2, 5
    refused(lambda: server.connect(*about), "--server http://host.invalid:8000: no server answers", code=1)


def test_a_server_that_starts_is_asked_again(world, fake):
    """And one that ends after its first answer, which may come back."""
    card, answers = fake.card, iter([503, "close"])
    fake.models = lambda: next(answers, {"data": [card]})
    served = server.connect(fake.url, "--server", "served", str(world / "teacher_init"), 29, 64, 2, 5)
    fake.shutdown()
    fake.server_close()
    with pytest.raises(ChildProcessError, match="/v1/models failed 4 times: .*refused"):
        served.ask("/v1/models", dict)


@pytest.mark.parametrize("name", ["id", "root", "link", "hub"])
def test_a_model_is_known_by_its_name_or_its_directory(world, fake, tmp_path, name):
    (tmp_path / "link").symlink_to(world / "teacher_init", target_is_directory=True)
    cards = {
        "id": {"id": "org/name", "root": "/elsewhere"},
        "root": {"id": "x", "root": str(world / "teacher_init")},
        "link": {"id": "x", "root": str(tmp_path / "link")},
        "hub": {"id": "x", "root": "org/name"},
    }
    fake.card |= cards[name]
    directory = str(world / "teacher_init")
    server.connect(fake.url, "--server", "org/name", directory, 29, 64, 2, 5)


def test_no_weights_are_read(world, rollouts, fake, tmp_path):
    shutil.copytree(world / "teacher_init", tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").unlink()
    fake.card |= {"root": str(tmp_path / "teacher")}
    scoring(world, rollouts, fake.url, tmp_path / "scores", f"--signal topk --teacher {tmp_path}/teacher")
    sampling(world, fake.url, tmp_path / "rollouts", f"--model {tmp_path}/teacher")
    training(
        world, f"--teacher_server {fake.url}", tmp_path / "run", f"--teacher {tmp_path}/teacher --steps 1"
    )


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("vocab, ranks", [("topk", 1), ("sampled", 1), ("topk", 2)])
def test_training_is_what_it_is_with_the_local_teacher(world, fake, tmp_path, vocab, ranks):
    """On two ranks each asks for its own responses."""
    more = f"--vocab {vocab}"
    training(world, "", tmp_path / "local", more)
    given = world, f"--teacher_server {fake.url}", tmp_path / "served", more
    on_ranks(training, *given, count=2) if ranks == 2 else training(*given)
    local, served = (untimed(tmp_path / run / "metrics.jsonl") for run in ("local", "served"))
    for one, two in zip(local, served, strict=True):
        names = {"loss", "grad_norm", "tflops", "response_length"} | {n for n in two if n.startswith("topk")}
        assert {n: one[n] for n in names} == pytest.approx({n: two[n] for n in names}, rel=1e-2, abs=1e-4)
    weights = [
        load_model(str(tmp_path / run / "final"), "-", "float32").state_dict() for run in ("local", "served")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-3)
    # the preflight asks for 8 responses on each rank, then each response of the steps is asked for once
    assert 8 * ranks + 24 <= len(fake.asked) <= 8 * ranks + 24 + 4 * (ranks - 1) * 6


def test_training_goes_on_with_a_new_server(world, fake, tmp_path, capsys):
    training(world, f"--teacher_server {fake.url}", tmp_path / "whole")
    with Fake(world / "teacher_init") as other:
        dies(other, 8 + 15)  # in the third step
        ends_in_one_line(lambda: training(world, f"--teacher_server {other.url}", tmp_path / "out"), capsys)
    assert len(read_rows(tmp_path / "out/metrics.jsonl")) == 2
    training(world, f"--teacher_server {fake.url}", tmp_path / "out", "--resume")
    assert f"--resume: --teacher_server {other.url} -> {fake.url}" in capsys.readouterr().out
    whole, out = (untimed(tmp_path / run / "metrics.jsonl") for run in ("whole", "out"))
    assert out == whole


def test_the_plan_of_a_run_leaves_a_served_teacher_out(world, tmp_path, capsys):
    """And asks nothing of the server."""
    with pytest.raises(SystemExit) as end:
        training(world, "--teacher_server http://127.0.0.1:1", tmp_path / "out", "--plan")
    planned = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert end.value.code == 0 and " 0.00 GiB" in planned["memory: teacher"]


def test_flags_that_do_not_fit_are_refused(world, refused):
    student = "--student s --kl reverse --out o"
    served = "--prefix student --teacher t --data d --teacher_server http://host:1"
    for stage, line, word in (
        (rollout, "--model m --data d --out o --engine server", "--server"),
        (rollout, "--model m --data d --out o --engine hf --server http://host:1", "--engine server"),
        (score_teacher, "--teacher t --rollouts r --out o --server http://host:1", "--signal topk"),
        (score_teacher, "--preflight --teacher t --student s --server http://host:1", "--server"),
        (train, f"{student} {served}", "--vocab"),
        (train, f"{student} {served} --vocab topk", "--topk_set teacher"),
        (train, f"{student} --prefix teacher --rollouts r --scores s --teacher_server http://h", "--prefix"),
    ):
        assert refused(lambda: stage.get_args(line.split()), word).count("\n") == 1
    args = rollout.get_args(
        "--model m --data d --out o --engine server --server http://host:8000/v1/".split()
    )
    assert args.server == "http://host:8000"
