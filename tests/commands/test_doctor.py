"""Doctor: every broken set-up shows as a red line with its remedy, all of them at once."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from webdataset.writer import TarWriter

from pipeline.__main__ import main
from pipeline.commands.doctor.diagnose import diagnose
from pipeline.commands.doctor.finding import Finding
from pipeline.data.index import build_index
from tests.shards import png, tiny_image, write_tiny_shards

CHECKS = [
    "config",
    "batch",
    "index",
    "split",
    "members",
    "shards",
    "order",
    "device",
    "memory",
    "disk",
    "clock",
    "threads",
    "strategy",
    "wandb",
]


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may break."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def config_of(shards: Path | str, folder: Path, **settings: object) -> Path:
    path = folder / "run.yaml"
    lines = {
        "run_dir": f"{folder}/run",
        "batch_size": 12,
        "num_steps": 100,
        "model": "{bottleneck: {kind: deterministic}}",
        "data": f"{{path: {shards}, decode: {{kind: image, size: 32}}}}",
    } | settings
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return path


def test_a_file_that_hides_our_packages_is_a_warning(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").mkdir()  # without __init__.py: ours is found before it
    assert not [f for f in diagnose(config_of(shards, tmp_path)) if f.check == "names"]
    (tmp_path / "launch.py").touch()
    [found] = [f for f in diagnose(config_of(shards, tmp_path)) if f.check == "names"]
    assert found.verdict == "warning"
    assert found.text.startswith("launch.py in this folder would be run by `python -m`")


def bad(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [
        (f.verdict, f.check, f.text)
        for f in findings
        if f.verdict != "ok" and f.check != "threads" and "fewer than 100" not in f.text
    ]


def texts(findings: list[Finding], verdict: str, check: str) -> str:
    return "\n".join(f.text for f in findings if (f.verdict, f.check) == (verdict, check))


def test_a_sound_run_is_green(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = config_of(shards, tmp_path)
    assert main(["doctor", str(config), "data.threads=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split()[1] for line in lines)) == CHECKS
    (tiny,) = [line for line in lines if line.split()[0] != "ok"]
    assert tiny.startswith("WARN     split     evaluation.split held_out holds 1")
    assert not (tmp_path / "run").exists()  # it only looks
    assert not bad(diagnose(config, [f"data.shards='file://{shards}'"]))


def test_all_problems_show_at_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (shards / "tiny-0001.tar").unlink()
    with (shards / "tiny-0003.tar").open("ab") as file:
        file.write(bytes(512))
    decode = "{kind: image, size: 32, suffixes: [tiff]}"
    data = f"{{path: {shards}, decode: {decode}, split: trian, lanes: 5}}"
    config = config_of(shards, tmp_path, data=data, evaluation="{split: test}")
    assert main(["doctor", str(config), "--processes", "5", "--json"]) == 1
    findings = [Finding(**entry) for entry in json.loads(capsys.readouterr().out)["findings"]]
    failures = {check: texts(findings, "FAIL", check) for check in CHECKS}
    assert "data.lanes 5 does not divide batch_size 12" in failures["config"]
    assert "Set batch_size to 15" in failures["batch"]
    assert "data.split = 'trian': the index has the splits held_out, train, all" in (
        failures["split"] + failures["order"]
    )
    assert "evaluation.split = 'test'" in failures["split"]
    assert "suffix of tiff" in failures["members"]
    assert "png (60)" in failures["members"]
    assert f"{shards}/tiny-0001.tar is missing: put" in failures["shards"]
    assert f"{shards}/tiny-0003.tar is changed since indexed: run" in failures["shards"]


def test_lanes_that_do_not_fit_are_named_with_those_that_do(shards: Path, tmp_path: Path):
    findings = diagnose(config_of(shards, tmp_path), ["data.lanes=5"])
    assert "choose one of [1, 2, 3, 4, 6, 12]" in texts(findings, "FAIL", "order")


def test_lanes_that_read_twice_are_a_warning(shards: Path, tmp_path: Path):
    findings = diagnose(config_of(shards, tmp_path), ["data.lanes=6"], world=4)
    warning = texts(findings, "warning", "order")
    assert "4 processes read every byte 1.33 times" in warning
    assert "data.lanes of 4, 12" in warning


def test_a_shard_written_again_is_a_warning(shards: Path, tmp_path: Path):
    os.utime(shards / "tiny-0002.tar", (1e9, 1e9))
    findings = diagnose(config_of(shards, tmp_path))
    assert [(verdict, check) for verdict, check, _ in bad(findings)] == [("warning", "shards")]
    assert "tiny-0002.tar is written or copied since indexed" in bad(findings)[0][2]


def test_no_index_is_one_failure(tmp_path: Path):
    write_tiny_shards(tmp_path / "s", counts=(3,))
    failures = bad(diagnose(config_of(tmp_path / "s", tmp_path)))
    assert [(verdict, check) for verdict, check, _ in failures] == [("FAIL", "index")]
    assert f"run `latentmill index {tmp_path / 's'}`" in failures[0][2]


def test_every_data_set_of_a_mixture_is_examined(shards: Path, tmp_path: Path):
    data = f"{{mixture: [{{path: {shards}}}, {{path: {tmp_path / 'none'}}}]}}"
    findings = diagnose(config_of(shards, tmp_path, data=data))
    assert "60 samples in 5 shards" in texts(findings, "ok", "index")
    assert f"run `latentmill index {tmp_path / 'none'}`" in texts(findings, "FAIL", "index")
    both = f"{{mixture: [{{path: {shards}}}, {{path: {shards}, weight: 2}}], lanes: 6}}"
    findings = diagnose(config_of(shards, tmp_path, data=both))
    orders = [finding.text for finding in findings if finding.check == "order"]
    assert [" 2 lanes" in orders[0], " 4 lanes" in orders[1]] == [True, True]
    assert texts(findings, "ok", "memory")


def test_a_store_that_cannot_be_reached_is_a_failure_soon(shards: Path, tmp_path: Path):
    url = "http://127.0.0.1:9"  # nothing listens there
    data = f"{{path: {shards}, shards: '{url}', decode: {{kind: image, size: 32}}}}"
    started = time.monotonic()
    findings = diagnose(config_of(shards, tmp_path, data=data))
    assert url in texts(findings, "FAIL", "shards")
    assert "does not send its time" in texts(findings, "warning", "clock")
    assert time.monotonic() - started < 30


def test_duplicate_keys_and_damage_are_warnings(tmp_path: Path):
    folder = tmp_path / "s"
    folder.mkdir()
    for number in range(2):
        with TarWriter(str(folder / f"s-{number}.tar"), mtime=0) as tar:
            for sample in range(8):
                tar.write({"__key__": f"{sample}", "png": png(tiny_image(sample))})
    os.truncate(folder / "s-1.tar", 5000)
    build_index(folder)
    findings = diagnose(config_of(folder, tmp_path), ["data.split=all", "evaluation.split=all"])
    warnings = texts(findings, "warning", "index")
    assert "keys occur more than once, such as '0' in s-0.tar, s-1.tar" in warnings
    assert "the shards were damaged when indexed" in warnings
    assert not texts(findings, "FAIL", "index")


def test_windows_larger_than_memory_fail_and_tight_ones_warn(shards: Path, tmp_path: Path):
    free = psutil.virtual_memory().available
    images = free // 12 // (4096**2 * 3)  # that fit in memory, of each of 12 slots
    options = ["data.decode.size=4096", "model.backbone={kind: mlp}"]
    config = config_of(shards, tmp_path)
    failure = texts(diagnose(config, [*options, f"data.prefetch={2 * images}"]), "FAIL", "memory")
    assert "are free: lower data.window" in failure
    warning = diagnose(config, [*options, f"data.prefetch={4 * images}"], world=6)
    assert "enough for 1 processes here" in texts(warning, "warning", "memory")


def test_more_threads_than_cores_are_a_warning(shards: Path, tmp_path: Path):
    findings = diagnose(config_of(shards, tmp_path), ["data.threads=1000"])
    assert "data.threads 1000" in texts(findings, "warning", "threads")


def test_cores_that_nothing_uses_are_a_warning(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: list(range(16)))
    config = config_of(shards, tmp_path)
    warning = texts(diagnose(config), "warning", "threads")
    assert "1 process x data.threads 2, 16 cores here, and one thread of each computes" in warning
    assert "13 cores idle; set --processes to 12" in warning  # 12 of 16: the batch divides by it
    assert texts(diagnose(config, world=4), "ok", "threads")


def test_a_likely_mistake_is_a_warning_and_no_failure(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of(shards, tmp_path, model="{bottleneck: {kind: gaussian}}")
    assert main(["doctor", str(config), "batch_size=120", "num_steps=1000000"]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARN")]
    assert [line.split()[1] for line in warned] == ["objective", "split", "length", "batch"]


def test_a_gpu_that_is_asked_for_must_be_there(shards: Path, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = config_of(shards, tmp_path)
    assert "sees no GPU here" in texts(diagnose(config), "ok", "device")
    assert "--device cpu" in texts(diagnose(config, device="cpu"), "ok", "device")
    assert "use another --device" in texts(diagnose(config, device="gpu"), "FAIL", "device")


def test_where_the_metrics_will_go(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    config = config_of(shards, tmp_path)

    def text_of(mode: str, verdict: str) -> str:
        return texts(diagnose(config, [f"monitor.wandb.mode={mode}"]), verdict, "wandb")

    assert "offline, into" in text_of("auto", "ok")
    assert "no key for wandb.example.org here" in text_of("auto", "ok")
    assert "run `wandb login`" in text_of("online", "warning")
    assert "disabled: monitor.wandb.mode disabled" in text_of("disabled", "ok")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password key\n")
    assert "online: monitor.wandb.mode auto, a key for wandb.example.org" in text_of("auto", "ok")
    assert "offline, into" in text_of("offline", "ok")


def test_files_from_the_future_show_a_wrong_clock(shards: Path, tmp_path: Path):
    later = time.time() + 3600
    os.utime(shards / "tiny-0000.tar", (later, later))
    failure = texts(diagnose(config_of(shards, tmp_path)), "FAIL", "clock")
    assert "s behind the newest shard" in failure
    assert "NTP" in failure


def test_the_clock_of_a_remote_store(shards: Path, tmp_path: Path):
    class HourAhead(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(shards))  # type: ignore[arg-type]

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string((timestamp or time.time()) + 3600)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), HourAhead) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            data = f"{{path: {shards}, shards: '{url}', decode: {{kind: image, size: 32}}}}"
            findings = diagnose(config_of(shards, tmp_path, data=data))
        finally:
            server.shutdown()
            thread.join()
    assert "s behind the server of http://127.0.0.1" in texts(findings, "FAIL", "clock")
    assert "5 there and unchanged" in texts(findings, "ok", "shards")


def test_the_topology_says_what_must_be_importable(shards: Path, tmp_path: Path):
    config, topology = config_of(shards, tmp_path), tmp_path / "topology.yaml"
    topology.write_text("distributed_type: MULTI_GPU\n")
    assert texts(diagnose(config, topology=topology), "ok", "strategy") == (
        "accelerate can be imported"
    )
    topology.write_text("[]\n")
    findings = diagnose(config, topology=topology)
    assert "is no accelerate config file" in texts(findings, "FAIL", "strategy")
    findings = diagnose(config, topology=tmp_path / "none.yaml")
    assert "none.yaml" in texts(findings, "FAIL", "strategy")


@pytest.mark.slow
def test_deepspeed_is_asked_for_by_its_topology(shards: Path, tmp_path: Path):
    topology = tmp_path / "topology.yaml"
    topology.write_text("distributed_type: DEEPSPEED\n")
    findings = diagnose(config_of(shards, tmp_path), topology=topology)
    found = texts(findings, "ok", "strategy") or texts(findings, "FAIL", "strategy")
    assert "deepspeed" in found


def test_a_run_directory_where_nothing_can_be_written_fails(shards: Path, tmp_path: Path):
    findings = diagnose(config_of(shards, tmp_path, run_dir="/proc/run"))
    assert "/proc cannot be written to" in texts(findings, "FAIL", "disk")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here (it needs root): {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.fault
def test_a_disk_too_small_for_the_checkpoints_fails(shards: Path, tmp_path: Path, full_disk: Path):
    findings = diagnose(config_of(shards, tmp_path, run_dir=full_disk / "deep" / "run"))
    failure = texts(findings, "FAIL", "disk")
    assert "2 checkpoints of " in failure
    assert "1.05 MB are free: make room" in failure


def test_a_config_that_is_not_there_is_one_failure(tmp_path: Path):
    findings = diagnose(tmp_path / "none.yaml")
    assert [(f.verdict, f.check) for f in findings] == [("FAIL", "config")]


def test_colours_are_for_terminals():
    finding = Finding("disk", "FAIL", "two\n  lines")
    assert finding.line(in_colour=False) == "FAIL     disk      two lines"
    assert finding.line(in_colour=True).startswith("\x1b[31mFAIL")
    assert Finding("disk", "warning", "x").line(in_colour=False) == "WARN     disk      x"
