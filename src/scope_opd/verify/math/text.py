r"""Spelling: the one LaTeX spelling in which answers are read and compared. No mathematics happens here.

``clean`` maps the many ways to write the same formula (``\dfrac``, ``\left(``, ``\leqslant``, ``$..$``, unicode signs,
spacing commands, ``\mathrm`` words) to one, and nothing else: two answers whose clean forms are equal are the same
answer. ``split`` cuts at separators outside all brackets. Letters of other alphabets that look like Latin ones stay
what they are, and so do digits other than 0-9 and their full-width forms.

Not covered: TeX macros, comments (a ``%`` is per cent), verbatim text.
"""

from __future__ import annotations

import re

MAX_LENGTH = 3000
"""Characters of an answer that is read as mathematics; no honest final answer is longer."""
MAX_DEPTH = 40
"""Nested brackets of an answer that is read as mathematics."""

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ",
    "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ",
    "∀": r"\forall ",
    "∃": r"\exists ", "°": r"^{\circ}", "º": r"^{\circ}", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "“": '"', "”": '"', "’": "'", "‘": "'", "′": "'", "″": "''", "、": ",", "。": ".", "∶": ":", "⁄": "/", "∕": "/",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u3000": " ", "\u2002": " ", "\u2003": " ", "\t": " ",
    "\u200b": None, "\u200c": None, "\u200d": None, "\u2060": None, "\ufeff": None,
}  # fmt: skip
_TABLE = str.maketrans(_SIGNS | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})
_ROOT = re.compile(r"√\s*(\([^()]*\)|[0-9]+|[a-z])")

_DELIMITERS = re.compile(r"(?<!\\)\$\$?|\\\(|\\\)|(?<!\\)\\\[(?![0-9.]+(?:pt|em|ex)\])|(?<!\\)\\\]")
_SIZES = re.compile(
    r"\\(?:left|right|middle|bigl|bigr|bigm|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|mleft|mright)"
    r"(?![a-zA-Z])\s*\.?(?=[^0-9]|$)|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|allowbreak)(?![a-zA-Z])"
)
_THOUSANDS_IDIOM = re.compile(r"(?<=[0-9])\s*(?:\{\s*,\s*\}|,\\!|\\,|\\!,)\s*(?:\\!)?\s*(?=[0-9]{3}(?![0-9]))")
_SPACES = re.compile(
    r"(?<!\\)\\[,;:! >]|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|phantom\{\s*\})(?![a-zA-Z])|~|\s+"
)
_NEGATIVE_SPACE = re.compile(r"\\!")
_FRAC = re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])")
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textsc|mathrm|mbox|hbox|emph|operatorname\*?)\s*\{"
)
_FONTS = re.compile(r"\\(?:mathbf|boldsymbol|mathit|mathsf|bm|pmb|vec|overrightarrow|rm|bf|it)(?![a-zA-Z])\s*")
_RENAMED = {
    r"\langle": "(",
    r"\rangle": ")",
    r"\lt": "<", r"\gt": ">", r"\le": r"\leq", r"\ge": r"\geq", r"\leqslant": r"\leq", r"\geqslant": r"\geq",
    r"\ne": r"\neq", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\cupdot": r"\cup",
    r"\land": r"\text{and}", r"\lor": r"\text{or}", r"\vee": r"\text{or}", r"\wedge": r"\text{and}",
    r"\varnothing": r"\emptyset", r"\degree": r"^{\circ}", r"\lvert": "|", r"\rvert": "|", r"\vert": "|",
    r"\iff": r"\Leftrightarrow", r"\colon": ":", r"\percent": r"\%", r"\dots": r"\ldots", r"\dotsc": r"\ldots",
    r"\cdots": r"\ldots", r"\dotsb": r"\ldots", r"\infin": r"\infty", r"\euro": "€", r"\pounds": "£",
    r"\textdollar": r"\$", r"\simeq": r"\approx", r"\thickapprox": r"\approx", r"\hfill": "", r"\sim": r"\approx",
}  # fmt: skip
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_EMPHASISED = re.compile(r"(\*\*|__|\*|_|`)(?![*_`\s])([^*_`]+)\1")
_TEXT_CIRCLED = re.compile(r"\\textcircled\s*\{?\s*(?:\\[a-z]+\s*)?\{?\s*([1-9])\s*\}{0,2}")
_CIRCLED = re.compile("[\u2460-\u2473]")
_FRENCH_LEFT = re.compile(r"(?<![\w)\]}.])\]((?:[^\[\]()]|\\[a-z]+)*[,;][^\[\]()]*)([\[\])])")
_FRENCH_RIGHT = re.compile(r"([\[\](])([^\[\]()]*[,;][^\[\]()]*)\[(?![\w\\.-])")
_CHOOSE = re.compile(r"\{?\s*(\w+)\s*\\choose\s*(\w+)\s*\}?")
_HTML = re.compile(r"<(sup|sub)>(.*?)</\1>")
_DOUBLED = re.compile(r"(?<!\\)\\(?:\\\\)*(?!\\)")
_ORDINAL = re.compile(
    r"(?<=[0-9])\s*(?:\^\s*\{?\s*(?:\\text\s*\{\s*)?(?:th|st|nd|rd)\s*\}?\s*\}?|(?:th|st|nd|rd)(?![a-zA-Z]))"
)
_FUNCTION_WORDS = {
    "tg": "tan",
    "ctg": "cot",
    "arctg": "arctan",
    "arcctg": "arccot",
    "lg": "log",
    "sh": "sinh",
    "ch": "cosh",
}
_FUNCTION_WORD = re.compile(
    r"\\text\s*\{\s*(arcsin|arccos|arctan|arctg|arcctg|sinh|cosh|tanh|sin|cos|tan|cot|tg|ctg|lg|ln|log|exp|gcd|lcm|max|min)\s*\}"
    r"|\\(tg|ctg|arctg|arcctg|lg|sh|ch)(?![a-zA-Z])"
)
_PLUS_INFINITY = re.compile(r"(^|[(\[,;=<>]\s*)\+\s*\\infty")
_BLACKBOARD = re.compile(r"\\mathbb\s+([A-Z])(?![a-zA-Z])")
_EMPTY_TEXT = re.compile(r"\\text\s*\{\s*\}")
_INDEX_WORD = re.compile(r"_\s*(?:\{\s*\\text\s*\{([^{}]*)\}\s*\}|\\text\s*\{([^{}]*)\})")
_MOD = re.compile(
    r"\(?\s*(?:\\(?:pmod|mod|bmod)(?![a-z])|\\text\s*\{\s*\(?mod\s*\}|(?<=\()mod(?![a-z]))\s*\{?\s*([0-9a-zA-Z]+)\s*\}?\s*\)?"
)
_DOUBLE = re.compile(r"\\\\(?=[a-zA-Z({\[$%])")
_ARRAY = re.compile(r"\\begin\{")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_BRACED_COMMA = re.compile(r"\{\s*,\s*\}")
_OPEN, _CLOSE = "([{", ")]}"
_STRAY_STOP = re.compile(r"\.(?=\s*[)\]}]|\s*\\\})(?<![0-9.]\.\.)")
_SHORT_FRAC = re.compile(
    r"\\frac(?!\s*\{[^{}]*\}\s*\{)\s*(?:\{([^{}]*)\}|([0-9a-zA-Z])|(\\[a-zA-Z]+))\s*(?:\{([^{}]*)\}|([0-9a-zA-Z])|(\\[a-zA-Z]+))"
)
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\[[0-9a-z]\])?\s*([0-9a-zA-Z])")


