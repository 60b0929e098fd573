"""Do two final answers say the same? Texts, numbers, letters, simple formulas, equations and inequalities, decided in process.

    quick_verdict(found, answer)   True, False, or None: this file cannot tell, and grading.py asks math-verify
"""
import ast
import functools
import operator
import random
import re
from fractions import Fraction

import mpmath

# ---------------------------------------------------------------------------------------------------------------------
# Layout

STRIPPED = re.compile(r"(?<!\\)\\(?:(?:left|right|[bB]ig[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![a-zA-Z])|[,!;: ])|~")
TEXT = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|textnormal|operatorname|boldsymbol|bf|rm)\s*\{([^{}]*)\}")
TRAILING = re.compile(r"(?:(?<!\\)[ .,;:]|\\[,!;: ])+$")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?((?:(?!\\begin|\\end).)*)\\end\{\1\}")
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
UNICODE = str.maketrans({"−": "-", "–": "-", "≤": "\\le ", "≥": "\\ge ", "π": "\\pi ", "∞": "\\infty", "×": "\\times ",
                         "·": "\\cdot ", "∪": "\\cup ", "∈": "\\in "})
DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?deg(?:rees?)?\b)"
                     r"(?:\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF](?![a-zA-Z(])))?")
ANGLE = re.compile(rf"\\(sin|cos|tan|cot|sec|csc)\s*\(?\s*(\d+(?:\.\d+)?){DEGREES.pattern}\s*\)?")
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|exp"
NUMERALS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
            "nine": "9", "ten": "10", "eleven": "11", "twelve": "12"}
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
REWRITTEN = [(re.compile(pattern), new) for pattern, new in (  # one spelling for what models write in many
    (r"\\\\\[[\d.]+(?:pt|em|ex|mm)\]", r"\\\\"),                                          # \\[4pt] between rows
    (r"(?<=\.)\d+(?:\\,\s*\d+)+", lambda match: re.sub(r"\\,\s*", "", match[0])),         # 0.000\,067\,2
    (r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|,\\,|\\ )\s*(?=\d{3}(?:\D|$))", ""),                  # LaTeX's thousands separators
    ("[⁻⁰¹²³⁴-⁹]+", lambda match: "^{" + match[0].translate(RAISED) + "}"),
    (r"\\text\s*\{\s*,\s*\}", ","),
    (r"(?<=\d)\s*\\(?:mathrm|text|textit)\s*\{\s*([a-zA-Z])\s*\}", r" \1"),             # 2\mathrm{i}
    (r"\bC(?=_)", "c"),                                                                  # constants of integration
    (r"\{:\}", ":"),                                                                     # 12{:}40
    (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\([^()]*\))", r"\\sqrt{\1}"),
    (STRIPPED, " "),
    (r"(?<=\S)[,\s]+\(?\s*[a-z]\s*\\in\s*\\math(?:bb|bf)\s*\{?[ZN]\}?\s*\)?$", ""),               # x = k\pi, k \in \mathbb{Z}
    (r"\\([%$])", r"\1"),
    (rf"(?<=\d)\s*(?:\\text\s*\{{\s*)?({'|'.join(SCALES)})\s*\}}?", lambda match: " \\times 10^{%d}" % SCALES[match[1]]),
    (r"(?<![\\a-zA-Z])(sin|cos|tan|cot|ln|log|sqrt|pi)(?![a-zA-Z])", r"\\\1 "),                  # sin x, pi/2
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d|[a-zA-Z]|\\(?!sqrt|frac)[a-z]+)\s*(?=[\\\da-zA-Z{])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z]|\\(?!sqrt|frac)[a-z]+)", r"\1{\2}"),
    (r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z])|\\pi)", r"\\sqrt{\1}"),
    (ANGLE, r"\\\1(\2\\pi/180)"),
    (DEGREES, ""),
    (r"\\([lg])eq?(?:slant|q)?(?![a-z])|([<>])=", lambda match: f"\\{match[1] or 'lg'['<>'.index(match[2])]}e "),
    (r"\\(?:lt|gt)(?![a-z])", lambda match: {"l": "<", "g": ">"}[match[0][1]]),
    (r"!=|≠|\\neq(?![a-z])", r"\\ne "),
    (r"\\[lr]brace(?![a-z])", lambda match: {"l": "\\{", "r": "\\}"}[match[0][1]]),
    (r"\\[lr]angle(?![a-z])", lambda match: {"l": "(", "r": ")"}[match[0][1]]),
    (r"\\(?:text|mathrm|operatorname)\s*\{\s*(sin|cos|tan|cot|ln|log)\s*\}", r"\\\1 "),
    (r"\s*\(?\\?[bp]?mod\s*\{?(\d+|[a-z])\}?\s*\)?$", r" mod \1"),
    (rf"_\s*\{{?\s*\\(?:text|mathrm)\s*\{{\s*({'|'.join(NUMERALS)})\s*\}}\s*\}}?", lambda match: "_" + NUMERALS[match[1]]),
    (r"^\s*\\text(?:bf|rm|it)?\s*\{[^{}]*(?:\b(?:is|are|equals)|:|=)\s*\}\s*(?=\S)", ""),     # \text{The line is } y = x
    (r"^\s*\\?\{\s*[a-zA-Z]\s*(?:\\in\s*(?:\\mathbb\s*\{?R\}?|\\R|ℝ)\s*)?(?:\\mid|\\vert|\||:)"   # \{x \in R \mid x < 2\}
     r"\s*([^|:]*(?:[<>]|\\[lg]e )[^|:]*?)\\?\}$", r"\1"),
    (MATRIX, lambda match: tuple_of(match)),
    (r"^[A-Z](?=\([^()]*,[^()]*\)$)|(?<=\))\s*\^\s*\{?(?:T|\\top)\}?$", ""),               # A(1, 2), (1, 2)^T
)]


