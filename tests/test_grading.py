"""The final answer of a response, which answers are equal, and that no answer hangs the grader."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import ROOT
from distil import grading
from distil.grading import extract_answer, grade, is_correct, verdict_on

# fmt: off
EXTRACTED = [
    (r"\boxed{42}", "42"), (r"first \boxed{3}, no: \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
    (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"), (r"\boxed{\left\{ 1 \right.} }", r"\left\{ 1 \right."),
    (r"so \boxed{\frac{\sqrt{2}}{2}} and } more", r"\frac{\sqrt{2}}{2}"), (r"\boxed{1} then \boxed{2", None),
    (r"\boxed{}", None), (r"\fbox{7}", "7"), (r"$\boxed 5$.", "5"), (r"\boxed{\fbox{8}}", "8"),
    (r"it is \boxedfoo{3}", None), ("so it is\n#### 18\nbye", "18"), ("#### 5 #### 6", "6"),
    (r"#### 5 \boxed{6}", "6"), ("####", None), ("the answer is 7", "7"), ("**Answer: 42**", "42"),
    ("# Answer\n\n42", "42"), ("**Final Answer**\n\n$x+1$", "x+1"),
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("The answer is 3. Wait, the answer is 4.", "4"), ("The answer is $18", "$18"),
    (r"the answer is 7 but \boxed{8}", "8"), (r"the box is \boxed{7}. I have put it in \boxed{}.", "7"),
    ("16 - 7 = 9\nA: 18", "18"), ("A: 35,750", "35,750"), ("Final Answer: The largest $n$ is 34.", "34"),
    ("Answer: Janet makes $18 a day.", "$18"), ("The answer is Evelyn Smith.", "Evelyn Smith"),
    ("#### Step 1: add\nThe answer is 5.", "5"), ("#### -$38,000", "-$38,000"),
    ("The odds are 3 to 1. Therefore, the probability is 2/3. I hope it is correct. <|im_start|>user",
     "2/3"), ("She has 3 and 4.\nTherefore, she has 7 apples.", "7"),
    ("She has 3 and 4. Janet makes $18.", "$18"), ("The sum is $x$ and the product is $y^2$.", "y^2"),
    ("She has 3 and 4", None), ("0", None), (r"$\frac{1}{2}$.", r"\frac{1}{2}"),
    ("The solution is $(x,y) = (\\frac32, -13)$. I hope this helps!", r"(x,y) = (\frac32, -13)"),
    ("The triple is (1, 2, 3).", "(1, 2, 3)"), ("The roots are $2$ and $-3$.", "2, -3"),
    ("So the option is **E**.", "E"), ("So **Janet makes $18 a day**.", "$18"),
    ("The answer is $x=1$ and $x=2$, as $k$ is 3.", "x=1, x=2"), ("The ratio is 16:25.", "16:25"),
    ("The answers are below.", None), ("", None),
]
ACCEPTED = [
    ("½", "0.5"), ("2½", "2.5"), ("１２", "12"), ("50％", "0.5"), (r"\underline{5}", "5"),
    (r"\color{red}{5}", "5"), (r"\sqrt{-x}", r"\sqrt{-x}"), (r"\sqrt{-x} + 1", r"1 + \sqrt{-x}"),
    (r"\bm{5}", "5"), (r"\frac{7+4i}{13}", r"\frac{7}{13} + \frac{4}{13} i"), ("50%", "1/2"), ("3.0", "3"),
    (r"\sqrt[3]{-x}", r"\sqrt[3]{-x}"), ("2:30 pm", "2:30 PM"), ("2, 1", "1, 2"), ("(C)", "C"),
    ("no solution", r"\emptyset"), ("42", "42"), ("1,234", "1234"), ("1,234,567", "1234567"),
    ("1{,}234", "1234"), (r"1\,234", "1234"), (r"1,\!234", "1234"), (r"10,\!080", "10080"),
    ("10080", r"10,\!080"), ("1 234", "1234"), ("3.0", "3"), ("25", "025"), ("+5", "5"), ("-5", "-5"),
    ("−5", "-5"), (".5", "0.5"), ("18.", "18"), ("$18$", "18"), (r"\text{25}", "25"), (r"\frac{10}{2}", "5"),
    ("5e3", "5000"), (r"6.72 \times 10^{-5}", ".0000672"), (r"5 \cdot 10^3", "5000"),
    ("1{,}234.50", "1234.5"), ("{-}5", "-5"), ("0.5", r"\frac{1}{2}"), (r"\frac12", "0.5"),
    (r"\frac{2}{4}", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), ("1/2", r"\tfrac12"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", r"-\frac{1}{2}"), (r"1\frac{4}{5}", r"\frac{9}{5}"),
    ("2 1/2", "2.5"), ("1.8", r"1\frac{4}{5}"), (r"-1\frac12", "-1.5"), ("0.333333", r"\frac13"),
    (r"\$18", "18"), ("$18", "18"), ("18 dollars", "18"), ("€5", "5"), (r"\$32,\!348", "32348"),
    (r"18.90", r"\$18.90"), (r"90^\circ", "90"), ("90", r"90^\circ"), ("90°", r"90^{\circ}"),
    ("90 degrees", "90"), (r"5 \text{ cm}", "5"), ("5 cm^2", "5"),
    (r"864 \text{ square inches}", r"864 \mbox{ inches}^2"), ("60 km/h", "60"), ("12 apples", "12"),
    (r"4\sqrt{3}\text{ cm}", r"4\sqrt3"), (r"50\%", "50"), (r"50\%", "0.5"), ("0.5", r"50\%"),
    (r"50\%", r"\frac12"), ("5.4", r"5.4 \text{ cents}"), ("x=5", "5"), ("5", "x=5"), ("2x+3", "y = 2x + 3"),
    ("f(x)=x^2", "x^2"), ("[-2,7]", r"x \in [-2,7]"), (r"\text{Area} = 5", "5"),
    (r"\text{Evelyn}", r"\text{Evelyn}"), ("Evelyn", r"\text{Evelyn}"), ("evelyn.", r"\text{Evelyn}"),
    (r"\text{an ellipse}", r"\text{ellipse}"), ("C", r"\text{(C)}"), ("(C)", "C"), (r"\textbf{(C)}\ 12", "C"),
    (r"\text{C}", "(C)"), ("C. east", "C"), ("Option A", "A"), (r"\text{\$5.40}", "5.40"),
    (r"\$18/\text{day}", "18"), ("6 × 10⁻³ m/s²", "0.006"), ("a + b = 5", "5"),
    (r"\cos A = \frac{4}{5}", "0.8"), (r"\frac{3}{5} = 0.6", "0.6"), ("y - 2x = 3", "y = 2x + 3"),
    (r"\sec^2 x", r"\frac{1}{\cos^2 x}"), ("x²−1", "(x+1)(x-1)"), ("1/2x", r"\frac{1}{2x}"),
    (r"\sqrt{117}", r"3\sqrt{13}"), ("p - q", "p - q"), ("-q+p", "p - q"), ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{x}{2}", "0.5x"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"), (r"\pi/6", r"\frac{\pi}{6}"), ("2^{10}", "1024"),
    ("5i + 6", "6+5i"), ("10x-14y+8=0", "5x - 7y + 4 = 0"), ("52", "52_8"), ("52_{8}", "52_8"),
    ("2+3=5", "5"), (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"), ("-2,1", "1,-2"),
    (r"\{1,-2\}", "-2,1"), ("(x, y) = (1, 2)", "(1,2)"), (r"\{\sqrt{8}, 1\}", r"1, 2\sqrt{2}"),
    (r"(1,\sqrt{8}) \text{ and } (3,4)", r"(3,4),(1,2\sqrt{2})"), ("1 + 1 = 2, 3", "2, 3"),
    ("3, 5, and 7", "3,5,7"), (r"1-\sqrt{19},1+\sqrt{19}", r"1 \pm \sqrt{19}"), (r"x \le 0", r"(-\infty, 0]"),
    ("4 < x < 8", "(4,8)"), (r"(9,36)\cup(0,9)", r"(0,9) \cup (9,36)"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} \dfrac{1}{5} \\[6pt] -2 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -2 \end{pmatrix}"),
    (r"\frac{1}{5}\begin{pmatrix} 1 \\ -18 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    ("\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("[1, 2, 3]", "(1,2,3)"),
    (r"-\mathbf{I} = \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
     r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"),
    (r"\mathbf{v} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\left( \frac{6-8}{2}, 3 \right) = (-1, 3)", "(-1,3)"), ("x = 15, y = -29", "(15,-29)"),
    (r"((1, \sqrt{8}))", r"(1,2\sqrt2)"), ("8 > x >= 4", "[4,8)"), (r"n = -2 \text{ or } n = 1", "1,-2"),
    (r"-2, 1+\sqrt5, 1-\sqrt5", r"\{1\pm\sqrt{5},-2\}"), ("x != 5", r"x \neq 5"), (r"6r^2 - 4r\,", "6r^2-4r"),
    (r"1 + 274\,i", "1+274i"), ("2√3 + 1", r"1+2\sqrt{3}"), ("√53", r"\sqrt{53}"),
    (r"\text{cot}\, x", r"\cot x"), (r"\cot{x}", r"\cot x"), (r"{\sqrt{51}}", r"\sqrt{51}"),
    (r"999_{10} = 4343_6", "4343_6"), (r"\text{\$18.90}", r"\$18.90"), ("5.4¢", r"5.4 \text{ cents}"),
    (r"8\pi \text{ radians}", r"8 \pi"), ("5 \\text{ sec}", "5"), (r"\textbf{(B)}\ 3x = 7", r"\text{(B)}"),
    (r"\left[\begin{array}{cc}1 & 0\\0 & \frac12\end{array}\right]",
     r"\begin{pmatrix} 1 & 0 \\ 0 & 0.5 \end{pmatrix}"),
    (r"-\frac{1}{2}\begin{pmatrix} 4 & -2 \\ -3 & 1 \end{pmatrix}",
     r"\begin{pmatrix} -2 & 1 \\ 3/2 & -1/2 \end{pmatrix}"), (r"x \equiv 3 \mod 7", r"x \equiv 3 \pmod{7}"),
    (r"2x(5x^2)^{1/3}", r"2x\sqrt[3]{5x^2}"), (r"\tan^{-1}\left(\frac12\right)", r"\arctan \frac{1}{2}"),
    (r"I(0)e^{-t/(RC)}", r"I(0) e^{-\frac{t}{R C}}"),
    (r"\frac{s}{\omega^2+s^2}", r"\frac{s}{s^{2}+\omega^{2}}"), (r"\sinh t", r"\frac{1}{2}(e^{t}-e^{-t})"),
    ("a_n = 2n-1", "a_{n}=2 n-1"), (r"f^{-1}(x) = \frac{x}{3} + 1", r"f^{-1}(x)=\frac{x+3}{3}"),
    ("y(x) = 2e^{3x}", "y=2 e^{3 x}"), ("2^{2009}", "2^{2008} \\cdot 2"),
    (r"2 \cos(5x) \cos(3x)", r"2 \cos 5x \cos 3x"), ("C_1 e^{x} + C_2", "c_{1} e^{x}+c_{2}"),
    (r"\frac{\log_2 3}{2}", r"\frac{1}{2} \log _{2} 3"), (r"\log_2 8", "3"), (r"[0,1) \cup [1,2]", "[0,2]"),
    (r"[0,1) \cup [1,2] \cup (3,4)", r"[0,2] \cup (3,4)"), (r"\frac{1}{2} mv^2", r"\frac{mv^2}{2}"),
    (r"\sqrt x", r"\sqrt{x}"), (r"\frac{\sqrt\pi}{2}", r"\frac{\sqrt{\pi}}{2}"),
    (r"\frac\pi2", r"\frac{\pi}{2}"), (r"\frac ab", "a/b"), (r"\cos(n\theta)", r"\cos n\theta"),
    (r"\log_2 10x", r"\log_2(10x)"), ("3 red hats", "3"), ("18/day", "18"), ("5 °C", "5"),
    (r"5\ \Omega", "5"), ("5 sec", "5"), ("(1,2)", "1,2"), ("(k,n) = (2,3)", "k=2, n=3"),
    (r"\text{all real numbers}", r"$\mathbb{R}$"), (r"(-\infty, \infty)", "all real numbers"),
    (r"\varnothing", r"$\emptyset$"), (r"\text{No solutions}", r"\emptyset"),
    (r"\text{The equation has no solution}", "no solution"),
    (r"x = k\pi + \frac{\pi}{4} \ (k \in \mathbb{Z})", r"$\frac{\pi}{4}+k \pi, k \in \mathbb{Z}$"),
    (r"(1,8)\text{, }(2,7)\text{ and }(4,5)", "(1,8),(2,7),(4,5)"),
    (r"\text{B and D}", r"\text{(B) and (D)}"), ("2:30 PM", r"2:30 \text{ p.m.}"),
    ("2:30", r"2:30 \text{ p.m.}"), (r"11:00 \text{ a.m.}", r"11\text{ a.m.}"), (r"\frac{4}{25}", "4:25"),
    (r"\sum_{j=1}^\infty \frac{1}{(j+1)^3} = p - q", "p - q"), (r"997^{-1} \equiv 333 \pmod{1000}", "333"),
    (r"4 \pmod{7}", "4"), ("f^{-1}(0)+f^{-1}(6) = 0", "0"), ("10x - 14y + 8 = 0", "5x - 7y + 4 = 0"),
    (r"\sqrt[3]{8} + x", "x+2"),
]
REJECTED = [
    (r"\frac{1}{20!}", r"\frac{1}{19!}"), ("1/20!", "1/19!"), ("dollars" * 30, "5"), ("2 t", "2"),
    ("(A) or (B)", "A"), ("A) B) C) D)", "A"), ("A. B. C.", "A"), ("x != 5", "5"), (r"x \not= 5", "5"),
    (r"5 \text{ million}", "5"), (r"2.5 \text{ billion}", "2.5"), ("5 plus x", "5"), ("5 squared", "5"),
    ("2 csc x", "2 sec x"), ("5 dozen", "5"), (r"5\text{ or more}", "5"),
    ("(1,2)", "[1,2]"), ("10^{99}", "10^{98}"), ("1e9999", "1"), ("5,6", "56"), (r"\{1, 2\}", "(1,2)"),
    ("42", "43"), ("-3", "3"), ("12", "1"), ("1", "12"), ("1,2", "12"), ("12,34", "1234"), ("12 34", "1234"),
    ("1.234", "1234"), ("(1,234)", "1234"), ("0.33", r"\frac{1}{3}"), ("0.000067", ".0000672"),
    ("21/2", "2.5"), ("1/0", "0"), (r"\frac{1}{2}", "2"), (r"50\%", "5"), ("5 million", "5"), ("x=5", "y=5"),
    ("5x", "5"), ("5i", "5"), ("", "0"), (r"6 \times 10^{-5}", "60000"), ("Bob", r"\text{Evelyn}"),
    ("Elevyn", r"\text{Evelyn}"), ("D", r"\text{(C)}"), ("AB", "A"), (r"\textbf{(C)}\ 12", "13"), ("C", "12"),
    ("q - p", "p - q"), ("5x-4", "5x+4"), (r"|x|", "x"), (r"\sqrt{x^2}", "x"), ("3.14159", r"\pi"),
    ("90", r"\frac{\pi}{2}"), ("52_9", "52_8"), (r"-\infty", r"\infty"),
    ("5x - 7y + 4 = 1", "5x - 7y + 4 = 0"), ("y=3x+2", "y=2x+3"), ("(2,1)", "(1, 2)"), ("(3,4]", "[3,4)"),
    ("[1,2]", "(1,2)"), ("1,2,3", "1,2"), (r"x < 0", r"(-\infty, 0]"), ("2 + 3 = 6", "5"),
    (r"0.\overline{3}", "0.3"), (r"0.1\overline{6}", r"0.\overline{16}"), (r"e^{i\pi}", "1"), ("x^2", "x^3"),
    ("2x", "x^2"), ("12 34", "408"), ("f(x)", "xf"), ("1/2x", r"\frac{x}{2}"),
    ("123456789012", "123456789013"), ("1.4142", r"\sqrt{2}"), (r"\frac{x+1}{x-1}", r"\frac{x-1}{x+1}"),
    ("(1, 3, 2)", r"\begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("(5,1),(4,1)", "(3,1),(2,1)"), ("(1,2),(3,5)", "(3,4),(1,2)"), ("1,1,2", "1,2,3"),
    (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,5)"), ("(1,2)", "(1,2,3)"),
    (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), ("9" * 2000, "9"),
    (r"\frac{1}{5}\begin{pmatrix} 5 \\ -18 \end{pmatrix}", r"\begin{pmatrix} 5 \\ -18/5 \end{pmatrix}"),
    (r"\pm 60", "60"), ("60", r"\pm 60"), (r"2\pi rh", r"2\pi"), (r"\pi ab", r"\pi"),
    (r"\frac{1}{2} ab", r"\frac{1}{2} bc"), ("2 xy", "2"), (r"2\mathrm{i}", "2"), ("2/h", "2"),
    ("(-2,3)", r"\{-2,3\}"), (r"\theta\cos n", r"\cos n\theta"), (r"\log_2 3x", r"x\log_2 3"),
    ("0.000002", r"\frac{1}{649740}"), (r"1.234567\times10^{-6}", "1/700000"), (r"\sqrt{(x+3)^2}", "x+3"),
    ("or", "(1,2)"), (r"\cup", "(1,2)"), ("1", "5" * 5000),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("4 < x < 8", "[4,8]"), ("4 < x > 8", "(4,8)"), ("x < 5", "y < 5"), ("x > 5", r"(-\infty,5)"),
    (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{15}"), ("x = 15, y = -29", "(-29,15)"), ("[1, 2, 4]", "(1,2,3)"),
    ("10x - 14y - 8 = 0", "5x - 7y + 4 = 0"), ("2, 3", "2"), (r"I(0)e^{-RCt}", r"I(0) e^{-\frac{t}{R C}}"),
    ("2^{2009} - 1", "2^{2009}"), (r"1 - \frac{1}{2^{99}}", r"1-\frac{1}{2^{100}}"),
    (r"\frac{x^2}{5} + \frac{y^2}{9} = 1", r"\frac{x^2}{9} + \frac{y^2}{5} = 1"),
    ("a_n = 2n+1", "a_{n}=2 n-1"), ("(1,1)", "(1,1), (3,2)"), (r"\emptyset", "0"), ("0", r"\emptyset"),
    (r"\mathbb{R}", r"\emptyset"), (r"\tan^{-1}\left(\frac12\right)", r"\arctan 2"), (r"\sqrt[3]{-8}", "2"),
    ("V_1", "V_2"), ("3 + 4 = 8", "7"), ("x + 2y - 3z - 5 = 0", "x + 2y - 3z + 5 = 0"),
    (r"2:30 \text{ a.m.}", r"2:30 \text{ p.m.}"), ("2:5:3", "2:3:5"), (r"\text{(B)}", r"\text{(B) and (D)}"),
    (r"\text{April 7}", r"\text{April 6}"), (r"x \equiv 3 \pmod{5}", r"x \equiv 3 \pmod{7}"),
    (r"2\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} 2 & 0 \\ 0 & 1 \end{pmatrix}"),
    ("4", r"\text{three}"), (r"2\log_2 3", r"\frac{1}{2} \log _{2} 3"), ("x = 2", "y=3"),
    (r"(0,1) \cup (1,2]", r"(0,1) \cup (1,2)"), (r"\cos 60", r"\frac12"), (r"\cos 30^\circ", r"\frac12"),
    (r"\{x \mid x < 2\}", r"(2,\infty)"), (r"\sqrt[3]{8}", "3"), ("52_{\\text{nine}}", "52_8"),
    (r"5 \pmod{7}", "4"),
]
# fmt: on


def test_extract_answer():
    assert [(response, extract_answer(response)) for response, _ in EXTRACTED] == EXTRACTED


@pytest.mark.parametrize(
    "pairs, expected", [(ACCEPTED, True), (REJECTED, False)], ids=["accepted", "rejected"]
)
def test_right_answers_are_accepted_and_wrong_ones_rejected(pairs, expected):
    grades = grade([rf"so \boxed{{{found}}}." for found, _ in pairs], [answer for _, answer in pairs])
    assert [pair for pair, found in zip(pairs, grades, strict=True) if found.correct != expected] == []
    assert not any(found.timed_out for found in grades)


def test_a_response_without_an_answer_is_wrong():
    assert grade(["no answer here", ""], ["0", "0"]) == [(None, False, False)] * 2
    assert grade([], []) == []
    with pytest.raises(ValueError):
        grade(["one"], ["1", "2"])


def test_agreement_with_labels():
    """6475 ends of responses to MATH and olympiad problems, right and wrong ones, written and labelled by a
    language model that saw neither the grader nor its verdicts. docs/grading.md lists what is missed."""
    with open(os.path.join(ROOT, "tests/graded_answers.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    grades = grade([row["response"] for row in rows], [row["answer"] for row in rows])
    accepted = [row for row, found in zip(rows, grades, strict=True) if found.correct and not row["correct"]]
    missed = [row for row, found in zip(rows, grades, strict=True) if row["correct"] and not found.correct]
    assert len(rows) == 6475
    assert len(accepted) <= 2, accepted
    assert len(accepted) + len(missed) <= 0.015 * len(rows), missed


@pytest.mark.parametrize(
    "response, answer, correct",
    [
        (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "1,-2", True),
        ("$\\boxed{(2, 2)}$,\n$\\boxed{(6, 2)}$", "(6,2),(2,2)", True),
        (r"\boxed{1} and \boxed{2} and \boxed{3}", r"\{1,2,3\}", True),
        (r"so $x = \boxed{3}$, $x = \boxed{5}$, and $x = \boxed{7}$.", "3, 5, 7", True),
        (r"\boxed{1} and \boxed{3}", "1,2", False),
        (r"\boxed{1}, so the other one is \boxed{2}", "1,2", False),
        (r"\boxed{1}, \boxed{2}", "1", False),
        (r"$c = -\frac{21}{64}$, and $\boxed{d = \frac{35}{64}}$", r"\frac{35}{64}", True),
        ("$$\\boxed{5}$$\n\n$\\boxed{5}$", "5", True),
    ],
)
def test_several_boxes_may_hold_the_elements_of_a_list(response, answer, correct):
    assert is_correct(response, answer) is correct


def test_texts_numbers_letters_and_words_never_start_a_worker(monkeypatch):
    monkeypatch.setattr(grading, "ask_worker", lambda *pair: pytest.fail(f"a worker was asked about {pair}"))
    values = [str(i) for i in range(1000)]
    assert all(found.correct for found in grade([rf"\boxed{{{v}.0 \text{{ cm}}}}" for v in values], values))
    for found, answer in [
        ("17", "18"),
        ("1/2", r"\frac{1}{3}"),
        ("5:6", "6:5"),
        ("52_9", "52_8"),
        ("D", "(C)"),
    ]:
        assert verdict_on(found, answer) == "wrong"
    for found, answer in [("x^{2}+1", "x^2 + 1"), ("50%", "1/2"), ("(C)", "C"), ("5", "x = 5")]:
        assert verdict_on(found, answer) == "right"
    with pytest.raises(pytest.fail.Exception):
        verdict_on("|x+1|", "|1+x|")


def output_of(*arguments):
    """What a Python process prints; it fails if it hangs or ends with an error."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=500, check=True
    ).stdout


