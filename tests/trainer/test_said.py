"""Where an output says its answer: marks, boxes, the last sentence or display; and what leaves it no answer."""

import time

import pytest

from client.errors import ProblemSetError
from client.problems.reader import ProblemRow
from trainer.grading.gold import Gold, Kind, gold_answer
from trainer.grading.grader import grade

GOLDS = {
    "22": Gold("22"),
    "9 (inches)": Gold("9", unit="inches"),
    "fraction": Gold(r"\frac{9}{4}"),
    "root": Gold(r"2\sqrt{3}"),
    "polynomial": Gold("x^2-2x+1"),
    "pair": Gold("(3,-2)", Kind.TUPLE),
    "interval": Gold("[1,2)", Kind.INTERVAL),
    "several": Gold("2, 5"),
    "words": Gold("Mrs. Hilt", Kind.WORDS),
}
FORMS = [
    "Therefore, we get ${}$.",
    "Dividing by 4, we get\n\n\\[\n{}\n\\]",
    "The first is 7. The answer is ${}$.",
    "The answer to the first part is 8.\n#### {}",
    "<answer>{}</answer>",
    "**Answer: ${}$**",
    "**Final Answer**\n\n${}$",
    "So the final answer is:\n$$\n{}\n$$",
    "The final answer is ${}$. I hope it is correct.",
    "所以答案是 ${}$。",
    "#### Step 2: the rest\nWe find \\(7\\) first. Hence it is \\({}\\).",
    "<think>It may be \\boxed{{7}}.</think> It is ${}$.",
]
WRONG_FORMS = [
    "Therefore, we get $\\frac{{{}}}{{2}} + 7$.",
    "The answer is $x \\ge {}$.",
    "The answer is not ${}$.",
    "So it is between ${}$ and $77$.",
    "The values are ${}$ and $77$.",
    "Hence it is more than ${}$.",
    "\\[\nx^2 + 7 = {}\n\\]",
    "The answer is ${}$. No, the answer is $77$.",
    "It is ${}$ or more.",
    "I do not think that it is ${}$.",
    "We get ${}$ at first.\n#### 77",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gold", GOLDS.values(), ids=GOLDS)
def test_a_gold_answer_without_a_box_is_right(gold, form):
    output = form.format(gold.text)
    assert grade(gold, output.replace("$", "") if gold.kind is Kind.WORDS else output).correct


@pytest.mark.parametrize("form", WRONG_FORMS)
@pytest.mark.parametrize("gold", GOLDS.values(), ids=GOLDS)
def test_what_stands_around_it_makes_it_wrong(gold, form):
    assert not grade(gold, form.format(gold.text)).correct


@pytest.mark.parametrize(
    ("gold", "output", "right"),
    [
        (Gold("3", unit="cookies"), "So he ate 1/3 of the cookies.", False),
        (Gold("3"), "He has 3 apples and 5 pears.", False),
        (Gold("2"), "It is x^2.", False),
        (Gold("18"), "So 2x = 18.", False),
        (Gold("18"), "We get $2x = 18$.", False),
        (Gold("18"), "Is it 18?", False),
        (Gold("5"), "Each of them needs at least 5.", False),
        (Gold("5"), "It makes 5 squared.", False),
        (Gold("2"), "If it were 2, it would be odd.", False),
        (Gold("2"), "Step 2: we add", False),
        (Gold("1"), "No one knows.", False),
        (Gold("41"), "The sum is 41. $\\blacksquare$", True),
        (Gold("41"), "So we need 41 of them. Let me know if you have questions!", True),
        (Gold("1.5e-7", relative=0.01), "The wavelength is about 1.5 × 10^-7 m.", True),
        (Gold("3,5,7"), "x = 3, x = 5, x = 7", True),
        (Gold("18"), "She has 18 eggs. But that is not what was asked.", False),
        (Gold("22"), "The first option comes to $91.\n\nSo they would save $113 - $91 = $22.", True),
        (Gold("140"), "That is 40 minutes + 100 minutes = 140 minutes", True),
        (Gold("10"), "So in 50 minutes she earned 0.2 x 50 = $10.", True),
        (Gold("12"), "The difference between their ages is 42-30 = 12 years.", True),
        (Gold("276000"), "So his total cost is 264,000+12,000=$276,000", True),
        (Gold("15"), "There are 9 + 6 = 15 liters of water out of the 24 liters.", True),
        (Gold("7"), "So she has seven.", True),
        (Gold("18"), "Step 1: 16 - 7 = 9\nStep 2: 9 * 2 = 18", True),
        (Gold("18"), "Step 2: x + 2 = 18", False),
        (Gold("1,250"), "The answer is Rs. 1,250/-", True),
        (Gold("1,250"), r"\boxed{\text{Rs. }1,250}", True),
        (Gold("93"), "So he spends 3*31=$93 a month", True),
        (Gold(r"7.6 Z", unit=r"\mathrm{eV}"), r"\[E=7.6 Z \mathrm{eV}\]", True),
        (Gold("121"), "The answer is one hundred and twenty-one.", True),
        (Gold("7"), "Thus $m+n = 3+4 = 7$.", True),
        (Gold("60"), "\\begin{align*} x &= 3 \\cdot 20 \\\\ &= 60 \\end{align*}", True),
        (Gold("41"), "#### 41\n\nI hope this helps!", True),
        (Gold("No", Kind.WORDS), "No, she does not have enough.", True),
        (Gold("No", Kind.WORDS), "Yes, she has no need of more.", False),
        (Gold("3:30 p.m.", Kind.CLOCK), "It ends at 3:30 p.m.", True),
        (Gold("3:30 p.m.", Kind.CLOCK), "It was 3:30 p.m. and then 4:10 p.m.", False),
    ],
)
def test_a_sentence_is_read_whole(gold, output, right):
    assert grade(gold, output).correct == right


@pytest.mark.parametrize(
    ("gold", "output", "right"),
    [
        (Gold("7"), r"The solutions are $\boxed{3}$ and $\boxed{7}$.", False),
        (Gold("7"), r"The first root is $\boxed{3}$, and the second one is $\boxed{7}$.", False),
        (Gold("7"), r"\boxed{3}\boxed{7}", False),
        (Gold("7"), r"We get $\boxed{3}$ first. So it is $\boxed{7}$.", True),
        (Gold("7"), r"$\boxed{3}$, so the answer is $\boxed{7}$", True),
        (Gold("7"), r"It is $\boxed{7}$, and \(\boxed{7}\)", True),
        (Gold("3, 7"), r"The solutions are $\boxed{3}$ and $\boxed{7}$.", True),
        (Gold("3, 7"), "Case 1 gives $\\boxed{3}$. We go on.\n\nCase 2 gives $\\boxed{7}$.", True),
        (Gold("3, 7"), "Case 1 gives $\\boxed{3}$. Case 2 gives $\\boxed{7}$. Case 3 gives $\\boxed{8}$.", False),
        (Gold("(3,7)", Kind.TUPLE), r"So $x = \boxed{3}$ and $y = \boxed{7}$.", True),
        (Gold(r"\frac{1}{2}"), r"$\boxed{\frac{1}{2}} = \boxed{0.5}$", True),
        (Gold("7"), r"In a month she will need $\boxed{7}$ dozens of eggs.", True),
        (Gold("84"), r"In a month she will need $\boxed{7}$ dozens of eggs.", True),
        (Gold("7"), r"\boxed{7 \text{ dozen}}", True),
        (Gold("84"), r"\boxed{7 \text{ dozen}}", True),
        (Gold("7", unit="eggs"), r"\boxed{7 \text{ dozen}}", False),
        (Gold("7"), r"\boxed{7 \text{ squared}}", False),
        (Gold("2"), r"\boxed{2t}", False),
        (Gold("7", unit="dozens"), r"\boxed{7}", True),
        (Gold("7", unit="dozens"), r"\boxed{7 \text{ dozen}}", True),
        (Gold("7", unit="dozens"), r"\boxed{84}", False),
        (Gold(r"5\sqrt{2}\text{ cm}"), r"\boxed{5\sqrt{2}}", True),
        (Gold(r"5\sqrt{2}\text{ cm}"), r"\boxed{5\sqrt{2} \text{ m}}", False),
        (Gold(r"10\%"), r"\boxed{0.1}", True),
        (Gold(r"10\%"), r"\boxed{0.1\%}", False),
    ],
)
def test_several_boxes_and_words_behind_them(gold, output, right):
    assert grade(gold, output).correct == right


BOXED = [
    r"x = \boxed{18}",
    r"= \boxed{18}",
    r"\$\boxed{18}$",
    r"$18 = \boxed{18}$",
    r"$\boxed{18}$",
    r"\$\boxed{18}",
    r"$\$\boxed{18}$",
    r"\[ \boxed{18} \]",
    r"\[ x = 20 - 2 = \boxed{18} \]",
    r"- \boxed{18}",
    r"* \boxed{18}",
    r"1. \boxed{18}",
    r"**\boxed{18}**",
    r"Answer - \boxed{18}",
    r"Step 5 - \boxed{18}",
    r"Question 3 - $\boxed{18}$",
    r"$20 - 2 = \boxed{18}$ apples.",
    r"\begin{align*} x &= 20-2 \\ &= \boxed{18} \end{align*}",
    r"\begin{aligned} 20-2 &= \boxed{18}\\ \end{aligned}",
    r"So \(\boxed{18}\).",
    r"\(x=\boxed{18}\)",
    r"$x \equiv \boxed{18} \pmod{20}$",
    r"$\Rightarrow \boxed{18}$",
    r"$18 \quad \boxed{18}$",
    r"$\text{Answer: }\boxed{18}$",
    r"The answer is: \[\boxed{18}\]",
    r"$\therefore x=\boxed{18}.$",
    r"$$\boxed{18}$$",
    r"She has $20 and spends $2, so $\boxed{18}$",
    r"She has 20 - 2 = \boxed{18}",
    r"= 9 * 2 = \boxed{18}",
    r"$m+n=\boxed{18}$",
    r"(a) \boxed{18}",
    r"$(a)\ \boxed{18}$",
    r"(1)\boxed{18}",
    r"The answer is \boxed{18}!",
    r"\boxed{18} - the number of eggs.",
    r"$\boxed{18}\text{ eggs}$",
    r"$\boxed{18}\ \mathrm{m}$",
    r"$\boxed{18}$ - that is all",
    r"\boxed{18} (20 - 2)",
    r"\boxed{18} * * *",
    r"$f(2)=\boxed{18}$",
    r"$|x|=\boxed{18}$",
    r"$\left(\boxed{18}\right)$",
    r"$\boldsymbol{\boxed{18}}$",
    r"\textbf{\boxed{18}}",
    r"$\color{blue}{\boxed{18}}$",
    r"The total is 9+9=\boxed{18}",
    "Total:\n20-2\n\\boxed{18}",
    "20-2=\n\n\\boxed{18}",
    r"$x=\boxed{18}m$",
    r"$\boxed{18}s$",
    r"Answer 2: \boxed{18}",
    r"$n = 9 \cdot 2 = \boxed{18}$",
    r"→ \boxed{18}",
    r"=> \boxed{18}",
    r"$\to\boxed{18}$",
    r"Final answer:\boxed{18}",
    r"answer is\boxed{18}",
    r"- **Answer**: \boxed{18}",
    r"### 4. \boxed{18}",
    r"$\boxed{18} = 20 - 2$",
    r"$\boxed{18}$ = 20 - 2",
    r"$x\approx\boxed{18}$",
    r"\boxed{18}$",
    r"$\log_2 8 = \boxed{18}$",
    r"$\frac{36}{2} = \boxed{18}$",
    r"$\frac{36}{2}=18$ \boxed{18}",
    "18\n\\boxed{18}",
    r"\[ x - 2 = 16 \implies x = \boxed{18} \]",
    r"$\boxed{18}\%$",
    r"$x^2=\boxed{18}$",
    r"a\) \boxed{18}",
    r"$a=\boxed{18}, b=3$",
    r"\(\boxed{18}\)-year-old",
    r"\boxed{18}-year-old",
    r"**18** → $\boxed{18}$",
    r"$\underline{\boxed{18}}$",
    r"$S=\boxed{18}\text{ (units)}$",
    r"$ \boxed{18} $ / answer",
    "```\n\\boxed{18}\n```",
    r"$$\begin{array}{c}\boxed{18}\end{array}$$",
    r"the 3 sides add up to $\boxed{18}$",
    r"$\angle A = \boxed{18}^\circ$",
    r"$\sin x = \boxed{18}$",
    r"$N=\boxed{18}(\text{mod }20)$",
    r"18\boxed{18}",
    r"$18$\boxed{18}$",
    r"=18$\boxed{18}$",
    r"9+9=18\[\boxed{18}\]",
    r"$9+9=18$$\boxed{18}$",
    r"$x=18\boxed{18}$",
    r"答案是18\boxed{18}",
    r"x = 18 - \boxed{18}",
    r"Thus, $x$\boxed{18}",
    r"\boxed{18}^{th}",
    r"$\boxed{18}^{nd}$",
    r"Exercise 2 - \boxed{18}",
    r"**Day 3** – $\boxed{18}$",
    r"- Q1 - \boxed{18}",
    r"1 - \boxed{18}",
    "Final Answer\n-\\boxed{18}",
    r"Answer -\boxed{18}",
    r"**Answer** –$\boxed{18}$",
    r"$\text{Answer} - \boxed{18}$",
]
PARTS = [
    r"20-\boxed{18}",
    r"\boxed{18}/2",
    r"2\boxed{18}",
    r"$20-\boxed{18}$",
    r"$20 - \boxed{18} = 2$",
    r"$2\boxed{18}$",
    r"$2 \cdot \boxed{18}$",
    r"$2\times\boxed{18}=36$",
    r"$x+\boxed{18}$",
    r"20 + \boxed{18}",
    r"20 - $\boxed{18}$",
    r"20-$\boxed{18}$",
    r"$\sqrt{\boxed{18}}$",
    r"$\sqrt\boxed{18}$",
    r"$\frac{\boxed{18}}{2}$",
    r"$\frac{1}{\boxed{18}}$",
    r"$\frac{1}{2}\boxed{18}$",
    r"$x^{\boxed{18}}$",
    r"$-\boxed{18}$",
    r"$x = -\boxed{18}$",
    r"x = -\boxed{18}",
    r"It is -\boxed{18}",
    r"$\pm\boxed{18}$",
    r"$\boxed{18}x$",
    r"$\boxed{18}-x$",
    r"$\boxed{18}+x$",
    r"$\boxed{18}/x$",
    r"$\boxed{18}\pi$",
    r"$\pi\boxed{18}$",
    r"$x\boxed{18}$",
    r"$3-\boxed{18}$",
    r"$\boxed{18}^2$",
    r"$\boxed{18}^n$",
    r"$\log\boxed{18}$",
    r"$\log_2 \boxed{18}$",
    r"\[ 2x = 3\boxed{18} \]",
    r"\begin{align*} x &= 20-\boxed{18} \end{align*}",
    r"\(20-\boxed{18}\)",
    r"\$20 - \$\boxed{18}",
    r"20 / \boxed{18}",
    r"3 * \boxed{18}",
    r"3*\boxed{18}",
    r"$(x+1)\boxed{18}$",
    r"$\boxed{18}(x+1)$",
    r"$\boxed{18}\cdot 2$",
    r"$\boxed{18}\sqrt{2}$",
    r"$20−\boxed{18}$",
    r"20 – \boxed{18}",
    r"$\boxed{9} + \boxed{18}$",
    r"$i+\boxed{18}$",
    r"$y = x + \boxed{18}$",
    r"$\boxed{18}i$",
    r"$\text{cost} - \boxed{18}$",
    r"$5\%-\boxed{18}$",
    r"20 -\boxed{18}",
    r"20 -$\boxed{18}$",
    r"$3 - \boxed{18}$",
    r"3-\boxed{18}",
    r"x = 20 - \boxed{18}",
    r"Total: 20 - \boxed{18}",
    r"118\boxed{18}",
    r"Total=-\boxed{18}",
    "The answer is\n-\\boxed{18}",
    r"It costs $20, so $x = 20 - \boxed{18}$",
    "$$\nx = 20 - \\boxed{18}\n$$",
]


@pytest.mark.parametrize("output", BOXED)
def test_a_box_that_ends_its_formula_is_the_answer(output):
    assert grade(Gold("18"), output).correct


@pytest.mark.parametrize("output", PARTS)
def test_a_box_that_is_a_part_of_a_formula_is_no_answer(output):
    assert not grade(Gold("18"), output).correct


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (r"$x = -\boxed{18}$", True),
        (r"It is -\boxed{18}.", True),
        (r"\[ -\boxed{18} \]", True),
        (r"Total=-\boxed{18}", True),
        ("The answer is:\n-\\boxed{18}", True),
        (r"20 -\boxed{18}", False),
        (r"20 -$\boxed{18}$", False),
        ("Final Answer\n-\\boxed{18}", False),
    ],
)
def test_a_sign_before_a_box_is_the_answers(output, right):
    assert grade(Gold("-18"), output).correct == right


