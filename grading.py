"""Is a response's final answer the right one?

    extract_answer(response)       the final answer as text, or None
    is_correct(response, answer)   True or False
    grade(responses, answers)      a Grade for each pair, the hard ones side by side

Text, numbers, simple formulas, and tuples and sets of these are compared here. Everything else goes to math-verify, which can be
sent round in circles by what a model writes (9^{9^{9^9}}), so it runs in worker processes with a limit of processor time that the
kernel enforces: an answer that takes too long is wrong and is counted. Workers are plain subprocesses, for any thread or process.
"""
import ast
import cmath
import collections
import concurrent.futures
import functools
import itertools
import json
import operator
import os
import re
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

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
NUMBER = re.compile(r"-?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\\?%)?|-?\.\d+")
BETWEEN = re.compile(r"(?:[\s$,;.&*-]|\\[\[\]()\\]|\\q?quad|\\text\s*\{[^{}]*\}|and|or)*")  # boxes that are one answer together


def extract_answer(response):
    """The content of the last \\boxed{} or \\fbox{} that is not empty; else what follows the last ####; else what "the answer is
    ..." or a line "A: ..." states; else the last number of a closing "Therefore, ...". None for none, or a last box cut off."""
    if found := boxes(response):
        return next((content for _, _, content in reversed(found) if content != ""), "")
    lines = response.rpartition("####")[2].strip().splitlines() if "####" in response else []
    if lines and not (len(lines) > 1 and re.match(r"\W*[A-Za-z]{3}", lines[0])):  # that would be a heading
        return lines[0].strip().rstrip(".")
    tail = response[-5000:].strip()
    if stated := list(STATED.finditer(tail)):
        return plain_answer(tail[stated[-1].end():].lstrip("*_ \n:").splitlines(), stated=True)
    conclusions = [sentence for sentence in re.split(r"(?<=[.!?])\s+", tail.rpartition("\n")[2]) if CONCLUSION.match(sentence)]
    return plain_answer(conclusions[-1:], stated=False)


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
    """The answer in plain words: a $...$ of the line, else the whole of what was stated, else the last number of a sentence."""
    line = re.sub(r"\*\*|__", "", lines[0]).strip() if lines else ""
    line = re.split(r"(?i)\.\s+(?=[A-Z])|\s*I hope it is correct|<\|", line)[0].strip().rstrip(".!")
    if line in ("\\[", "$$") and len(lines) > 1:
        return lines[1].strip().rstrip(".") or None
    if stated and re.match(r"(?!Option|Choice)[A-Za-z]{2,} ", line):  # "the largest $n$ is 34", "she makes $18 a day"
        line = re.split(r"\b(?:is|are|equals)\b:?\s*", line)[-1]
        stated = not (re.match(r"[A-Za-z]{2,} ", line) and NUMBER.search(line))
    math = re.findall(r"(?<!\\)\$\$?([^$]+?)(?<!\\)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", line)
    if math:
        return next(part for part in math[0 if stated else -1] if part).strip()
    if stated and len(line) <= 60:
        return line or None
    numbers = NUMBER.findall(line)
    return numbers[0 if stated else -1].rstrip(",") if numbers else None

# ---------------------------------------------------------------------------------------------------------------------
# Texts, numbers, letters and words, formulas: decided without math-verify

STRIPPED = re.compile(r"(?<!\\)\\(?:left|right|[bB]ig[lr]?|displaystyle|textstyle|limits|,|!|;|:|quad|qquad| )(?![a-zA-Z])|~")
TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|textnormal|operatorname|boldsymbol|bf|rm)\s*\{([^{}]*)\}")
UNIT = re.compile(  # what follows a number and is words alone: 5 cm, 5\text{ apples}, 5 square inches^2, 5 \text{ km/h}
    r"(?<=[\d})%])(?:[\s/]*\\(?:text|mbox|textrm|mathrm|textbf)\s*\{\s*[a-zA-Z][a-zA-Z\s./°^\d-]*\}(?:\^\{?\d\}?)?[./]?"
    r"|[\s/]\s*(?:[a-zA-Z]{2,}|[mgshLJNW](?=$|[\s/^]))\.?(?:\^\{?\d\}?)?)+$")