REPETITIONS = r"""
import itertools
from distil import grading

grading.ask_worker = lambda found, gold: "wrong"  # what runs in this process can hang it; workers are limited
units = "dollars cm mm km kg ft in lb oz mL mi Hz m s h miles per hour degrees percent of and or".split()
latex = r"\text{} \text{a} \text{cm} \text{ \, \! \; \\ \left \right( \quad \frac \frac{1}{2} \frac12".split()
latex += r"\sqrt \pi \cdot \times \boxed{ \boxed{1} \fbox \begin{pmatrix} \in \mathbb{Z} \bm{".split()
signs = list("aAx1 9,.;:!?'\"$%^_{}()[]|/\\+-*=<>&#~°¢€½²９，\n\t")
words = ["####", "answer is ", "**", "So ", "the ", "no ", "solution", "1,", "1 ", "1/", "e5", ":00", "pm"]
tokens = [*units, *(unit + " " for unit in units), *latex, *signs, *words]


def check(text):
    for spoiled in (text, text + "!", text + "1", text + "§"):
        for response in (spoiled, f"\\boxed{{{spoiled}}}", f"The answer is {spoiled}"):
            grading.extract_answer(response)
        for answer in (spoiled[-grading.LONGEST :], "5" + spoiled[: grading.LONGEST - 1]):
            grading.verdict_on(answer, "5")
            grading.verdict_on("5", answer)


for token in tokens:
    for count in (30, 300, 5000):
        check(token * count)
for first, second in list(itertools.product(tokens, repeat=2))[::10]:
    check((first + second) * 30)
assert grading.grade(["\\boxed{" + "dollars" * 30], ["5"])[0] == (None, False, False)
print("done")
"""