def test_what_follows_a_golds_box_is_a_unit_only_where_it_is_one():
    row = ProblemRow("p", "q", {"problem": "p", "level": "1", "solution": r"It is $\theta = \boxed{160}.$"}, "f:1")
    assert gold_answer(row) == Gold("160")
    assert grade(gold_answer(row), r"So $\theta = \boxed{160^\circ}$.").correct


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("This holds when \\boxed{H \\ll E}, which only the last one meets.\n\n**Answer: D**", "D"),
        ("It is \\boxed{4}, so (D) is correct.", "D"),
        ("We compare.\n\nd. a proton", "D"),
        ("The answer is a proton (D).", "D"),
        ("A is wrong, and B too. Therefore, D", "D"),
        ("Option B is the correct answer.", "B"),
        ("答案是 C。", "C"),
        ("The answer is C. I excluded D.", "C"),
        ("The answer is not (D).", ""),
        ("(D) is incorrect.", ""),
        ("It is (D) or (A).", ""),
        ("The answer is D or A.", ""),
        ("Both A and D are correct.", ""),
        ("Option A: wrong.\nOption D: correct.", "D"),
        ("Thus, it's B.", "B"),
        ("Not A. Not B. Not C. D it is.", "D"),
        ("D it is not.", ""),
        ("A. wrong\nB. wrong\nC. wrong\nD. correct", "D"),
        ("(A) no\n(B) yes\n(C) no\n(D) yes", ""),
        ("故选 D。", "D"),
        ("The answer is A proton.", "D"),
        ("The answer is a proton.", "D"),
        ("\\boxed{A}\n\nThe answer is a formula.", "A"),
    ],
)
def test_the_letter_that_is_said_last_and_meant(output, letter):
    choices = ("a photon", "an electron", "a neutron", "a proton")
    right = [one for one in "ABCD" if grade(Gold(one, Kind.CHOICE, choices=choices), output).correct]
    assert right == ([letter] if letter else [])


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("5", "€5"), ("5", "5 €"), ("5", "£5"), ("5", r"\color{red}{5}"), ("5", r"{\color{blue} 5}"), ("5", r"{\bf 5}"),
        ("5", r"\textcolor{red}{5}"), ("5", r"\mathbf{5}"), (r"\sqrt[3]{5}", r"\sqrt[3]5"), ("3e-8", "3×10⁻⁸"),
        ("e^2", r"\mathrm{e}^2"), ("25", "25 °C"), ("25", r"25\,^\circ\text{C}"), 
        (r"\frac{1}{2}", r"\displaystyle\frac12"),
        ("7", r"\text{seven}"), ("x^2", "x²"), (r"2\sqrt{3}", "2√3"), (r"\frac{\pi}{2}", "π/2"),
        ("60", r"\angle ABC = 60^\circ"),
        ("5", r"AB = 5"), ("12", "12"),
    ],
)  # fmt: skip
def test_spellings(gold, output):
    assert grade(Gold(gold), rf"It is $\boxed{{{output}}}$.").correct


