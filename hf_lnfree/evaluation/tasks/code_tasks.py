"""Multiple choice over Python code, out of the interpreter's standard library: documents for lm-evaluation-harness.

Read by the harness beside the YAML files, in processes that may not have this package: it imports none of it. Files are
those that `hf_lnfree` holds out when it trains on the standard library.
"""

import hashlib
import io
import keyword
import random
import sysconfig
import tokenize
from pathlib import Path

import datasets

HELD_OUT = 0.05  # share of files, by the hash of their text
LEFT_OUT = {
    *("config", "distutils", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "tkinter"),
    *("turtledemo", "__pycache__"),
}
CONTEXT = 12  # lines
BRACKETS = {")": "(", "]": "[", "}": "{"}


def held_out_files():
    """The texts of the standard library that training on it holds out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if any(part.split("-")[0] in LEFT_OUT or part in LEFT_OUT for part in path.relative_to(root).parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT:
            yield text


def multiple_choice(make, count=200, seed=0):
    """`count` documents of `make`, which yields (context, right choice, wrong choices) for a file."""
    rng = random.Random(seed)
    rows = []
    for text in held_out_files():
        for context, right, wrong in make(text, rng):
            choices = [right, *wrong]
            rng.shuffle(choices)
            rows.append({"context": context, "choices": choices, "target": choices.index(right)})
    rng.shuffle(rows)
    return {"test": datasets.Dataset.from_list(rows[:count])}


def next_line(**kwargs):
    """Which of four lines of the file follows?"""

    def make(text, rng):
        lines = text.splitlines()
        wanted = [i for i in range(CONTEXT, len(lines)) if len(lines[i].strip()) > 8]
        for i in rng.sample(wanted, min(30, len(wanted))):
            others = sorted({line for line in lines if len(line.strip()) > 8} - {lines[i]})
            if len(others) >= 3:
                context = "\n".join(lines[i - CONTEXT : i]) + "\n"
                yield context, lines[i], rng.sample(others, 3)

    return multiple_choice(make)


def python_tokens(text):
    """The tokens of a Python text; none if it cannot be tokenised."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return []


def before(text, token):
    """The lines up to a token."""
    row, column = token.start
    lines = text.splitlines(keepends=True)
    return "".join(lines[max(0, row - 1 - CONTEXT) : row - 1]) + lines[row - 1][:column]


def identifiers(**kwargs):
    """Which of four identifiers of the file stands here? All of them occurred before."""

    def make(text, rng):
        names = [t for t in python_tokens(text) if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]
        for index in sorted(rng.sample(range(len(names)), min(30, len(names)))):
            known = {name.string for name in names[:index]}
            right = names[index].string
            others = sorted(known - {right})
            if right in known and len(others) >= 3:
                yield before(text, names[index]), right, rng.sample(others, 3)

    return multiple_choice(make)


def brackets(**kwargs):
    """Which bracket closes here?"""

    def make(text, rng):
        closing = [t for t in python_tokens(text) if t.type == tokenize.OP and t.string in BRACKETS]
        for token in rng.sample(closing, min(30, len(closing))):
            yield before(text, token), token.string, sorted(set(BRACKETS) - {token.string})

    return multiple_choice(make)