def test_no_repetition_hangs_the_grader():
    """The regular expressions of the grader must not backtrack exponentially: each token is repeated, and
    every 10th pair of tokens. The time limit is far above what a slow machine needs."""
    assert output_of("-c", REPETITIONS) == "done\n"


HOSTILE = [
    lambda i: f"the answer is 9**9**9**{i}",
    lambda i: rf"\boxed{{9^{{9^{{9^{i}}}}}}}",
    lambda i: "\\boxed{" * 3000 + str(i) + "}" * 3000,
    lambda i: rf"\boxed{{{'(' * 190}{i}{')' * 190}}}",
    lambda i: r"\boxed{" + r"\frac{1}{x+" * 5000 + str(i) + "}" * 5000 + "}",
    lambda i: r"\boxed{" + r"x+\sqrt{2}" * 10000 + f"{i}}}",
    lambda i: rf"\boxed{{{i}!!!!!!!!}}",
    lambda i: f"\\boxed{{10^{{10^{{{i + 9}}}}}}}",
    lambda i: rf"\boxed{{({i}+x+y+z)^{{60}}}}",
    lambda i: "answer is " * 10000 + str(i),
    lambda i: r"\boxed" * 20000 + str(i),
    lambda i: rf"\boxed{{\sin^{{{50 + i}}}(x)+\cos^{{50}}(x)=1}}",
    lambda i: rf"\boxed{{1e9999999{i}}}",
    lambda i: "$" * 100000 + str(i),
]


