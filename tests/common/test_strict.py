"""The strict loader against a small tree that has every shape a config may have."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from pipeline.common import strict
from pipeline.common.component import Component
from pipeline.common.errors import UserError
from pipeline.common.strict.dialect import parse, write


class Noise(Component):
    kind: Literal["noise"] = "noise"
    sigma: float | tuple[float, float] = 0.1


class Masking(Component):
    kind: Literal["masking"] = "masking"
    ratio: float = Field(default=0.5, gt=0, le=1)


Corruption = Annotated[Noise | Masking, Field(discriminator="kind")]


class Constant(Component):
    kind: Literal["constant"] = "constant"
    value: float = 1.0


class Linear(Component):
    kind: Literal["linear"] = "linear"
    start: float = 0.0
    end: float = 1.0


Schedule = Annotated[Constant | Linear, Field(discriminator="kind")]


class Optimizer(Component):
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)


class Tree(Component):
    path: Path
    precision: Literal["fp32", "bf16"] = "fp32"
    num_steps: int = 100
    compile: bool = False
    corruptions: tuple[Corruption, ...] = ()
    one: Corruption = Masking(ratio=0.3)
    beta: float | Schedule = 1.0
    optimizer: Optimizer = Optimizer(lr=5e-4)
    ema: Optimizer | None = None
    fractions: dict[str, float] = {"train": 1.0}

    @model_validator(mode="after")
    def _rule(self) -> "Tree":
        if self.num_steps == 13:
            raise ValueError("num_steps 13 does not go with this tree")
        return self


def load(text: str, *overrides: str) -> Tree:
    return strict.load(Tree, None, overrides, text=text)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"The configuration has {len(lines)} problem{'s' * (len(lines) > 1)}:"
    return lines


def test_scalars_mean_what_they_look_like():
    value, faults = parse(
        "{a: 1e-4, b: None, c: null, d: no, e: 017, f: 1:30, g: 1_000, h: 2026-01-01, i: .5, "
        "j: -3, k: True, l: 1e6, m: 0x10, n: '1'}"
    )
    assert not faults
    assert value == {
        "a": 1e-4,
        "b": None,
        "c": None,
        "d": "no",
        "e": 17,
        "f": "1:30",
        "g": "1_000",
        "h": "2026-01-01",
        "i": 0.5,
        "j": -3,
        "k": True,
        "l": 1e6,
        "m": "0x10",
        "n": "1",
    }
    assert isinstance(value["a"], float)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(trees)
def test_what_is_written_reads_back_equal(value: object):
    back, faults = parse(write(value))
    assert not faults
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029 ", "\r", "a\r\nb"])
def test_unusual_line_breaks_are_kept(text: str):
    assert parse(write({"key": text, text: 1}))[0] == {"key": text, text: 1}
    assert yaml.safe_load(write({"key": text})) == {"key": text}


@given(st.text(alphabet="0123456789eE+-._:xNonetrufalsyTFO~ ", max_size=8))
def test_no_string_changes_its_type_on_the_way(text: str):
    assert parse(write({"key": text}))[0] == {"key": text}
    assert yaml.safe_load(write({"key": text})) == {"key": text}  # nor for other readers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: x\npath: y", "path: given twice, on lines 1 and 2"),
        ("path: x\none: {kind: noise, kind: noise}", "kind: given twice, on lines 2 and 2"),
        ("path: &a x\nprecision: *a", "line 2, column 12: not valid YAML: aliases"),
        ("path: !!python/name:os.system", "line 1, column 7: not valid YAML: could not determine"),
        ("path: !!binary aGk=", "line 1, column 7: not valid YAML: could not determine"),
        ("path: [x", "not valid YAML"),
        ("path: x\n---\npath: y", "not valid YAML: but found another document"),
        ("- path", "the file must be a mapping of settings"),
        ("path: \x07", "not valid YAML"),
        ("num_steps: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_strict_yaml(text: str, message: str):
    assert any(message in problem for problem in problems(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pth: 3", "pth: unknown key (got 3); did you mean 'path'?"),
        ("num_steps: '5'", 'num_steps: must be an integer (got "5")'),
        ("num_steps: 2.5", "num_steps: must be an integer (got 2.5)"),
        ("num_steps: 1e6", "num_steps: must be an integer (got 1000000.0)"),
        ("num_steps: true", "num_steps: must be an integer (got true)"),
        ("compile: 1", "compile: must be true or false (got 1)"),
        ("path: 3", "path: must be a string (got 3)"),
        ("precision: fp23", "precision: must be 'fp32' or 'bf16' (got \"fp23\"); did you mean"),
        ("one: {kind: masking, ratio: 2}", "one.ratio: must be less than or equal to 1 (got 2)"),
        ("one: {ratio: 2}", "one.kind: required; choices: noise, masking"),
        (
            "one: {kind: maskin}",
            "one.kind: unknown kind 'maskin' (choices: noise, masking); did you mean 'masking'?",
        ),
        ("one: 3", "one: must be a mapping (got 3)"),
        (
            "one: {kind: noise, zzz: 2}",
            "one.zzz: unknown key (got 2); known keys: kind, sigma",
        ),
        (
            "corruptions: [{kind: noise}, {kind: masking, ratioo: 1}]",
            "corruptions.1.ratioo: unknown key (got 1); did you mean 'ratio'?",
        ),
        (
            "one: {kind: noise, sigma: abc}",
            'one.sigma: must be a number (got "abc") or must be a list (got "abc")',
        ),
        ("beta: {kind: linear, strt: 1}", "beta.strt: unknown key (got 1); did you mean 'start'?"),
        (
            "beta: {kind: cosine}",
            "beta.kind: unknown kind 'cosine' (choices: constant, linear)",
        ),
        ("fractions: {train: x}", 'fractions.train: must be a number (got "x")'),
        ("optimizer: {betas: [1]}", "optimizer.betas.1: required, but not given"),
        ("optimizer: {lr: .inf}", "optimizer.lr: must be a finite number (got Infinity)"),
        ("num_steps: 13", "num_steps 13 does not go with this tree"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(text: str, message: str):
    full = text if text.startswith(("path", "pth")) else f"path: x\n{text}"
    found = problems(full)
    assert any(problem.startswith(message) for problem in found), found
    assert len(found) == (2 if text.startswith("pth") else 1)  # pth: path is missing, too


def test_all_problems_come_at_once():
    found = problems(
        "precision: fp16\nprecision: fp32x\none: {kind: nose}\nnum_steps: x",
        "modle=3",
        "corruptions.0.ratio=1",
        "--optimizer.lr=-1",
        "word",
        "compile=a: b",
    )
    starts = [problem.split(":")[0] for problem in found]
    assert sorted(starts) == sorted(
        ["precision", '"word"', "compile", "corruptions.0.ratio", "path", "precision", "num_steps"]
        + ["one.kind", "optimizer.lr", "modle"]
    )


def test_long_values_are_cut():
    (problem,) = problems("path: x\nnum_steps: " + "y" * 500)
    assert len(problem) < 150
    assert "..." in problem


def test_file_errors(tmp_path: Path):
    (tmp_path / "vae.yaml").write_text("path: x")
    with pytest.raises(UserError, match="vea.yaml does not exist; did you mean 'vae.yaml'?"):
        strict.load(Tree, tmp_path / "vea.yaml", [])
    with pytest.raises(UserError, match="cannot be read"):
        strict.load(Tree, tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes(b"path: \xe9")
    with pytest.raises(UserError, match="cannot be read as text"):
        strict.load(Tree, tmp_path / "latin.yaml", [])
    (tmp_path / "bad.yaml").write_text("pth: x")
    with pytest.raises(UserError, match=r"bad.yaml has 2 problems:\n  path: required"):
        strict.load(Tree, tmp_path / "bad.yaml", [])


def test_no_file_means_defaults_and_overrides():
    assert strict.load(Tree, None, ["path=x"]) == Tree(path=Path("x"))


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUM_STEPS", "7")
    monkeypatch.setenv("num_steps", "7")
    assert load("path: x").num_steps == 100


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides_take_yaml_values(dashes: str):
    tree = load(
        "path: x\ncorruptions: [{kind: noise}, {kind: masking}]",
        f"{dashes}num_steps=5",
        f"{dashes}compile=True",
        f"{dashes}optimizer.lr=1e-5",
        f"{dashes}corruptions.0.sigma=[0.1, 2]",
        f"{dashes}optimizer.betas.1=0.5",
        f"{dashes}beta=" + "{kind: linear, end: 4}",
        f"{dashes}path=a=b",
        f"{dashes}fractions.held_out=0.25",
    )
    assert tree == Tree(
        path=Path("a=b"),
        num_steps=5,
        compile=True,
        corruptions=(Noise(sigma=(0.1, 2.0)), Masking()),
        beta=Linear(end=4),
        # the part that the file leaves out starts from its default, not from its class's
        optimizer=Optimizer(lr=1e-5, betas=(0.9, 0.5)),
        fractions={"train": 1.0, "held_out": 0.25},
    )


def test_an_override_inside_a_default_keeps_the_rest_of_it():
    assert load("path: x", "optimizer.betas.0=0.8").optimizer.lr == 5e-4
    assert load("path: x", "one.ratio=0.7").one == Masking(ratio=0.7)
    assert load("path: x", "ema.lr=0.7").ema == Optimizer(lr=0.7)
    assert load("path: x\nema: {lr: 1}", "ema=None").ema is None


def test_another_kind_starts_afresh_whatever_the_order():
    text = "path: x\none: {kind: masking, ratio: 0.9}\ncorruptions: [{kind: masking, ratio: 0.9}]"
    for order in (1, -1):
        overrides = ["one.kind=noise", "one.sigma=3", "corruptions.0.kind=noise"][::order]
        tree = load(text, *overrides)
        assert tree.one == Noise(sigma=3)
        assert tree.corruptions == (Noise(),)
    assert load(text, "one.kind=masking").one == Masking(ratio=0.9)  # the same kind: kept
    assert load(text, "one.ratio=0.2", "one={kind: masking}").one == Masking(ratio=0.2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps", '"num_steps": an override is written a.b=value'),
        ("=3", '"=3": an override is written a.b=value'),
        ("a..b=3", '"a..b=3": an override is written a.b=value'),
        ("corruptions.1.sigma=3", "corruptions.1.sigma: '1' is not an index into its 1 elements"),
        ("corruptions.-1.sigma=3", "corruptions.-1.sigma: '-1' is not an index"),
        ("corruptions.7=3", "corruptions.7: '7' is not an index into its 1 elements (from 0)"),
        ("path.x=3", "path.x: 'path' is \"x\", which has no settings inside"),
        ("num_steps=[", "num_steps: line 1, column 2: not valid YAML"),
        ("optimiser.lr=3", "optimiser: unknown key (got {\"lr\": 3}); did you mean 'optimizer'?"),
    ],
)
def test_an_override_that_leads_nowhere(override: str, message: str):
    found = problems("path: x\ncorruptions: [{kind: noise}]", override)
    assert any(problem.startswith(message) for problem in found), found


def test_the_same_override_twice_is_a_contradiction():
    assert problems("path: x", "num_steps=1", "--num_steps=2") == ["num_steps: overridden twice"]


def test_dump_loads_to_an_equal_tree_and_states_the_defaults():
    tree = load("path: '1e-4'\nbeta: {kind: linear}", "ema.lr=1e-7", "one.kind=noise")
    text = strict.dump(tree)
    assert strict.load(Tree, None, [], text=text) == tree
    assert "num_steps: 100" in text


def test_difference_names_each_setting_once():
    left = load("path: x\ncorruptions: [{kind: noise}, {kind: masking}]\nema: {lr: 1}")
    right = load("path: y\ncorruptions: [{kind: masking}]", "optimizer.betas.1=0.5")
    assert strict.difference(left, left) == []
    assert strict.difference(left, right) == [
        ("path", "x", "y"),
        ("corruptions.0.kind", "noise", "masking"),
        ("corruptions.1", {"kind": "masking", "ratio": 0.5}, strict.ABSENT),
        ("optimizer.betas.1", 0.99, 0.5),
        ("ema", {"lr": 1.0, "betas": [0.9, 0.99]}, None),
    ]


def test_difference_of_plain_trees_shows_absent_values():
    assert strict.difference({"a": 1}, {"b": {"c": 2}}) == [
        ("a", 1, strict.ABSENT),
        ("b", strict.ABSENT, {"c": 2}),
    ]
