"""Units behind a number, which are not compared.

What is a unit and what a variable? Upright letters (\\text{ m}, \\mathrm{m\\,s^{-1}}), the names in SURE, words of
four letters and other symbols of at least two letters after a space are units wherever a value stands before them.
A letter (300 K, 5 m, 5 m/s) may be a variable, and so may the letters of 2mg: `remove_units` leaves them and puts a
tilde before them, 300~K. Whoever compares may read that as a product, or as 300 where the other answer is a number
too. A single letter right after a number, 5m, is a variable.
"""

import re

UPRIGHT = r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|math(?:rm|bf|it|sf)|operatorname|si|unit|pu)\s*"
_COMMANDS = r"\\(?:mu|Omega|AA|circ|degree|odot|cdot|times|[dt]?frac|mathring)(?![a-zA-Z])"
_POWER = r"\^\s?(?:\{\s?[-+]?\d++\s?\}|[-+]?\d)"
_BALANCED = r"((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)"

# Taken for units even right after a number: no product of variables that is known as an answer.
_SURE = re.compile(
    r"cm|mm|km|nm|kg|ft|yd|mi|hrs?|mins?|secs?|lbs?|oz|mph|kph|rpm|deg|sq|cu|day|way|yrs?|gal|k?cal|[kMG]?Wh|"
    r"[kMGT]?Hz|[kMG]?eV|[kMG]J|[kMG]W|[kMG]Pa|atm|[mk]?mol|rad|dB|ergs?|dyn|[kM]pc|usd|eur|"
    r"USD|EUR|GBP|JPY|INR|CNY|RMB|CAD|AUD|CHF|KRW|yen"
)
_MAYBE = re.compile(
    r"(?!d[^mLlB]|c[^mLl]|h[^PL]|G[mgsTM]|k[TM]$|mM|pV|fg)"
    r"(?:[fpnµmcdhkMGT]?(?:m|g|s|A|K|N|Pa|J|W|C|V|F|S|T|H|L|l|B|bar|pc|M|eV|Hz)|"
    r"[hduDGR]|AU|ly|in|pts|Hg|pp[mb]|Wb|Bq|Sv)"
)
_SMALL_WORDS = re.compile(r"of|an?|the|in|to|on|for|at|by|each|all")
_LETTERS = set("mgshdAKNJWCVFSTHLlBMGuDbRk")  # upright, and units alone
# Words that change what a number is worth: functions, Greek letters, numbers, signs and comparisons.
FUNCTIONS = r"(?:arc)?(?:sinh?|cosh?|tanh?|coth?|csc)|ln|log|lg|exp|max|gcd|det|dim|ker|arg"
_NO_NAME = re.compile(
    rf"(?:{FUNCTIONS}|arsinh|arcosh|artanh|arcsec|sqrt|root|lcm|sgn|erf|lim|sup|inf|infinity|infinite|"
    r"alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|"
    r"upsilon|(?:var)?phi|chi|omega|"
    r"or|and|plus|minus|times|over|divided|multiplied|choose|mod|modulo|point|not|no|isn|half|halves|quarters?|"
    r"(?:third|four?th|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|hundredth|thousandth|millionth|"
    r"billionth|dozen|hundred|thousand|million|billion|trillion|lakh|crore)s?|"
    r"factorial|power|negative|positive|below|above|under|more|less|fewer|least|most|greater|smaller|except|without|"
    r"remainder|base|is|wrong|false|incorrect|impossible|unless|repeating|recurring|maybe|perhaps|"
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty)",
    re.IGNORECASE,
)
_RAISED = re.compile(r"squared|cubed", re.IGNORECASE)
_LENGTH = re.compile(
    r"[mck]?m|in|ft|yd|mi|units?|inch(?:es)?|foot|feet|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?", re.IGNORECASE
)
# What has a meaning of its own: the time of day, an era, i and e.
_NO_UNIT = re.compile(r"(?:[ap]\.?\s?m\b.*|noon|midnight|BCE?|AD|CE|[ie])\.?")
_NOT_LETTERS = re.compile(rf"{_COMMANDS}|{_POWER}|(?<=[a-zA-Z])-?\d(?![\d.])")
_PLAIN = re.compile(r"(?!\s*-)[a-zA-Z\s.'~/*(){}_\-]*+,?\s*")
_NAME = re.compile(r"[a-zA-Z]+")