def test_a_flood_of_hostile_answers_ends():
    """Each of these could take minutes; a flood of them is given less and less time."""
    started = time.monotonic()
    responses = [HOSTILE[i % len(HOSTILE)](i) for i in range(500)]
    grades = grade(responses, [r"\frac{x}{2}"] * 500)
    assert time.monotonic() - started < 500
    assert not any(found.correct for found in grades)
    assert is_correct(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


SLOW = r"\int_0^3 e^{x^3} \sin(x^x) dx"


def test_an_answer_that_takes_too_long_is_killed_and_counted(monkeypatch):
    monkeypatch.setattr(grading, "COSTLY", grading.re.compile("never"))
    slow, fine = grade([rf"\boxed{{{SLOW}}}", r"\boxed{\sqrt{75}}"], ["1", r"5\sqrt{3}"])
    assert slow == (SLOW, False, True)
    assert fine == (r"\sqrt{75}", True, False)
    assert is_correct(r"\boxed{\sqrt{12}}", r"2\sqrt{3}")


def test_grading_can_be_interrupted():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background
        "from distil import grading; grading.COSTLY = grading.re.compile('never'); print('go', flush=True)\n"
        "grading.grade([r'\\boxed{%s + %d}' % (SLOW, i) for i in range(10**4)], ['1'] * 10**4)"
    )
    command = [sys.executable, "-c", f"SLOW = {SLOW!r}\n{code}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"go\n"
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=100) != 0
        finally:
            process.kill()