NOT_UNITS = re.compile(r"(?i)\b(?:and|or|if|mod|pi|sqrt|infinity|log|sin|cos|tan|choose|pm|hundred|thousand|[mbtr]+illion)\b")
CURRENCY = re.compile(r"^(-?)\s*(?:\\?[$€£¥]|\\pounds|\\text\{\s*\\?[$€£]\s*\}|USD|US\$|Rs\.?)\s*(?=[\d.\\-])")
COLUMN = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[clr|]*\})?((?:(?!&|\\begin|\\end).)*)\\end\{\1\}", re.DOTALL)
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
UNICODE = str.maketrans({"−": "-", "–": "-", "≤": "\\le ", "≥": "\\ge ", "π": "\\pi ", "∞": "\\infty", "×": "\\times "})
EQUATION = re.compile(r"\d\s*[a-z]|[a-z]\s*(?:\^|[-+]\s*\d)")
LABEL = re.compile(r"^(?:\\text(?:bf)?\{\s*)?\(([A-J])\)\s*\}?\s*(?=[-\d\\])")  # "\textbf{(C)}\ 27" for 27
NAMED = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z, ]*\))?|\\[a-z]+|\([a-zA-Z\\, _]*\))\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?deg(?:rees?)?\b)")


def tidy(text):
    """The text without what only lays it out: dollars around it, \\left, thin spaces, LaTeX's many fractions, a full stop."""
    text = re.sub(r"^(?:\$\$?|\\\(|\\\[)\s*([^$]*?)\s*(?:\$\$?|\\\)|\\\])$", r"\1", text.strip()).rstrip(" .,;:")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|,\\,|\\ )\s*(?=\d{3}(?:\D|$))", "", text)  # LaTeX's thousands separators
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda match: "^{" + match[0].translate(RAISED) + "}", text).translate(UNICODE)
    text = STRIPPED.sub(" ", text).replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = DEGREES.sub("", text)
    text = re.sub(r"\\([lg]e)q?(?:slant)?(?![a-z])", r"\\\1 ", text)
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\langle", "(").replace("\\rangle", ")")
    text = COLUMN.sub(lambda match: "(" + match[2].strip().removesuffix("\\\\").replace("\\\\", ", ") + ")", text)
    if not re.search(r"[(\[]|\\\{", text):  # 1,234 is a number, but (1,234) is a pair and 1,234,5 a list
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text.strip()


def without_unit(text):
    """The text without the words after its number, and without currency: "\\$5.40 \\text{ each}" -> "5.40"."""
    text = whole[1] if (whole := TEXT.fullmatch(text)) else text
    bare = UNIT.sub("", text)
    return CURRENCY.sub(r"\1", text if NOT_UNITS.search(text[len(bare):]) else bare).strip()


def squeezed(text):
    """For comparing as text: no spaces, no text commands, braces around single sub- and superscripts left out."""
    text = re.sub(r"([_^])\{([^{}])\}", r"\1\2", TEXT.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).replace("\\cdot", "*").replace("\\times", "*")


def split_name(text):
    """("x", "5") of "x = 5", ("f(x)", "x^2") of "f(x) = x^2", ("x", "[1,2]") of "x \\in [1,2]"; ("", text) without a name."""
    match = NAMED.fullmatch(text.strip())
    return (match[1].replace(" ", ""), match[2].strip()) if match else ("", text)

DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
PLAIN = re.compile(rf"([-+]?)\s*({DIGITS})(?:\s*[eE]([-+]?\d{{1,4}})"
                   rf"|\s*(?:\\times|\\cdot|\*|×|x)\s*10\s*\^\s*\{{?\s*([-+]?\d{{1,4}})\s*\}}?)?")
