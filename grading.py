"""Is a response's final answer the right one?

    extract_answer(response)           the final answer as text, or None
    is_correct(response, answer)       True or False
    grade(responses, answers)          a Grade for each pair, the hard ones side by side

Text and plain numbers are compared here. Everything else goes to math-verify, which can be sent round in circles by what a model
writes (9^{9^{9^9}}), so it runs in worker processes with a limit of processor time that the kernel enforces: an answer that takes
too long is wrong and is counted. Workers are plain subprocesses, started when first needed; they work in any thread and process.
"""
import collections
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

LIMIT_SECONDS = 1.0      # of processor time, for one answer
HURRY_SECONDS = 0.1      # the same while more than 3 of the last 50 answers took too long, so that a flood of them ends
LIMIT_MEMORY = 2 << 30   # bytes of address space of a worker
LONGEST = 400            # characters of an answer; longer ones must equal the gold answer as text
DEEPEST = 12             # brackets within brackets, likewise


class Grade(NamedTuple):
    extracted: str | None
    correct: bool
    timed_out: bool      # it took too long, or was bound to

# ---------------------------------------------------------------------------------------------------------------------
# The final answer of a response

STATED = re.compile(r"(?i)(?:\banswer\b\W{0,6}\s*(?:is|:|=)"
                    r"|^[#* ]*(?:the )?(?:final )?answer[* ]*$|^\W{0,9}(?:final )?answer\W{0,9}:)", re.MULTILINE)
CONCLUSION = re.compile(r"(?i)^\W*(?:so|thus|therefore|hence|in total|in conclusion|altogether)\b")
NUMBER = re.compile(r"-?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\\?%)?|-?\.\d+")


def extract_answer(response):
    """The content of the last \\boxed{} (or \\fbox{}); else what follows the last ####; else what "the answer is ..." states; else
    the last number of a closing "Therefore, ..." sentence. None where there is none of these, or the last box is cut off.

    extract_answer(r"so \\boxed{3}, no, \\boxed{\\frac{1}{2}}.") -> r"\\frac{1}{2}" """
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", response)]
    if starts:
        return boxed(response[starts[-1]:])
    if "####" in response:
        lines = response.rsplit("####", 1)[1].strip().splitlines()
        return lines[0].strip().rstrip(".") if lines else None
    stated = list(STATED.finditer(response[-5000:]))
    if stated:
        lines = response[-5000:][stated[-1].end():].strip().lstrip("*_ \n:").splitlines()
        return last_line_answer(lines, stated=True)
    lines = response[-5000:].strip().splitlines()[-1:]
    return last_line_answer(lines, stated=False) if lines and CONCLUSION.match(lines[0]) else None


def boxed(text):
    """What the box holds whose \\boxed was just read: the text up to the brace that closes it, or one word where there is none."""
    text = text.lstrip()
    if not text.startswith("{"):
        word = re.match(r"\\?[^\s$\\]+", text)
        return word[0].rstrip(".,;:!") or None if word else None
    depth, escaped = 0, False
    for end, char in enumerate(text):
        if not escaped:
            depth += (char == "{") - (char == "}")
        escaped = char == "\\" and not escaped
        if depth == 0:
            return text[1:end].strip()
    return None  # cut off inside the box


def last_line_answer(lines, stated):
    """The answer in plain words: the last $...$ of the line, else the whole of what was stated, else the last number."""
    if not lines:
        return None
    line = re.sub(r"\*\*|__", "", lines[0]).strip()
    line = re.split(r"(?i)\.\s+(?=[A-Z])|\s*I hope it is correct|<\|", line)[0].strip().rstrip(".!")
    if line in ("\\[", "$$") and len(lines) > 1:
        return lines[1].strip().rstrip(".") or None
    math = re.findall(r"(?<!\\)\$\$?([^$]+?)(?<!\\)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", line)
    if math:
        pick = math[-1] if not stated else math[0]
        return next(part for part in pick if part).strip()
    if stated and len(line) <= 60:
        return line or None
    numbers = NUMBER.findall(line)
    return numbers[0 if stated else -1].rstrip(",") if numbers else None

# ---------------------------------------------------------------------------------------------------------------------
# One spelling for equal texts