def clean(answer: str) -> str:
    """The one spelling of an answer: see the module. Idempotent on its own output for plain answers."""
    text = _TEXT_CIRCLED.sub(lambda m: chr(0x245F + int(m[1])), answer) if r"\textcircled" in answer else answer
    text = text.translate(_TABLE).strip()
    if emphasised := _EMPHASISED.fullmatch(text):
        text = emphasised[2]
    if _CIRCLED.search(text):
        text = _CIRCLED.sub(lambda m: f" {ord(m[0]) - 0x245F} ,", text).replace(",,", ",").rstrip(" ,")
    if "<su" in text:
        text = _HTML.sub(lambda m: ("^{" if m[1] == "sup" else "_{") + m[2] + "}", text)
    if "\\\\" in text and not _DOUBLED.search(text):  # every backslash is written twice
        text = text.replace("\\\\", "\\")
    if "√" in text:
        text = _ROOT.sub(lambda m: r"\sqrt{" + m[1].removeprefix("(").removesuffix(")") + "}", text)
    if text.count("$") - text.count("\\$") == 1:
        text = text.replace("$", "\\$") if "\\$" not in text else text  # one sign alone is money
    if "[" in text or "]" in text:
        text = _FRENCH_LEFT.sub(r"(\1\2", _FRENCH_RIGHT.sub(r"\1\2)", text))
    if "choose" in text:
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    if "\\" in text or "$" in text or "{" in text:
        if not _ARRAY.search(text):
            text = _DOUBLE.sub(r"\\", text)
        text = _THOUSANDS_IDIOM.sub("", text)
        text = _DELIMITERS.sub(" ", text)
        text = _COMMAND.sub(lambda m: _RENAMED.get(m[0], m[0]), text)
        text = _SIZES.sub("", text)
        text = _FRAC.sub(r"\\frac", text)
        text = _WORDS.sub(r"\\text{", text)
        text = _BLACKBOARD.sub(r"\\mathbb{\1}", text)
        text = _EMPTY_TEXT.sub("", text).replace(r"\text{\$}", r"\$")
        text = _FUNCTION_WORD.sub(lambda m: "\\" + _FUNCTION_WORDS.get(m[1] or m[2], m[1] or m[2]) + " ", text)
        text = _PLUS_INFINITY.sub(r"\1\\infty", text)
        text = _INDEX_WORD.sub(lambda m: "_{" + (m[1] or m[2] or "").strip() + "}", text)
        text = _FONTS.sub("", text)
        text = _NEGATIVE_SPACE.sub("", text)
        text = _DEGREES.sub(r"^{\\circ}", text)
        text = _BRACED_COMMA.sub(",", text).replace("{:}", ":")
    if "mod" in text:
        text = _MOD.sub(r" \\bmod \1", text)
    text = _ORDINAL.sub("", _SPACES.sub(" ", text).strip())
    if re.search(r"[A-Za-z]{2}!$", text):
        text = text[:-1]  # "Yes!", but n! is a factorial
    while text and (text[-1] in ".,;:" and not text.endswith("..")):
        text = text[:-1].rstrip()
    return _unwrapped(_STRAY_STOP.sub("", text))


