"""What `math` takes for another kind of object: nothing, but for usual spellings."""

import pytest

from grpo_jax import Example
from grpo_jax.rewards.verifiers import check_gold, math


def verdict(gold, answer):
    return math(Example("", gold), rf"so $\boxed{{{answer}}}$.")


# Two objects a line; neither is the other.
DIFFERENT = r"""
(3,456) | 3456
(3,456) | 3,456
(12,345) | 12345
(-3,456) | -3456
(1,000) | 1000
(1,234) | (1234)
[3,456] | 3456
\{3,456\} | 3456
(3,456,789) | 3456789
x=3456 | x=(3,456)
(x,y)=(3,456) | 3456
2(1,234) | 2468
(3,456)+1 | 3457
\frac{(3,456)}{1} | 3456
(3,456)\cup(500,600) | 3456
(1,2) | 1,2
(1,2) | 2,1
(1,2) | \{1,2\}
(1,2) | [1,2]
(1,2) | (1,2]
(1,2,3) | 3,2,1
(1,2),(3,4) | 1,2,3,4
(1,2) | \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
(-\infty,456) | (-\infty,456]
0<x<1 | [0,1]
x>5 | x\ge 5
x>5 | 5
x\ne 5 | 5
x+y=5 | 5
x=5 | x=-5
x=5 | y=5
x=5,y=3 | (3,5)
x=5,y=3 | \{5,3\}
x=5,y=3 | x=3,y=5
\pm 5 | 5
\pm 5 | (5,-5)
5,3 | 5.3
1\frac12 | \frac{12}{2}
-\frac12 | \frac12
5! | 5
50\% | 0.5
5\% | \$5
5^\circ | 5\%
\$5 | 5\text{ cents}
90^\circ | 90\text{ radians}
\frac{\pi}{6} | 30^\circ
5\text{ cm}^2 | 5\text{ cm}^3
5\text{ cm}^2 | 5\text{ cm}
5\text{ square feet} | 5\text{ cubic feet}
2E | 2e
E | e
R-r | r-R
\pi R^2 | \pi r^2
R-r | 0
3+4i | (3,4)
3+4i | 3-4i
|-5| | -5
\sqrt2 | \sqrt[3]2
\log 2 | 2
\log_2 3 | \log_3 2
f(x)=x^2 | g(x)=x^2
\sin x | \cos x
(A) | (B)
\text{even} | \text{odd}
\emptyset | 0
\infty | -\infty
"""
# Two spellings a line; either is the other.
SAME = r"""
(3,456) | (3, 456)
(3,456) | \left(3,456\right)
(\sqrt8,456) | (2\sqrt2,456)
(-\infty,456) | (-\infty, 456)
(0,100)\cup(200,456) | (200,456)\cup(0,100)
3,456 | 3456
(5) | 5
2(3+4) | 14
\{1,2\} | 2,1
\pm 5 | -5,5
x=5 | 5
x=5,y=3 | (5,3)
x=5,y=3 | y=3,x=5
(x,y)=(1,2) | (1,2)
R^2-r^2 | (R-r)(R+r)
P+Q | Q+P
\text{(B)} | b
\text{Tuesday} | tuesday
\$5 | 5\text{ dollars}
\$5 | 5
5\% | 5\text{ percent}
5\% | 5
90^\circ | 90\text{ degrees}
90^\circ | 90
5\text{ cm}^2 | 5\text{ square centimeters}
5\text{ cm}^2 | 5
5! | 120
"""
INCOMPLETE = r"""
2 +
$2+$
\(5+\)
5-
5 \times
x =
x >
/5
\times 5
\frac{1}
\frac{5}{}
\frac
\binom{5}
\sqrt{}
\sqrt[3]
x^
x_
5^{}
(1,2
1,2)
\{1,2
\left(1,2
\text{}
\begin{pmatrix}1
"""
COMPLETE = r"""
\frac12
\frac ab
\frac{a}b
\sqrt2
\sqrt[3]2
\binom52
]0,1[
[0,1[
(1,2]
B)
A+
0^+
\mathbb{R}^+
\mathbb{Z}^*
\text{Na}^+
{}_5C_2
= 5
> 5
-5
+5
5!
$5$
\(5\)
f'(x)
\begin{pmatrix}1\\2\end{pmatrix}
"""


def pairs(table):
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_different_objects_are_no_answer_to_each_other(one, other):
    pytest.importorskip("math_verify")
    assert (verdict(one, one), verdict(other, other)) == (1, 1)
    assert (verdict(one, other), verdict(other, one)) == (0, 0)


@pytest.mark.parametrize(("one", "other"), pairs(SAME))
def test_spellings_of_one_object_are_answers_to_each_other(one, other):
    pytest.importorskip("math_verify")
    assert (verdict(one, other), verdict(other, one)) == (1, 1)


def test_a_list_in_any_order_may_be_answered_with_names_and_no_others_may():
    assert verdict("5,3", "x=3, y=5") == 1
    assert verdict("x=5, y=3", "5,3") == 1
    assert verdict("x=5, y=3", "3,5") == 0
    assert verdict("(5,3)", "x=3, y=5") == 0


@pytest.mark.parametrize("gold", INCOMPLETE.strip().splitlines())
def test_latex_that_is_not_complete_is_refused_as_a_gold(gold):
    assert "its LaTeX is not complete" in (check_gold("math", gold) or "")
    assert verdict(gold, gold) == 0


@pytest.mark.parametrize("gold", COMPLETE.strip().splitlines())
def test_complete_latex_is_a_gold_whose_own_text_scores(gold):
    assert check_gold("math", gold) is None
    assert verdict(gold, gold) == 1
