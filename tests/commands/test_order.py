"""The verb `order`: its lines are what a stream delivers, its table what the simulation found."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.commands.order.example import LETTERS, Example, draw
from pipeline.commands.order.plan import Request, assignments, simulation
from pipeline.common.errors import UserError
from pipeline.data.decode import ImageDecode
from pipeline.data.index import Index, build_index
from pipeline.data.settings import DataConfig
from pipeline.data.stream.datasets import open_indexes
from tests.data.order_reference import Shape, SlowOrder, lane_samples
from tests.processes import ROOT
from tests.shards import open_stream, write_tiny_shards

NUMBERS = {"batch_size": 12, "seed": 5, "lanes": [6], "interleave": [3], "window": [5]}


def config_of(shards: Path, folder: Path, data: str = "") -> str:
    path = folder / "run.yaml"
    path.write_text(
        f"run_dir: {folder}/run\n"
        "batch_size: 12\n"
        "seed: 5\n"
        f"data: {{{data or f'path: {shards}'}, decode: {{kind: image, size: 32}}, split: train,"
        " lanes: 6, interleave: 3, window: 5}\n"
        "model: {backbone: {kind: burgess}}\n"
    )
    return str(path)


def delivered(data: DataConfig, steps: range, world: int) -> list[tuple[int, int, str]]:
    """(step, rank, key) in the order of steps and slots."""
    rows = []
    for rank in range(world):
        with open_stream(
            data,
            index=open_indexes(data),
            seed=5,
            batch_size=12,
            first_step=steps.start,
            num_steps=len(steps),
            rank=rank,
            world=world,
        ) as stream:
            for step, batch in zip(steps, stream, strict=True):
                rows += [(step, rank, key) for key in batch.keys]
    return sorted(rows, key=lambda row: row[:2])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_lines_say_what_a_stream_delivers(tiny_shards: Path, world: int):
    request = Request(str(tiny_shards), world_size=[world], **NUMBERS)
    lines = list(assignments(request, range(3, 9)))
    numbers = {name: NUMBERS[name][0] for name in ("lanes", "interleave", "window")}
    data = DataConfig(path=str(tiny_shards), split="all", decode=ImageDecode(size=8), **numbers)
    expected = delivered(data, range(3, 9), world)
    assert [(line["step"], line["rank"], line["key"]) for line in lines] == expected
    assert [line["slot"] for line in lines] == [*range(12)] * 6
    index = Index.open(tiny_shards)
    for line in lines[:5]:
        shard = [entry.name for entry in index.shards].index(line["shard"])
        keys = index.table(shard).keys()
        assert line["key"] in keys


def test_a_config_gives_its_own_numbers(tiny_shards: Path, tmp_path: Path):
    config = config_of(tiny_shards, tmp_path)
    lines = list(assignments(Request(config), range(2)))
    assert lines == list(assignments(Request(str(tiny_shards), split="train", **NUMBERS), range(2)))
    other = list(assignments(Request(config, overrides=["seed=6"], window=[4]), range(2)))
    numbers = NUMBERS | {"seed": 6, "window": [4]}
    assert other != lines
    assert other == list(assignments(Request(str(tiny_shards), split="train", **numbers), range(2)))


def test_lines_of_a_mixture(tiny_shards: Path, tmp_path: Path):
    write_tiny_shards(tmp_path / "more", counts=(9, 11))
    build_index(tmp_path / "more")
    parts = f"mixture: [{{path: {tiny_shards}, weight: 2}}, {{path: {tmp_path / 'more'}}}]"
    config = config_of(tiny_shards, tmp_path, parts)
    lines = list(assignments(Request(config, split="all", world_size=[2]), range(1, 4)))
    data = DataConfig(
        mixture=[{"path": str(tiny_shards), "weight": 2}, {"path": str(tmp_path / "more")}],
        split="all",
        decode=ImageDecode(size=8),
        lanes=6,
        interleave=3,
        window=5,
    )
    found = [(line["step"], line["rank"], line["key"]) for line in lines]
    assert found == delivered(data, range(1, 4), 2)
    with pytest.raises(UserError, match=r"data.mixture names several"):
        simulation(Request(config))


def test_lines_far_ahead_need_no_way_there(tiny_shards: Path):
    request = Request(str(tiny_shards), **NUMBERS)
    lines = assignments(request, range(10**12, 2 * 10**12))  # lazy at both ends
    assert next(lines)["step"] == 10**12
    assert len(list(islice(lines, 11))) == 11


def test_the_command_prints_lines_and_tables(tiny_shards: Path, capsys: pytest.CaptureFixture[str]):
    index = [str(tiny_shards), "--batch-size", "12", "--lanes", "6"]
    assert main(["order", *index, "--steps", "4:6", "--world-size", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in lines] == [["step", "slot", "rank", "shard", "key"]] * 24
    assert {line["step"] for line in lines} == {4, 5}

    options = [*index[:3], "--lanes", "4,6", "--world-size", "1,4", "--window", "5"]
    assert main(["order", *options, "--simulate", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["num_shards"]) == (60, 5)
    combinations = [(row["lanes"], row["world"]) for row in report["costs"]]
    assert combinations == [(4, 1), (4, 4), (6, 1), (6, 4)]
    assert [row["read_amplification"] for row in report["costs"]] == [1, 1, 1, 8 / 6]

    assert main(["order", *options, "--simulate"]) == 0
    about, _, rest = capsys.readouterr().out.partition("\n\n")
    assert about.startswith("60 samples of ")
    table, meanings = (part.splitlines() for part in rest.split("\n\n"))
    assert table[0].split()[:4] == ["lanes", "interleave", "window", "ranks"]
    assert table[4].split()[:4] == ["6", "8", "5", "4"]
    # Each column is explained, in the order in which it stands.
    assert [line[:13].strip() for line in meanings] == re.split(r"  +", table[0].strip())
    assert all(line[13:] for line in meanings)


@pytest.mark.parametrize(
    "example",
    [
        Example(),
        Example(shards=5, samples_per_shard=7, seed=3, interleave=3, window=5, ranks=8),
        Example(shards=1, samples_per_shard=2),  # lanes without a sample
        Example(shards=26, samples_per_shard=4, batch_size=12, lanes=6, interleave=1, ranks=3),
    ],
    ids=str,
)
def test_the_example_is_the_order(example: Example):
    shape = Shape(
        counts=(example.samples_per_shard,) * example.shards,
        seed=example.seed,
        G=example.batch_size,
        L=example.lanes,
        K=example.interleave,
        S=example.window,
    )
    sections = draw(example).split("\n\n")
    *lanes, steps = [
        [line.split() for line in section.splitlines() if re.match(r" +(lane|step|rank) +\d", line)]
        for section in sections[1:]
    ]
    slow = SlowOrder(shape)
    ranks, per_lane, *drawn = steps
    assert ranks[1:] == [str(slot * example.ranks // shape.G) for slot in range(shape.G)]
    assert per_lane[1:] == [str(slot * shape.L // shape.G) for slot in range(shape.G)]
    assert len(drawn) == -(-slow.N // shape.G)
    for number, line in enumerate(drawn):
        expected = [
            f"{LETTERS[shard]}{row}" + "'" * epoch for epoch, (shard, row), _ in slow.step(number)
        ]
        assert line == ["step", str(number), *expected]
    # The lanes: as cut, as groups of spans, merged, and in windows; all hold the same samples.
    cut, groups, merged, windows = lanes
    for lane in range(shape.L):
        samples = [f"{LETTERS[shard]}{row}" for shard, row in lane_samples(shape, 0, lane)]
        assert [word.strip("[]") for word in windows[lane][2:]] == samples
        spans = [word.strip("()") for word in groups[lane][2:]]
        assert sorted(cut[lane][2:]) == sorted(spans)
        held = [f"{n[0]}{i}" for n in spans for i in range(*ends_of(n))]
        assert sorted(held) == sorted(merged[lane][2:]) == sorted(samples)
        for span in spans:  # strictly forward
            positions = [merged[lane].index(f"{span[0]}{i}") for i in range(*ends_of(span))]
            assert positions == sorted(positions)


def ends_of(span: str) -> tuple[int, int]:
    """The samples of a span that is written as f0-3, as a range."""
    first, last = span[1:].split("-")
    return int(first), int(last) + 1


@pytest.mark.parametrize(
    "options",
    [
        "--example",
        "--simulate --shards 1280 --batch-size 512 --lanes 32,64,128 --world-size 8,128",
    ],
)
def test_the_page_shows_what_is_printed(options: str, capsys: pytest.CaptureFixture[str]):
    assert main(["order", *options.split()]) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs/order.md").read_text()
    assert f"```console\nlatentmill order {options}\n```" in page
    assert f"```text\n{printed}```" in page


def test_a_data_set_that_need_not_exist(capsys: pytest.CaptureFixture[str]):
    options = ["--shards", "50", "--samples-per-shard", "100", "--mean-bytes", "1K"]
    assert main(["order", "--simulate", *options, "--batch-size", "32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["mean_bytes"]) == (5000, 1024)
    assert report["costs"][0]["bytes_per_epoch"] == 5000 * 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{shards}"], "set --batch-size"),
        (["{shards}", "--batch-size", "12", "--lanes", "5"], "data.lanes = 5 does not divide"),
        (["{shards}", "--batch-size", "12", "--world-size", "5"], "choose one of [1, 2, 3, 4, 6"),
        (["{shards}", "--batch-size", "12", "--lanes", "4,6"], "several numbers need --simulate"),
        (["{shards}", "seed=1", "--batch-size", "12"], "has nothing to override"),
        (["{shards}", "--batch-size", "12", "--split", "test"], "the index has the splits"),
        (["{shards}/none", "--batch-size", "12"], "run `latentmill index"),
        (["{shards}/none.yaml"], "none.yaml does not exist"),
        ([], "Name a config, or the directory"),
        (["--simulate"], "or --shards and --batch-size"),
        (["--example", "--shards", "27"], "at most 26 shards"),
        (["--example", "--shards", "0"], "must be at least 1"),
        (["--example", "--lanes", "2,4"], "several numbers need --simulate"),
        (["--example", "--world-size", "3"], "does not divide the global batch of 8"),
        (["--example", "--lanes", "3"], "data.lanes = 3 does not divide"),
        (["--example", "{shards}"], "leave out"),
        (["--simulate", "--shards", "0", "--batch-size", "3"], "must be at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_explained(
    tiny_shards: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    argv = [option.replace("{shards}", str(tiny_shards)) for option in options]
    assert main(["order", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--steps", "3"], ["--steps", "3:3"], ["--lanes", "0"]])
def test_wrong_options_are_wrong_use(options: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["order", "x", *options])
    assert "write " in capsys.readouterr().err