_ONE_UNIT = rf"{UPRIGHT}\{{[^{{}}]*\}}(?:{_POWER})?"
_TOKEN = re.compile(
    rf"(?P<space>\s|~)|(?P<upright>{UPRIGHT}\{{{_BALANCED}\}})"
    rf"|(?P<fraction>\\[dt]?frac\s?\{{\s?{_ONE_UNIT}\s?\}}\{{\s?{_ONE_UNIT}\s?\}})"
    rf"|(?P<symbol>(?:[kMm]|\\mu\s?)?\\Omega(?![a-zA-Z])|\\AA(?![a-zA-Z])"
    rf"|\\mathring\s?\{{A\}}|_\{{?\\odot(?:\}}|(?![a-zA-Z])))"
    rf"|(?P<mu>\\mu(?![a-zA-Z]))"
    rf"|(?P<between>\\cdot(?![a-zA-Z])|[*/\-]|per(?![a-zA-Z]))|(?P<power>{_POWER}|(?<=[a-zA-Z}}])[23](?![\d.]))"
    r"|(?P<bracket>[()])|(?P<word>[a-zA-Z]+)\.?"
)
_VALUE_ENDS = re.compile(rf"(?<=[\d}})])(?![\d.])|(?<=[a-z.])(?=\s?{UPRIGHT}\{{)|(?<=\\pi)(?=\s)")
_NEXT = re.compile(r"\s?(?:$|[,;)\]}]|\\\})")


def remove_units(text: str) -> str:
    """A text without the units that stand behind its values, and with a tilde before what may be one.

    >>> remove_units("5 \\\\text{ N}\\\\cdot\\\\text{m}"), remove_units("300 K"), remove_units("5m")
    ('5', '300~K', '5m')
    """
    kept, position = [], 0
    for value in _VALUE_ENDS.finditer(text):
        begin = value.end()
        if begin < position:
            continue
        end, kind = _unit(text, begin)
        kind = kind if _NEXT.match(text, end) else ""
        kept.append(text[position : begin if kind else end])
        if kind == "maybe":
            kept.append("~" + text[begin:end].strip(" ~"))
        position = end
    return "".join([*kept, text[position:]])


def _unit(text: str, begin: int) -> tuple[int, str]:
    """Where the unit that begins here ends, and whether it is "sure", "maybe" or "" for none."""
    position, depth = begin, 0
    parts: list[str] = []
    kinds: set[str] = set()
    after_symbol, name = False, ""
    while token := _TOKEN.match(text, position):
        kind = token.lastgroup or ""
        if kind == "bracket":
            if parts[-1:] != ["/"] if token[0] == "(" else not depth:  # J/(kg K), but neither (3 m) nor 5(m)
                break
            depth += 1 if token[0] == "(" else -1
        if kind == "word":
            kind = _kind_of_word(token["word"], name, position == begin, text[begin - 1], within=bool(kinds))
        elif kind == "upright":
            kind = "sure" if _names_a_unit(token[3] or "", name) else "other"
        elif kind == "power" and token[0] in "23" and not after_symbol:  # m2, but not \text{ times }2 and \cdot2
            kind = "other"
        elif kind in ("fraction", "symbol"):
            kind = "sure"
        if names := _NAME.findall(token["word"] or token[3] or ""):
            name = names[-1]
        after_symbol = bool(names) and token[0].endswith((name, name + "}")) and _is_symbol(name)
        if kind == "other" or (kind in ("power", "between") and not kinds and token[0] not in ("/", "per")):
            break
        kinds |= {kind} & {"sure", "maybe"}
        parts.append(token[0].strip())
        position = token.end()
    if not kinds or depth or parts[-1] in ("/", "*", "-", "per", r"\cdot", r"\mu"):
        return position, ""
    if "sure" not in kinds and (parts[0] == "/" or (parts[0] and len(parts[0]) == 1 and "/" not in parts)):
        return position, ""  # 5/s and 5m
    return position, "sure" if "sure" in kinds else "maybe"


def _kind_of_word(word: str, before: str, glued: bool, after_bracket: str, within: bool) -> str:
    if _is_no_name(word, before):
        return "other"
    if _SURE.fullmatch(word) or (len(word) > 3 and not glued and (within or after_bracket != ")")):
        return "sure"
    if glued and after_bracket == "}" and len(word) > 1:  # the mg of \frac{1}{2}mg
        return "other"
    if _MAYBE.fullmatch(word):
        return "maybe" if len(word) == 1 or glued else "sure"
    return "small" if within and _SMALL_WORDS.fullmatch(word) else "other"


def _is_no_name(word: str, before: str) -> bool:
    """Whether a word changes what a number is worth, as sqrt and dozen do, and squared behind what is no length."""
    return bool(_NO_NAME.fullmatch(word) or (_RAISED.fullmatch(word) and not _LENGTH.fullmatch(before)))


def _is_symbol(name: str) -> bool:
    return bool(_SURE.fullmatch(name) or _MAYBE.fullmatch(name))


def _names_a_unit(upright: str, before: str = "") -> bool:
    """Whether upright letters are a unit, or any words behind a value, and not a number or a formula."""
    rest = _NOT_LETTERS.sub(" ", upright)
    names = _NAME.findall(rest)
    if (
        not _PLAIN.fullmatch(rest)
        or _NO_UNIT.fullmatch(upright.strip())
        or any(map(_is_no_name, names, [before, *names]))
    ):
        return False
    return (bool(names) or rest != upright) and (any(len(name) > 1 for name in names) or _LETTERS.issuperset(names))