def tuple_of(matrix):
    """"(1, 2)" of a column, "((1, 2), (3, 4))" of a matrix; one row stays as it is, for it is no column."""
    rows = matrix[2].strip().removesuffix("\\\\").split("\\\\")
    if len(rows) == 1 and "&" in rows[0]:
        return matrix[0]
    return "(" + ", ".join(f"({row.replace('&', ',')})" if "&" in row else row for row in rows) + ")"


def tidy(text):
    """The text without what only lays it out: dollars around it, \\left, thin spaces, LaTeX's many fractions, a full stop."""
    text = re.sub(r"^(?:\$\$?|\\\(|\\\[)\s*((?:[^$\\]|\\.)*?)\s*(?:\$\$?|\\\)|\\\])$", r"\1", " ".join(text.split()))
    text = TRAILING.sub("", text).translate(UNICODE)
    for pattern, new in REWRITTEN:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # 1,234 is a number, but (1,234) is a pair and 1,234,5 a list
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = text.strip()
    return text[1:-1].strip() if re.fullmatch(r"\{\0*\}", outside(text)) else text


def outside(text):
    """The text with a \\0 for each character that stands within brackets: "(\\0\\0\\0] + 1" of "(1,2] + 1"."""
    depth, shown = 0, []
    for char in text:
        depth -= char in ")]}"
        shown.append("\0" if depth > 0 else char)
        depth += char in "([{"
    return "".join(shown)


def split_outside(pattern, text):
    """The text cut at the matches of a pattern that stand in no bracket."""
    ends = [(0, 0), *(match.span() for match in re.finditer(pattern, outside(text))), (len(text), len(text))]
    return [text[before[1]:after[0]].strip() for before, after in zip(ends, ends[1:])]


def squeezed(text):
    """For comparing as text: no spaces, no text commands, braces around single sub- and superscripts left out."""
    text = re.sub(r"([_^])\{([^{}])\}", r"\1\2", TEXT.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).replace("\\cdot", "*").replace("\\times", "*")

# ---------------------------------------------------------------------------------------------------------------------
# Numbers, and what may stand around them