def _unwrapped(text: str) -> str:
    """Without braces (not ``\\{``) or a ``\\boxed{}`` around everything."""
    for _ in range(8):
        start = re.match(r"(?:\\boxed|\\fbox)?\s*\{", text)
        if (
            not start
            or text[start.end() - 2 : start.end() - 1] == "\\"
            or closing(text, start.end() - 1) != len(text) - 1
        ):
            break
        inner = text[start.end() : -1].strip()
        if (
            start[0] == "{"
            and re.search(r"\||\\mid|:", inner)
            and re.search(r"[<>=]|\\(?:leq|geq|neq|in)(?![a-z])", inner)
        ):
            break  # {x | x > 2}: a set too
        if start[0] == "{" and len(split(inner, ",;")) > 1:
            break  # {1, 2}: a set
        text = inner
    return text


def closing(text: str, opened: int) -> int:
    """Where the bracket opened at ``opened`` closes, brackets of all kinds pairing with each other; -1: nowhere."""
    depth, at = 0, opened
    while at < len(text):
        char = text[at]
        if char == "\\" and text[at + 1 : at + 2] not in ("{", "}"):
            at += 2
            continue
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0:
                return at
            if depth < 0:
                return -1
        at += 1
    return -1


def depth(text: str) -> int:
    """The deepest nesting of brackets."""
    deepest = level = 0
    for char in text:
        if char in _OPEN:
            level += 1
            deepest = max(deepest, level)
        elif char in _CLOSE:
            level -= 1
    return deepest


def split(text: str, separators: str) -> list[str]:
    """Cut at the characters of ``separators`` that stand outside all brackets and environments."""
    parts, level, start, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            if text.startswith(r"\begin{", at):
                level += 1
            elif text.startswith(r"\end{", at):
                level -= 1
            elif text[at + 1 : at + 2] in ("{", "}"):
                at += 1
                continue
            at += 2
            continue
        if char in _OPEN:
            level += 1
        elif char in _CLOSE:
            level -= 1
        elif level == 0 and char in separators:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    parts.append(text[start:])
    return parts


def split_at(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cut at matches of ``pattern`` that begin outside all brackets; the matches themselves stand between the parts."""
    parts: list[str] = []
    start = 0
    for match in pattern.finditer(text):
        if match.start() >= start and _level(text, match.start()) == 0:
            parts += [text[start : match.start()], match[0]]
            start = match.end()
    return [*parts, text[start:]]


def _level(text: str, end: int) -> int:
    level, at = 0, 0
    while at < end:
        char = text[at]
        if char == "\\" and text[at + 1 : at + 2] not in ("{", "}"):
            level += text.startswith(r"\begin{", at) - text.startswith(r"\end{", at)
            at += 2
            continue
        level += (char in _OPEN) - (char in _CLOSE)
        at += 1
    return level


def full_fractions(text: str) -> str:
    r"""``\frac12`` and ``\sqrt2`` with their braces."""

    def braces(match: re.Match[str]) -> str:
        top, bottom = (next(part for part in match.groups()[i : i + 3] if part is not None) for i in (0, 3))
        return rf"\frac{{{top}}}{{{bottom}}}"

    return _SHORT_ROOT.sub(r"\\sqrt\1{\2}", _SHORT_FRAC.sub(braces, text))


def squeezed(text: str) -> str:
    """Without any white space and braces around single characters: for comparing spellings."""
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "~", full_fractions(text))
    text = re.sub(r"\s+", "", text)
    return re.sub(r"([_^])\{([0-9a-zA-Z])\}", r"\1\2", text)
