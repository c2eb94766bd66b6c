"""Plain English: no sentence that confused readers, one meaning per name, no empty docstring.

Every check is a function from sources to findings, `FILE:LINE: what, and what to say instead`; the
tests run it on the repository, and on made-up text that it must find.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.processes import ROOT
from tests.project.test_readme import tracked

HERE = Path(__file__).relative_to(ROOT).as_posix()
OURS = ("pipeline/", "launch/", "latentmill/")  # whose names are looked at
PROSE = (*OURS, "benchmarks/", "examples/", "docker/", "docs/", "configs/", "README.md")
PROSE += ("CONTRIBUTING.md", "Makefile")

Sources = Mapping[str, str]  # file -> text

# The beginning of a sentence as it was -> what it says.
SENTENCES = {
    # README
    "Kept are the newest": "the run keeps the newest N, one per `every_samples`, the best",
    "which the next start makes up for": "a stopped evaluation is repeated at the next start",
    "are the run's (`outcome.json`": "outcome.json and failure/ hold the traceback",
    "which only lost a peer": "other ranks end without a traceback of their own",
    "tells who hangs in which phase": "rank 0 reports which rank hangs in which phase",
    "does not answer at all": "or does not respond",
    "says how long it stalled": "metrics.jsonl holds the seconds that saving took",
    "committed by one file that only one process can create": "one task per shard; a commit file, "
    "created exclusively, makes a task finished",
    "a store without either is refused": "other stores are an error",
    "same bits for any processes": "the same bits for any number of processes",
    "that of the means alone is": "`mu.std`: standard deviation of the means",
    "the same for any ranks, workers and restarts": "independent of ranks, workers and restarts",
    "it finds one by its key in": "a lookup by key takes 0.3 ms among 200,000 rows",
    "carried from an earlier start = all samples": "usable + bad + read before a restart = all",
    "who stood in which slot": "which sample filled which slot",
    "with the order planned afresh": "compared with a newly planned order",
    "row is of a second call with": "measured in a second call, on an idle machine",
    "in which nothing else ran, the ceiling was": "measured on an idle machine; the ceiling was",
    "`sum of weights` samples hold the exact shares": "every W = sum(weights) samples do",
    "must meet within": "the rendezvous times out after",
    # comments and docstrings
    "before anything is closed, which may take long": "record the failure before closing anything",
    "nobody barks": "stop the watchdog",
    "is to bark before": "timeout of collectives, longer than the watchdog's",
    "as the newest checkpoint left it": "restore the newest checkpoint",
    "Print a mistake on which this process ends": "print the error; other ranks wait for rank 0",
    "every process meets the same one": "usually all ranks have the same error",
    "they take batches to a GPU one ahead": "on a GPU, the account lags one batch",
    "Each must be used up or left": "exhaust or abandon a shard's iterator before the next",
    "one without rows is passed over": "empty shards are skipped",
    "for who wants no more": "for readers that need nothing else",
    "who starts late may forget": "a late starter may clear a fresh failure, which costs a retry",
    "after which a collective fails that a process": "timeout of collectives in seconds",
    "One: whether": "one draw: flip or not",
}
# Functions, classes and constants that mislead or play -> the field's term.
NAMES = {
    **dict.fromkeys(("meeting", "MEETING_SECONDS"), "rendezvous"),
    "_by_hand": "not_under_torchrun",
    "speak": "print_error",
    "claimed": "locked_run_dir",
    "together": "collective errors: say what all ranks do",
    "from_main": "broadcast",
    "recall": "restore",
    "judge": "update, or compare",
    "Patient": "what doctor checks: DoctorContext",
    "blaming": "reported_as_damage",
    "_bury": "_mark_bad",
    **dict.fromkeys(("Slab", "Slabs"), "ReadBuffer"),
    "Pins": "PinnedStates",
    "Patience": "Retries",
    "Pace": "ProgressTracker",
    **dict.fromkeys(("Place", "_Place", "Places"), "location, position, row, host: what it is"),
}
NAMES_IN = {  # "place" is a launch target in launch alone, "quarantine" a training's bad samples
    "launch/": {"Place"},
}
QUARANTINE = ("pipeline/export/", "pipeline/checkpoints/")  # tasks fail, checkpoints are damaged
FILES = {  # path -> what to call the file
    "pipeline/data/wds.py": "ordered_shards.py",
    "pipeline/data/raw.py": "raw_samples.py",
    "pipeline/data/rows.py": "sequential.py",
    "pipeline/latents/portable.py": "exact_math.py",
    "pipeline/evaluation/probe.py": "linear_probe.py: `probe.py` is the verb",
    "pipeline/distributed/meeting.py": "rendezvous.py",
}
STOP_WORDS = """a all an and are as at by each every for from give in is it its of on one or return
returns tell that the this to what whether with"""


def sources(*tops: str, suffix: str = "") -> dict[str, str]:
    """The tracked files below some folders."""
    names = (name for name in tracked() if name.startswith(tops) and name != HERE)
    texts = (".py", ".md", ".yaml", "Makefile")
    return {n: (ROOT / n).read_text() for n in names if n.endswith(suffix or texts)}


def sentences(files: Sources) -> Iterator[str]:
    """Sentences that readers stumbled over, also over the ends of lines."""
    for old, new in SENTENCES.items():
        pattern = re.compile(r"[\s#\"]+".join(map(re.escape, old.split())))
        for file, text in files.items():
            for match in pattern.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{file}:{line}: {old!r}; say: {new}"


def bound(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Names of functions, classes and constants: (name, line, whether it is a class)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno, isinstance(node, ast.ClassDef)
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                yield target.id, node.lineno, False


def misleading_names(files: Sources) -> Iterator[str]:
    """Names that play, or that say something else."""
    for file, text in files.items():
        if file in FILES:
            yield f"{file}:1: the file's name misleads; call it {FILES[file]}"
        allowed = set[str]().union(
            *(names for top, names in NAMES_IN.items() if file.startswith(top))
        )
        for name, line, _ in bound(ast.parse(text)):
            if name in NAMES and name not in allowed:
                yield f"{file}:{line}: {name}; call it {NAMES[name]}"
            if "quarantin" in name.lower() and file.startswith(QUARANTINE):
                yield f"{file}:{line}: {name}: quarantine means bad samples of a training only"


def classes_twice(files: Sources) -> Iterator[str]:
    """Classes of one name."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file, text in files.items():
        for name, line, is_class in bound(ast.parse(text)):
            if is_class:
                found[name].append(f"{file}:{line}")
    for name, where in found.items():
        if len(where) > 1:
            yield f"{where[0]}: the class {name} is also in {', '.join(where[1:])}; rename one"


