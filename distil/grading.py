"""Is a response's final answer the right one?

    extract_answer(response)       the final answer as text, or None
    is_correct(response, answer)   True or False
    grade(responses, answers)      a Grade for each pair, the hard ones side by side

Tuples, sets and lists are taken apart, and equality.py compares what is simple. Everything else goes to math-verify, which can be
sent round in circles by what a model writes (9^{9^{9^9}}), so it runs in worker processes with a limit of processor time that the
kernel enforces: an answer that takes too long is wrong and is counted. Workers are plain subprocesses, for any thread or process.
"""
import collections
import concurrent.futures
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

from distil.equality import bare_answers, outside, quick_verdict, split_name, split_outside, tidy

LIMIT_SECONDS = 1.0      # of processor time, for one answer
HURRY_SECONDS = 0.1      # the same while more than 3 of the last 50 answers took too long, so that a flood of them ends
LIMIT_MEMORY = 2 << 30   # bytes of a worker's address space
LONGEST = 400            # characters of an answer; longer ones must equal the gold answer as text
DEEPEST = 12             # brackets within brackets, likewise


class Grade(NamedTuple):
    extracted: str | None
    correct: bool
    timed_out: bool      # it took too long, or was bound to

# ---------------------------------------------------------------------------------------------------------------------
# The final answer of a response

STATED = re.compile(r"(?i)(?:\banswer\b\W{0,6}\s*(?:is|:|=)|^[#* ]*(?:the )?(?:final )?answer[* ]*$"
                    r"|^\W{0,9}(?:final )?answer\W{0,9}:|(?-i:^A(?:ns)?:))", re.MULTILINE)
CONCLUSION = re.compile(r"(?i)^\W*(?:so|thus|therefore|hence|in total|in conclusion|altogether)\b")
COMPLETE = re.compile(r"(?:[.!$]|\*\*|\\\]|\\\))$")
NUMBER = re.compile(r"-?[$€£]?\d[\d,]*(?:\.\d+)?(?:[/:]\d+)?(?:\\?%)?|-?\.\d+")
BETWEEN = re.compile(  # boxes that are one answer together
    r"(?:[\s$,;.&*-]|\\[\[\]()\\]|\\q?quad|\\text\s*\{[^{}]*\}|and|or|[a-zA-Z](?:_\{?\d\}?)?\s*=)*")


def extract_answer(response):
    """The content of the last \\boxed{} or \\fbox{} that is not empty; else what follows the last ####; else what "the answer is
    ..." or a line "A: ..." states; else the last formula or number of the last line's "Therefore, ...", or of its last sentence
    where that is complete. None for none, or a last box cut off."""
    if found := boxes(response):
        return next((content for _, _, content in reversed(found) if content != ""), "")
    lines = response.rpartition("####")[2].strip().splitlines() if "####" in response else []
    if lines and not (len(lines) > 1 and re.match(r"\W*[A-Za-z]{3}", lines[0])):  # that would be a heading
        return lines[0].strip().rstrip(".")
    tail = response[-5000:].strip()
    if stated := list(STATED.finditer(tail)):
        return plain_answer(tail[stated[-1].end():].lstrip("*_ \n:").splitlines(), stated=True)
    sentences = re.split(r"(?<=[.!?])\s+|(?<=\$)\s+(?=So|Thus|Hence|Therefore)", tail.rpartition("\n")[2])
    concluded = [sentence for sentence in sentences if CONCLUSION.match(sentence)]
    closing = concluded[-1:] or (sentences[:-3:-1] if COMPLETE.search(tail) else [])
    return next(filter(None, (plain_answer([sentence], stated=False) for sentence in closing)), None)


def boxes(text):
    """(start, end, content) of the last 8 boxes; the content is one word where there are no braces, None where it is cut off."""
    found = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\\?[^\s$\\{][^\s$\\]*)?", text))[-8:]:
        depth, escaped, end, content = 0, False, match.end(), match[1] and match[1].rstrip(".,;:!")
        while not content and end < len(text):
            if not escaped:
                depth += (text[end] == "{") - (text[end] == "}")
            escaped = text[end] == "\\" and not escaped
            end += 1
            if depth == 0:
                content = text[match.end() + 1:end - 1].strip()
                break
        found.append((match.start(), end, content))
    return found


def joined_boxes(response):
    """The last boxes as one list, where there is nothing but commas, "and" and line breaks between them: "-2, 1" of two boxes."""
    found = boxes(response)
    while not all(BETWEEN.fullmatch(response[one[1]:other[0]]) for one, other in itertools.pairwise(found)):
        found.pop(0)
    return ", ".join(content or "" for _, _, content in found)


