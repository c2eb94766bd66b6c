"""The settings page: made from the models, with a meaning for every setting."""

import re

import pytest

from docs import settings
from pipeline.config import TrainConfig
from pipeline.export.settings import ExportConfig
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "settings.md").read_text()


def filled(text: str) -> str:
    source = [text]
    settings.fill_in(None, "settings", source)
    return source[0]


def all_models(model: settings.Model) -> dict[settings.Model, None]:
    """A model and all that it may hold."""
    found, todo = {model: None}, [model]
    for one in todo:
        held = (m for f in one.model_fields.values() for m in settings.models(f.annotation))
        for inner in held:
            if inner not in found:
                found[inner] = None
                todo.append(inner)
    return found


@pytest.mark.parametrize("root", [TrainConfig, ExportConfig])
def test_every_setting_says_what_it_means(root: settings.Model):
    models = all_models(root)
    assert len(models) > 5
    names = [(model, name) for model in models for name in model.model_fields if name != "kind"]
    mute = [f"{m.__module__}.{m.__name__}.{n}" for m, n in names if not settings.meaning(m, n)]
    assert not mute, f"settings without a comment above or beside them: {mute}"


@pytest.mark.parametrize("root", [TrainConfig, ExportConfig])
def test_every_component_says_what_it_is(root: settings.Model):
    assert not [model for model in all_models(root) if not settings.purpose(model)]


def test_the_page_shows_every_setting_once_and_no_gap():
    text = filled(PAGE)
    assert "<!--" not in text
    parts = text.split("\n## ")
    for root, part in ((TrainConfig, parts[2]), (ExportConfig, parts[3])):
        models = all_models(root)
        labels = re.findall(r"^\((.*)\)=$", part, re.MULTILINE)
        assert sorted(labels) == sorted(map(settings.label, models))
        num_fields = sum(len(model.model_fields.keys() - {"kind"}) for model in models)
        assert len(re.findall(r"^\| `", part, re.MULTILINE)) == num_fields


def test_a_line_has_name_choices_bounds_default_and_meaning():
    text = filled(
        "<!-- settings of pipeline.config.TrainConfig: precision data.interleave run_dir -->"
    )
    precision, interleave, run_dir = text.splitlines()[2:]
    assert precision.startswith("| `precision` | `fp32` or `bf16` or `fp64` | `fp32` | ")
    assert interleave.startswith("| `data.interleave` | integer, ≥ 1, ≤ 1024 | `8` | K: shards ")
    assert run_dir.startswith("| `run_dir` | text | **required** | where the run ")


def test_a_setting_that_does_not_exist_is_noticed():
    with pytest.raises(KeyError, match="nothing"):
        filled("<!-- settings of pipeline.config.TrainConfig: data.nothing -->")
