"""Verifiable rewards: what marks an answer, what equals it, and that no text raises or hangs."""

import json
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krl.rewards import algebra
from krl.rewards.verify import REWARDS, answer_key, exact_match, extract_answer, find_reward, math_reward


@pytest.fixture(autouse=True)
def patience(monkeypatch, request):
    """What is equal does not depend on how busy the machine is; only the tests of time keep the algebra's limit."""
    if "hang" not in request.node.name:
        monkeypatch.setattr(algebra, "SYMBOLIC_SECONDS", 30)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("work #### 18", "worked <<9*2=18>>18\n#### 18", 1.0),
        ("#### 1,234", "#### 1234", 1.0),
        ("#### $5.00", "5", 1.0),
        ("#### 0.5", "1/2", 1.0),
        ("#### 18\n#### 19", "#### 18", 0.0),
        ("18", "18", 0.0),  # not marked as the answer
        ("", "18", 0.0),
        ("####", "18", 0.0),
        ("\\boxed{}", "", 0.0),
        ("Answer: x + 1", "x+1", 1.0),
        ("so \\boxed{\\frac{1}{2}} or #### 3", "\\frac{1}{2}", 1.0),
        ("\\boxed{3", "3", 0.0),
        ("#### 1/0", "1/0", 1.0),  # not a number: compared as text
        ("#### -7", "7", 0.0),
        ("#### 7", ["6", "7.0\n"], 1.0),
        ("#### 8", ["6", "7.0\n"], 0.0),
        ("#### 7", [], 0.0),
        ("#### 142", 142.0, 1.0),
    ],
)
def test_math_reward(response, answer, reward):
    assert math_reward(response, answer) == reward


# Gold answer, answer, whether they are equal. Each pair also stands the other way round unless marked "one way".
EQUALITIES = [
    ("\\frac12", "0.5", True), ("\\frac{1}{2}", "\\dfrac 12", True), ("1\\frac45", "\\frac95", True),
    ("137 \\frac{1}{2}", "137.5", True), ("1\\frac45", "1 4/5", True), ("-\\frac{33}{2}", "-16.5", True),
    ("1/3", "0.333333", True), ("1/3", "0.333334", False), ("1/3", "0.333", False), ("0.5", "0.5000001", False),
    ("10,\\!080", "10080", True), ("\\$23{,}000", "23,000", True), ("1 234 567", "1234567", True),
    ("1 2", "12", False), ("(100,101)", "100101", False), ("x = 1,575", "1575", True),
    ("2400, 1350, 864", "864, 1350, 2400", True), (".0000672", "0.0000672", True), ("025", "25", True),
    ("2.88 \\times 10^{16}", "2.88e16", True), ("2.88 \\times 10^{16}", "28800000000000000", True),
    ("10^{-3}", "0.001", True), ("1e-5", "1e-6", False), ("2.26 \\times 10^{-10}", "3.3e-10", False),
    ("5", "5 cm", True), ("5.4 \\text{ cents}", "5.4", True), ("864 \\mbox{ inches}^2", "864", True),
    ("90^\\circ", "90", True), ("1950^\\circ C\n", "1950", True), ("7\\text{ hours}.", "7", True),
    ("(6,235^\\circ)", "(6, 235)", True), ("2t", "2", False), ("2 n", "2", False),
    ("3wxyz", "3", False), ("5cm", "5", True), ("5r^5", "5", False),
    ("8\\!:\\!34 \\text{ p.m.}", "8:34 p.m.", True), ("8\\!:\\!34 \\text{ p.m.}", "8:34 a.m.", False),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}", True), ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}", False),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2, 1+\\sqrt5, 1-\\sqrt5\\}", True), ("\\{4,5,7\\}", "\\{7,5,4\\}", True),
    ("3i, -3i", "\\pm 3i", True), ("$69$,$84$", "84 and 69", True), ("6, 8\\text{, and }10", "10,8,6", True),
    ("$(3,2),(-3,2)$", "(-3,2), (3,2)", True), ("$(3,2),(-3,2)$", "(2,3), (-3,2)", False),
    ("5, 100", "5100", False), ("$5$,$100$", "100, 5", True), ("5, 100", "100 and 5", True),
    ("(5, 100)", "(5,100)", True),
    ("1,2,2", "1,1,2", False), ("1,2", "1,2,3", False), ("1,2", "x\\in\\{2,1\\}", True), ("1,2", "x\\in\\{1,3\\}", False), ("(2,4)", "(4,2)", False),
    ("(-1, 0.5)", "(-1, \\frac12)", True),
    ("(1,2)", "[1,2]", False), ("(1,2]", "(1,2)", False), ("[2,7]", "x \\in [2,7]", True),
    ("x \\in [-2,7]", "-2 \\le x \\leqslant 7", True), ("(3,4]", "3<x\\le 4", True),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2)", True),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2]", False),
    ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ 2 \\end{bmatrix}", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", False),
    ("x=5", "5", True), ("x=5", "x = 5.0", True), ("x=5", "y=5", False), ("f(x)=2 x", "2x", True),
    ("$f(x)=x,f(x)=-x$", "f(x)=-x \\text{ or } f(x)=x", True), ("AB=9, CD=4", "CD=4, AB=9", True),
    ("x + y + z = 0", "0", False), ("2x = 10", "10", False), ("5", "2 + 3 = 5", True), ("5", "x = 2 + 3 = 5", True),
    ("AB=12+12\\sqrt{3}", "12(1+\\sqrt3)", True), ("m_{\\max }=n^{2}", "n^2", True), ("P(A) = 0.5", "\\frac12", True),
    ("y^2 - 4x - 6y + 9 = 0", "y^2-4x=6y-9", True),
    ("52_8", "52_{8}", True), ("52_8", "52", True), ("52_8", "52_9", False),
    ("\\text{(B)}", "B", True), ("\\text{(B)}", "(C)", False), ("\\text{A, B}", "B, A", True),
    ("\\text{Evelyn}", "evelyn", True), ("\\text{Evelyn}", "nylEve", False), ("\\text{even}", "odd", False),
    ("3\\sqrt{13}", "\\sqrt{117}", True), ("(a+5)(b+2)", "ab+2a+5b+10", True), ("6 - 5i", "-5i+6", True),
    ("\\cot x", "\\frac{\\cos x}{\\sin x}", True),
    ("2^{1009}", "2 \\cdot 2^{1008}", True), ("100!", "99! \\cdot 100", True),
    ("\\frac{100!}{2^{50}}", "100! \\cdot 2^{-50}", True),
    ("\\frac{1}{2^{98}}", "2^{-98}", True), ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}", False),
    ("\\sqrt{2}\\sqrt{3}-\\sqrt{6}", "0", True),
    ("10^{10^{10}}", "10^{10^{10}}", True), ("10^{10^{10}}", "10^{10^{11}}", False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "given", "equal"), EQUALITIES)