def plain_answer(lines, stated):
    """The answer in plain words. Of what was stated: its number, its first $...$, or all of it; of a sentence: what is bold in it,
    its last $...$, a tuple at its end, its last number."""
    line = lines[0] if lines else ""
    bold = None if stated else re.search(r".*\*\*([^*]+)\*\*", line)
    line = re.sub(r"\*\*|__", "", bold[1] if bold else line).strip()
    line = re.split(r"(?i)\.\s+(?=[A-Z])|\s*I hope it is correct|<\|", line)[0].strip().rstrip(".!")
    if line in ("\\[", "$$") and len(lines) > 1:
        return lines[1].strip().rstrip(".") or None
    if stated and re.match(r"(?!Option|Choice)[A-Za-z]{2,} ", line):  # "the largest $n$ is 34", "she makes $18 a day"
        line = re.split(r"\b(?:is|are|equals)\b:?\s*", line)[-1]
        stated = not (re.match(r"[A-Za-z]{2,} ", line) and NUMBER.search(line))
    if stated and (first := re.match(rf"({NUMBER.pattern}), [a-z]", line)):  # 1/2, whatever $k$ is
        return first[1]
    math = list(re.finditer(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+?)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", line))
    if math:  # $x = 1$ and $x = 2$ are one answer
        joined = [bool(BETWEEN.fullmatch(line[one.end():other.start()])) for one, other in itertools.pairwise(math)]
        if stated:
            math = math[:[*joined, False].index(False) + 1]
        else:
            math = math[len(math) - [*reversed(joined), False].index(False) - 1:]
        return ", ".join(one[one.lastindex].strip() for one in math)
    if stated and (len(line) <= 60 or re.match(r"[-(\[\\]", line)):
        return line or None
    pair, numbers = re.search(r"\([^()]*\d,[^()]*\)$", line), NUMBER.findall(line)
    if pair:
        return pair[0]
    return numbers[0 if stated else -1].rstrip(",") if numbers else line if bold and len(line) <= 30 else None

# ---------------------------------------------------------------------------------------------------------------------
# math-verify, in worker processes

BRUTAL = re.compile(r"(?:\^|\*\*)[\s{(]*\d+\s*(?:\^|\*\*)|\d{4,}[\s})]*!|!\s*!|\\binom\s*\{\d{4,}"
                    r"|\\(?:i*int|oint|sum|prod|lim)(?![a-z])")


def brutal(text):
    """Whether a text is not worth parsing: brackets too deep, towers of powers, or sums and integrals left to do."""
    depths = itertools.accumulate((char in "{([") - (char in "})]") for char in text)
    return max(depths, default=0) > DEEPEST or bool(BRUTAL.search(text))


idle = []                # workers that wait for a question
recent = collections.deque(maxlen=50)  # whether the last answers took too long
os.register_at_fork(after_in_child=idle.clear)  # a fork must not talk to its parent's workers


def ask_worker(found, answer):
    """"right", "wrong" or "timeout": a worker's verdict on one pair."""
    worker = idle.pop() if idle else subprocess.Popen(
        [sys.executable, "-m", "distil.grading"], cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    worker.stdin.write(json.dumps([HURRY_SECONDS if sum(recent) > 3 else LIMIT_SECONDS, found, answer]) + "\n")
    worker.stdin.flush()
    verdict = worker.stdout.readline().strip()
    if not verdict:
        raise RuntimeError(f"the grading worker ended with exit code {worker.wait()}: is math-verify installed?")
    idle.append(worker)
    recent.append(verdict == "timeout")
    return verdict


@functools.lru_cache(maxsize=100_000)
def verdict_on(found, answer):
    """"right", "wrong" or "timeout"; equal pairs are looked at once."""
    quick = quick_verdict(found, answer) if max(len(found), len(answer)) <= LONGEST else found == answer
    if quick is not None:
        return "right" if quick else "wrong"
    mine, gold, _ = bare_answers(found, answer)
    if brutal(mine) or brutal(gold):
        return "timeout"
    return verdict_by_parts(mine, gold) or ask_worker(*((tidy(found), tidy(answer)) if "=" in gold else (mine, gold)))


SCALAR = r"[-+]?(?:(?:\d+(?:/\d+)?|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?:\\cdot|\\times)?)?"


def parts(text):
    """("()", ["1", "2"]) of "(1, 2)"; ("", ["1", "2"]) of the list "1 and 2" and the set "\\{1, 2\\}"; ("", ["1"]) of "1". A list's
    1 \\pm a is two of it, and 3(1, 2) is (3 * 1, 3 * 2)."""
    text = re.sub(r"(?:,\s*)?(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\cup(?![a-z]))", ",", text)
    whole = re.fullmatch(rf"({SCALAR})\s*\\?([(\[{{])(\0*)([)\]}}])", outside(text))
    if not whole:
        found = [part for part in split_outside(",", text) if part]
        signs = [("+", "-") if part.count("\\pm") == 1 else ("",) for part in found]
        return "", [part.replace("\\pm", sign).removeprefix("+").strip() for part, both in zip(found, signs) for sign in both]
    kind, scalar = whole[2] + whole[4], text[:whole.end(1)].strip()
    inner, found = parts(text[whole.start(3):whole.end(3)].removesuffix("\\").strip())
    if not inner and len(found) < 2:  # (x), \{5\}
        return "", [text]
    return inner or ("" if kind == "{}" else kind), [f"{scalar}({part})" for part in found] if scalar else found


def values_of_names(parts):
    """["1", "2"] of ["x = 1", "y = 2"], in the order of the letters; None where a part has no name or two have the same."""
    named = dict(map(split_name, parts))
    if not all(named) or len(named) < max(2, len(parts)):
        return None
    return [named[name] for name in (sorted(named) if all(map(str.isalpha, named)) else named)]  # y = 2, x = 1 is (1, 2)


def verdict_by_parts(mine, gold):
    """A verdict on tuples, intervals, lists and sets part by part; None where there are no parts, or where it takes more."""
    (kind, ours), (gold_kind, theirs) = parts(mine), parts(gold)
    if gold_kind == "()" and not kind and (values := values_of_names(ours)):  # x = 1, y = 2 for (1, 2)
        kind, ours = gold_kind, values
    if kind == "()" and not gold_kind and (values := values_of_names(theirs)):
        gold_kind, theirs = kind, values
    if kind and not gold_kind and len(theirs) > 1 and parts(theirs[0])[0]:  # one tuple for several
        kind, ours = "", [mine]
    if {kind, gold_kind} == {"()", "[]"} and len(ours) == len(theirs) > 2:  # no intervals, so vectors
        kind = gold_kind
    every = ours + theirs
    if len(every) < 3 or len(ours) * len(theirs) > 64 or any(re.search(r"\\[pm][pm]|;|\\setminus", part) for part in every):
        return None
    if kind != gold_kind and "\\cup" in mine + gold:
        return None
    if kind != gold_kind and (kind and gold_kind or "\\{" in mine + gold or "[" in kind + gold_kind or "]" in kind + gold_kind):
        return "wrong"
    if re.search(r"\band\b", mine + gold) and re.search(r"[<>]|\\[lg]e ", mine + gold):  # no union
        return None
    if kind or gold_kind:
        verdicts = [verdict_on(*pair) for pair in zip(ours, theirs)] + ["wrong"] * (len(ours) != len(theirs))
    else:  # in any order
        verdicts = [min(verdict_on(x, y) for y in theirs) for x in ours] + [min(verdict_on(x, y) for x in ours) for y in theirs]
    sure = "\\cup" not in mine + gold or max(verdicts) == "right" or len(ours) == len(theirs)  # [0,1) and [1,2] are [0,2]
    return max(verdicts) if sure else None  # right < timeout < wrong


def grade_one(response, answer):
    """A Grade for one response; where the gold answer is a list, the last boxes may each hold a part of it."""
    found = extract_answer(response)
    verdict = verdict_on(found, answer) if found else "wrong"
    if verdict == "wrong" and len(parts(tidy(answer))[1]) > 1 and verdict_on(joined_boxes(response), answer) == "right":
        found, verdict = joined_boxes(response), "right"
    return Grade(found, verdict == "right", verdict == "timeout")


def grade(responses, answers):
    """A Grade for each response and gold answer: equal pairs once, the hard ones on all cores."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(lambda pair: grade_one(*pair), zip(responses, answers, strict=True)))


def is_correct(response, answer):
    """Whether the response's final answer equals the gold answer."""
    return grade_one(response, answer).correct


def serve():
    """The worker: answers [found, gold] lines on stdin. A fork does the work; when the kernel kills it, the next one goes on."""
    import logging
    import resource
    import signal
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    sys.path.pop(0)
    import math_verify
    parsed = functools.lru_cache(10_000)(lambda text: math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None))
    logging.disable(logging.CRITICAL)
    for text in ("\\sqrt{8}", "\\cot(x)", "(1,3]", "y=2x+3", "x>3", "\\{1,x\\}", "0.5"):
        math_verify.verify(parsed(text), parsed(text + "+1"), timeout_seconds=None)  # imports all it needs, once for all forks
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_MEMORY, LIMIT_MEMORY))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a worker whose stage was killed ends in silence
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    while os.fork():
        if os.wait()[1] == 0:
            return  # no more questions
        print("timeout", file=answers, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in iter(sys.stdin.readline, ""):
        limit, found, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        same = math_verify.verify(parsed(answer), parsed(found), allow_set_relation_comp=True, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("right" if same else "wrong", file=answers, flush=True)


if __name__ == "__main__":
    serve()
