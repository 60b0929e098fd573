"""Is a response's final answer the right one?

Equal texts, numbers, option letters and words are decided here, everything else by math-verify. Some answers
would keep it busy for ever (9^{9^{9^9}}), so it runs in subprocesses whose CPU time the kernel limits.
"""

import collections
import concurrent.futures
import functools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LIMIT_SECONDS = 1.0  # CPU time for one answer
HURRY_SECONDS = 0.1  # the same while more than 3 of the last 50 answers timed out: a flood of them must end
LIMIT_MEMORY = 2 << 30  # bytes of a worker's address space
LONGEST = 400  # characters of an answer; a longer one must equal the gold answer as text


class Grade(NamedTuple):
    extracted: str | None
    correct: bool
    timed_out: bool


# ---- The final answer of a response ----
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\\?[^\s$\\{][^\s$\\]*)?")  # group 1: a word without braces
GAP = r"(?:[\s$.&*-]|\\[\[\]()\\]|\\q?quad)*"
JOINT = re.compile(  # between boxes that are one list: "$, and $x ="
    rf"{GAP}(?:[,;]|\\text\s*\{{[^{{}}]*\}}|and|or){GAP}(?:(?:and|or){GAP})?(?:\w(?:_\{{?\d\}}?)?\s*=\s*)?"
)
STATED = re.compile(  # "the answer is", "Answer:", "## Answer", "**Final answer**:", "A: 18"
    r"(?im)\banswer\b\W{0,6}\s?(?:is|:|=)|^[#* ]*(?:the )?(?:final )?answer[* ]*$"
    r"|^\W{0,9}(?:final )?answer\W{0,9}:|(?-i:^A(?:ns)?:)"
)
CONCLUSION = re.compile(r"(?i)^\W*(?:so|thus|therefore|hence|in total|in conclusion|altogether)\b")
NUMBER = re.compile(r"-?[$€£]?\d[\d,]*(?:\.\d+)?(?:[/:]\d+)?(?:\\?%)?|-?\.\d+")  # "-$1,234.50", "3/4", "50%"
FORMULA = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+?)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]")


def extract_answer(response):
    """The last box that is not empty, and boxes listed with it; else what follows the last ####; else what
    "the answer is" or "A:" states; else what the last "Therefore, ..." or whole sentence ends with."""
    answers, next_start = [], len(response)
    for box in reversed(collections.deque(BOX.finditer(response), maxlen=8)):
        content, end = box_content(response, box)
        if answers and not (content and JOINT.fullmatch(response[end:next_start])):
            break
        if content is None:
            return None
        answers, next_start = ([content, *answers], box.start()) if content else (answers, next_start)
    if answers:
        return ", ".join(answers)
    lines = response.rpartition("####")[2].strip().splitlines() if "####" in response else []
    if lines and not (len(lines) > 1 and re.match(r"\W*[A-Za-z]{3}", lines[0])):  # that would be a heading
        return lines[0].strip().rstrip(".")
    tail = response[-5000:].strip()
    if stated := list(STATED.finditer(tail)):
        return answer_in_words(tail[stated[-1].end() :].lstrip("*_ \n:"), stated=True)
    sentences = re.split(r"(?<=[.!?])\s+|(?<=\$)\s+(?=So|Thus|Hence|Therefore)", tail.rpartition("\n")[2])
    is_complete = re.search(r"(?:[.!$]|\*\*|\\\]|\\\))$", tail)
    candidates = list(filter(CONCLUSION.match, sentences))[-1:] or (sentences[:-3:-1] if is_complete else [])
    return next(filter(None, (answer_in_words(sentence, stated=False) for sentence in candidates)), None)


def box_content(text, box):
    """A box's content and where it ends: 5 for \\boxed{5} and \\boxed 5, None for \\boxed{5 (cut off)."""
    if box[1]:
        return box[1].rstrip(".,;:!"), box.end()
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[box.end() :], re.DOTALL):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth <= 0 and brace[0] in "{}":
            return text[box.end() + 1 : box.end() + brace.start()].strip(), box.end() + brace.end()
    return None, len(text)