@pytest.mark.parametrize(
    "output",
    [
        r"\boxed{2^{-99999999}}", r"\boxed{9^{9^{9}}}", r"\boxed{1000000000!}",
        r"\boxed{\binom{1000000000}{500000000}}",
        r"\boxed{\gcd(10^{1000000},3)}", r"\boxed{e^{e^{e^{18}}}}",
        r"\boxed{(1, 7^{99999999})}", r"It is $7^{99999999}$.",
        r"\boxed{\prod_{n=1}^{10^9} n}", r"\boxed{\sum_{k=1}^{50} 2^{2^k}}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "gold",
    [
        Gold("3.3e12", unit="erg/s", relative=0.01),
        Gold("0.5", absolute=0.1),
        Gold("2^{-99999998}"),
        Gold("(1,2)", Kind.TUPLE),
        Gold("[1,2]", Kind.INTERVAL),
    ],
    ids=str,
)
def test_huge_exact_numbers_are_judged_in_time(gold, output):
    began = time.monotonic()
    assert not grade(gold, output).correct
    assert time.monotonic() - began < 10


def olympiad(**fields):
    return gold_answer(ProblemRow("p", "q", {"answer_type": "Numerical", **fields}, "file.jsonl:3"))


def test_several_numbers_have_a_tolerance_each():
    gold = olympiad(final_answer=["1.25", "3.1"], error="1e-1,1e-2")
    assert gold.each == (0.1, 0.01)
    assert grade(gold, r"\boxed{3.105, 1.2}").correct
    assert not grade(gold, r"\boxed{1.3, 3.15}").correct
    assert not grade(gold, r"\boxed{1.3}").correct
    with pytest.raises(ProblemSetError, match=r"file\.jsonl:3: 'error' is 'some'"):
        olympiad(final_answer=["1.25"], error="some")
