"""One spelling for what LaTeX, Unicode and prose write in many ways."""

import functools
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from krl.rewards.units import FUNCTIONS, UPRIGHT, remove_units

# Longer texts are compared as text only. The longest answers of MATH and OlympiadBench have 250 characters.
MAX_CHARACTERS = 400

_New = str | Callable[[re.Match[str]], str]


def _rewrites(*pairs: tuple[str, _New]) -> tuple[tuple[re.Pattern[str], _New], ...]:
    return tuple((re.compile(pattern), new) for pattern, new in pairs)


def _rewrite(text: str, rewrites: tuple[tuple[re.Pattern[str], _New], ...]) -> str:
    for pattern, new in rewrites:
        text = pattern.sub(new, text)
    return text


# ---------------------------------------------------------------- characters

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\u00d7": r"\times ", "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ", "\u2219": r"\cdot ", "\u2022": r"\cdot ", "\u00f7": "/", "\u2044": "/", "\u00b0": r"^\circ ",
    "\u00ba": r"^\circ ", "\u2103": r"^\circ C", "\u2109": r"^\circ F", "\u221e": r"\infty ", "\u2264": r"\leq ",
    "\u2265": r"\geq ", "\u2260": r"\neq ", "\u2248": r"\approx ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}", "\u211a": r"\mathbb{Q}", "\u2115": r"\mathbb{N}", "\u2102": r"\mathbb{C}",
    "\u2032": "'", "\u2019": "'", "\u2033": "''", "\u2026": "...", "\u212b": r"\AA ", "\u00c5": r"\AA ",
    "\u230a": r"\lfloor ", "\u230b": r"\rfloor ", "\u2308": r"\lceil ", "\u2309": r"\rceil ", "\u2236": ":",
    "\u2126": r"\Omega ", "\u00b5": r"\mu ", "\u3002": ".", "\u3001": ",", "\u2609": r"\odot ",
    "\u20ac": "", "\u00a3": "", "\u00a5": "", "\u20b9": "", "\u20a9": "", "\u20bd": "", "\u00a2": "",  # currencies
    "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]", "\u221a": r"\sqrt",
    "\u0393": r"\Gamma ", "\u0394": r"\Delta ", "\u0398": r"\Theta ", "\u039b": r"\Lambda ", "\u03a0": r"\Pi ",
    "\u03a3": r"\Sigma ", "\u03a6": r"\Phi ", "\u03a8": r"\Psi ", "\u03a9": r"\Omega ",
    "\u03d5": r"\phi ", "\u03f5": r"\epsilon ",
}  # fmt: skip
_GREEK = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "o", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
]  # fmt: skip
_UNICODE = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width ASCII
    | {chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(_GREEK)}
    | _SYMBOLS
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f"
_LOWERED = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u208a\u208b\u2099"


def _on_line(text: str) -> str:
    """Raised, lowered and vulgar characters as Unicode has them on the line: 12 and 1\u20442."""
    return unicodedata.normalize("NFKC", text)


_CHARACTERS = _rewrites(
    (
        rf"(?<![{_RAISED[:10]}])[{_RAISED[:10]}]++\u2044[{_LOWERED[:10]}]++|(?<!\d)\d++\u2044\d++"
        r"|[\u00bc-\u00be\u2150-\u215e]",
        lambda m: "\\frac{" + _on_line(m[0]).replace("\u2044", "}{") + "}",
    ),
    (rf"[{_RAISED}]+", lambda m: f"^{{{_on_line(m[0])}}}"),
    (rf"[{_LOWERED}]+", lambda m: f"_{{{_on_line(m[0])}}}"),
    (r"(?:[0-9]\u0305)+", lambda m: "\\overline{" + m[0].replace("\u0305", "") + "}"),
    (r"([\u221a\u221b\u221c]) ?(\d++(?:\.\d++)?|[a-zA-Z])", r"\1{\2}"),
)

# ---------------------------------------------------------------- numbers

_TIMES_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _repeating(match: re.Match[str]) -> str:
    whole, begin, *blocks = match.groups(default="")
    return _sum_of_digits(whole, begin, "".join(blocks))