def answer_in_words(text, stated):
    """The first formula or number, or the line, of what is stated; the last of another sentence."""
    line, _, rest = text.partition("\n")
    if line.strip() in ("\\[", "$$"):
        return rest.partition("\n")[0].strip().rstrip(".") or None
    bold = [] if stated else re.findall(r"\*\*([^*]+)\*\*", line)
    line = re.sub(r"\*\*|__", "", bold[-1] if bold else line).strip()
    line = re.split(r"(?i)\.\s+(?=[A-Z])|\s?I hope it is correct|<\|", line)[0].strip().rstrip(".!")
    if stated and re.match(r"(?!Option|Choice)[A-Za-z]{2,} ", line):  # "the largest $n$ is 34"
        line = re.split(r"\b(?:is|are|equals)\b:?\s*", line)[-1]
        stated = not (re.match(r"[A-Za-z]{2,} ", line) and NUMBER.search(line))
    line = re.sub(r"(?:\$|\\\))\s?(?:,? ?and|,? ?or|[,;])\s?(?:\$|\\\()", ", ", line)  # "$x = 1$ and $x = 2$"
    if formulas := [match[match.lastindex].strip() for match in FORMULA.finditer(line)]:
        return formulas[0 if stated else -1]
    if stated and (len(line) <= 60 or re.match(r"[-(\[\\]", line)):
        return line or None
    numbers = re.findall(r"\([^()]*\d,[^()]*\)$", line) or NUMBER.findall(line)
    return numbers[0 if stated else -1].rstrip(",") if numbers else line if bold and len(line) <= 30 else None


# ---- One spelling for what models write in many: only layout, for math-verify does the mathematics ----
COMMANDS = re.findall(r"(.)(\w+) ?", "≤le ≥ge ≠ne πpi ∞infty ×times ·cdot ∪cup ∈in ∅emptyset √sqrt")
SYMBOLS = str.maketrans({"−": "-", "–": "-"} | {symbol: f"\\{name} " for symbol, name in COMMANDS})
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
NOT_UNIT = (
    "and|or|if|is|not|mod|pi|sqrt|infinity|log|choose|plus|minus|times|over|squared|dozen|[mbtr]+illions?"
)
NOT_UNIT = rf"(?!(?:{NOT_UNIT}|(?:arc)?(?:sin|cos|tan|csc|cot)h?|sec [a-z]|(?:hundred|thousand)(?:th)?s?)\b)"
UNIT = r"(?:cm|mm|km|kg|mg|ft|in|lbs?|oz|m[lL]|yd|mi|sq|Hz|[mgshLJNWVAKCF])"
UNITS = (  # 5\text{ cm}, 5 km/h, 5 red hats, 5 inches^2
    r"(?:(?<=[\d%})])|(?<=\\pi))(?:¢|\s*\\Omega"
    rf"|[\s/]*\\text\s*\{{\s*+{NOT_UNIT}[^{{}}]*\}}(?:/\\text\s*\{{[^{{}}]*\}})?"
    rf"|\s{UNIT}(?:/{UNIT})?|[\s/]{NOT_UNIT}[a-zA-Z]{{3,}}(?:[\s/][a-zA-Z]+)*)\.?(?:\^\{{?\d\}}?)?$"
)
LAYOUT = [
    (r"^(?:\\text\s*)?\{([^{}]*\d[^{}]*)\}$", r"\1"),
    (r"\\\\\[[\d.]+[a-z]{2}\]", r"\\\\"),  # \\[4pt] between rows
    (r"(?<=\d)(?:\{,\}|,? ?\\[,!]|\\? )\s*(?=\d{3}(?!\d))|\\color\s*\{[^{}]*\}", ""),  # 1{,}234, 1\,234
    (r"(?<!\\)\\(?:[,!;: ]|(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad)(?![a-z])\.?)|~", " "),
    (r"\\(?:mbox|math(?:rm|it)|text(?:rm|bf|it|normal)|operatorname)(?![a-zA-Z])\s*(?=\{)", r"\\text"),
    (r"\\(?:bm|mathbf|boldsymbol|underline)\s*\{([^{}]*)\}", r"\1"),
    (r"\\text\s*\{\s*(sin|cos|tan|cot|ln|log)\s*\}", r"\\\1 "),
    (r"\\text\s*\{\s*(,|,? ?and|,? ?or|[ie]?)\s*\}", r" \1 "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d|[a-zA-Z]|\\[a-z]+)(?=\s*[\\\w{])", r"\\frac{\1}"),  # \frac12, \frac\pi2
    (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z]|\\pi)", r"\1{\2}"),
    (r"\\sqrt\s*(\d+|[a-zA-Z]|\\pi)", r"\\sqrt{\1}"),
    (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\bdegrees?\b)(?:\s*\\text\{[CF]\}|[CF]\b)?", ""),
    (r"\\([lgn])eq?(?:slant)?(?![a-z])|([<>!]|\\not ?)=", lambda m: f"\\{m[1] or 'lgn'['<>'.find(m[2])]}e "),
    (r"\\([%$])", r"\1"),
    (r"(?:^|(?<==))(\s*-?)\s*(?:\\text\s*\{\s*)?[$€£¥]\s*\}?(?=[\d.\\-])", r"\1"),  # currency
    (r"(?i)(?<=\d)\s*(?:\\text\s*\{)?\s*([ap])\.?m\b\.?\s*\}?$", lambda match: match[1].lower() + "m"),
    (r"\\text\s*\{\s*per ?cent\s*\}|\s*\bper ?cent\b|\s+%", "%"),
    (r"\s*\(?\\?[bp]?mod\s*\{?(\d+)\}?\s*\)?$", r" mod \1"),
    (r"[,\s\\]+\(?\s*[a-z]\s*\\in\s*(?:\\mathbb\s*)?\{?[ZN]\}?\s*\)?$", ""),  # k \in \mathbb{Z}
    (r"(?<=\d)\s*i(?![a-zA-Z])", " i"),  # math-verify takes the i of 4i for a variable
    (r"\s*/\s*", "/"),
    (r"(?i)^(?:.*\b)?no (?:real )?(?:solution|root)s?\s*\}?$|^\\varnothing$|^\\\{\s*\\\}$", r"\\emptyset"),
    (r"(?i)^(?:\\text\s*\{)?(?:all )?real(?:s| numbers?)\}?$|^\(-\\infty, ?\+?\\infty\)$", r"\\mathbb{R}"),
    (UNITS, ""),
]


