"""Prints how dense the code is, with the targets beside the figures.

    python tests/bench/code_style.py            # exit status 1 when a target is missed
    python tests/bench/code_style.py --report   # prints only

A code line holds code: no blank line, no line of comments alone, no docstring. Its characters are
counted without the indentation, its tokens by `tokenize` without line ends, comments and indents.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train.py", "sample.py", "insert.py")
MAX_COLUMNS = 100

LAYOUT_TOKENS = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


@dataclass
class Counts:
    """Sums over the files of one group."""

    lines: int = 0
    code_lines: int = 0
    characters: int = 0
    tokens: int = 0
    comments: int = 0
    comprehensions: int = 0
    nested: int = 0
    arguments: int = 0
    hinted: int = 0
    long_lines: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """The files that are judged together, and their limits ("at most"); hints are "at least"."""

    name: str
    files: list[Path]
    limits: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="print only; exit status 0")
    parser.add_argument("--details", action="store_true", help="list long lines and missing hints")
    args = parser.parse_args()

    columns = []
    for group in groups():
        counts = Counts()
        for path in group.files:
            count_file(path, counts)
        columns.append((group, counts, figures(counts)))

    missed = print_table(columns)
    if args.details:
        print_details(columns)
    if missed:
        print("missed:", *missed, sep="\n  ")
    return 1 if missed and not args.report else 0


def groups() -> list[Group]:
    """The four parts of the repository and the targets of each."""
    package = sorted((ROOT / "alchemy").rglob("*.py"))
    page = [path for path in (ROOT / "alchemy").rglob("*") if path.suffix in (".js", ".css")]
    core_limits = {
        "characters per code line": 40,
        "tokens per code line": 9.5,
        "lines over 100 columns": 0,
        "comprehensions per 100 lines": 4,
        "nested per 1000 lines": 0,
        "public arguments hinted, %": 100,
    }
    elsewhere = {"lines over 100 columns": 0, "nested per 1000 lines": 0}
    scripts = [ROOT / name for name in SCRIPTS]
    return [
        Group("core", sorted((ROOT / "alchemy").glob("*.py")), core_limits | {"lines": 2700}),
        Group("alchemy, scripts", package + page + scripts, core_limits | {"lines": 7000}),
        Group(
            "weights/toy", sorted((ROOT / "weights/toy").rglob("*.py")), elsewhere | {"lines": 1700}
        ),
        Group("tests", sorted((ROOT / "tests").rglob("*.py")), elsewhere | {"lines": 9000}),
    ]


def count_file(path: Path, counts: Counts) -> None:
    """Adds one file to `counts`. Of JavaScript and CSS only the lines are counted."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    name = str(path.relative_to(ROOT))
    counts.lines += len(lines)
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            counts.long_lines.append(f"{name}:{number}")
    if path.suffix != ".py":
        return

    tree = ast.parse(text, name)
    count_tokens(text, lines, docstring_lines(tree), counts)
    count_comprehensions(tree, counts)
    for function, label in public_functions(tree, name):
        count_hints(function, label, counts)


def count_tokens(text: str, lines: list[str], docstrings: set[int], counts: Counts) -> None:
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT:
            counts.comments += 1
        if token.type in LAYOUT_TOKENS or first in docstrings:
            continue
        counts.tokens += 1
        code.update(range(first, last + 1))
    for number in code:
        stripped = lines[number - 1].strip()
        if stripped:  # a blank line inside a string literal
            counts.code_lines += 1
            counts.characters += len(stripped)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines that docstrings take."""
    taken: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            taken.update(range(docstring.lineno, docstring.end_lineno + 1))
    return taken


def count_comprehensions(tree: ast.Module, counts: Counts) -> None:
    """A comprehension is nested if it lies inside another one, or has two `for`."""
    for node in ast.walk(tree):
        if not isinstance(node, COMPREHENSIONS):
            continue
        counts.comprehensions += 1
        inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
        counts.nested += len(node.generators) > 1 or len(inner) > 1


def public_functions(tree: ast.Module, name: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions of the module and methods of its classes whose names have no leading underscore."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node, f"{name}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                private = isinstance(method, FUNCTIONS) and method.name.startswith("_")
                if isinstance(method, FUNCTIONS) and (not private or method.name == "__init__"):
                    yield method, f"{name}:{method.lineno} {node.name}.{method.name}"


def count_hints(function: ast.FunctionDef, label: str, counts: Counts) -> None:
    """Counts every argument but self and cls; *args and **kwargs need a hint as well."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    arguments += [argument for argument in (spec.vararg, spec.kwarg) if argument]
    arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    hinted = [argument for argument in arguments if argument.annotation]
    counts.arguments += len(arguments)
    counts.hinted += len(hinted)
    if len(hinted) < len(arguments):
        counts.untyped.append(label)


def figures(counts: Counts) -> dict[str, float]:
    """The rows of the table, from the sums."""
    code = max(counts.code_lines, 1)
    return {
        "characters per code line": counts.characters / code,
        "tokens per code line": counts.tokens / code,
        "lines over 100 columns": len(counts.long_lines),
        "comprehensions per 100 lines": 100 * counts.comprehensions / code,
        "nested per 1000 lines": 1000 * counts.nested / code,
        "public arguments hinted, %": 100 * counts.hinted / max(counts.arguments, 1),
        "comments per 100 lines": 100 * counts.comments / code,
        "lines": counts.lines,
    }


def print_table(columns: list[tuple[Group, Counts, dict[str, float]]]) -> list[str]:
    """Prints the figures with their targets and returns the misses."""
    print(f"{'':30}" + "".join(f"{group.name:>24}" for group, _, _ in columns))
    missed = []
    for row in columns[0][2]:
        cells = []
        for group, _, values in columns:
            value, limit = values[row], group.limits.get(row)
            cell = f"{value:.0f}" if row.startswith("lines") else f"{value:.1f}"
            if limit is None:
                cells.append(f"{cell:>24}")
                continue
            # The figures are compared unrounded: 99.96 % of the arguments are not all of them.
            at_least = row.startswith("public arguments")
            failed = value < limit if at_least else value > limit
            target = f"{'>=' if at_least else '<='} {limit:g}"
            cells.append(f"{cell + ' ' + target:>22} {'!' if failed else ' '}")
            if failed:
                missed.append(f"{group.name}: {row} {cell} (target {limit:g})")
        print(f"{row:30}" + "".join(cells))
    return missed


def print_details(columns: list[tuple[Group, Counts, dict[str, float]]]) -> None:
    for group, counts, _ in columns:
        for line in counts.long_lines:
            print(f"over {MAX_COLUMNS} columns: {line}")
        if "public arguments hinted, %" in group.limits:
            for label in counts.untyped:
                print(f"without a type hint: {label}")


if __name__ == "__main__":
    raise SystemExit(main())
