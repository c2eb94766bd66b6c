"""Doctor: every broken set-up shows as a red line with its remedy, all of them at once."""

import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
import wandb
from webdataset.writer import TarWriter

from pipeline.__main__ import main
from pipeline.commands.doctor.compute import zero_stage
from pipeline.commands.doctor.diagnose import diagnose
from pipeline.commands.doctor.finding import Finding
from pipeline.common.shipped import find
from pipeline.config import read_config
from pipeline.data.index import Index, build_index
from pipeline.training.memory import StepMemory
from tests.shards import png, tiny_image, write_tiny_shards

CHECKS = [
    "config",
    "batch",
    "index",
    "split",
    "members",
    "shards",
    "order",
    "evaluated",
    "device",
    "memory",
    "disk",
    "threads",
    "strategy",
    "step",
    "wandb",
]


@pytest.fixture(autouse=True)
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the W&B account of this machine's user out of the tests."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


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
    missing = f"{tmp_path / 'none'} does not exist: name the directory"
    assert missing in texts(findings, "FAIL", "index")
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
    assert "with the key of an earlier one, such as '0' in s-0.tar, s-1.tar" in warnings
    assert "pack each once" in warnings
    assert "the shards were damaged when indexed" in warnings
    assert not texts(findings, "FAIL", "index")


def write_members(folder: Path, names: list[str]) -> None:
    """Write a shard of pictures under these names, and its index."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, name in enumerate(names):
            info, content = tarfile.TarInfo(name), png(tiny_image(number % 7))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    build_index(folder)


@pytest.mark.parametrize("kind", ["image", "array"])
def test_mostly_unwanted_members_fail_with_the_share_and_the_remedy(tmp_path: Path, kind: str):
    other, wanted = ("jfif", "jpg") if kind == "image" else ("tif", "npy")
    write_members(tmp_path / "s", [f"{n}.{other if n % 4 else wanted}" for n in range(60)])
    decode = "{kind: image, size: 32}"
    if kind == "array":
        decode = "{kind: array, suffix: npy, shape: [3, 4, 4], dtype: float32, range: [0, 1]}"
    data = f"{{path: {tmp_path / 's'}, decode: {decode}, split: all}}"
    model = "{backbone: {kind: mlp}, bottleneck: {kind: deterministic}}"
    settings = {"data": data, "evaluation": "{split: all}", "model": model}
    config = config_of(tmp_path / "s", tmp_path, **settings)
    failure = texts(diagnose(config), "FAIL", "members")
    assert "At least 45 of the 60 samples (75 %)" in failure
    assert f"The index has: {other} (45), {wanted} (15). Name those that are to be" in failure
    few = diagnose(config, ["num_steps=1"])  # 12 samples, while a fraction is one of 1,000
    assert texts(few, "ok", "members")


def test_what_the_index_left_out_is_said(tmp_path: Path):
    """200 pictures under other whole suffixes, a folder that looks like metadata, sidecars."""
    names = [f"IMG_2024.{n:05d}.png" for n in range(200)] + [f"{n:05d}.png" for n in range(50)]
    names += ["__background__/0.png", "cats/._0.png"]
    write_members(tmp_path / "s", names)
    findings = diagnose(config_of(tmp_path / "s", tmp_path))
    warnings = texts(findings, "warning", "index")
    assert f"{tmp_path / 's'}: 200 files: ending in .png or the like under another" in warnings
    assert "as IMG_2024.00000.png in a.tar; use one dot per name" in warnings
    assert "1 file: in a folder like `__x__`" in warnings
    assert "1 file: left by macOS" in texts(findings, "ok", "index")


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


SD = "model.backbone={kind: resnet, preset: sd}"


def test_a_step_is_compared_with_a_card(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of(shards, tmp_path)
    large = [SD, "data.decode.size=256", "batch_size=48"]
    assert "of a card of 140 GB" in texts(diagnose(config, large, card_gb=140), "ok", "step")
    tight = texts(diagnose(config, large, card_gb=120), "warning", "step")
    assert "which leaves little for all else: set accumulation 2 (micro-batch 24, " in tight
    assert main(["doctor", str(config), *large, "--card-gb", "24", "--processes", "2"]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "step"]
    # 84 million parameters, 20 bytes each; 2.3 GB of activations per picture.
    assert "a process needs 56.9 GB (weights, gradients and moments 1.7 GB, " in line
    assert "activations of 24 images 55.2 GB) of a card of 24 GB, which does not fit" in line
    assert "set accumulation 3 (micro-batch 8, 20.1 GB)" in line
    assert (
        ", or model.gradient_checkpointing true and accumulation 1 (micro-batch 24, 18.8 GB)"
        in line
    )


@pytest.mark.parametrize(("stage", "states"), [(0, 20), (1, 16), (2, 16), (3, 12)])
def test_zero_divides_the_states_of_a_step(shards: Path, tmp_path: Path, stage: int, states: int):
    """By the table in docs/clusters.md, which test_zero.py measures; two processes."""
    topology = None if stage == 0 else find("accelerate", f"zero{stage}")
    assert zero_stage(topology) == stage
    config = read_config(config_of(shards, tmp_path))
    memory = StepMemory(config, world=2, stage=zero_stage(topology))
    assert memory.states == pytest.approx(states * memory.cost.parameters, rel=1e-5)


def test_where_the_metrics_will_go(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a training says it; a key is tried."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # closed
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    wandb.teardown()  # it has read the environment
    config = config_of(shards, tmp_path)

    def text_of(verdict: str, *overrides: str) -> str:
        return texts(diagnose(config, overrides), verdict, "wandb")

    found = text_of("ok")
    assert found.startswith("offline (no key for http://127.0.0.1:9 here, `wandb login` stores")
    assert f"`wandb sync {tmp_path}/run/wandb/offline-run-*` uploads later" in found
    assert "`wandb login`" in text_of("warning", "monitor.wandb.mode=online")
    assert text_of("ok", "monitor.wandb.mode=disabled") == "off (monitor.wandb.mode=disabled)"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert text_of("ok") == "off (WANDB_MODE=disabled)"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "http://127.0.0.1:9 cannot be used: no answer in time" in text_of("warning")
    wandb.teardown()


def test_a_shard_dated_in_the_future_says_nothing_of_the_clock(shards: Path, tmp_path: Path):
    """Nor do dates of the index, and of a run's directory."""
    later = time.time() + 30 * 86400
    for path in [*shards.rglob("*"), shards, tmp_path]:
        os.utime(path, (later, later))
    assert not bad(diagnose(config_of(shards, tmp_path)))