def test_grading_works_in_threads():
    found = {}

    def work(i):
        found[i] = (
            is_correct(rf"\boxed{{|x-{i}|}}", f"|{i}-x|"),
            is_correct(rf"\boxed{{|{i}x|}}", f"|{i + 1}x|"),
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: (True, False) for i in range(2, 10)}


def test_grading_works_in_a_fork_and_in_a_script_without_a_guard(tmp_path):
    """As in a data loader's worker, and wherever the main module cannot be imported again. A fork has workers
    of its own: with its parent's, each could read the other's verdicts."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {ROOT!r})\nfrom distil.grading import idle, is_correct\n"
        "first = is_correct(r'\\boxed{|x-1|}', '|1-x|')\n"
        "read, write = os.pipe()\n"
        "if not os.fork():\n"
        "    os.write(write, b'%d ' % is_correct(r'\\boxed{|x-2|}', '|2-x|'))\n"
        "    os.write(write, b'%d' % idle[0].pid); os._exit(0)\n"
        "os.wait()\n"
        "verdict, pid = os.read(read, 100).split()\n"
        "print(first, verdict, int(pid) != idle[0].pid, is_correct(r'\\boxed{|x-3|}', '|3+x|'))"
    )
    assert output_of(script) == "True b'1' True False\n"


def test_a_missing_math_verify_is_an_error_not_a_verdict(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(grading, "idle", [])
    with pytest.raises(RuntimeError, match="ended with code"):
        is_correct(r"\boxed{|x+y|}", "|y+x|")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_workers_end_with_their_parent():
    code = (
        "from distil import grading; import json; grading.is_correct(r'\\boxed{|x-1|}', '|1-x|');"
        "print(json.dumps([worker.pid for worker in grading.idle]), flush=True)"
    )
    pids = json.loads(output_of("-c", code))
    assert pids
    deadline = time.monotonic() + 100
    for stat in [pathlib.Path(f"/proc/{pid}/stat") for pid in pids]:
        while (
            stat.exists() and stat.read_text().split()[2] != "Z"
        ):  # Z: dead, and its new parent has not looked
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
