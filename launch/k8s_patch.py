"""A patch file of the user, merged into the objects of a manifest before it is printed.

    FILE: YAML documents, each a part of an object -> Kubernetes' strategic merge -> the object

The rule is that of `kubectl patch`: mappings are merged, null removes, a list of MERGE_KEYS is
merged element by element, any other list is replaced. Kubernetes checks the result.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from launch.job import JobError

# Lists that a manifest has -> what tells their elements apart, by Kubernetes' API (patchMergeKey).
MERGE_KEYS = {
    **dict.fromkeys(("containers", "initContainers", "env", "volumes", "imagePullSecrets"), "name"),
    "volumeMounts": "mountPath",
}
Tree = dict[str, Any]


def patched(objects: Sequence[Tree], path: Path) -> list[Tree]:
    """The objects of a manifest with a patch file merged into them; JobError if it does not fit."""
    found = {one["kind"]: one for one in objects}
    for patch in _documents(path):
        kind = patch.get("kind", "Job")
        if not isinstance(kind, str) or kind not in found:
            raise JobError(
                f"--patch {path}: {kind} is not in the manifest, which has {', '.join(found)}."
            )
        ours, theirs = found[kind]["metadata"], patch.get("metadata")
        for name in ("name", "namespace") if isinstance(theirs, dict) else ():
            if cast(Tree, theirs).get(name, ours.get(name)) != ours.get(name):
                # The objects find each other by them.
                raise JobError(f"--patch {path}: {kind}.metadata.{name} cannot be changed.")
        found[kind] = _merge(found[kind], patch, f"--patch {path}: {kind}")
    return list(found.values())


def _documents(path: Path) -> list[Tree]:
    """The mappings in a file; empty documents are left out."""
    try:
        found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"--patch {path}: {' '.join(str(error).split())}.") from error
    found = [document for document in found if document is not None]
    if not found or not all(isinstance(document, dict) for document in found):
        raise JobError(
            f"--patch {path} is no part of an object: write, for example, "
            "`spec: {suspend: true}` for the Job."
        )
    return cast(list[Tree], found)


def _merge(old: Any, patch: Any, where: str) -> Any:
    """`old` with a patch merged into it, both at the place `where`; neither is changed."""
    if not isinstance(patch, dict):
        return patch
    merged: Tree = dict(cast(Tree, old)) if isinstance(old, dict) else {}
    for name, value in cast(Tree, patch).items():
        here = f"{where}.{name}"
        if value is None:
            merged.pop(name, None)
        elif name in MERGE_KEYS and isinstance(value, list):
            elements = cast(list[Any], value)
            merged[name] = _merge_list(merged.get(name) or [], elements, MERGE_KEYS[name], here)
        else:
            merged[name] = _merge(merged.get(name), value, here)
    return merged


def _merge_list(old: Sequence[Tree], patch: Sequence[Any], key: str, where: str) -> list[Tree]:
    """Two lists, elements with the same key merged; new ones stand at the end."""
    merged = {element[key]: element for element in old}
    for element in patch:
        name = cast(Tree, element).get(key) if isinstance(element, dict) else None
        if not isinstance(name, str | int):
            raise JobError(f"{where} has an element without {key}, or with one that is no name.")
        merged[name] = _merge(merged.get(name), element, where)
    return list(merged.values())