def test_equality(gold, given, equal):
    assert math_reward(f"\\boxed{{{given}}}", gold) == equal
    assert math_reward(f"\\boxed{{{gold}}}", given.strip()) == equal


# Constants, formulas and bounds that differ by little, or are large or small themselves: no absolute bound decides.
SIZES = [
    ("\\frac{1}{2^{300}}", "\\frac{1}{2^{299}}", False), ("2^{-300}", "\\frac{1}{2^{300}}", True), ("2^{-300}",
    "-2^{-300}", False),
    ("\\frac{3}{2^{2020}}", "\\frac{1}{2^{2020}}", False), ("\\frac{1}{100!}", "\\frac{1}{99!}", False),
    ("10^{-400}", "0", False),
    ("\\frac{1}{2006!}", "\\frac{1}{2004!}", False), ("\\frac{1}{2006!}", "\\frac{1}{2006 \\cdot 2005!}", True),
    ("1-\\frac{1}{2^{2020}}", "1-\\frac{1}{2^{2019}}", False), ("1-\\frac{1}{2^{2020}}", "1", False),
    ("(-1)^{101}", "-1", True), ("(-1)^{101}", "1", False), ("2(-1)^{1000}", "2", True),
    ("1-2^{-2020}", "\\frac{2^{2020}-1}{2^{2020}}", True), ("2^{2020}", "2^{2020}+1", False), ("2^{2020}",
    "4^{1010}", True),
    ("10^{400}", "10^{401}", False), ("1000!", "1000!+1", False), ("\\frac{1001!}{1000!}", "1001", True),
    ("\\sqrt{2} \\cdot 2^{-300}", "\\sqrt{2} \\cdot 2^{-301}", False), ("\\sqrt{2} \\cdot 2^{-300}", "2^{1/2-300}",
    True),
    ("e^{-1000}", "e^{-1001}", False), ("e^{-1000}", "-e^{-1000}", False), ("e^{-1000}", "\\frac{1}{e^{1000}}", True),
    ("\\sqrt{2}", "\\sqrt{2}+10^{-40}", False), ("\\sqrt{1+10^{-400}}", "1", False), ("\\sqrt{10^{40}+1}", "10^{20}",
    False),
    ("e^{\\pi\\sqrt{163}}", "262537412640768744", False), ("\\sin(10^{-50})", "10^{-50}", False),
    ("0.99999999999999999999", "1", False),
    ("x+10^{-20}", "x", False), ("10^{-20}x", "10^{-21}x", False), ("\\frac{x}{2^{300}}", "2^{-300}x", True),
    ("y=x+10^{-30}", "y=x", False),
    ("x>10^{-20}", "x>10^{-21}", False), ("x>10^{-20}", "10^{20}x>1", True), ("(0, 10^{-20})", "0<x<10^{-21}", False),
    ("(2^{-300},1)", "(2^{-301},1)", False), ("\\{2^{-300},1\\}", "\\{2^{-301},1\\}", False),
    ("[0,\\sqrt2\\cdot2^{-300}]", "[0,\\sqrt2\\cdot2^{-301}]", False),
    ("\\begin{pmatrix} 2^{-300} \\\\ 1 \\end{pmatrix}", "\\begin{pmatrix} 2^{-301} \\\\ 1 \\end{pmatrix}", False),
    ("\\sqrt{x^2}", "x", False), ("\\ln x^2", "2\\ln x", False), ("|x-100|", "100-x", False),
    ("\\lfloor x\\rfloor+1", "\\lceil x\\rceil", False),
    ("\\sin^2 x", "1-\\cos^2 x", True), ("\\binom{n}{2}", "\\frac{n(n-1)}{2}", True), ("\\binom{n}{2}",
    "\\frac{n(n+1)}{2}", False), ("0.5x", "\\frac{x}{2}", True),
    ("x^2<4", "-2<x<2", True), ("x^2<4", "x<2", False), ("-x<-1", "x>1", True), ("-x>-1", "x>1", False), ("xy=1",
    "y=\\frac1x", True), ("1<x<2", "1<y<2", False),
    ("\\sqrt2", "1.41421", True), ("\\sqrt2", "1.41422", False), ("\\sqrt2", "1.4142", False), ("\\frac{22}{7}",
    "\\pi", False),
]  # fmt: skip