def tidy(text):
    """\\frac{1}{2} of "$\\dfrac12$.", 1 1/2 of "1½", x^{2} of "x²", 5 of "\\$5 \\text{ each}"."""
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text.translate(SYMBOLS))
    text = " ".join(unicodedata.normalize("NFKC", text).replace("⁄", "/").split()).rstrip(" .")
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right) and text.count(left) <= 1 + (left == right):
            text = text.removeprefix(left).removesuffix(right).rstrip(" .,;:")
    for pattern, replacement in LAYOUT:
        text = re.sub(pattern, replacement, text).strip()
    if not re.search(r"[(\[]|\\\{", text):  # 1,234 is a number, but (1,234) is a pair and 1,234,5 a list
        text = re.sub(r"(?<=\d),(?=\d{3}(?:,\d{3})*(?![\d,]))", "", text)
    return text.rstrip(" .,;:")


TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
OPTION = re.compile(r"(?:Option |Choice |[Pp]oint )?\(?([A-J])(?:\)|[.:](?!\S)|$)(?! and| or|.*\b[B-J]\b)")
FRACTION = re.compile(r"(\d*)\s*\\frac\s*\{\s*(-?)\s*([\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}")
NUMERAL = re.compile(  # sign, whole part of a mixed number, numerator, denominator, exponent of ten, percent
    r"([-+]?)\s*(?:(\d+) )?(\d++\.?\d*+|\.\d+)(?:/(-?\d++\.?\d*+))?"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|\*)\s*10\s*\^)\s*\{?([-+]?\d{1,4})\}?)?(%?)"
)
NAME = re.compile(  # of "x = 5", "f(x) = 5", "(x, y) = (1, 2)", "\text{Area} = 5", "x \in [1, 2]"
    r"(\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-z, ]*\))?|\([a-zA-Z, ]*\)|\\text\{[^{}]*\}) ?(?:=|\\in(?![a-z])) ?"
)