SHORT = "cm|mm|km|kg|mg|ft|in|lbs?|oz|m[lL]|hrs?|mins?|secs?|yd|mi|pm|am|sq|Hz|kW|kJ|[mgshLJNWVAKCF](?=$|[\\s/^])"
UNIT = re.compile("|".join(  # what follows a number and is words alone: 5 cm, 5\text{ apples}, 5 square inches^2, 5 \text{ km/h}, 5¢
    rf"{behind}(?:[\s/]*\\(?:text|mbox|textrm|mathrm|textbf)\s*\{{\s*(?![a-zA-Z]\s*\}})[a-zA-Z][a-zA-Z\s./°^\d-]*\}}"
    rf"(?:\^\{{?\d\}}?)?[./]?|[\s/]*\\(?:text|mathrm)\s*\{{\s*[mgshLJNWVAKCF]\s*\}}(?:\^\{{?\d\}}?)?"
    rf"|\s*\\frac\s*\{{\s*\\text\{{[a-zA-Z. ]+\}}\s*\}}\s*\{{\s*\\text\{{[a-zA-Z. ]+\}}\s*\}}|\s*¢|\s*\\Omega"
    rf"|(?:\s|(?<=[a-zA-Z])/|/(?=[a-zA-Z]{{3}}))\s*(?:{SHORT}|[a-zA-Z]{{{shortest},}})\.?(?:\^\{{?\d\}}?)?)+$"
    for behind, shortest in ((r"(?<=[\d%])", 3), (r"(?:(?<=[})])|(?<=\\pi))", 4))))
MEASURE = re.compile(r"(?i)\b(second|minute|hour|day|week|month|year|cent|dollar|inch|yard|mile|gram|kilogram|meter)(?:e?s)?\b")
NOT_UNITS = re.compile(r"(?i)\b(?:and|or|if|mod|pi|sqrt|infinity|log|sin|cos|tan|choose|pm|hundred|thousand|[mbtr]+illion)\b")
CURRENCY = re.compile(r"^(-?)\s*(?:\\?[$€£¥]|\\pounds|\\text\{\s*\\?[$€£]\s*\}|USD|US\$|Rs\.?)\s*(?=[\d.\\-])")
LABEL = re.compile(r"^(?:\\text(?:bf)?\{\s*)?\(([A-J])\)\s*\}?\s*(?=[-\d\\])")  # "\textbf{(C)}\ 27" for 27
DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
PLAIN = re.compile(rf"([-+]?)\s*({DIGITS})(?:\s*[eE]([-+]?\d{{1,4}})"
                   rf"|\s*(?:\\times|\\cdot|\*|×|x)\s*10\s*\^\s*\{{?\s*([-+]?\d{{1,4}})\s*\}}?)?")
RATIO = re.compile(rf"([-+]?)\s*(?:(\d+)\s*(?:\\?\s))?\s*([-+]?{DIGITS})\s*/\s*({DIGITS})")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
FRACTION = re.compile(rf"([-+]?)\s*(\d+)?\s*(?:\+\s*)?\\frac\s*\{{\s*([-+]?{DIGITS})\s*\}}\s*\{{\s*([-+]?{DIGITS})\s*\}}")


def without_unit(text):
    """The text without the words after its number, and without currency: "\\$5.40 \\text{ each}" -> "5.40"."""
    text = whole[1] if (whole := TEXT.fullmatch(text)) else text
    bare = UNIT.sub("", text)
    return CURRENCY.sub(r"\1", text if NOT_UNITS.search(text[len(bare):]) else bare).strip()


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
        value = Fraction(digits) * Fraction(10) ** int(exponent or power or 0)
        decimals = 0 if exponent or power else len(digits.partition(".")[2])
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
    endless = 10 ** 99 % y.denominator and abs(x) * 10 ** decimals >= 10 ** 5  # six digits that say something
    return x == y or bool(decimals >= 6 and endless and abs(x - y) * 10 ** decimals <= 1)

# ---------------------------------------------------------------------------------------------------------------------
# Letters, words, numerals in a base


def choices(text):
    """"C" of "C", "(C)", "\\text{(C)}", "\\textbf{(C) } 12", "C. 12", "(C) 12" or "point C"; "BD" of "(B) and (D)"; else None."""
    text = TEXT.sub(r"\1 ", text).replace("$", "").strip()
    several = re.fullmatch(r"\(?[A-J]\)?(?:(?:[\s,&]|and)+\(?[A-J]\)?)+", text)
    letters = re.findall("[A-J]", text) if several else {*re.findall(r"\(([A-J])\)", text)}
    if len(letters) > 1:
        return "".join(sorted(letters))
    match = re.match(r"^(?:Option|Choice|[Pp]oint|[Ll]etter)?\s*\(?([A-J])(?:\)|[.:](?=\s|$)|$)", text)
    return match[1] if match else None