STRIPPED = re.compile(r"(?<!\\)\\(?:left|right|[bB]ig[lr]?|displaystyle|textstyle|limits|,|!|;|:|quad|qquad| )(?![a-zA-Z])|~")
TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|textnormal|operatorname|boldsymbol|bf|rm)\s*\{([^{}]*)\}")
UNIT = re.compile(  # what follows a number and is words alone: 5 cm, 5\text{ apples}, 5 square inches^2, 5 \text{ km/h}
    r"(?<=[\d})%])(?:\s*\\(?:text|mbox|textrm|mathrm|textbf)\s*\{\s*[a-zA-Z][a-zA-Z\s./°^\d-]*\}(?:\^\{?\d\}?)?[./]?"
    r"|[\s/]\s*(?:[a-zA-Z]{2,}|[mgshLJNW](?=$|[\s/^]))\.?(?:\^\{?\d\}?|²|³)?)+$")
NOT_UNITS = re.compile(r"(?i)\b(?:and|or|if|mod|pi|sqrt|infinity|log|sin|cos|tan|choose|pm|hundred|thousand|[mbtr]+illion)\b")
CURRENCY = re.compile(r"^(-?)\s*(?:\\?[$€£¥]|\\pounds|\\text\{\s*\\?[$€£]\s*\}|USD|US\$|Rs\.?)\s*(?=[\d.\\-])")
DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?deg(?:rees?)?\b)")


def tidy(text):
    """The text without what only lays it out: dollars around it, \\left, thin spaces, LaTeX's many fractions, a full stop."""
    text = text.strip()
    text = re.sub(r"^(?:\$\$?|\\\(|\\\[)\s*([^$]*?)\s*(?:\$\$?|\\\)|\\\])$", r"\1", text).rstrip(" .,;:")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|,\\,|\\ )\s*(?=\d{3}(?:\D|$))", "", text)  # LaTeX's thousands separators
    text = STRIPPED.sub(" ", text).replace("−", "-").replace("–", "-").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = DEGREES.sub("", text)
    text = text.replace("\\leq", "\\le").replace("\\geq", "\\ge").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    if not re.search(r"[(\[]|\\\{", text):  # 1,234 is a number, but (1,234) is a pair and 1,234,5 a list
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text.strip()


def without_unit(text):
    """The text without the words after its number, and without currency: "\\$5.40 \\text{ each}" -> "5.40"."""
    bare = UNIT.sub("", text)
    if bare != text and NOT_UNITS.search(text[len(bare):]):
        bare = text
    return CURRENCY.sub(r"\1", bare).strip()


def squeezed(text):
    """For comparing as text: no spaces, no text commands, braces around single sub- and superscripts left out."""
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"([_^])\{([^{}])\}", r"\1\2", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).replace("\\cdot", "*").replace("\\times", "*")


def split_name(text):
    """("x", "5") of "x = 5", ("f(x)", "x^2") of "f(x) = x^2", ("x", "[1,2]") of "x \\in [1,2]"; ("", text) without a name."""
    match = re.match(r"^\s*([a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z, ]*\))?|\\[a-z]+)\s*(?:=|\\in(?![a-z]))\s*([^=]+)$", text)
    return (match[1].replace(" ", ""), match[2].strip()) if match else ("", text)

# ---------------------------------------------------------------------------------------------------------------------
# Numbers, letters and words: decided without math-verify

DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
PLAIN = re.compile(rf"([-+]?)\s*({DIGITS})(?:\s*[eE]([-+]?\d{{1,4}})"
                   rf"|\s*(?:\\times|\\cdot|\*|×|x)\s*10\s*\^\s*\{{?\s*([-+]?\d{{1,4}})\s*\}}?)?")
RATIO = re.compile(rf"([-+]?)\s*(?:(\d+)\s*(?:\\?\s))?\s*([-+]?{DIGITS})\s*/\s*({DIGITS})")
FRACTION = re.compile(rf"([-+]?)\s*(\d+)?\s*(?:\+\s*)?\\frac\s*\{{\s*([-+]?{DIGITS})\s*\}}\s*\{{\s*([-+]?{DIGITS})\s*\}}")


