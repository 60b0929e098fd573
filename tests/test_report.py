"""--token_details against whole softmaxes; how tokens are written; the report's data and its page."""

import html
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import evaluate
from conftest import read_rows, run_line
from distil import artifacts, evaluation
from distil.models import Response
from recipes.toy_world import make_model
from reports import details
from reports import page as report_page
from test_evaluate import trained
from test_prompts import byte_tokenizer

EVIL = "</script><script>throw 1</script><!-- & &amp; \\frac{1}{2} <b>$x_1$</b> @DATA@"
TEXTS = [EVIL, "é 😀 שלום עולם\tو\u200c e\u0301 \u202eabc\n\n  \u0301 日本", "2", "long " * 35]
SMALL = "--engine hf --dtype float32"


def write_pair(folder, tokenizer):
    for seed, name in enumerate(["model", "teacher"]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, 32, 1, 1)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=0.3)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def trained_run(world, rollouts):
    out = world.parent / "reported"
    trained(world, rollouts, out, "--eval_every", 1, "--eval_data", world / "heldout.jsonl", "--eval_n", 2)
    return out


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """An evaluation with details: problems are EVIL, responses TEXTS; "2" is right, the last is cut."""
    folder, tokenizer = tmp_path_factory.mktemp("evil"), byte_tokenizer()
    write_pair(folder, tokenizer)
    problems = [{"problem": f"{i} {EVIL}", "answer": "2"} for i in range(3)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, problems)))

    def solve(engine, prompts, sampling, seed, places):
        ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in TEXTS]
        groups = [[Response(p, one, i == 3) for i, one in enumerate(ids)] for p in prompts]
        return [dict(zip(places, groups))]

    line = f"--model {folder}/model --teacher {folder}/teacher --data {folder}/data.jsonl --n 4 {SMALL}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sample_stream", solve)
        patch.setattr(evaluation, "grade", lambda texts, answers: [verdict(text) for text in texts])
        run_line(evaluate, f"{line} --max_response_tokens 200 --token_details 1000 --out {folder}/eval")
    return folder


