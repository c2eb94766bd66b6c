"""Checks of the launcher's variables, in one process; tests/launch/ has real launches."""

import json
import socket
import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.distributed import rendezvous as module
from pipeline.distributed.rendezvous import check_announced, check_launcher, rendezvous

TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "ACCELERATE_MIXED_PRECISION": "no",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node1"},  # of a job's script, under plain Python
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "node1", "WORLD_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "node1", "OMPI_COMM_WORLD_SIZE": "2"},
        TORCHRUN,
    ],
)
def test_what_fits_together_may_start(environment: dict[str, str]):
    check_announced(environment)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_precision_is_the_configs(precision: str):
    with pytest.raises(UserError, match=f"mixed precision '{precision}' .* set `precision`"):
        check_announced(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": precision})


@pytest.mark.parametrize("section", ["fp16", "bf16", "amp", "torch_autocast"])
def test_nor_is_it_deepspeeds(section: str, tmp_path: Path):
    path = tmp_path / "zero.json"
    environment = TORCHRUN | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    for fitting in ({section: {"enabled": False}}, {section: 1}, [section]):
        path.write_text(json.dumps(fitting))
        check_announced(environment)
    path.write_text(json.dumps({section: {"enabled": True}}))
    with pytest.raises(UserError, match=rf"zero\.json enables {section}, but .* set `precision`"):
        check_announced(environment)


@pytest.mark.parametrize("environment", [TORCHRUN, {**TORCHRUN, "MASTER_ADDR": "::1"}])
def test_who_waits_under_a_launcher_is_told_where_and_goes_on_waiting(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module, "LATE_SECONDS", 0.05)
    with rendezvous(environment):
        time.sleep(0.3)
    text = "warning: WORLD_SIZE announces 2 processes, of which this is process 1, but after 0.05 s"
    place = f"{environment['MASTER_ADDR']}:29500"
    assert capsys.readouterr().err.startswith(f"{text} they have not all come to {place} ")


def test_who_meets_in_time_hears_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module, "LATE_SECONDS", 0.2)
    with rendezvous(TORCHRUN):
        pass
    time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_a_launcher_that_has_died_is_noticed_before_anyone_waits_for_it():
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = store.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        check_launcher(environment)
    with pytest.raises(UserError, match=f"nobody answers at 127.0.0.1:{port} .*been killed"):
        check_launcher(environment)
    check_launcher(environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
