"""The fenced blocks of a page, with what the line above their text says of them.

```console              commands, as typed in a shell
```python               a script; blocks with no command between them are one script
```yaml                 a config, or a part of one
```text                 what something prints, or what is no code: not run

An option behind the language changes that: `norun="REASON"` for what cannot run in a test, `exit=2`
for a mistake that is shown, `file=NAME` for text to be saved under this name. GitHub, Sphinx and
editors take the first word as the language, and show the block without its options.
"""

import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

LANGUAGES = {"console", "python", "yaml", "text"}
OPERATORS = {"|", ">", ">>", "<", "&", "&&", "||", ";"}  # written with spaces around them
OPTIONS = {"norun", "exit", "file"}
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    options: dict[str, str]
    text: str

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, from top to bottom; a mistake in what they say of themselves fails."""
    text, found = page.read_text(), list[Block]()
    for match in FENCE.finditer(text):
        if match[2].startswith("{"):
            continue  # Sphinx's own: a list of pages, a reference
        language, *rest = shlex.split(match[2]) or [""]
        options = {name: value for name, _, value in (word.partition("=") for word in rest)}
        line = text[: match.start()].count("\n") + 1
        where = f"{page.name}:{line}"
        assert language in LANGUAGES, f"{where}: its language must be one of {sorted(LANGUAGES)}"
        assert options.keys() <= OPTIONS, f"{where}: an option must be one of {sorted(OPTIONS)}"
        assert options.get("norun") != "", f"{where}: norun needs a reason"
        found.append(Block(page, line, language, options, match[3]))
    rest = FENCE.sub("", text)
    assert "```" not in rest, f"{page.name}: a fence is not closed"
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of a console block, without what the shell makes of its output."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[*takewhile(lambda word: word not in OPERATORS, line)] for line in words if line]