@pytest.mark.parametrize(("ahead", "age"), [(3600, 0), (-3600, 3600)])
def test_the_clock_of_a_remote_store(shards: Path, tmp_path: Path, ahead: int, age: int):
    """An hour ahead; and right, as the answer comes from a cache that has held it for an hour."""

    class OtherTime(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(shards))  # type: ignore[arg-type]

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string((timestamp or time.time()) + ahead)

        def end_headers(self) -> None:
            self.send_header("Age", str(age))
            super().end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), OtherTime) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            data = f"{{path: {shards}, shards: '{url}', decode: {{kind: image, size: 32}}}}"
            findings = diagnose(config_of(shards, tmp_path, data=data))
        finally:
            server.shutdown()
            thread.join()
    failure = texts(findings, "FAIL", "clock")
    assert ("s behind the server of http://127.0.0.1" in failure) == (age == 0)
    assert bool(texts(findings, "ok", "clock")) == (age > 0)
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


def test_the_cost_of_an_evaluation(shards: Path, tmp_path: Path):
    """Of the training's split, and of data of its own, which is checked as well."""
    line = texts(diagnose(config_of(shards, tmp_path)), "ok", "evaluated")
    held_out = sum(shard.splits["held_out"] for shard in Index.open(shards).shards)
    assert line.startswith(
        f"each evaluation reads {held_out} of the {held_out} samples of split held_out of {shards}"
    )
    sets = f"{{a: {{path: {shards}}}, b: {{path: {shards}, split: 'tiny-*3.tar'}}}}"
    config = config_of(shards, tmp_path, evaluation=f"{{data: {sets}, max_samples: 17}}")
    findings = diagnose(config)
    first, second = texts(findings, "ok", "evaluated").splitlines()
    assert first.startswith(
        f"a: each evaluation reads 17 of the 60 samples of split all of {shards}"
    )
    assert second.startswith(
        "b: each evaluation reads 16 of the 16 samples of split tiny-*3.tar of"
    )
    # Each of 12 lanes reads its own part of the shard.
    assert "from 1 shard: about 12 requests and 5" in second
    assert not bad(findings)
    nowhere = config_of(shards, tmp_path, evaluation="{data: {a: {path: /nowhere}}}")
    assert "evaluation.data.a: /nowhere does not exist" in texts(
        diagnose(nowhere), "FAIL", "evaluated"
    )