def _going_on(match: re.Match[str]) -> str:
    """A decimal with dots: 0.1666... goes on with what it ends in, 3.14159... is what its digits are."""
    whole, digits = match.groups()
    for size in range(1, len(digits) // 2 + 1):
        block = digits[-size:]
        begin = digits
        while begin.endswith(block):
            begin = begin[:-size]
        if len(digits) - len(begin) >= (3 if size == 1 else 2) * size:
            return _sum_of_digits(whole, begin, block)
    return f"{whole}.{digits}"


def _sum_of_digits(whole: str, begin: str, block: str) -> str:
    """The fraction that a decimal with a repeating block of digits is."""
    repeated_once = int(whole + begin + block or 0) - int(whole + begin or 0)
    return _fraction(Fraction(repeated_once, 10 ** len(begin) * (10 ** len(block) - 1)))


def _degrees(match: re.Match[str]) -> str:
    return _fraction(Fraction(match[1]) + Fraction(match[2]) / 60 + Fraction(match[3] or 0) / 3600)


def _fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


# ---------------------------------------------------------------- normal form

_ROOT = r"(?<![a-zA-Z])\\?sqrt ?(\[\d\])?\(([^()]*)\)"
# In this order, on texts with single spaces. All take linear time: of two ways to match one text, the first is final.
_BEFORE_UNITS = _rewrites(
    (r"^\\[\[(]|\\[\])]$", ""),
    (r"\^ ?(?:\{ ?((?:\\prime ?)++)\}|(\\prime)(?![a-zA-Z]))", lambda m: "'" * m[0].count("p")),
    (rf"(?<![\d.])(\d*+\.)(\d) ?({UPRIGHT}\{{ ?)?(?:repeating|recurring)(?![a-zA-Z])(?(3) ?\}})", r"\1(\2)"),
    (
        r"(?<![\d.])(\d*+)\.(\d*+)(?:\\(?:overline|bar)\s?(?:\{(\d+)\}|(\d))|\((\d++)\)"
        r"|\\dot\s?\{?(\d)\}?(?:(\d*+)\\dot\s?\{?(\d)\}?)?)",
        _repeating,
    ),
    (r"(?<![\d.])(\d*+)\.(\d++) ?(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.)", _going_on),
    (
        r"(?<![\d.])(\d++)\s?\^\s?\{?\s?\\circ\s?\}?\s?(\d++(?:\.\d++)?)\s?'(?!')"
        r"(?:\s?(\d++(?:\.\d++)?)\s?(?:''|\"))?",
        _degrees,
    ),
    (r"(?<![\w.])\d{1,3}(?:_\d{3})++(?![\w{])", lambda m: m[0].replace("_", "")),
    (
        rf"(?<=[\d}}]) ?({UPRIGHT}\{{ ?)?({'|'.join(_TIMES_OF_TEN)})(?![a-zA-Z])",
        lambda m: rf"\times10^{{{_TIMES_OF_TEN[m[2]]}}} {m[1] or ''}",
    ),
    (r"(?<=\d)(?:\{,\}| ?, ?\\! ?)(?=\d{3}(?!\d))", ""),  # 10{,}080 and 10,\!080
    (r"(?<=\d)'(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])|\\(?:display|text)style(?![a-zA-Z])", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"(?<![a-zA-Z$])(?:US|CA|AU|NZ|HK)\\?\$(?= ?[-+\d.\\])", ""),
    (r"(?<![a-zA-Z])(?:USD|EUR|GBP|JPY|INR|CNY|RMB|CAD|AUD|CHF|Rs\.?) ?(?=[-+\d.\\])", ""),
    (r"\\(?:pounds|euro|yen|textdollar|texteuro|textsterling)(?![a-zA-Z])", ""),
    (r"(?<!\\)\$ ?, ?\$", ", "),
    (r"\\?\$|\\[()](?![a-zA-Z])", ""),
    (r"\\(?:SI|qty) ?\{([^{}]*)\} ?\{[^{}]*\}", r"\1"),
    (r"\\textcolor ?\{\w*+\} ?\{([^{}]*)\}", r"{\1}"),
    (r"\\color ?\{\w*+\}", ""),
    (r"\\(?:boldsymbol|bm) ?\{([^{}]*)\}", r"{\1}"),
    (r"\{\\rm ([^{}\\]*)\}|\\(?:rm|bf|it)(?![a-zA-Z]) ?([^{}\\]*)$", r"\\text{\1\2}"),
    (r"\{\} ?(?=\^)", ""),
    (rf"{UPRIGHT}\{{ ?\}}", ""),
    (rf"{UPRIGHT}\{{ ?({FUNCTIONS}) ?\}}", r"\\\1 "),
    (r"(?<![\s.,;:\\])[\s.,;:]++$", ""),
    (rf"(?<=\d) ?(?:{UPRIGHT}\{{ ?(?:a\.? ?m|A\.?M)\.? ?\}}|(?:a\.m|A\.?M)\b\.?)", " am"),
    (rf"(?<=\d) ?(?:{UPRIGHT}\{{ ?(?:p\.? ?m|P\.?M)\.? ?\}}|(?:p\.m|P\.?M)\b\.?)", " pm"),
    (r"\\not ?=", r"\\neq "),
    (r"\\not ?\\in(?![a-zA-Z])", r"\\notin "),
    (r"^ ?(?:\\approx(?![a-zA-Z])|=)", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"<=|\\leqslant|\\le(?![a-zA-Z])", r"\\leq "),
    (r">=|\\geqslant|\\ge(?![a-zA-Z])", r"\\geq "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\(?:colon(?![a-zA-Z])|mathbin ?\{:\})", ":"),
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"\\varnothing(?![a-zA-Z])|\\\{ ?\\\}|^\{ ?\}$", r"\\emptyset "),
    (r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z])) ?(?:[CF]\b)?|\\degrees?(?![a-zA-Z])", ""),
    (r"(?<![\w.^}])(\d++(?:\.\d++)?) ?(?:''?|\")(?=$|[,)])", r"\1"),  # 5'' are inches, or seconds of an arc
    (rf"(?:\\%|%|{UPRIGHT}\{{ ?(?:percent|%|\\%) ?\}}|\bpercent\b)", "%"),
    (rf"[,;]? ?(?:{UPRIGHT}\{{ ?,? ?(?:and|or) ?\}}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])) ?", ", "),
)
_AFTER_UNITS = _rewrites(
    (rf"{UPRIGHT}\{{([^{{}}]*)\}}", r"\1"),
    (r"(?<=\d) *+([ap])\.? ?m\b\.?", r"\1m"),
    (_ROOT, r"\\sqrt\1{\2}"),
    (r"(?<![a-zA-Z\\])sqrt ?(\d++(?:\.\d++)?|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=[)\]}]) ?(?:U|\\bigcup(?![a-zA-Z])) ?(?=[(\[{\\])", r"\\cup "),
    (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
    (r"\{ ?10 ?\} ?\^", "10^"),
    (r"\^ ?\( ?([-+]? ?\d++) ?\)", r"^{\1}"),
    (r"(?<=\d) (?=\d{3}(?!\d))", ""),  # 1 234 567
    (r"(?<=\d) (\d++)/(\d++)$", r"\\frac{\1}{\2}"),  # the mixed number 1 4/5
    (r"\^ ?([-+]) ?(\d++|[a-zA-Z])(?![\w.^(\\{!])", r"^{\1\2}"),
    (r"\\frac ?(\d) ?(?=[\d{])", r"\\frac{\1}"),
    (rf"\\frac ?(\\(?:{'|'.join(_GREEK)})(?![a-zA-Z])|[a-zA-Z]) ?(?=[\d{{])", r"\\frac{\1}"),
    (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"\\sqrt ?(\d)", r"\\sqrt{\1}"),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"(\\[a-zA-Z]++) (?=[a-zA-Z])", "\\1\0"),  # the space that ends a command stays
    (r"(?<=\d) (?=\d)", "\0"),  # 1 2 is not 12
    (r"(?:, ?){2,}", ", "),
    (r" ?, (?=\d)", ",\0"),  # 5, 100 is not 5100
    (r"\s++", ""),
    ("\0", " "),
    (r"\*\*", "^"),
    (r"([_^])([0-9a-zA-Z])(?![0-9a-zA-Z])", r"\1{\2}"),
    (r"(?:^|(?<=[(\[{,;=]))\+(?=[\w\\(.])", ""),
    (r"^[ ,;:]++|(?<![ .,;:])[ .,;:]++$", ""),
    (r"^(?:[a-zA-Z]=)?-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?(?:~[^,]*)?$", lambda m: m[0].replace(",", "")),
    (", ", ","),
    (r"^\{([^{}\\]*,[^{}]*)\}$", r"\\{\1\\}"),
    (
        r"([\[\]])([^\[\](),;]+[,;][^\[\](),;]+)([\[\]])",
        lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"),
    ),
)


@functools.lru_cache(maxsize=8192)
def normal_form(text: str) -> str:
    """A text with one spelling for what LaTeX and prose write in many ways; long texts as they are.

    What may be a unit follows a tilde, see `krl.rewards.units`.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return text
    text = " ".join(_rewrite(text, _CHARACTERS).translate(_UNICODE).split()).strip("*` ")
    text = remove_units(" ".join(_rewrite(text, _BEFORE_UNITS).split()))
    return _rewrite(text, _AFTER_UNITS)
