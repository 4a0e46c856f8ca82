"""The mutants of a source file: one small change each, made in its text, so that lines stay where they are."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {  # each with its boundary and its opposite
    ast.Lt: ("<", "<=", ">="), ast.LtE: ("<=", "<", ">"), ast.Gt: (">", ">=", "<="), ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.MatMult: ("@", "*"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file with one change. line: where, from 1; before, after: that line, stripped."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def compiles(self) -> bool:
        try:
            compile(self.source, self.path, "exec")
        except SyntaxError:
            return False
        return True

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays when other lines of the file change."""
        return self.path, self.before, self.after


def mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    found: dict[bytes, Mutant] = {}
    data = source.encode()
    for kind, start, stop, text in _changes(source):
        changed = data[:start] + text.encode() + data[stop:]
        first, last = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", stop)
        before, after = data[first:last], changed[first : last + len(changed) - len(data)]
        old, new = (" ".join(x.strip().decode() for x in lines.splitlines()) for lines in (before, after))
        line = data.count(b"\n", 0, start) + 1
        found.setdefault(changed, Mutant(path, line, kind, old, new, changed.decode()))
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _changes(source: str) -> Iterator[tuple[str, int, int, str]]:
    """(kind, first byte, byte after the last, new text) of each change."""
    tree = ast.parse(source)
    data = source.encode()
    starts = [0, *(match.end() for match in re.finditer(b"\n", data))]

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None, "bug: a node without a place"
        assert node.end_col_offset is not None, "bug: a node without a place"
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr | ast.stmt, right: ast.expr, old: str, new: str) -> tuple[int, int, str]:
        """The operator `old` that stands between two nodes."""
        begin, end = span(left)[1], span(right)[0]
        pattern = re.escape(old).replace(r"\ ", r"\s+")
        match = re.search((rf"\b{pattern}\b" if old.isalpha() else pattern).encode(), data[begin:end])
        assert match is not None, f"bug: no {old} in {data[begin:end]!r}"
        return begin + match.start(), begin + match.end(), new

    for node in _code(tree):
        match node:
            case ast.Compare():
                for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    old, *others = COMPARISONS[type(op)]
                    for new in others:
                        yield "comparison", *between(left, right, old, new)
            case ast.BinOp() if type(node.op) in ARITHMETIC:
                old, new = ARITHMETIC[type(node.op)]
                yield "arithmetic", *between(node.left, node.right, old, new)
            case ast.AugAssign():
                if type(node.op) in ARITHMETIC:
                    old, new = ARITHMETIC[type(node.op)]
                    yield "arithmetic", *between(node.target, node.value, old, new)
                yield "statement", *span(node), "pass"
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                yield "and or", *between(node.values[0], node.values[1], old, new)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                first, last = span(node)
                kind = "not" if isinstance(node.op, ast.Not) else "arithmetic"
                yield kind, first, last, f"({data[span(node.operand)[0] : last].decode()})"
            case ast.Constant(value=bool()):
                yield "constant", *span(node), str(not node.value)
            case ast.Constant(value=int() as number):
                for new in (number + 1, number - 1):
                    yield "constant", *span(node), str(new) if new >= 0 else f"({new})"
            case ast.Constant(value=float() as number):
                yield "constant", *span(node), repr(number * 2 if number else 1.0)
            case ast.Return(value=ast.expr()) if not (
                isinstance(node.value, ast.Constant) and node.value.value is None
            ):
                yield "return", *span(node), "return None"
            case ast.Expr(value=ast.Call()) | ast.Raise():
                yield "statement", *span(node), "pass"
            case ast.Assign() if _rebinds(node):
                yield "statement", *span(node), "pass"
            case ast.If() | ast.IfExp():
                for new in ("True", "False"):
                    yield "condition", *span(node.test), new


def _rebinds(node: ast.Assign) -> bool:
    """Whether a name is given a value made of its own, so that without the line an older one goes on."""
    names = {x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    return any(isinstance(x, ast.Name) and x.id in names for x in ast.walk(node.value))


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations, decorators, what type checkers alone read, and the arguments of errors."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, (ast.FunctionDef, ast.If)) and _for_type_checkers(child):
                continue
            if isinstance(child, ast.JoinedStr):  # texts
                continue
            if isinstance(child, ast.Raise):
                yield child
                continue
            yield from _code(child)


def _for_type_checkers(node: ast.FunctionDef | ast.If) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return any(isinstance(x, ast.Name) and x.id == "overload" for x in node.decorator_list)