RATIO = re.compile(rf"([-+]?)\s*(?:(\d+)\s*(?:\\?\s))?\s*([-+]?{DIGITS})\s*/\s*({DIGITS})")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
FRACTION = re.compile(rf"([-+]?)\s*(\d+)?\s*(?:\+\s*)?\\frac\s*\{{\s*([-+]?{DIGITS})\s*\}}\s*\{{\s*([-+]?{DIGITS})\s*\}}")


def number(text):
    """(value, decimals, whether it is a percentage) of a number in any spelling, (25/2, 2, True) of "12.50%"; else None."""
    if percent := re.search(r"\s*(?:%|\bpercent|\bper cent)$", text):
        text = text[:percent.start()]
    text = text.replace("{-}", "-").strip()
    if re.fullmatch(r"\{[^{}]*\}|\([-+]?\d+(?:\.\d+)?\)", text):
        text = text[1:-1].strip()
    text = re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", "", text) if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text) else text
    if found := REPEATING.search(text):  # 0.1\\overline{6} is (16 - 1)/90
        start, cycle = found[1] + found[2], found[3]
        text = text.replace(found[0], f"{int(start + cycle) - int(start or 0)}/{10 ** len(found[2]) * (10 ** len(cycle) - 1)}")
    if found := PLAIN.fullmatch(text):
        sign, digits, exponent, power = found.groups()
        value, decimals = Fraction(digits) * Fraction(10) ** int(exponent or power or 0), len(digits.partition(".")[2])
    elif found := RATIO.fullmatch(text) or FRACTION.fullmatch(text):
        sign, whole, top, bottom = found.groups()
        if not Fraction(bottom) or whole and not top.isdigit():
            return None
        value, decimals = Fraction(whole or 0) + Fraction(top) / Fraction(bottom), 0
    else:
        return None
    return (-value if sign == "-" else value), decimals, bool(percent)


def equal_numbers(mine, gold):
    """Equal values. A percentage equals its share of one and its bare number; six right decimals are enough of an endless one."""
    (x, decimals, percent), (y, _, gold_percent) = mine, gold
    if percent != gold_percent:
        return x == y or (x / 100 == y if percent else x == y / 100)
    return x == y or bool(decimals >= 6 and 10 ** 99 % y.denominator and abs(x - y) * 10 ** decimals <= 1)


def choice(text):
    """"C" of "C", "(C)", "\\text{(C)}", "\\textbf{(C) } 12", "C. 12" or "(C) 12"; else None."""
    match = re.match(r"^(?:Option|Choice)?\s*\(?([A-J])(?:\)|[.:](?=\s|$)|$)", TEXT.sub(r"\1 ", text).replace("$", "").strip())
    return match[1] if match else None


def words(text):
    """Lower-case words of an answer that is only words: "\\text{ Evelyn}." -> "evelyn"; else None."""
    marked, text = TEXT.search(text), TEXT.sub(r"\1", text).strip("'\"`. ")
    alone = re.fullmatch(r"(?i)yes|no|(?=.{4})[a-z']{2,}(?:[ -][a-z']{2,})*", text)
    is_words = alone or marked and re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text)
    return re.sub(r"^(?:a|an|the) ", "", " ".join(text.lower().split())) if is_words else None


def based(text):
    """("52", "8") of "52_8" or "52_{8}"; None otherwise."""
    match = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d+|\\text\{[a-z]+\})\s*\}?", text)
    return match.groups() if match else None


FUNCTIONS = "sin|cos|tan|cot|sec|csc|ln"
KNOWN = {"pi": cmath.pi, "e": cmath.e, "i": 1j, "sqrt": cmath.sqrt, "ln": cmath.log, "sin": cmath.sin, "cos": cmath.cos,
         "tan": cmath.tan, "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x)}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
             ast.USub: operator.neg, ast.UAdd: operator.pos}