def words(text):
    """Lower-case words of an answer that is only words: "\\text{ Evelyn}." -> "evelyn"; else None."""
    marked, text = TEXT.search(text), TEXT.sub(r"\1", text).strip("'\"`. ")
    alone = re.fullmatch(r"(?i)yes|no|(?=.{4})[a-z']{2,}(?:[ -][a-z']{2,})*", text)
    is_words = alone or marked and re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text)
    return re.sub(r"^(?:a|an|the) ", "", " ".join(text.lower().split())) if is_words else None


def phrase(text):
    """["april", "6"] of "\\text{April 6th}", ["6", "feet", "2", "inches"]: words and numbers, nothing else; None otherwise."""
    text = TEXT.sub(r" \1 ", text).lower()
    found = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\band\b", "", text))
    return found if re.fullmatch(r"[\w ,]+", text) and re.search("[a-z]{3}", text) and re.search(r"\d", text) else None


def clock(text):
    """("2:30", "pm") of "2:30 \\text{ p.m.}", ("11", "am") of "11:00 AM", ("2:3:5", "") of a ratio; None otherwise."""
    text = re.sub(r"\s|\.", "", TEXT.sub(r"\1", text)).lower()
    match = re.fullmatch(r"(\d+(?::\d+)*?)(:00)?([ap]m)?", text)
    if not match or not match[3] and ":" not in text:
        return None
    return (match[1] if match[3] else match[1] + (match[2] or "")), match[3] or ""


NO_SOLUTION = re.compile(r"(?i)\\emptyset|\\varnothing|∅|\\\{\s*\\\}"
                         r"|(?:the \w+ has |there (?:is|are) )?no (?:real |such )?(?:solution|root)s?")
REALS = re.compile(r"(?i)(?:[a-z] ?\\in ?)?(?:\\mathbb\s*\{?R\}?|ℝ|\\R)|(?:all )?real numbers?|all reals"
                   r"|\(-\\infty, ?\+?\\infty\)")


def named_set(text):
    """"none" or "reals" of an answer that is no solution at all, or every real number; else None."""
    text = TEXT.sub(r"\1", text).strip()
    return "none" if NO_SOLUTION.fullmatch(text) else "reals" if REALS.fullmatch(text) else None


def based(text):
    """("52", "8") of "52_8" or "52_{8}"; None otherwise."""
    match = re.fullmatch(r"\(?([0-9A-F]+)\)?\s*_\s*\{?\s*(\d+|\\text\{[a-z]+\})\s*\}?", text)
    return match.groups() if match else None

# ---------------------------------------------------------------------------------------------------------------------
# Formulas, equations, inequalities

EXACT = mpmath.mp.clone()  # digits enough to tell 2^2009 from 2^2009 - 1
EXACT.dps = 720
SMALL = EXACT.mpf(10) ** -700
LARGEST = 2300  # bits of a value's exponent
KNOWN = {"pi": EXACT.pi, "e": EXACT.e, "i": EXACT.j, "sqrt": EXACT.sqrt, "ln": EXACT.log, "cbrt": lambda x: real_power(x, 3),
         "arcsin": EXACT.asin, "arccos": EXACT.acos, "arctan": EXACT.atan,
         **{name: getattr(EXACT, name) for name in ("sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc", "exp")}}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
             ast.USub: operator.neg, ast.UAdd: operator.pos}
GREEK = "alpha|beta|gamma|delta|epsilon|theta|mu|rho|sigma|tau|phi|omega|hbar"
FRACTION_OF = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
NESTED = r"\([^()]*\)"
for _ in range(4):
    NESTED = rf"\((?:[^()]|{NESTED})*\)"  # brackets in brackets