LABELLED = ["(C) 45", "\\textbf{(C)}\\ 45^\\circ", "C. 45", "\\text{(C) }45", "C: $45^\\circ$", "(C) \\frac{90}{2}"]


@pytest.mark.parametrize("gold", LABELLED)
def test_a_choice_with_its_value_is_said_by_either(gold):
    right = ["C", "(C)", "45", "\\text{(C)}", *LABELLED]
    wrong = ["D", "46", "(D) 45", "(C) 46", "D. 45", "C. -45", "(C) 45 (D) 46"]
    taken = [given for given in right + wrong if math_reward(f"\\boxed{{{given}}}", gold)]
    assert taken == right


@pytest.mark.parametrize("given", LABELLED)
def test_a_value_after_its_choice(given):
    assert [math_reward(f"\\boxed{{{given}}}", gold) for gold in ("45", "C", "46", "D")] == [1, 1, 0, 0]


@pytest.mark.parametrize(("gold", "given", "equal"), SIZES)
def test_equality_at_any_size(gold, given, equal):
    assert math_reward(f"\\boxed{{{given}}}", gold) == equal
    assert math_reward(f"\\boxed{{{gold}}}", given) == equal


@pytest.mark.parametrize(
    ("gold", "given", "equal"),
    [
        ("50\\%", "50", True), ("50\\%", "0.5", True), ("50\\%", "\\frac12", True), ("50\\%", "50 percent", True),
        ("50\\%", "5", False), ("50", "50\\%", True), ("0.5", "50\\%", False),
        ("\\text{(B)}", "(B) 42", True), ("\\text{(B)}", "B. forty", True), ("\\text{(B)}", "b", True),
        ("\\text{(B)}", "Bob", False),
        ("1, -2", "(-2, 1)", True), ("(-2, 1)", "1, -2", False), ("(-2, 1)", "-2, 1", True),
    ],
)  # fmt: skip
def test_equality_that_follows_the_gold_answer(gold, given, equal):
    assert math_reward(f"\\boxed{{{given}}}", gold) == equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{f{x}{y}}", "f{x}{y}"),
        ("\\boxed{3} and then \\boxed{4", "3"),
        ("\\boxed{3}, as asked in \\boxed{}", "3"),
        ("\\fbox{7}", "7"),
        ("\\boxed {\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),
        ("#### 5\n\n", "5"),
        ("#### 4 \nhm\n####5\n####", "5"),
        ("**Final Answer:** 5", "5"),
        ("Answer:\n\n$5$", "$5$"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        ("the answer is **42**.", "42"),
        ("The answer is $34\\text{ sq. units}$. Done.", "$34\\text{ sq. units}$"),
        ("Answer: 1\nno, answer: 2", "2"),
        ("<answer>42</answer>", "42"),
        ("<answer>41</answer> no: <ANSWER>\n42\n</ANSWER>", "42"),
        ("<answer> so \\boxed{42} </answer> \\boxed{43}", "42"),
        ("<answer></answer> \\boxed{42}", "42"),
        ("In <answer> tags: <answer>42", "42"),
        ("<think>\\boxed{41}</think> So \\boxed{42}", "42"),
        ("\\boxed{41}</think><answer>42</answer>", "42"),
        ("<think>\\boxed{41}</think> no idea", None),
        ("\u25c1think\u25b7\\boxed{41}\u25c1/think\u25b7 no idea", None),
        ("[THINK]\\boxed{41}[/THINK] no idea", None),
        ("[THINK]\\boxed{41}", None),
        ("<seed:think>\\boxed{41}</seed:think> \\boxed{42}", "42"),
        ("<think >\\boxed{41}", None),
        ("<think>\\boxed{41}", None),
        ("<reasoning>\n\\boxed{3}\n</reasoning>\n<answer>\n42\n</answer>", "42"),
        ("The answer is:\n$$\n42\n$$\nDone.", "42"),
        ("The final answer is:\n\n\\[ x = 4.2 \\]", "x = 4.2"),
        ("The answer is: $$42$$.", "42"),
        ("## Answer\n\n42\n\n## Notes\n7", "42"),
        ("### Final answer:\n$$x$$", "x"),
        ("#### Final answer\n42", "42"),
        ("#### Step 1\nadd\nThe answer is 42.", "42"),
        ("The answer is 41.\n#### 42", "42"),
        ("#### **42**", "42"),
        ("####\n42\nDone.", "42"),
        ("The answer is:\n\\begin{align*}\n42\n\\end{align*}\nDone.", "42"),
        ("**Final Answer**: 42", "42"),
        ("**Answer**\n42", "42"),
        ("__Answer__: 42", "42"),
        ("The answers are 1 and 2.", "1 and 2"),
        ("So it is **42**.", "42"),
        ("**42** is what I think", None),
        ("\\boxed{1}, \\boxed{2}, \\boxed{3}", "3"),
        ("nothing but 12", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_the_last_number_counts_only_where_it_is_asked_for():
    text = "first 3, then 1,250.5 apples"
    assert extract_answer(text, last_number=True) == "1,250.5"
    assert math_reward(text, "1250.5") == 0.0
    assert math_reward(text, "1250.5", last_number=True) == 1.0
    assert answer_key(text) is None
    assert answer_key(text, last_number=True) == "2501/2"
    assert extract_answer("#### 4, not 5", last_number=True) == "4, not 5"


def test_exact_match():
    assert exact_match(" 12", "12") == 1.0
    assert exact_match("12 ", "13") == 0.0
    assert exact_match("0 12", "12") == 0.0
    assert exact_match("12", ["11", "12"]) == 1.0


def test_equal_keys_are_equal_answers():
    answers = [text for gold, given, _ in EQUALITIES for text in (gold, given)]
    keys = [answer_key(f"\\boxed{{{text}}}") for text in answers]
    assert all(keys)
    pairs = [(a, b) for i, a in enumerate(answers) for j, b in enumerate(answers) if i < j and keys[i] == keys[j]]
    assert len(pairs) > 40
    for a, b in pairs:
        assert math_reward(f"\\boxed{{{a}}}", b) == 1.0, (a, b)
    same_key = [("\\frac{2}{4}", "0.50"), ("1,\\!000", "1e3"), ("3, 1", "1 and 3"), ("5 cm", "5")]
    for a, b in same_key:
        assert answer_key(f"\\boxed{{{a}}}") == answer_key(f"#### {b}")


PIECES = [
    "\\boxed{", "\\frac", "{", "}", "(", ")", "[", "]", "^", "_", "10", "99999", "-", "+", "=", ",", "\\pm",
    "\\cup", "%",
    "\\text{", "\\sqrt", "!", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "x", "e9", ".", " ", "####",
    "answer is ", "\\{", "<answer>", "</think>", "~", " m/s", "\\mathrm{m}", "0.\\overline{3}", "0.(3)", "\u00b2",
    "\u221a", "\u00bd", "'", "^\\circ ", " million", ":", "]1,2[",
]  # fmt: skip
odd_text = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@given(response=odd_text, answer=odd_text)
@settings(max_examples=150, deadline=None)
def test_no_text_raises(response, answer):
    for marked in (response, f"\\boxed{{{response}}}"):
        assert math_reward(marked, answer) in (0.0, 1.0)
        key = answer_key(marked, last_number=True)
        assert key is None or isinstance(key, str)


@pytest.mark.parametrize("in_thread", [False, True])
def test_no_text_hangs(in_thread):
    """Each in well under the algebra's limit, which does not hold in threads; in processor time, as machines are busy."""
    texts = [
        "10^10^10", "10^{10^{10}}", "9^{9^{9^9}}", "(10^{9999})^{9999}", "1e1000000000", "1e-9999", "100000000!",
        "((5!)!)!", "\\binom{1000000000}{500000000}", "\\int_0^1 e^{x^2}\\sin(x^3) dx", "(x+y+z)^{500}",
        "10^{x99999999}", "2^{{{100000000000}}}", "\\exp(\\exp(\\exp(100)))", "(10^{10})^{10^{10}}", "10**10**10",
        "(" * 300, "{" * 300, "\\frac{" * 80, "\\sqrt{" * 60 + "2" + "}" * 60, "1" * 5000, "0." + "3" * 300,
        "\\boxed{" * 20_000, "#### " * 20_000, "answer is " * 20_000, "answer:" + " " * 50_000, "1,2," * 90 + "1",
        "5 " + "cm " * 120 + "!", "5" + "\\text{ cm}" * 30 + "!", "abcdefghijklmn!",
        "1.1" * 100, "\\pm" * 99, "-" * 390, "{" * 9 + "}" * 390, "," * 399,
    ]  # fmt: skip
    slowest = {}

    def score_all():
        for text in texts:
            begin = time.thread_time()
            assert math_reward(text, "5") == 0.0
            assert math_reward(f"\\boxed{{{text}}}", "x^{5}+\\sqrt{2}") == 0.0
            assert math_reward("\\boxed{\\frac{1}{1+x}}", text) == 0.0
            slowest[text[:30]] = time.thread_time() - begin

    if in_thread:
        thread = threading.Thread(target=score_all, daemon=True)
        thread.start()
        thread.join(300)
        assert not thread.is_alive(), f"hung after {list(slowest)[-1:]}"
    else:
        score_all()
    assert len(slowest) == len(texts)
    assert max(slowest.values()) < 1.9, slowest


def test_keys_of_long_answers_are_cheap():
    text = "1," * 50_000 + "1"
    begin = time.process_time()
    assert answer_key(f"\\boxed{{{text}}}") == text
    assert time.process_time() - begin < 0.5


def test_find_reward(tmp_path, monkeypatch):
    assert find_reward("math")("a prompt", "#### 0.5", "1/2") == 1.0
    assert find_reward("exact")("a prompt", "0.5", "1/2") == 0.0
    assert set(REWARDS) == {"exact", "math", "math_or_number", "reasoning_gym"}
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompt, response, answer):\n    return float(len(response))\nx = 1\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import not_a_module_of_mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_reward("my_rewards:length")("", "abc", "") == 3.0
    for name, message in {
        "maths": r"reward 'maths' must be one of \['exact', 'math', 'math_or_number', 'reasoning_gym'\]",
        "my_rewards:": "must be one of",
        "my_gone_rewards:length": "cannot import my_gone_rewards: ModuleNotFoundError",
        "my_broken_rewards:length": "cannot import my_broken_rewards.*not_a_module_of_mine",
        "my_rewards:width": "my_rewards has no width",
        "my_rewards:x": "x is a int, not a function",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            find_reward(name)
        assert "\n" not in str(error.value)


def test_a_worker_needs_none_of_the_heavy_libraries():
    program = (
        "import json, sys, krl.rewards.verify, krl.rewards.worker, krl.rewards.pool; "
        "print(json.dumps([m for m in ('jax', 'transformers', 'datasets', 'flax') if m in sys.modules])); "
        "import krl; krl.budget.grpo_value; assert 'jax' in sys.modules; assert 'learn' in dir(krl)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