FRACTION_OF = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
FUNCTION_OF = re.compile(rf"\\({FUNCTIONS})\s*(?:\^\(?(\d)\)?)?\s*(\([^()]*\)|\d*\s*\\?[a-zA-Z]+(?!\s*[\w(^]))")
TOKEN = re.compile(rf"{DIGITS}|(?:sqrt|{FUNCTIONS})\(|pi|theta|alpha|beta|[a-zA-Z]|[-+*/^()]")


@functools.lru_cache(maxsize=10_000)
def formula(text):
    """The syntax tree of a formula of numbers, letters, powers, fractions and functions, "2.*x**(3.)". ValueError for all else."""
    if re.search(r"\d\s*\\frac|(?<!\\)\b[a-zA-Z]{4}|[\w)]\s+\d", text):  # 1\\frac{a}{b}, words, 12 34
        raise ValueError(text)
    while (deeper := FRACTION_OF.sub(r"((\1)/(\2))", re.sub(r"(\\sqrt|\^)\s*\{([^{}]*)\}", r"\1(\2)", text))) != text:
        text = deeper
    text = FUNCTION_OF.sub(lambda match: f"({match[1]}({match[3]}))^{match[2] or 1}", text)
    text = re.sub(rf"\s+|\\(?=sqrt|{FUNCTIONS}|pi|theta|alpha|beta)", "", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text))
    source = " ".join(TOKEN.findall(text))
    if source.replace(" ", "") != text or re.search(r"[\w)] \d|/ [\w.]+ [a-zA-Z(]|\b[fghP] \(", source):  # 1/2x, f(x)
        raise ValueError(text)
    source = re.sub(r"(?<=[\w.)]) (?=[a-zA-Z(])", "*", source).replace("^", "**")
    return ast.parse(re.sub(r"(?<![\d.])(\d+)(?![\d.])", r"\1.", source), mode="eval").body