def squeezed(text):
    """The text without spaces and \\text{}, to compare as text: x^2+1 of "x^{2} + 1"."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", TEXT.sub(r" \1 ", text).strip(" ."))
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text).replace("\\cdot", "*").replace("\\times", "*")


def number(text):
    """(Fraction(25, 2), True) of "12.5%" and "12\\frac{1}{2}%": a number, is it a percentage; else None."""
    text = re.sub(r"^\{([^{}]*)\}$|^\(([^()]*)\)$", r"\1\2", text.replace("{-}", "-"))
    match = NUMERAL.fullmatch(FRACTION.sub(r"\2\1 \3/\4", text).strip())
    if not match or match[4] and not Fraction(match[4]) or match[2] and not match[4]:
        return None
    value = Fraction(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return value * Fraction(10) ** int(match[5] or 0) * (-1 if match[1] == "-" else 1), bool(match[6])


def words(text):
    """evelyn of "\\text{ Evelyn}.", c of "(C)", "\\text{(C) } 12" and "Option C"; else None."""
    plain = TEXT.sub(r" \1 ", text).replace(",", " and ").strip(" '\"`.")
    if option := OPTION.match(plain):
        return option[1].lower()
    pattern = r"[a-z() '-]+" if "\\text" in text else r"yes|no|(?=.{4})[a-z']{2,}(?:[ -][a-z']{2,})*"
    plain = plain.lower() if re.fullmatch(pattern, plain.lower()) else ""
    return re.sub(r"^(?:an?|the) |[()]|\band\b|\s", "", plain) or None


def quick_verdict(found, gold):
    """True or False for two tidy answers if texts, numbers, letters or words decide; else None."""
    text, gold_text, value, gold_value = squeezed(found), squeezed(gold), number(found), number(gold)
    if not text or text == gold_text or words(gold):
        return bool(text) and (text == gold_text or words(found) == words(gold))
    if re.fullmatch(r"\\\{[^(\[]*\} [(\[].*|[(\[].* \\\{[^(\[]*", f"{found} {gold}"):
        return False  # a set is no tuple
    if re.fullmatch(r"\d+(?::\d+)+(?:[ap]m)?|\d+[ap]m", gold_text):  # clock times and ratios
        times = [text.replace(":00", "") + half for half in ("", "am", "pm")]
        ratio = number(gold_text.replace(":", "/"))
        return gold_text.replace(":00", "") in times or None not in (value, ratio) and value == ratio
    if re.fullmatch(r"[\dA-F]+_\{?\w+\}?", gold_text):  # numerals in a stated base
        return re.sub("[()]", "", text) in (gold_text, gold_text.partition("_")[0])
    if not value or not gold_value:
        return None
    (value, percent), (gold_value, gold_percent) = value, gold_value
    scaled = value / 100 if percent else value * 100
    if value == gold_value or percent != gold_percent and scaled == gold_value:
        return True
    is_rounded = 10**99 % gold_value.denominator and re.search(r"\.\d{6}", text)  # 0.333333 for 1/3
    return None if is_rounded and abs(value) > 0.1 else False


def without_names(found, gold):
    """("16", "16") of "A + B = 9 + 7 = 16" and "16", of "x = 16" and "16", of "y = 16" and "y(x) = 16"."""
    found = found if "mod" in gold else re.sub(r" mod \w+$", "", found)
    is_list = re.search(r",|\b(?:and|or)\b", found + gold) and max(found.count("="), gold.count("=")) > 1
    if is_list or words(gold):
        return found, gold
    name, gold_name = NAME.match(found), NAME.match(gold)
    if name and gold_name and name[1].partition("(")[0] == gold_name[1].partition("(")[0]:
        return found[name.end() :], gold[gold_name.end() :]
    if gold_name and "=" not in found:
        return found, gold[gold_name.end() :]
    is_relation = re.search(r"=", gold) or re.search(r"[<>]|\\(?:[lgn]e|not)(?![a-z])", found + gold)
    return found if is_relation else re.split(r"=|\\equiv(?![a-z])|\\in(?![a-z])", found)[-1].strip(), gold


COSTLY = re.compile(  # towers of powers, large factorials, integrals, sums and limits left to do
    r"(?:\^|\*\*)[\s{(]*\d+\s*(?:\^|\*\*)|\d{4,}[\s})]*!|!\s*!|\\binom\s*\{\d{4,}"
    r"|\\(?:i*int|oint|sum|prod|lim)(?![a-z])"
)
idle = []  # workers waiting for a question
recent = collections.deque(maxlen=50)  # whether each of the last answers timed out
os.register_at_fork(after_in_child=idle.clear)  # a forked process must not talk to its parent's workers


def ask_worker(found, gold):
    """Right, wrong or timeout: math-verify's verdict on one pair."""
    command, pipe = [sys.executable, os.path.abspath(__file__)], subprocess.PIPE
    start = functools.partial(subprocess.Popen, command, stdin=pipe, stdout=pipe, text=True, process_group=0)
    worker = idle.pop() if idle else start()
    limit = HURRY_SECONDS if sum(recent) > 3 else LIMIT_SECONDS
    print(json.dumps([limit, found, gold]), file=worker.stdin, flush=True)
    verdict = worker.stdout.readline().strip()
    if not verdict:
        raise RuntimeError(f"a grading worker ended with code {worker.wait()}: its error is above")
    idle.append(worker)
    recent.append(verdict == "timeout")
    return verdict