def words_of(text: str) -> set[str]:
    """The stems of the words of a name or a sentence."""
    found: set[str] = set()
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text):
        stem = re.sub(r"(?<=..)(?:ing|ed|es|s)$", "", word.lower())
        found.add(stem.removesuffix("e") if len(stem) > 3 else stem)
    return found


def empty_docstrings(files: Sources) -> Iterator[str]:
    """Docstrings that say what names and arguments, or a returned text, say already."""
    for file, text in files.items():
        for owner in ast.walk(ast.parse(text)):
            if not isinstance(owner, ast.Module | ast.ClassDef):
                continue
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    said = words_of(ast.get_docstring(node) or "") - words_of(STOP_WORDS)
                    if said and said <= _known(node, owner):
                        yield f"{file}:{node.lineno}: the docstring of {node.name} only repeats it"


def _known(node: ast.FunctionDef | ast.ClassDef, owner: ast.AST) -> set[str]:
    known = words_of(node.name)
    known |= words_of(owner.name) if isinstance(owner, ast.ClassDef) else set()
    if isinstance(node, ast.FunctionDef):
        known |= words_of(" ".join(argument.arg for argument in node.args.args))
        last = node.body[-1]
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Constant):
            known |= words_of(str(last.value.value)) if len(node.body) == 2 else set()
    return known


def test_no_sentence_that_readers_stumbled_over():
    found = list(sentences(sources(*PROSE)))
    assert not found, "\n".join(found)


def test_names_say_what_they_mean():
    found = list(misleading_names(sources(*OURS, suffix=".py")))
    assert not found, "\n".join(found)


def test_no_class_name_stands_twice():
    found = list(classes_twice(sources(*OURS, suffix=".py")))
    assert not found, "\n".join(found)


def test_docstrings_say_more_than_the_name():
    found = list(empty_docstrings(sources(*OURS, "benchmarks/", suffix=".py")))
    assert not found, "\n".join(found)


def test_the_checks_find_what_they_are_for():
    wrapped = {"a.md": "Good.\nKept are\nthe newest.", "b.py": "x = 1\n# and nobody\n# barks\n"}
    assert [found.partition(": ")[0] for found in sentences(wrapped)] == ["a.md:2", "b.py:2"]
    assert not list(sentences({"a.md": "The newest are kept."}))

    playing = {"pipeline/x.py": "class Pace: ...\nPLACES = 1\ndef fine(): ...\nclass Place: ..."}
    playing |= {"launch/x.py": "class Place: ...", "pipeline/data/wds.py": ""}
    playing |= {"pipeline/export/x.py": "def quarantined(): ..."}
    lines = [found.split(": ")[0] for found in misleading_names(playing)]
    assert lines == [
        "pipeline/x.py:1",
        "pipeline/x.py:4",
        "pipeline/data/wds.py:1",
        "pipeline/export/x.py:1",
    ]

    two = {"a.py": "class A: ...\nclass B: ...", "b.py": "def f():\n    class A: ..."}
    assert [found[:6] for found in classes_twice(two)] == ["a.py:1"]

    empty = 'def step_count():\n    """Return the count of steps."""\n'
    text = 'def suffix():\n    """Return ".tar"."""\n    return ".tar"\n'
    good = 'def rate():\n    """The learning rate, per sample."""\n'
    assert [len(list(empty_docstrings({"a.py": one}))) for one in (empty, text, good)] == [1, 1, 0]
