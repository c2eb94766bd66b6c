"""Changes of the settings of metrics with networks: settings, what is seen, given settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.config.runs import ending, evaluation
from tests.evaluation.networks import SmallFeatures, random_trunk, saved_script

Row = tuple[tuple[str, ...], Callable[..., Any], tuple[str, ...]]
FIRST, OTHER = "evaluation.metrics.0", "0" * 64


def write_networks(folder: Path) -> None:
    """The files that the rows name; `World` puts in their digests."""
    for trunk in ("alex", "vgg"):
        random_trunk(trunk, folder / f"{trunk}.pth")
    saved_script(SmallFeatures(), folder / "small.pt")


def _metric(kind: str, field: str, file: str, more: str = "") -> str:
    named = f"{field}: {{path: {{tmp}}/{file}, sha256: {{sha256:{file}}}}}"
    return f"evaluation.metrics=[{{kind: {kind}, {named}{more}}}]"


def _rows(kind: str, field: str, file: str) -> dict[str, Row]:
    size, path = "data.decode.size=32", f"evaluation.metrics.{kind}"
    given = (size, _metric(kind, field, file))
    return {
        f"{path}.kind": (given[1:], evaluation, (size, "evaluation.metrics=[]")),
        f"{path}.decodes": ((f"{FIRST}.decodes=sample",), evaluation, given),
        f"{path}.{field}.path": ((f"{FIRST}.{field}.path={{tmp}}/none",), ending, given),
        f"{path}.{field}.sha256": ((f"{FIRST}.{field}.sha256='{OTHER}'",), ending, given),
    }


def network_changes() -> dict[str, Row]:
    rows = _rows("lpips", "weights", "alex.pth")
    given = rows["evaluation.metrics.lpips.decodes"][2]
    vgg = _metric("lpips", "weights", "vgg.pth", ", trunk: vgg")
    rows["evaluation.metrics.lpips.trunk"] = ((vgg,), evaluation, given)
    for kind in ("frechet", "kid"):
        rows |= _rows(kind, "network", "small.pt")
        given = rows[f"evaluation.metrics.{kind}.decodes"][2]
        name = f"{FIRST}.network.name=other"
        rows[f"evaluation.metrics.{kind}.network.name"] = ((name,), evaluation, given)
    rows["evaluation.metrics.kid.images"] = ((f"{FIRST}.images=4",), evaluation, given)
    return rows