ATOM = rf"(?:\\(?:pi|{GREEK})|[a-zA-Z](?:_\w)?)"
LOGARITHM = re.compile(rf"\\log\s*_\s*\{{?(\w+)\}}?\s*({NESTED}|\d+|[a-zA-Z])(?!\s*[\w^\\(])")
FUNCTION_OF = re.compile(rf"\\({FUNCTIONS})(?![a-z])\s*(?:\^\(?(\d)\)?)?\s*({NESTED}|(?:\d+|{ATOM})(?:\s*{ATOM})*(?!\s*[\w^]|\())")
TOKEN = re.compile(rf"{DIGITS}|(?:sqrt|cbrt|{FUNCTIONS})\(|pi|(?:{GREEK}|[a-zA-Z])(?:_\w)?|[-+*/^()]")
AMBIGUOUS = re.compile(r"[\w)] \d|/ [\w.]+ [a-zA-Z(]|\b[a-zA-Z] \( [\w.]+ \)|\b[fghP] \(")  # (x)2, 1/2x, I(0), f(x + 1)
RELATED = r"(<|>|\\[lg]e )"
SIDE = r"((?:(?!\\[lg]e |[<>=,]).)+?)"
LETTER = r"([a-zA-Z](?:\([a-z]\))?|\\(?!pi|infty)[a-z]+)"
BETWEEN_BOUNDS = re.compile(rf"{SIDE}\s*{RELATED}\s*{LETTER}\s*{RELATED}\s*{SIDE}")
BOUNDED = re.compile(rf"{LETTER}\s*{RELATED}\s*{SIDE}")
BOUNDS = re.compile(rf"{SIDE}\s*{RELATED}\s*{LETTER}")
FLIPPED = {">": "<", "\\ge ": "\\le "}  # relations that put the larger side first, turned round


@functools.lru_cache(maxsize=10_000)
def formula(text):
    """The syntax tree of a formula of numbers, letters, powers, fractions and functions, "2*x**(3)". ValueError for all else."""
    if re.search(r"\d\s*\\frac|(?<!\\)\b[a-zA-Z]{4}", text):  # 1\\frac{a}{b}, words
        raise ValueError(text)
    text = re.sub(r"\\sqrt\s*\[3\]", r"\\cbrt", re.sub(r"_\{(\w)\}", r"_\1", text))
    text = re.sub(r"\\(sin|cos|tan)\s*\^\s*(?:-1|\{-1\})", r"\\arc\1", text)
    text = re.sub(rf"(\\(?:{FUNCTIONS}))\s*\{{([^{{}}]*)\}}", r"\1(\2)", text)
    while (deeper := FRACTION_OF.sub(r"((\1)/(\2))", re.sub(r"(\\sqrt|\\cbrt|\^)\s*\{([^{}]*)\}", r"\1(\2)", text))) != text:
        text = deeper
    text = LOGARITHM.sub(lambda match: f"(\\ln{match[2] if match[2][0] == '(' else f'({match[2]})'}/\\ln({match[1]}))", text)
    text = FUNCTION_OF.sub(lambda match: f"({match[1]}({match[3]}))^{match[2] or 1}", text)
    if re.search(r"[\w)]\s+\d", text):  # 12 34
        raise ValueError(text)
    text = re.sub(rf"\s+|\\(?=(?:sqrt|cbrt)\s*\(|pi|{GREEK})", "", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text))
    source = " ".join(TOKEN.findall(text))
    if source.replace(" ", "") != text or AMBIGUOUS.search(source):
        raise ValueError(text)
    source = re.sub(r"(?<=[\w.)]) (?=[a-zA-Z(])", "*", source).replace("^", "**")
    return ast.parse(source, mode="eval").body


def real_power(x, n):
    """The n-th root, the real one of a negative number."""
    return -(-x) ** (EXACT.one / n) if EXACT.im(x) == 0 and EXACT.re(x) < 0 else x ** (EXACT.one / n)


def value_of(node, point):
    """The value of a formula's syntax tree at a point {letter: number}. What a model wrote is never run as Python."""
    if isinstance(node, ast.Constant):
        value = EXACT.mpf(str(node.value))
    elif isinstance(node, ast.Name):
        value = +point[node.id]
    elif isinstance(node, ast.Call):
        value = KNOWN[node.func.id](value_of(node.args[0], point))
    else:
        sides = [value_of(getattr(node, side), point) for side in ("left", "right", "operand") if hasattr(node, side)]
        value = OPERATORS[type(node.op)](*sides)
    if value and abs(EXACT.mag(value)) > LARGEST:
        raise OverflowError
    return value