def number(text):
    """(value, decimals or None, whether it is a percentage) of a plain number, fraction or mixed number in any spelling; else None.

    number("1\\frac{4}{5}") -> (9/5, None, False);  number("12.50%") -> (25/2, 2, True)"""
    percent = re.search(r"\s*(?:%|\bpercent|\bper cent)$", text)
    if percent:
        text = text[:percent.start()]
    text = text.replace("{-}", "-").strip()
    if re.fullmatch(r"\{[^{}]*\}|\([-+]?\d+(?:\.\d+)?\)", text):
        text = text[1:-1].strip()
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", "", text) if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text) else text
    if found := PLAIN.fullmatch(text):
        sign, digits, exponent, power = found.groups()
        value, decimals = Fraction(digits) * Fraction(10) ** int(exponent or power or 0), len(digits.partition(".")[2]) or None
    elif found := RATIO.fullmatch(text) or FRACTION.fullmatch(text):
        sign, whole, top, bottom = found.groups()
        if not Fraction(bottom) or whole and not top.isdigit():
            return None
        value, decimals = Fraction(whole or 0) + Fraction(top) / Fraction(bottom), None
    else:
        return None
    return (-value if sign == "-" else value), decimals, bool(percent)


def equal_numbers(mine, gold):
    """Equal values. A percentage equals its share of one and its bare number; six right decimals are enough of an endless one."""
    (x, decimals, percent), (y, _, gold_percent) = mine, gold
    if percent != gold_percent:
        return x == y or (x / 100 == y if percent else x == y / 100)
    return x == y or bool(decimals and decimals >= 6 and not has_end(y) and abs(x - y) * 10 ** decimals <= 1)


def has_end(value):
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def choice(text):
    """"C" of "C", "(C)", "\\text{(C)}", "\\textbf{(C) } 12", "C. 12" or "(C) 12"; else None."""
    match = re.match(r"^\(?([A-J])(?:\)|[.:](?=\s|$)|$)", TEXT.sub(r"\1 ", text).replace("$", "").strip())
    return match[1] if match else None


def words(text):
    """Lower-case words of an answer that is only words: "\\text{ Evelyn}." -> "evelyn"; else None."""
    marked, text = TEXT.search(text), TEXT.sub(r"\1", text).strip().strip("'\"`.")
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text) and (marked or re.fullmatch(r"[A-Za-z']{2,}(?:[ -][A-Za-z']{2,})*", text)
                                                        and (len(text) > 3 or text.lower() in ("yes", "no"))):
        return re.sub(r"^(?:a|an|the) ", "", " ".join(text.lower().split()))
    return None


def based(text):
    """("52", "8") of "52_8" or "52_{8}"; None otherwise."""
    match = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d+|\\text\{[a-z]+\})\s*\}?", text)
    return match.groups() if match else None


def quick_verdict(found, answer):
    """True or False where text and plain numbers decide; None where it takes mathematics."""
    if found == answer:
        return True
    mine, gold = tidy(found), tidy(answer)
    if squeezed(mine) == squeezed(gold):
        return True
    (name, mine), (gold_name, gold) = split_name(mine), split_name(gold)
    if name and gold_name and name != gold_name:
        return None
    if choice(gold) and (len(gold) == 1 or not number(gold)):
        return choice(mine) == choice(gold)
    if not mine or not gold:
        return False
    if words(gold):
        return words(mine) == words(gold)
    if label := re.match(r"^(?:\\text(?:bf)?\{\s*)?\(([A-J])\)\s*\}?\s*(?=[-\d\\])", mine):  # "\textbf{(C)}\ 27" for 27
        mine = mine[label.end():].strip()
    bare, bare_gold = without_unit(mine), without_unit(gold)
    if squeezed(bare) == squeezed(bare_gold):
        return True
    if based(bare_gold) or based(bare):
        (digits, base), (gold_digits, gold_base) = based(bare) or (bare, None), based(bare_gold) or (bare_gold, None)
        return digits == gold_digits and (not base or not gold_base or base == gold_base)
    x, y = number(TEXT.sub(r"\1", bare)), number(TEXT.sub(r"\1", bare_gold))
    return equal_numbers(x, y) if x and y else None