def value_of(node, point):
    """The value of a formula's syntax tree at a point {letter: number}. What a model wrote is never run as Python."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return point[node.id]
    if isinstance(node, ast.Call):
        return KNOWN[node.func.id](value_of(node.args[0], point))
    sides = [value_of(getattr(node, side), point) for side in ("left", "right", "operand") if hasattr(node, side)]
    return OPERATORS[type(node.op)](*sides)


def same_values(mine, gold):
    """Whether two formulas have equal values at three points; None where one is not so simple, or where it is too close to call."""
    try:
        trees = formula(mine), formula(gold)
        letters = sorted({node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} - KNOWN.keys())
        for start in (0.7340912, -1.3027561, 2.1180339):
            point = {letter: start + 0.3517 * i for i, letter in enumerate(letters)} | KNOWN
            x, y = (value_of(tree, point) for tree in trees)
            size, gap = max(abs(x), abs(y)), abs(x - y)
            if not gap <= 1e-12 * size < 1e-3:
                return False if gap > 1e-6 * size > 1e-12 and "." not in mine + gold else None
    except (ArithmeticError, ValueError, TypeError, SyntaxError, LookupError, AttributeError, RecursionError):
        return None
    return True


def quick_verdict(found, answer):
    """True or False where texts, numbers and simple formulas decide; else None."""
    (name, mine), (gold_name, gold) = split_name(tidy(found)), split_name(tidy(answer))
    if name != gold_name and name and gold_name:
        return None
    bare, bare_gold = without_unit(LABEL.sub("", mine)), without_unit(gold)
    if squeezed(mine) == squeezed(gold) or squeezed(bare) == squeezed(bare_gold):
        return True
    if choice(gold):
        return choice(mine) == choice(gold)
    if words(gold):
        return words(mine) == words(gold)
    if based(bare_gold) or based(bare):
        (digits, base), (gold_digits, gold_base) = based(bare) or (bare, None), based(bare_gold) or (bare_gold, None)
        return digits == gold_digits and (base == gold_base or not base or not gold_base)
    if bare.count("=") == 1 and "=" not in answer and not re.search(r"[,<>]|\\[lgn]e(?![a-z])|\b(?:or|and)\b", bare):
        left, bare = (without_unit(side.strip()) for side in bare.split("="))
        if number(left) and number(bare) and number(left)[0] != number(bare)[0] or bare == "0" and EQUATION.search(left):
            return False  # 5 = 1 and 3x - 6 = 0 are no answers; a + b = 5 and 2 + 3 = 5 are
    x, y = number(TEXT.sub(r"\1", bare)), number(TEXT.sub(r"\1", bare_gold))
    return equal_numbers(x, y) if x and y else same_values(bare, bare_gold)


NESTED = r"[^()\[\]{}]"
for _ in range(4):
    NESTED = rf"(?:[^()\[\]{{}}]|[(\[{{]{NESTED}*[)\]}}])"  # brackets within brackets
PART = re.compile(NESTED.replace("[^", "[^,", 1) + "+")
BRUTAL = re.compile(r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)|\d{4,}[\s})]*!|!\s*!|\\binom\s*\{\d{4,}"
                    r"|\\(?:i*int|oint|sum|prod|lim)(?![a-z])")


def brutal(text):
    """Whether a text is not worth parsing: brackets too deep, towers of powers, or sums and integrals left to do."""
    depths = itertools.accumulate((char in "{([") - (char in "})]") for char in text)
    return max(depths, default=0) > DEEPEST or bool(BRUTAL.search(text))

# ---------------------------------------------------------------------------------------------------------------------
# math-verify, in worker processes

idle = []                # workers that wait for a question
recent = collections.deque(maxlen=50)  # whether the last answers took too long
os.register_at_fork(after_in_child=idle.clear)  # a fork must not talk to its parent's workers


def ask_worker(found, answer):
    """"right", "wrong" or "timeout": a worker's verdict on one pair."""
    worker = idle.pop() if idle else subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
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
    quick = quick_verdict(found, answer) if len(found) <= LONGEST else found == answer
    if quick is not None:
        return "right" if quick else "wrong"
    if brutal(found) or brutal(answer):
        return "timeout"
    mine, gold = tidy(found), tidy(answer)
    return verdict_by_parts(split_name(mine)[1], split_name(gold)[1]) or ask_worker(mine, gold)


def parts(text):
    """("()", ["1", "2"]) of "(1, 2)"; ("", ["1", "2"]) of the list "1 and 2" and the set "\\{1, 2\\}"; ("", ["1"]) of "1"."""
    text = re.sub(r"(?:,\s*)?(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\cup)", ",", text)
    whole = re.fullmatch(rf"\\?([(\[{{])({NESTED}*?)\\?([)\]}}])", text)
    kind, body = (whole[1] + whole[3], whole[2]) if whole else ("", text)
    found = PART.findall(body)
    return ("" if kind == "{}" else kind), [part.strip() for part in found] if ",".join(found) == body else [text]


def verdict_by_parts(mine, gold):
    """A verdict on tuples, intervals, lists and sets part by part; None where there are no parts, or not the same shape."""
    (kind, ours), (gold_kind, theirs) = parts(mine), parts(gold)
    if kind != gold_kind or min(len(ours), len(theirs)) < 2 or len(ours) * len(theirs) > 64 or re.search(r"\\pm|;", mine + gold):
        return None
    if kind:
        verdicts = [verdict_on(*pair) for pair in zip(ours, theirs)] + ["wrong"] * (len(ours) != len(theirs))
    else:  # in any order
        verdicts = [min(verdict_on(x, y) for y in theirs) for x in ours] + [min(verdict_on(x, y) for x in ours) for y in theirs]
    return max(verdicts) if "\\cup" not in mine or max(verdicts) == "right" else None  # right < timeout < wrong


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