def values_of(*texts):
    """The values of formulas at three random points, in turn."""
    trees = [formula(text) for text in texts]
    letters = sorted({node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} - KNOWN.keys())
    generator, signs = random.Random(7), (1,) if re.search("ln|log", "".join(texts)) else (1, -1)
    for _ in range(3):
        point = {letter: EXACT.mpf(generator.choice(signs) * generator.uniform(0.6, 9.7)) for letter in letters} | KNOWN
        yield [value_of(tree, point) for tree in trees]


def is_polynomial(text):
    """Whether a formula has no functions, and letters only in numerators and under constant powers."""
    nodes = list(ast.walk(formula(text)))
    inner = [node.right for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.Pow))]
    return not any(isinstance(node, ast.Call) for node in nodes) and not any(
        isinstance(node, ast.Name) for part in inner for node in ast.walk(part))


def same_values(mine, gold):
    """Whether two formulas have equal values at three points; two equations are the same where their differences of sides are
    proportional. None where one is not so simple, or where it is too close to call."""
    try:
        if "=" in mine and "=" in gold:
            sides = [*mine.split("="), *gold.split("=")]
            ratios = [(a - b) / (c - d) for a, b, c, d in values_of(*sides)]
            if all(0 < abs(ratios[0]) and abs(ratio / ratios[0] - 1) < SMALL for ratio in ratios):
                return True
            return False if all(map(is_polynomial, sides)) and len(set(re.findall("[a-z]", gold))) > 1 else None
        for x, y in values_of(mine, gold):
            size, gap = max(abs(x), abs(y)), abs(x - y)
            if not gap <= SMALL * size or not size:
                return False if gap > SMALL * size * 10 ** 10 and "." not in mine + gold else None
    except (ArithmeticError, ValueError, TypeError, SyntaxError, LookupError, AttributeError, RecursionError, MemoryError):
        return None
    return True


def interval_of(text):
    """(letter, interval) of an inequality: ("x", "(2, 5]") of "2 < x \\le 5", ("x", "(-\\infty, 5)") of "x < 5"; else None."""
    if found := BETWEEN_BOUNDS.fullmatch(text):
        low, left, letter, right, high = found.groups()
    elif found := BOUNDED.fullmatch(text):
        letter, right, high = found.groups()
        low, left = ("\\infty", ">") if right in FLIPPED else ("-\\infty", "<")
    elif found := BOUNDS.fullmatch(text):
        low, left, letter = found.groups()
        right, high = (">", "-\\infty") if left in FLIPPED else ("<", "\\infty")
    else:
        return None
    if left in FLIPPED and right in FLIPPED:  # 5 > x > 2
        low, left, right, high = high, FLIPPED[right], FLIPPED[left], low
    if left in FLIPPED or right in FLIPPED:
        return None
    return letter, f"{'(' if left == '<' else '['}{low}, {high}{')' if right == '<' else ']'}"

# ---------------------------------------------------------------------------------------------------------------------
# The verdict