@functools.lru_cache(maxsize=100_000)
def verdict_on(found, answer):
    """Right, wrong or timeout, for one answer found and the gold answer."""
    if max(len(found), len(answer)) > LONGEST:
        return "right" if found == answer else "wrong"
    ours, gold = without_names(tidy(found), tidy(answer))
    quick = quick_verdict(ours, gold)
    if quick is not None:
        return "right" if quick else "wrong"
    if COSTLY.search(f"{ours} {gold}"):
        return "timeout"
    return ask_worker(ours, gold)


def grade_one(response, answer):
    found = extract_answer(response)
    verdict = verdict_on(found, answer) if found else "wrong"
    return Grade(found, verdict == "right", verdict == "timeout")


def grade(responses, answers):
    """A Grade for each response and gold answer, on all cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda pair: grade_one(*pair), zip(responses, answers, strict=True)))


def is_correct(response, answer):
    """Whether the response's final answer equals the gold answer."""
    return grade_one(response, answer).correct


def serve():
    """The worker: a fork answers [limit, found, gold] lines; if the kernel kills it, the next goes on."""
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not a verdict
    sys.path.pop(0)  # this file's directory
    import math_verify

    logging.disable(logging.CRITICAL)
    layout = math_verify.parser.NormalizationConfig(malformed_operators=True, nits=True)
    latex = [math_verify.LatexExtractionConfig(normalization_config=layout)]  # its units drop the t of "2 t"
    parse_once = functools.partial(math_verify.parse, extraction_config=latex, parsing_timeout=None)
    parse = functools.lru_cache(10_000)(lambda text: parse_once(f"\\boxed{{{text}}}"))
    digits = 400  # with the default of 15, 1/20! equals 1/19!
    settings = {"numeric_precision": digits, "allow_set_relation_comp": True, "timeout_seconds": None}
    for text in ("\\sqrt{8}", "\\cot(x)", "(1,3]", "y=2x+3", "x>3", "\\{1,x\\}", "0.5"):
        math_verify.verify(parse(text), parse(f"{text}+1"), **settings)  # imports what forks need
    if sys.platform == "linux":  # macOS refuses it
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_MEMORY, LIMIT_MEMORY))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a worker whose stage was killed ends in silence
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    while os.fork():
        if os.wait()[1] == 0:
            return  # no more questions
        print("timeout", file=verdicts, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in iter(sys.stdin.readline, ""):
        limit, found, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit)
        verdict = "right" if math_verify.verify(parse(gold), parse(found), **settings) else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=verdicts, flush=True)


if __name__ == "__main__":
    serve()
