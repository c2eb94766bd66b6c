"""benchmarks/loaders.py by its command line, with the loaders of this environment."""

import json

import pytest

from benchmarks.loaders import count_ids, main
from benchmarks.report import checks

COUNT = 520  # three shards, the last one small: one for each of three ranks
ONLY = ("latentmill", "stock_webdataset", "lightning_litdata")


def measured(folder, *options):
    """The JSON of a run over small pictures."""
    sizes = ("--pictures", f"16:{COUNT}", "--batch", 30, "--rounds", 1, "--workers", 1)
    file = folder / "report.json"
    argv = ("--data", folder, "--json", file, *sizes, "--only", *ONLY, *options)
    assert main([str(word) for word in argv]) == 0
    assert not list(folder.glob("scratch-*"))
    return json.loads(file.read_text())


@pytest.mark.slow
def test_ours_delivers_every_picture_once_and_what_is_absent_is_named(tmp_path, capsys):
    report = measured(tmp_path, "--parts", "ranks", "--worlds", 2)
    figures = report["sizes"]["16"]
    assert figures["count"] == COUNT
    ours = figures["ranks"]["latentmill"]["2"]
    assert (ours["duplicates"], ours["misses"], ours["wrong_pixels"]) == (0, 0, 0)
    assert len(ours["steps"]) == 2
    assert len(set(ours["steps"])) == 1
    webdataset = figures["ranks"]["stock_webdataset"]["2"]
    assert (webdataset["misses"], webdataset["wrong_pixels"]) == (0, 0)
    assert "No module named 'litdata'" in report["absent"]["lightning_litdata"]
    assert "LitData is absent: " in capsys.readouterr().out
    assert len(report["checks"]) == 5
    assert not any(check["holds"] for check in report["checks"]), "nothing was timed"


@pytest.mark.soak
def test_speed_ranks_and_resume_are_measured_in_one_go(tmp_path, capsys):
    report = measured(tmp_path, "--worlds", 3)
    printed = capsys.readouterr().out
    rows = report["sizes"]["16"]["speed"]
    webdataset = [("stock_webdataset", "stock"), ("stock_webdataset", "ours")]
    names = [(row["loader"], row["decoder"]) for row in rows]
    assert names == [("ceiling", "stock"), ("latentmill", "ours"), *webdataset]
    assert rows[0]["share"] == 1
    for row in rows[1:]:
        assert row["images_per_second"] == row["runs"][0] > 0
        assert row["share"] == pytest.approx(row["runs"][0] / rows[0]["runs"][0])
        assert f"{row['images_per_second']:,.0f}" in printed
    three = report["sizes"]["16"]["ranks"]["latentmill"]["3"]
    assert (three["duplicates"], three["misses"], three["wrong_pixels"]) == (0, 0, 0)
    resume = report["sizes"]["16"]["resume"]
    ours = resume["latentmill"]
    assert (ours["duplicates"], ours["misses"], ours["how"]) == (0, 0, "state")
    assert resume["stock_webdataset"]["how"] == "skip"
    assert all(figures["seconds"] > 0 for figures in resume.values())


def test_the_check_compares_with_the_best_rival_whatever_its_decoder():
    rates = {
        ("latentmill", "ours"): 1000.0,
        ("stock_webdataset", "stock"): 250.0,
        ("stock_webdataset", "ours"): 401.0,
        ("lightning_litdata", "stock"): 200.0,
        ("mosaicml_streaming", "stock"): 100.0,
    }
    rows = [
        {"loader": name, "decoder": decoder, "images_per_second": rate}
        for (name, decoder), rate in rates.items()
    ]
    found = checks({"sizes": {"64": {"speed": rows}, "256": {"speed": rows}}})
    assert [check["ratio"] for check in found] == pytest.approx([1000 / 401, 1000 / 401, 4, 5, 10])
    assert [check["holds"] for check in found] == [False, True, True, True, True]


def test_a_wrong_size_is_explained(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--pictures", "64"])
    assert "'64' is not SIZE:COUNT, such as 64:20000" in capsys.readouterr().err


def test_samples_delivered_twice_and_never_are_counted():
    assert count_ids([0, 1, 1, 3, 3, 3], 5) == {"duplicates": 3, "misses": 2}