NAMED = re.compile(r"((?:[a-zA-Z]|\\mathbf\{[a-zA-Z]\})(?:_\{?\w+\}?|\^\{?-1\}?)?(?:\([a-z, ]*\))?|\\[a-z]+|\([a-zA-Z\\, _]*\))"
                   r"\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
MODULUS = re.compile(r" mod \w+$")
CALL = re.compile(r"[a-zA-Z](?:\^\{?-?\d\}?)?\([^()]*\)")
INFINITE = re.compile(r"[-+]?\s*\\infty")
EQUATION = re.compile(r"\d\s*[a-z]|[a-z]\s*(?:\^|[-+]\s*\d)")


def split_name(text):
    """("x", "5") of "x = 5", ("f(x)", "x^2") of "f(x) = x^2", ("x", "[1,2]") of "x \\in [1,2]"; ("", text) without a name."""
    match = NAMED.fullmatch(text.strip())
    return (re.sub(r"[\s{}]", "", match[1]), match[2].strip()) if match else ("", text)


def bare_answers(found, answer):
    """(mine, gold, the sides before mine): the two answers without layout and names; where the gold answer is no equation, of the
    found one its last side, "16" of "A + B = 9 + 7 = 16"; inequalities as intervals."""
    mine, gold = tidy(found), tidy(answer)
    mine = mine if "mod" in gold else MODULUS.sub("", mine)
    (name, value), (gold_name, gold_value) = split_name(mine), split_name(gold)
    same = name == gold_name or name.partition("(")[0] == gold_name or gold_name.partition("(")[0] == name  # y, y(x)
    if name and (same or not gold_name and "=" not in gold):
        mine = value
    if gold_name and (same or "=" not in mine):
        gold = gold_value
    before = []
    if not re.search(r"=|[<>]|\\[lgn]e(?![a-z])", gold) and not choices(gold):
        mine = split_outside(r"\\equiv(?![a-z])", mine)[-1]
        if not re.search(r"[,<>]|\\[lgn]e(?![a-z])", outside(mine)) and not re.search(r"\b(?:or|and)\b", mine):
            *before, mine = split_outside("=", mine)
    mine_in, gold_in = interval_of(mine), interval_of(gold)
    mine_in, gold_in = mine_in if gold_in or gold[:1] in ("(", "[") else None, gold_in if mine_in or mine[:1] in ("(", "[") else None
    if not (mine_in and gold_in) or mine_in[0] == gold_in[0]:
        mine, gold = mine_in[1] if mine_in else mine, gold_in[1] if gold_in else gold
    return mine, gold, before


def quick_verdict(found, answer):
    """True or False where texts, numbers and simple formulas decide; else None."""
    mine, gold, before = bare_answers(found, answer)
    if not mine:
        return False
    (name, value), (gold_name, gold_value) = split_name(mine), split_name(gold)
    if name and gold_name and name != gold_name and number(value) and number(gold_value):
        return False  # x = 5 is not y = 5
    bare, bare_gold = without_unit(LABEL.sub("", mine)), without_unit(gold)
    x, y = number(TEXT.sub(r"\1", bare)), number(TEXT.sub(r"\1", bare_gold))
    measures = [{unit.lower() for unit in MEASURE.findall(text)} for text in (mine, gold)]
    if x and y and all(measures) and measures[0] != measures[1]:
        return False  # 5 cents are not 5 dollars
    for side in before:  # 5 = 1 and 3x - 6 = 0 are no answers; a + b = 5 and 2 + 3 = 5 are
        other = number(without_unit(side))
        if x and other and other[0] != x[0] or bare == "0" and EQUATION.search(CALL.sub("", side)):
            return False
    if squeezed(mine) == squeezed(gold):
        return True
    if named_set(gold):
        return named_set(mine) == named_set(gold)
    if choices(gold) and (choices(mine) == choices(gold) or not LABEL.match(gold)):
        return choices(mine) == choices(gold)
    bare_gold = LABEL.sub("", bare_gold)
    if words(gold):
        numeral = y or number(NUMERALS.get(words(gold), ""))
        return words(mine) == words(gold) or bool(x and numeral and equal_numbers(x, numeral))
    if clock(gold):
        (time, half), (gold_time, gold_half) = clock(mine) or (bare, ""), clock(gold)
        same_ratio = x and re.fullmatch(r"\d+:\d+", bare_gold) and equal_numbers(x, number(bare_gold.replace(":", "/")))
        return bool(same_ratio) or time == gold_time and (half == gold_half or not half or not gold_half)
    if squeezed(bare) == squeezed(bare_gold) or phrase(gold) and phrase(gold) == phrase(mine):
        return True
    if based(bare_gold) or based(bare):
        (digits, base), (gold_digits, gold_base) = based(bare) or (bare, None), based(bare_gold) or (bare_gold, None)
        return digits == gold_digits and (base == gold_base or not (base and gold_base) and digits.isdigit())
    if INFINITE.fullmatch(bare) or INFINITE.fullmatch(bare_gold):
        return squeezed(bare.lstrip("+")) == squeezed(bare_gold.lstrip("+"))
    return equal_numbers(x, y) if x and y else same_values(bare, bare_gold)