def with_steps(run, copy, count):
    """A copy of a run whose metrics.jsonl has so many rows, with losses that rise and fall."""
    shutil.copytree(run, copy)
    rows = [{"step": i, "tflops": i / 8, "loss": (i * 37 % 101) / 100} for i in range(1, count + 1)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = artifacts.read_sealed(str(copy / "meta.json"), "-")
    meta["files"]["metrics.jsonl"] = artifacts.file_sha256(copy / "metrics.jsonl")
    artifacts.write_sealed(str(copy / "meta.json"), meta)
    return copy


def verdict(text):
    fields = {"extracted": text or None, "correct": text == "2", "timed_out": False}
    return types.SimpleNamespace(_asdict=lambda: fields)


def data_of(page):
    """The JSON in a page."""
    [text] = re.findall(r'(?s)<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(text)


def write(page, *directories):
    evaluate.main(evaluate.get_args(["--report", str(page), *map(str, directories)]))
    return data_of(page)


# Values of tokens


def test_token_details_are_those_of_whole_softmaxes(evil):
    """In float64, from the models' own logits."""
    pair = [AutoModelForCausalLM.from_pretrained(evil / name).double() for name in ("model", "teacher")]
    samples = {(row["id"], row["sample"]): row for row in read_rows(evil / "eval/samples.jsonl")}
    rows = read_rows(evil / "eval/tokens.jsonl")
    for row in rows:
        sample = samples[row["id"], row["sample"]]
        ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
        tokens = ids[0, len(sample["prompt_ids"]) :]
        with torch.no_grad():
            logits = [model(ids).logits[0, len(sample["prompt_ids"]) - 1 : -1] for model in pair]
        log_q, log_p = (one.log_softmax(-1) for one in logits)
        truth = {
            "fkl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "rkl": (log_q.exp() * (log_q - log_p)).sum(-1),
        }
        for who, logps in {"student": log_q, "teacher": log_p}.items():
            truth[f"{who}_entropy"] = -(logps.exp() * logps).sum(-1)
            truth[f"{who}_logp"] = logps.gather(1, tokens[:, None])[:, 0]
            truth[f"{who}_top_logps"] = logps.topk(5).values
            chosen = logps.gather(1, torch.tensor(row[f"{who}_top_ids"]))
            torch.testing.assert_close(chosen, logps.topk(5).values, rtol=0, atol=1e-4)
        for name, values in truth.items():
            torch.testing.assert_close(torch.tensor(row[name]).double(), values, rtol=0, atol=1e-4)
        assert (truth["fkl"] > 0.1).any() and (truth["fkl"] - truth["rkl"]).abs().max() > 0.01
        ids = {*tokens.tolist(), *itertools.chain(*row["student_top_ids"], *row["teacher_top_ids"])}
        assert {str(i) for i in ids} <= json.loads((evil / "eval/vocabulary.json").read_text()).keys()
    assert len(rows) == 12


def test_the_limit_of_stored_tokens_is_kept_and_counted(world, tmp_path, capsys, monkeypatch):
    line = f"--model {world}/student_init --teacher {world}/teacher_init --data {world}/test.jsonl --n 2"
    line += f" {SMALL} --max_response_tokens 6 --out {tmp_path}"
    run_line(evaluate, f"{line}/eval --token_details 20")
    rows = read_rows(tmp_path / "eval/samples.jsonl")
    stored = [list(itertools.accumulate(row["tokens"] for row in rows))[i] <= 20 for i in range(len(rows))]
    assert 0 < sum(stored) < len(rows)
    found = {(row["id"], row["sample"]) for row in read_rows(tmp_path / "eval/tokens.jsonl")}
    assert found == {(row["id"], row["sample"]) for row, kept in zip(rows, stored) if kept}
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results["token_details"] == {"responses": sum(stored), "left_out": len(rows) - sum(stored)}
    assert f"--token_details 20: {sum(stored)} of {len(rows)} responses stored" in capsys.readouterr().out
    capsys.readouterr()
    run_line(evaluate, f"{line}/none --token_details 1")  # not even the first fits
    needed = f"0 of {len(rows)} responses stored; the first one needs --token_details {rows[0]['tokens']}"
    assert needed in capsys.readouterr().out
    assert (tmp_path / "none/tokens.jsonl").read_text() == ""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(artifacts, "asked", 2)
        run_line(evaluate, f"{line}/again --token_details 20 --sample_batch 99")
    assert end.value.code == 130
    run_line(evaluate, f"{line}/again --token_details 20 --sample_batch 99 --resume")
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "eval" / name).read_text()


def test_a_teacher_that_cannot_be_compared_is_refused(world, evil, tmp_path, refused):
    line = f"--model {world}/student_init --data {world}/test.jsonl {SMALL} --out {tmp_path}/out --n 1"
    more = f"{line} --token_details 9 --max_response_tokens"
    refused(lambda: run_line(evaluate, f"{more} 6 --teacher {evil}/teacher"), "--teacher", "tokenizers")
    refused(lambda: run_line(evaluate, f"{more} 6 --teacher {tmp_path}/no"), "--teacher", "no such directory")
    shutil.copytree(world / "teacher_init", tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text()) | {"max_position_embeddings": 30}
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    refused(lambda: run_line(evaluate, f"{more} 20 --teacher {tmp_path}/short"), "--teacher", "context")
    refused(lambda: evaluate.get_args(f"{line} --token_details 5".split()), "--token_details needs --teacher")
    assert not (tmp_path / "out").exists()


# How tokens are written


def sentencepiece_like():
    """Words begin with \u2581, which the decoder drops in front of the first; other characters are bytes."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "\u2581a",
        "a",
        "\u2581the",
        "\u2581",
        "<unk>",
        "\n",
        "b",
    ]
    one = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    one.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=one, unk_token="<unk>", additional_special_tokens=["<|end|>"]
    )


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
@pytest.mark.parametrize("text", [*TEXTS, "a the b", "\ufffd", "é", "x" + "😀" * 3])
def test_the_pieces_of_tokens_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer("a" + text, add_special_tokens=False).input_ids
    if make is sentencepiece_like and tokenizer.unk_token_id in ids:
        pytest.skip("not in this small vocabulary")
    texts = details.token_texts(tokenizer, sorted({*ids}))
    found = report_page.pieces([texts[i] for i in ids])
    assert len(found) == len(ids)
    assert "".join(found).removeprefix(" ") == tokenizer.decode(ids)


def test_kinds_of_tokens():
    tokenizer = byte_tokenizer()
    emoji = tokenizer("😀").input_ids
    texts = details.token_texts(tokenizer, [*emoji, *tokenizer(" <\n").input_ids, tokenizer.eos_token_id])
    assert [texts[i] for i in emoji] == [["bytes", byte] for byte in "F0 9F 98 80".split()]
    assert report_page.pieces([texts[i] for i in emoji]) == ["", "", "", "😀"]
    assert report_page.pieces([texts[i] for i in emoji[:2]] + [["text", "x"]]) == ["", "", "\ufffdx"]
    assert list(texts.values())[4:] == [["text", " <"], ["text", "\n"], ["special", "<|im_end|>"]]
    tokenizer = sentencepiece_like()
    ids = tokenizer.convert_tokens_to_ids(["\u2581the", "b", "<0xF0>", "<|end|>"])
    kinds = [["text", " the"], ["text", "b"], ["bytes", "F0"], ["special", "<|end|>"]]
    assert [*details.token_texts(tokenizer, ids).values()] == kinds


# The data


def test_the_page_has_what_is_stored(evil, tmp_path, capsys):
    data = write(tmp_path / "a.html", evil / "eval")
    assert f"report: {tmp_path}/a.html" in capsys.readouterr().out
    [one] = data["evaluations"]
    results = json.loads((evil / "eval/results.json").read_text())
    low, high = results["avg_interval"]
    assert one["cells"]["Avg@n"] == [f"{results['avg']:.3f}", f"{low:.3f} – {high:.3f}"]
    low, high = results["pass_interval"]["4"]
    assert one["cells"]["Pass@4"] == [f"{results['pass']['4']:.3f}", f"{low:.3f} – {high:.3f}"]
    assert one["cells"]["truncated"][0] == "25.0%" and one["cells"]["TFLOPs"] == ["-", ""]
    details = {(row["id"], row["sample"]): row for row in read_rows(evil / "eval/tokens.jsonl")}
    rows = read_rows(evil / "eval/samples.jsonl")
    assert len(one["responses"]) == one["stored"] == len(rows) == 12
    for row, shown in zip(rows, one["responses"], strict=True):
        assert shown["problem"] == row["problem"] and EVIL in row["problem"]
        assert (shown["text"], shown["correct"], shown["cut"]) == (
            row["response"],
            row["sample"] == 2,
            row["sample"] == 3,
        )
        detail, text = details[row["id"], row["sample"]], ""
        for t, token in enumerate(shown["detail"]):
            i, kind, written = one["vocabulary"][token[0]]
            assert i == row["response_ids"][t]
            text += token[9] if len(token) > 9 else written
            assert token[1] == round(1000 * detail["fkl"][t]) and token[4] == round(
                1000 * detail["teacher_entropy"][t]
            )
            assert token[5] / 1e4 == pytest.approx(
                torch.tensor(detail["student_logp"][t]).exp().item(), abs=1e-4
            )
            assert [one["vocabulary"][n][0] for n in token[8][::2]] == detail["teacher_top_ids"][t][
                : len(token[8]) // 2
            ]
        assert text == row["response"] + "<|im_end|>"


def test_the_page_asks_for_nothing_and_holds_no_markup_of_others(evil, tmp_path):
    write(tmp_path / "a.html", evil / "eval")
    page = (tmp_path / "a.html").read_text()
    assert EVIL not in page and page.count("</script>") == 2 and page.count("<!--") == 0
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a request
    assert not re.search(r"(?i)innerHTML|document\.write|@import|src\s*=\s*[\"']|fetch\(|XMLHttp", page)


def test_a_run_stands_for_its_curves_and_evaluations(world, trained_run, tmp_path, refused):
    [run] = write(tmp_path / "a.html", trained_run)["runs"]
    evals, steps = read_rows(trained_run / "evals.jsonl"), read_rows(trained_run / "metrics.jsonl")
    for name in ("step", "tflops", "avg", "avg_interval", "entropy", "length"):
        assert run["evals"][name] == [row[name] for row in evals]
    assert run["steps"]["loss"] == [row["loss"] for row in steps] and "fkl" not in run["steps"]
    shutil.copytree(trained_run, tmp_path / "run")
    line = f"--model {tmp_path}/run/final --data {world}/test.jsonl --n 1 {SMALL} --max_response_tokens 6"
    run_line(evaluate, f"{line} --out {tmp_path}/run/eval")
    data = write(tmp_path / "a.html", tmp_path / "run", tmp_path / "run/eval")
    assert [len(data["evaluations"]), len(data["runs"])] == [1, 1]
    assert (
        data["evaluations"][0]["details"] is None and "detail" not in data["evaluations"][0]["responses"][0]
    )


def test_a_long_run_is_thinned_and_keeps_its_last_step(monkeypatch, trained_run, tmp_path):
    monkeypatch.setattr(report_page, "POINTS", 1)
    [run] = write(tmp_path / "a.html", trained_run)["runs"]
    assert run["every"] == {"steps": 2, "evals": 3}
    assert run["steps"]["step"] == [2] and run["evals"]["step"] == [2]


def test_sources_are_those_of_meta_json(evil, trained_run, tmp_path):
    data = write(tmp_path / "a.html", evil / "eval", trained_run)
    for one, path in ((data["evaluations"][0], evil / "eval"), (data["runs"][0], trained_run)):
        made, meta = one["made"], json.loads((path / "meta.json").read_text())
        assert made["directory"] == str(path) and made["finished"] == meta["finished"]
        assert made["commit"].startswith(meta["commit"] or "unknown")
        assert made["commit"].endswith("with uncommitted changes") == meta["dirty"]
        assert f"torch {meta['versions']['torch']}" in made["versions"]
    flags = data["runs"][0]["made"]["all flags"]
    assert "--kl forward " in flags and "--eval_every 1 " in flags and "--teacher" not in flags
    assert "--weight_decay 0.0 " in flags and "--limit 0 " in flags  # not left out as unset
    assert " --k 4 " in data["evaluations"][0]["made"]["all flags"]  # a list


def test_runs_of_one_name_get_their_paths(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "seed1/reported")
    runs = write(tmp_path / "a.html", trained_run, tmp_path / "seed1/reported")["runs"]
    assert [run["name"] for run in runs] == [f"{trained_run.parent.name}/reported", "seed1/reported"]


@pytest.mark.parametrize("name, limit", [("RESPONSES", 5), ("PAGE_BYTES", 20_000), ("PAGE_BYTES", 3000)])
def test_a_page_is_bounded_and_says_so(name, limit, evil, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, name, limit)
    [one] = write(tmp_path / "a.html", evil / "eval")["evaluations"]
    assert len(one["responses"]) == one["shown"] and one["stored"] == 12
    assert f"{one['shown']} of 12 responses" in capsys.readouterr().out
    if name == "RESPONSES":
        assert one["shown"] == 5 and one["too_long"] == 0
    else:
        held = {key: one[key] for key in ("responses", "vocabulary")}
        assert len(json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()) <= 1.1 * limit
        assert one["too_long"] > 0 and one["too_long"] >= sum("detail" not in r for r in one["responses"])


def test_bad_input_is_one_line_and_leaves_the_old_page(evil, world, trained_run, tmp_path, refused):
    page = tmp_path / "a.html"
    page.write_text("old")

    def is_refused(directory, *words, to=page, others=()):
        line = ["--report", str(to), *map(str, [*others, directory])]
        call = lambda: evaluate.main(evaluate.get_args(line))
        assert refused(call, "--report", *words).count("\n") == 1
        assert page.read_text() == "old"

    is_refused(tmp_path / "absent", "no evaluation")
    is_refused(world, "no evaluation")
    (tmp_path / "folder.html").mkdir()
    for name in ("folder.html", "a.txt", "a"):
        is_refused(evil / "eval", ".html", to=tmp_path / name)
    for name in ("tokens.jsonl", "vocabulary.json", "samples.jsonl", "results.json", "meta.json"):
        shutil.copytree(evil / "eval", tmp_path / "damaged")
        text = (tmp_path / "damaged" / name).read_text()
        (tmp_path / "damaged" / name).write_text(text[:-20])
        is_refused(tmp_path / "damaged", str(tmp_path / "damaged"))
        (tmp_path / "damaged" / name).unlink()
        is_refused(tmp_path / "damaged", str(tmp_path / "damaged"))
        shutil.rmtree(tmp_path / "damaged")
    shutil.copytree(evil / "eval", tmp_path / "other")  # sealed, but not with what is needed
    (tmp_path / "other/results.json").write_text('{"run": "a"}')
    meta = artifacts.read_sealed(str(tmp_path / "other/meta.json"), "-")
    meta["files"]["results.json"] = artifacts.file_sha256(tmp_path / "other/results.json")
    artifacts.write_sealed(str(tmp_path / "other/meta.json"), meta)
    is_refused(tmp_path / "other", "no cell", "evaluate again")
    refused(lambda: evaluate.get_args(["--report", "a.html"]), "--report a.html")
    run = with_steps(trained_run, tmp_path / "run", 0)  # one bad run among good ones
    is_refused(run, run, "make it again, or leave it out", others=[evil / "eval", trained_run])
    (run / "metrics.jsonl").write_text("{}")
    is_refused(run, run, "metrics.jsonl", "make it again", others=[evil / "eval", trained_run])
    shutil.copytree(run, tmp_path / "second")
    for one in (run, tmp_path / "second"):
        (one / "meta.json").unlink()
    is_refused(run, f"{tmp_path}/second {run}: unfinished", "leave it out", others=[tmp_path / "second"])


# The page in Chromium

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="Chromium is not installed (.ci/run does it on Debian)"
)
VISIT = pathlib.Path(__file__).with_name("visit_report.js").read_text()
END = "\n".join(VISIT.splitlines()[-2:])


def visit(page, folder, width=1280, dark=False, script=VISIT):
    """What a script found on a page; there must be no message on its console.

    Chromium's windows are at least 500 wide, so the page is in a frame, whose scheme is the outer's."""
    script = f"<script>addEventListener('load', async () => {{{script}}})</script>"
    inner = html.escape(page.read_text() + script)
    frame = f'<iframe style="border: 0; width: {width}px; height: 800px" srcdoc="{inner}"></iframe>'
    (folder / "outer.html").write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark">{frame}'
    )
    options = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    options += f" --virtual-time-budget=4000 --window-size=1400,900 --user-data-dir={folder}/chromium"
    options += f" --blink-settings=preferredColorScheme={1 - dark}"
    command = [BROWSER, *options.split(), (folder / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    [found] = re.findall(r'(?s)<pre id="found">(.*?)</pre>', done.stdout)
    return json.loads(html.unescape(found))


@needs_browser
@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_filter_hover_keyboard_and_contrast(width, dark, evil, trained_run, tmp_path):
    data = write(tmp_path / "a.html", evil / "eval", trained_run)
    found = visit(tmp_path / "a.html", tmp_path, width, dark)
    assert found["width"] == width and found["overflow"] <= 0
    assert found["page"] == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert found["right"] == ["right"] * 3 and found["cut"] == ["wrong cut"] * 3
    assert found["wrong"] == ["wrong", "wrong", "wrong cut"] * 3
    assert found["all"] == ["wrong", "wrong", "right", "wrong cut"] * 2 + ["wrong", "wrong"]
    assert found["after_more"] == 12 and found["problem"] == f"0 {EVIL}"
    assert found["text"][0] == EVIL + "<|im_end|>" and found["text"][3].endswith("<|im_end|> ✂ cut off here")
    assert "‹U+202E›abc↵\n↵\n" in found["text"][1] and "⋯⋯⋯😀 " in found["text"][1]
    assert found["hidden"] and found["inside"] and found["left"] and found["focused"] and found["moved"]
    assert found["searched"] == 3 and set(found["marked"]) == {"g long"} and len(found["marked"]) == 3 * 17
    assert found["everywhere"] == 12 and found["nowhere"] == "No such response."
    assert found["charts"] == 5
    assert found["jumped"] and found["escaped"] and found["tapped"] and found["away"]
    [one] = data["evaluations"]
    assert set(found["levels"]) <= {f"k{i}" for i in range(5)} and len(set(found["levels"])) > 2
    for card, token in zip(found["cards"], one["responses"][1]["detail"], strict=True):
        assert f"token {one['vocabulary'][token[0]][0]}" in card
        assert f"fkl: {token[1] / 1000:.3f}" in card and f"rkl: {token[2] / 1000:.3f}" in card
        assert f"entropy (nats){token[3] / 1000:.3f}{token[4] / 1000:.3f}" in card
        for parts in (*token[5:7], *token[7][1::2], *token[8][1::2]):
            assert (f"{parts / 100:.2f}%" if parts else "< 0.01%") in card
    assert found["worst"][0] >= 4.5, found["worst"]  # WCAG AA


COUNT = """
const count = selector => document.querySelectorAll(selector).length;
const found = {charts: count("figure svg"), articles: count("article"), spans: count(".text > span")};
found.note = document.getElementById("note").textContent;
"""


CURVES = """
const click = node => { node.focus(); node.click(); };
const loss = () => [...document.querySelectorAll("figure")].find(node => node.textContent.startsWith("loss"));
const last = () => [...loss().querySelectorAll("text[text-anchor=middle]")].at(-1).textContent;
const lines = () => loss().querySelectorAll("path").length;
const buttons = () => [...document.querySelectorAll(".legend button")];
const found = {styles: [...Array(100).keys()].map(i => JSON.stringify(lineStyle(i))), both: last()};
found.notes = document.getElementById("panels").textContent;
click(document.querySelector("[data-value=share]"));
found.share = last();
click(document.querySelector("[data-value=step]"));
click(buttons()[1]);
found.short = [last(), lines(), buttons().map(node => node.ariaPressed)];
click(buttons()[2]);
found.shown = [last(), lines()];
click(buttons()[2]);
found.none = document.getElementById("panels").textContent;
click(buttons()[2]);
found.smoothed = smoothed(pointsOf(data.runs[1], "steps", "loss"), 8).map(point => point.y);
const slider = document.getElementById("smooth");
slider.value = 8;
slider.dispatchEvent(new InputEvent("input"));
found.slider = [slider.nextElementSibling.textContent, lines()];
const picture = loss().querySelector("svg"), card = document.getElementById("card");
const type = key => picture.dispatchEvent(new KeyboardEvent("keydown", {bubbles: true, key}));
picture.focus();
found.read = card.textContent;
type("ArrowLeft");
found.before = card.textContent;
const box = picture.getBoundingClientRect();
const at = {bubbles: true, clientX: box.left + 46 * box.width / 360, clientY: box.top + 50};
picture.dispatchEvent(new PointerEvent("pointermove", at));
found.pointed = card.textContent;
type("Escape");
found.closed = card.hidden;
found.sources = [...document.querySelectorAll("details")].map(node => node.textContent);
"""


@needs_browser
def test_curves_of_runs_of_many_and_of_few_steps(trained_run, tmp_path):
    long = with_steps(trained_run, tmp_path / "long", 1500)
    runs = write(tmp_path / "a.html", trained_run, long)["runs"]
    found = visit(tmp_path / "a.html", tmp_path, script=CURVES + END)
    assert len(set(found["styles"])) == 100
    assert "Drawn: one row in 2 of long." in found["notes"]
    assert found["both"] == "1500" and found["share"] == "100"
    assert found["short"] == ["2", 1, ["true", "false", None]] and found["shown"] == ["1500", 2]
    assert found["none"] == "All runs are hidden."
    steps, losses = (torch.tensor(runs[1]["steps"][name], dtype=torch.double) for name in ("step", "loss"))
    near = ((steps[:, None] - steps).abs() <= 8).double()
    torch.testing.assert_close(torch.tensor(found["smoothed"]).double(), near @ losses / near.sum(1))
    assert found["slider"] == ["mean of 17 steps", 4]
    row = lambda step: f"long{(step * 37 % 101) / 100:g}step {step}"
    assert (found["read"], found["before"], found["closed"]) == (row(1500), row(1498), True)
    first = runs[0]["steps"]["loss"]
    assert found["pointed"] == f"reported{first[0]:.4g}step 1{row(2)}"
    for run, source in zip(runs, found["sources"], strict=True):
        assert run["made"]["directory"] in source and run["made"]["commit"] in source


def test_colours_of_runs_stand_out_from_the_page():
    """A contrast of at least 3, as WCAG asks of graphics, in light and dark."""
    page = (pathlib.Path(report_page.__file__).parent / "page.html").read_text()

    def light(colour):
        parts = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return (linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item() + 0.05

    for back, line in zip(["#ffffff", "#14161a"], re.findall(r"--c0: .*", page), strict=True):
        colours = re.findall(r"#\w{6}", line)
        assert len(set(colours)) == 7
        for colour in colours:
            assert max(light(back) / light(colour), light(colour) / light(back)) >= 3, colour


OTHERS = """
const others = {opened: document.getElementById("which").value};
choose(2);
others.small = document.getElementById("note").textContent;
choose(1);
"""


@needs_browser
def test_pages_without_values_of_tokens_work(world, evil, trained_run, tmp_path, monkeypatch):
    """A run alone; an evaluation without a teacher; one whose values are left out, to keep the page small."""
    script = COUNT + END
    write(tmp_path / "a.html", trained_run)
    found = visit(tmp_path / "a.html", tmp_path, script=script)
    assert found == {"charts": 5, "articles": 0, "note": "", "spans": 0}
    line = f"--model {world}/student_init --data {world}/test.jsonl --n 1 {SMALL} --max_response_tokens 6"
    run_line(evaluate, f"{line} --out {tmp_path}/plain")
    run_line(evaluate, f"{line} --out {tmp_path}/none --teacher {world}/teacher_init --token_details 1")
    write(tmp_path / "a.html", evil / "eval", tmp_path / "plain", tmp_path / "none")
    found = visit(tmp_path / "a.html", tmp_path, script=OTHERS + COUNT + "found.others = others;" + END)
    assert found["others"]["opened"] == "0"  # the one with values of tokens
    assert (found["articles"], found["spans"]) == (4, 0) and "--token_details" in found["note"]
    first = read_rows(tmp_path / "none/samples.jsonl")[0]
    assert f"The first response needs {first['tokens']}." in found["others"]["small"]
    monkeypatch.setattr(report_page, "PAGE_BYTES", 4000)
    [one] = write(tmp_path / "a.html", evil / "eval")["evaluations"]
    found = visit(tmp_path / "a.html", tmp_path, script=script)
    assert found["articles"] == one["shown"] < 12 and f"The first {one['shown']} of 12" in found["note"]
    kept = sum("detail" in response for response in one["responses"])
    assert f"{kept} of them have values for each token" in found["note"]
