"""What kind of Python each token of a tokenizer stands in: a keyword, a name, an operator ..."""

import io
import keyword
import token
import tokenize
from collections.abc import Iterator, Sequence

KINDS = ("keyword", "name", "operator", "number", "string", "comment", "whitespace")
LAYOUT = {token.NEWLINE, token.NL, token.INDENT, token.DEDENT}
OF_TYPE = {token.OP: "operator", token.NUMBER: "number", token.STRING: "string", token.COMMENT: "comment"}
FSTRING = {getattr(token, name, None) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")} - {None}


def spans(text: str) -> Iterator[tuple[int, int, str]]:
    """Where in a text its Python tokens lie, and of which kind they are; none after what is no Python."""
    starts = [0]
    for line in io.StringIO(text, newline="\n"):
        starts.append(starts[-1] + len(line))
    try:
        for found in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            if found.type == token.ENDMARKER or found.type in LAYOUT:
                continue
            kind = "string" if found.type in FSTRING else OF_TYPE.get(found.type)
            if found.type == token.NAME:
                kind = "keyword" if keyword.iskeyword(found.string) else "name"
            if kind is None:
                return
            (row, column), (last, end) = found.start, found.end
            yield starts[row - 1] + column, starts[last - 1] + end, kind
    except (tokenize.TokenError, SyntaxError):
        return


def token_kinds(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """
    Args:
        offsets: where in `text` each token of a tokenizer begins and ends.

    Returns:
        Of each the index of its kind in `KINDS`: that of the Python token at its first character that is no whitespace;
        -1 for special tokens, which have no text, and in what Python cannot read.
    """
    kinds = [-1] * len(text)
    end = 0
    for start, stop, kind in spans(text):
        kinds[start:stop] = [KINDS.index(kind)] * (stop - start)
        end = stop
    whitespace = KINDS.index("whitespace")
    found = []
    for start, stop in offsets:
        visible = next((i for i in range(start, stop) if not text[i].isspace()), None)
        if visible is not None:
            found.append(kinds[visible])
        else:  # layout, or a space inside a string or a comment
            inside = [kinds[i] for i in range(start, stop) if kinds[i] >= 0]
            found.append(inside[0] if inside else whitespace if start < min(stop, end) else -1)
    return found
