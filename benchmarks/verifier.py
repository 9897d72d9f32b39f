"""The mathematics reward on real gold answers: does it accept their surface forms and refuse other answers?

    python -m benchmarks.verifier --data DIRECTORY [--out runs/verifier] [--rows 300]

DIRECTORY holds train/ and test/ with the files of FILES. Each sampled gold answer is written in up to 17
forms, and in up to 14 more that its near misses are written in too: other notations, each of 20 units and five
currencies, and the marks of common recipes. The answer should score 1 in all of them and the near misses 0. So
should gold answers of other problems of its file, unless a plain reading of the two texts says that they are equal.
Prints the agreement for each file and form and what one call costs, and writes the disagreements to
disagreements.jsonl.
"""

import argparse
import collections
import json
import pathlib
import re
import time

import numpy as np

from krl.rewards.verify import answer_key, math_reward

FILES = (
    "train/gsm8k", "train/math", "train/aime",
    "test/aime", "test/amc", "test/math500", "test/minerva", "test/olympiad_bench", "test/gsm8k",
)  # fmt: skip
OTHERS = 4  # answers of other problems, for each row
SEED = 0
UNITS = (
    " \\text{ m/s}", "\\ \\mathrm{m/s^2}", " \\text{ g/cm}^3", "\\, \\mathrm{m \\, s^{-1}}", " \\text{ kJ/mol}",
    " \\text{ N}\\cdot\\text{m}",
    " \\text{ miles/hour}", "\\ \\Omega", "\\ \\mu\\text{m}", " \\text{ cm}\u00b2", " K", " USD",
    " dollars per hour", "\\,\\text{\u00c5}",
    " cm\u207b\u00b3", " m/s", "\u00b0C", "~\\mathrm{erg}~\\mathrm{s}^{-1}", "\\ \\mathrm{W/(m^2\\,K)}", " N m",
)  # fmt: skip
CURRENCIES = ("\u20ac", "\u00a3", "\\$", "US$", "EUR ")
RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
WIDE = str.maketrans("0123456789", "".join(chr(0xFF10 + digit) for digit in range(10)))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=pathlib.Path, required=True)
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/verifier"))
    arguments.add_argument("--rows", type=int, default=300, help="sampled from each file")
    options = arguments.parse_args()
    missing = [file for file in FILES if not (options.data / f"{file}.jsonl").is_file()]
    if missing:
        arguments.error(f"{options.data} has no {missing[0]}.jsonl; --data is a directory with {', '.join(FILES)}")
    options.out.mkdir(parents=True, exist_ok=True)

    right: collections.Counter = collections.Counter()  # by file and form
    asked: collections.Counter = collections.Counter()
    seconds, disagreements, false_keys = [], [], 0
    for file in FILES:
        rng = np.random.default_rng(SEED)
        golds = read_golds(options.data / f"{file}.jsonl")
        for row in rng.permutation(len(golds))[: options.rows]:
            accepted = golds[row]
            keys = {answer_key(f"\\boxed{{{bare(text)}}}") for text in accepted}
            for form, response, label in trials(accepted, [golds[i] for i in rng.integers(0, len(golds), OTHERS)]):
                begin = time.perf_counter()
                reward = math_reward(response, accepted)
                seconds.append(time.perf_counter() - begin)
                asked[file, form] += 1
                right[file, form] += reward == label
                false_keys += reward == 0 and answer_key(response) in keys
                if reward != label:
                    wrong = {"file": file, "form": form, "gold": accepted, "response": response, "reward": reward}
                    disagreements.append(wrong)
    with open(options.out / "disagreements.jsonl", "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in disagreements)
    print_agreement(right, asked)
    median, late, longest = 1e3 * np.percentile(seconds, [50, 99, 100])
    print(f"\n{len(disagreements)} disagreements in {options.out / 'disagreements.jsonl'}")
    print(f"{false_keys} answers with the gold answer's key and a reward of 0")
    print(f"a call takes {median:.2f} ms (median), {late:.1f} ms (99th percentile), {longest:.0f} ms (longest)")


def trials(accepted: list[str], others: list[list[str]]) -> list[tuple[str, str, float]]:
    """Forms, responses and the rewards they should get."""
    right = [(form, response, 1.0) for form, response in surface_forms(accepted[0]) + written(bare(accepted[0]))]
    wrong = [("near miss", f"\\boxed{{{text}}}", 0.0) for text in near_misses(accepted)]
    wrong += [(f"near: {form}", said, 0.0) for text in near_misses(accepted) for form, said in written(text)]
    readings = {plainly(text) for text in accepted}
    for other in others:
        wrong.append(("another answer", f"\\boxed{{{bare(other[0])}}}", float(plainly(other[0]) in readings)))
    return right + wrong


def read_golds(path: pathlib.Path) -> list[list[str]]:
    """The accepted answers of each row that has one; GSM8K's are what follows "####"."""
    answers = [json.loads(line)["answer"] for line in path.open()]
    rows = [answer if isinstance(answer, list) else [answer] for answer in answers if answer not in (None, "")]
    return [[str(text).rpartition("####")[2].strip() for text in row] for row in rows]


def bare(gold: str) -> str:
    """An answer as it stands inside a formula: without its dollar signs, if they only open and close formulas."""
    return gold.strip().rstrip(".").replace("$", "") if not re.search(r"\\\$|text|[a-z]{3,} ", gold) else gold.strip()


def plainly(gold: str) -> str:
    """A reading of an answer that shares nothing with the verifier: a number's value, or the text without spaces."""
    text = re.sub(r"\\(left|right|!|,|;| )|[\s$]", "", gold).replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\frac(\d)(\d)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^(\{?)\\circ(\}?)|\\(text|mbox)\{[^}]*\}(\^2)?$|\\|\.$|%$", "", re.sub(r"^[a-z]=", "", text))
    text = re.sub(r"times10\^\{?(-?\d+)\}?$", r"e\1", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    number = re.fullmatch(r"(-?)frac\{(\d+)\}\{(\d+)\}", text)
    try:
        value = float(f"{number[1]}1") * float(number[2]) / float(number[3]) if number else float(text)
    except ValueError:
        return text
    return f"{value:.9g}"


def surface_forms(gold: str) -> list[tuple[str, str]]:
    """Names and responses that give this answer; only forms that make sense for its kind."""
    inside = bare(gold)
    integer = re.fullmatch(r"-?\d+", inside.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})*", inside) else inside)
    value = integer and inside.replace(",", "")
    decimal = re.fullmatch(r"-?\d*\.\d+", inside)
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", inside)
    prose = "$" in inside.replace("\\$", "")
    balanced = inside.count("(") + inside.count("[") == inside.count(")") + inside.count("]")
    sized = re.sub(r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", inside))
    spaced = re.sub(r"(?<!\d),|,(?!\d{3})", " , ", re.sub(r"(?<=[\w)}])([+=])", r" \1 ", inside))
    forms = {
        "boxed": f"so it is \\boxed{{{inside}}}",
        "boxed in $$": f"Therefore\n$$\\boxed{{{inside}}}$$\nas was to be shown.",
        "dollars inside": "" if prose else f"\\boxed{{${inside}$}}",
        "dfrac": inside.replace("\\frac", "\\dfrac") if re.search(r"\\frac", inside) else "",
        "left right": sized if balanced and sized != inside and "left" not in inside else "",
        "period": f"\\boxed{{{inside}.}}",
        "spaces": f"\\boxed{{  {spaced} }}",
        "answer is": f"We add them. The answer is {inside if prose or '$' in inside else f'${inside}$'}.",
        "final answer": f"**Final Answer:** {inside}\n",
        "####": f"2 + 2 = 4\n#### {inside}",
        "earlier boxes": f"First \\boxed{{123457}}, then \\boxed{{\\frac{{x}}{{7}}}}, at last \\fbox{{{inside}}}.",
        "decimal zeros": f"{value}.00" if value else f"{inside}0" if decimal else "",
        "thousands": f"{int(value):,}" if value and abs(int(value)) >= 1000 else "",
        "slash": f"{fraction[1]}{fraction[2]}/{fraction[3]}" if fraction else "",
        "unit": f"{inside} \\text{{ units}}" if value or decimal or fraction else "",
        "reversed list": ", ".join(reversed(inside.split(","))) if is_plain_list(inside) else "",
        "equation": f"x = {inside}" if value or decimal or fraction else "",
    }
    boxed = {"dfrac", "left right", "decimal zeros", "thousands", "slash", "unit", "reversed list", "equation"}
    return [(name, f"\\boxed{{{text}}}" if name in boxed else text) for name, text in forms.items() if text]


def written(inside: str) -> list[tuple[str, str]]:
    """Names and responses that give this text, of the answer or a near miss, in other notations and recipes' marks."""
    prose = bool(re.search(r"\$|\*|text|mbox", inside))
    number = re.fullmatch(
        r"-?(\d+|\d{1,3}(,\d{3})+|\d*\.\d+|\\[dt]?frac\{\d+\}\{\d+\}|\d+(\.\d+)?( ?\\times 10\^\{?-?\d+\}?|e-?\d+))",
        inside,
    )
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", inside)
    letter = re.fullmatch(r"\(?([A-H])\)?|\\text\{\(?([A-H])\)?\}", inside)
    forms = {
        "unicode minus": inside.replace("-", "\u2212") if "-" in inside and not prose else "",
        "superscripts": re.sub(r"\^(?:\{(-?\d+)\}|(\d)(?!\d))", lambda m: (m[1] or m[2]).translate(RAISED), inside),
        "root sign": re.sub(r"(?<!\d)\\sqrt\{(\d+)\}", "\u221a\\1", inside),
        "fraction slash": f"{fraction[1]}{fraction[2]}\u2044{fraction[3]}" if fraction else "",
        "repeating": repeating(*fraction.groups()) if fraction else "",
        "full width": inside.translate(WIDE) if number and inside.isdigit() else "",
        "plain braces": f"{{{inside[2:-2]}}}" if re.fullmatch(r"\\\{[^{}\\]+,[^{}\\]+\\\}", inside) else "",
        "open bracket": re.sub(r"^\(([^()\[\],]+,[^()\[\],]+\])$", r"]\1", inside),
        "choice": f"{letter[1] or letter[2]}. 12" if letter else "",
    }
    said = [(name, f"\\boxed{{{text}}}") for name, text in forms.items() if text and text != inside]
    if number:
        sign, size = ("-", inside[1:]) if inside.startswith("-") else ("", inside)
        said += [("units", f"\\boxed{{{inside}{unit}}}") for unit in UNITS]
        said += [("currencies", f"\\boxed{{{sign}{currency}{size}}}") for currency in CURRENCIES]
    said.append(("answer tags", f"We add.\n<answer>{inside}</answer>"))
    said.append(("after thinking", f"<think>Is it \\boxed{{123457}}?</think>\nIt is \\boxed{{{inside}}}."))
    if not prose:
        said.append(("displayed", f"The answer is:\n$$\n{inside}\n$$\nThat was it."))
        said.append(("heading", f"2 + 2 = 4\n\n### Final answer\n\n{inside}\n"))
        said.append(("bold", f"So we find **{inside}**."))
    return said


def repeating(sign: str, above: str, below: str) -> str:
    """A fraction as a decimal with a bar over its period; "" where it has none, or one of over six digits."""
    whole, rest = divmod(int(above), int(below) or 1)
    digits, seen = "", {}
    while rest and rest not in seen and len(digits) < 12:
        seen[rest] = len(digits)
        digit, rest = divmod(10 * rest, int(below))
        digits += str(digit)
    begin = seen.get(rest, 0) if rest else len(digits)
    return (
        f"{sign}{whole}.{digits[:begin]}\\overline{{{digits[begin:]}}}"
        if rest in seen and len(digits) - begin <= 6
        else ""
    )


def is_plain_list(inside: str) -> bool:
    """Whether commas separate the elements of a list, and neither thousands nor coordinates."""
    return bool(re.fullmatch(r"[^()\[\]{}]+(,[^()\[\]{}]+)+", inside)) and not re.search(r",\\?!|text|\d,\d{3}", inside)


def near_misses(accepted: list[str]) -> list[str]:
    """Answers that differ from all accepted ones by one number, a sign, a bracket, an element or their order."""
    inside = bare(accepted[0])
    if len(accepted) > 1 or re.search(r"text|mbox|\$|=|pm|\^\{?\\?circ", inside):
        return []  # several answers may be each other's near misses, and units are not compared
    last = list(re.finditer(r"\d+", inside))[-1:]
    missed = [f"{inside[: found.start()]}{int(found[0]) + 1}{inside[found.end() :]}" for found in last]
    if re.fullmatch(r"-?(\d+|\\[dt]?frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\})", inside) and inside != "0":
        missed += [inside.removeprefix("-") if inside.startswith("-") else f"-{inside}"]
    pair = re.fullmatch(r"(?:\\left)?([(\[])([^()\[\]]+),([^()\[\],]+?)(?:\\right)?([)\]])", inside)
    if pair and pair[2].strip() != pair[3].strip():
        missed += [
            f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}",
            f"{'(' if pair[1] == '[' else '['}{pair[2]},{pair[3]}{pair[4]}",
        ]
        missed = [text for text in missed if text.count(",") == 1 or text[0] + text[-1] == pair[1] + pair[4]]
    elif is_plain_list(inside):
        missed += [inside.rpartition(",")[0]]
    return missed


def print_agreement(right: collections.Counter, asked: collections.Counter) -> None:
    """A table of forms by files, in percent."""
    forms = list(dict.fromkeys(form for _, form in asked))
    names = [file.replace("olympiad_bench", "olympiad") for file in FILES]
    print("form".ljust(21) + "".join(f"{name:>15}" for name in names) + f"{'all':>10}")
    for form in [*forms, "all"]:
        cells = []
        for file in [*FILES, "all"]:
            keys = [key for key in asked if form in (key[1], "all") and file in (key[0], "all")]
            total = sum(asked[key] for key in keys)
            cells.append(f"{100 * sum(right[key] for key in keys) / total:.2f}" if total else "-")
        print(form.ljust(21) + "".join(f"{cell:>15}" for cell in cells[:-1]) + f"{cells[-1]:>10}")
    agreed, total = sum(right.values()), sum(asked.values())
    print(f"{agreed} of {total} agree: {100 * agreed / total:.3f}%")


if __name__ == "__main__":
    main()