BRUTAL = re.compile(r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)|\d{4,}[\s})]*!|!\s*!|\\binom\s*\{\d{4,}"
                    r"|\\(?:i*int|oint|sum|prod|lim)(?![a-z])")


def brutal(text):
    """Whether a text is not worth parsing: brackets too deep, towers of powers, or sums and integrals left to do."""
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest > DEEPEST or bool(BRUTAL.search(text))

# ---------------------------------------------------------------------------------------------------------------------
# math-verify, in worker processes

idle = []                # workers that wait for a question
recent = collections.deque(maxlen=50)  # whether the last answers took too long
os.register_at_fork(after_in_child=idle.clear)  # a fork must not talk to its parent's workers


def ask_worker(found, answer):
    """"right", "wrong" or "timeout": a worker's verdict on one pair."""
    worker = idle.pop() if idle else subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    limit = HURRY_SECONDS if sum(recent) > 3 else LIMIT_SECONDS
    worker.stdin.write(json.dumps([limit, found, answer]) + "\n")
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
    quick = quick_verdict(found, answer) if len(found) <= LONGEST else found == answer
    if quick is not None:
        return "right" if quick else "wrong"
    if brutal(found) or brutal(answer):
        return "timeout"
    return ask_worker(tidy(found), tidy(answer))


def grade(responses, answers):
    """A Grade for each response and gold answer: equal pairs once, the hard ones on all cores."""
    found = [extract_answer(response) for response in responses]
    pairs = [(mine or "", answer) for mine, answer in zip(found, answers, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        verdicts = list(threads.map(lambda pair: verdict_on(*pair) if pair[0] else "wrong", pairs))
    return [Grade(mine, verdict == "right", verdict == "timeout") for mine, verdict in zip(found, verdicts)]


def is_correct(response, answer):
    """Whether the response's final answer equals the gold answer."""
    found = extract_answer(response)
    return bool(found) and verdict_on(found, answer) == "right"


def serve():
    """The worker: answers [found, gold] lines on stdin. A fork does the work; when the kernel kills it, the next one goes on."""
    import logging
    import resource
    import signal
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    sys.path.pop(0)
    logging.disable(logging.CRITICAL)
    for text in ("\\sqrt{8}", "\\cot(x)", "(1,3]", "y=2x+3", "x>3", "\\{1,x\\}", "0.5"):
        equal(text, text + "+1")  # imports all that sympy needs, once for all forks
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_MEMORY, LIMIT_MEMORY))
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
        verdict = "right" if equal(found, answer) else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=answers, flush=True)


@functools.lru_cache(maxsize=10_000)
def parsed(text):
    import math_verify
    return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def equal(found, answer):
    """By math-verify; formulas without decimals by their values, which is faster and knows that cos x / sin x is cot x."""
    import math_verify
    gold, mine = parsed(answer), parsed(found)
    if not gold or not mine:
        return False
    try:
        same = same_values(gold[0], mine[0])
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        same = None  # sympy cannot put numbers in, so math-verify decides
    return same if same is not None else math_verify.verify(gold, mine, allow_set_relation_comp=True, timeout_seconds=None)


def same_values(gold, mine):
    """Whether two exact formulas have equal values at three points; None for all else (decimals, sets, equations, matrices)."""
    import sympy
    for one in (gold, mine):
        if not isinstance(one, sympy.Expr) or one.has(sympy.Float, sympy.core.expr.UnevaluatedExpr, sympy.Integral, sympy.Sum,
                                                      sympy.Product, sympy.Limit, sympy.Derivative, sympy.oo, sympy.zoo, sympy.nan):
            return None
    symbols = sorted(gold.free_symbols | mine.free_symbols, key=str)
    for start in ("0.7340912", "-1.3027561", "2.1180339"):
        point = {symbol: sympy.Float(start, 30) + sympy.Float("0.3517", 30) * i for i, symbol in enumerate(symbols)}
        x, y = (sympy.N(one.subs(point), 30) for one in (gold, mine))
        if not (x.is_Number or x.is_number) or not y.is_number or x.has(sympy.nan, sympy.zoo, sympy.oo):
            return None
        if not abs(x - y) <= sympy.Float("1e-15") * (abs(x) + abs(y)):
            return False
    return True


if __name__ == "__main__":
    serve()
