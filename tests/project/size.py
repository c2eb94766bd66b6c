"""Lines of code by folder, neither blank nor comment; docstrings count as comments.

python tests/project/size.py FOLDER ...
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(text: str) -> int:
    """Count the lines of a Python file that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*LAYOUT, tokenize.COMMENT):
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def main(folders: list[str]) -> None:
    """Print a row per folder, and one per wing below `pipeline`."""
    for top in folders:
        by_wing: Counter[str] = Counter()
        num_files: Counter[str] = Counter()
        for path in sorted(Path(top).rglob("*.py")):
            parts = path.relative_to(top).parts
            wing = f"{top}/{parts[0]}" if len(parts) > 1 else f"{top}/*.py"
            by_wing[wing] += code_lines(path.read_text())
            num_files[wing] += 1
        print(f"{top:<28}{sum(by_wing.values()):>8,} lines in {sum(num_files.values()):>4} files")
        if top == "pipeline":
            for wing, count in by_wing.most_common():
                print(f"  {wing:<26}{count:>8,} lines in {num_files[wing]:>4} files")


if __name__ == "__main__":
    main(sys.argv[1:])
