"""What of a tar does not arrive as a sample, or not whole: the reasons, and counts by reason.

    members --TarScan, group_samples, ContentChecks--> Tally, one per shard
            --table, manifest--> Index.left_out, `lines_of` --> index, verify, doctor, a run's start

What a sound tar holds and a rule leaves out is counted; `Damage` is reported with its place.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pipeline.common.console import plural, printable

DUNDER_NAME = "dunder_name"
METADATA = "metadata"
SIDECAR = "sidecar"
NO_SUFFIX = "no_suffix"
EMPTY_NAME = "empty_name"
SYMBOLIC_LINK = "symbolic_link"
HARD_LINK = "hard_link"
SPECIAL = "special"
UNKNOWN_TYPE = "unknown_type"
COMPRESSED = "compressed"
DOTTED_SUFFIX = "dotted_suffix"
SECOND_PICTURE = "second_picture"
LABEL_NOT_INTEGER = "label_not_integer"
LABEL_MINUS_ONE = "label_minus_one"
TEXT_NOT_UTF8 = "text_not_utf8"
JSON_INVALID = "json_invalid"


@dataclass(frozen=True)
class Damage:
    """One fault of a shard: its kind, offset, number of bytes, and a description."""

    kind: str
    offset: int
    num_bytes: int
    text: str


class Count(TypedDict):
    """How many members a reason holds for, and the name of the first; of a data set, its shard."""

    count: int
    example: str


Counts = dict[str, Count]  # by reason


@dataclass(frozen=True)
class Reason:
    """Why a member is left out. is_loss: it may be something that the user wanted."""

    words: str
    remedy: str
    is_loss: bool = True


# Words and remedies stand behind `12 files: `.
REASONS: Mapping[str, Reason] = {
    DUNDER_NAME: Reason(
        "in a folder like `__x__`, which webdataset takes for metadata",
        "rename the folder, or pack the pictures with `latentmill pack`",
    ),
    METADATA: Reason("named like `__x__`, metadata by webdataset's rule", "", is_loss=False),
    SIDECAR: Reason("left by macOS, Windows or a NAS beside the real ones", "", is_loss=False),
    NO_SUFFIX: Reason(
        "without a suffix (no dot in the name, or the name begins with one)",
        "give those a suffix that belong to samples",
    ),
    EMPTY_NAME: Reason("without a name", "write the tar again, with names"),
    SYMBOLIC_LINK: Reason(
        "symbolic link, which holds no content", "write the tar again with `tar --dereference` (-h)"
    ),
    HARD_LINK: Reason(
        "hard link to no earlier member of its tar",
        "write the tar again with `tar --hard-dereference`",
    ),
    SPECIAL: Reason("device, pipe or volume label", "", is_loss=False),
    UNKNOWN_TYPE: Reason(
        "of a type that plain tars do not have", "write the tar again with `tar --format=pax`"
    ),
    COMPRESSED: Reason(
        "compressed, and byte ranges cannot be read", "decompress it and index again"
    ),
    DOTTED_SUFFIX: Reason(
        "ending in .png or the like under another whole suffix (a key ends at the first dot of the "
        "name)",
        "use one dot per name, or pack the folder with `latentmill pack`; if these are kinds of "
        "members, name them in data.decode.suffixes",
    ),
    SECOND_PICTURE: Reason(
        "picture of a sample that has one under another suffix, as 1.png beside 1.jpg: a sample is "
        "read by one of them",
        "if both are samples, pack the folder with `latentmill pack`",
        is_loss=False,
    ),
    LABEL_NOT_INTEGER: Reason(
        ".cls that is no integer of 64 bits, so that the sample has no label",
        "write the class's number (the text stays in the shard)",
    ),
    LABEL_MINUS_ONE: Reason(
        ".cls of -1, which also stands for no label", "number the classes from 0", is_loss=False
    ),
    TEXT_NOT_UTF8: Reason(
        ".txt that is not UTF-8", "convert it with `iconv -t UTF-8` (the bytes stay in the shard)"
    ),
    JSON_INVALID: Reason(".json that cannot be parsed", "mend it (the bytes stay in the shard)"),
}

# What a picture's or an array's file is called, whether or not it is read by default.
IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
)
PICTURE_SUFFIXES = IMAGE_SUFFIXES | {"npy"}
MAX_KINDS = 20  # different suffixes; more are dots in file names
# Files in any folder, and all in folders of their own.
SIDECAR_NAME = re.compile(
    r"(?:^|/)(?:\._[^/]*$|(?i:\.ds_store|thumbs\.db|ehthumbs\.db|desktop\.ini)$"
    r"|(?:__MACOSX|\.AppleDouble|@eaDir)/)"
)


class Tally:
    """Counts members by reason."""

    def __init__(self) -> None:
        self.counts: Counts = {}

    def add(self, reason: str, name: str) -> None:
        """Count a member."""
        found = self.counts.get(reason)
        if found is None:
            self.counts[reason] = {"count": 1, "example": name}
        else:
            found["count"] += 1


def is_sidecar(name: str) -> bool:
    """Tell whether an operating system left this file, in any folder."""
    return SIDECAR_NAME.search(name) is not None


def is_dotted(suffix: str) -> bool:
    """Tell whether a whole suffix, as `00001.png`, hides a picture's suffix."""
    return "." in suffix and suffix.rpartition(".")[2] in PICTURE_SUFFIXES


def folded(suffixes: Mapping[str, int]) -> dict[str, int]:
    """Counts by suffix; of very many, those with a dot together by their ends, as `*.png`."""
    if len(suffixes) <= MAX_KINDS:
        return dict(suffixes)
    ends: Counter[str] = Counter()
    for suffix, count in suffixes.items():
        _, dot, end = suffix.rpartition(".")
        ends[f"*.{end}" if dot else end] += count
    return dict(ends.most_common())


def summed(shards: Mapping[str, Counts]) -> Counts:
    """Add the counts of shards, by their names, in the sequence of REASONS."""
    total: Counts = {}
    for shard, of_shard in shards.items():
        for reason, found in of_shard.items():
            example = f"{found['example']} in {shard}" if shard else found["example"]
            total.setdefault(reason, {"count": 0, "example": example})["count"] += found["count"]
    others = sorted(total.keys() - REASONS.keys())  # of a later version
    return {reason: total[reason] for reason in (*REASONS, *others) if reason in total}


def lines_of(left_out: Counts, *, only_losses: bool = False) -> Iterator[str]:
    """Yield a line per reason for people: count, words, example, remedy."""
    for name, found in left_out.items():
        reason = REASONS.get(name, Reason(name, ""))
        if reason.is_loss or not only_losses:
            remedy = f"; {reason.remedy}" if reason.remedy else ""
            files, example = plural(found["count"], "file"), printable(found["example"])
            yield f"{files}: {reason.words}, such as {example}{remedy}"


def remedy_of_repeats(examples: Sequence[Sequence[str]]) -> str:
    """What to do about samples with the key of an earlier one; examples: (key, shards)."""
    if any(len(set(shards)) < len(shards) for _, *shards in examples):
        return (
            "where the members of one sample do not stand together, write the tar again with "
            "`tar --sort=name`, or pack the folder with `latentmill pack`"
        )
    return "each counts as a sample: pack each once, or keep both if the images differ"
