"""The text of every launcher, as golden files; scripts under shellcheck; what reaches processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from launch.job import Job
from tests.launch.texts import OF_K8S, OF_SLURM, TEXTS, TRAIN, container
from tests.processes import ROOT, Result


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_every_launcher(
    name: str, text_of: Callable[[str], str], golden: Callable[[str, str], None]
):
    golden(f"launch_{name}.txt", text_of(name))


@pytest.mark.parametrize("name", [*OF_SLURM, *OF_K8S])
def test_scripts_pass_shellcheck(name: str, text_of: Callable[[str], str], tmp_path: Path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed beside this Python: run under `make test`")
    text = text_of(name)
    scripts = [text]
    if name in OF_K8S:
        hooks = container(text).get("lifecycle", {}).values()
        commands = [container(text)["args"], *(hook["exec"]["command"] for hook in hooks)]
        scripts = [script for _bash, _c, script in commands]
    for script in scripts:
        path = tmp_path / "script.sh"
        path.write_text(script)
        # Left to the node on purpose: what a task's own shell expands, what only a trap calls.
        argv = [shellcheck, "--shell=bash", "--exclude=SC2016,SC2329", path]
        checked = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_deepspeed_never_gets_accelerates_use_cpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: DEEPSPEED\n")
    for choice in ({"strategy": "zero1"}, {"topology": own}):
        env = local.command(Job(config=ROOT / TRAIN[0], device=device, **choice)).env
        # Set, whatever the shell has exported: accelerate would leave DeepSpeed out, silently.
        assert env.get("ACCELERATE_USE_CPU") == ("false" if device == "cpu" else None)


@pytest.mark.deepspeed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_strategy_reaches_the_processes(
    run_processes: Callable[..., Result], tmp_path: Path, num_processes: int
):
    config, env = tmp_path / "c.yaml", {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    config.write_text("seed: 1\n")
    (tmp_path / "stand_in.py").write_text(
        "import json, os\n"
        "names = ('RANK', 'ACCELERATE_USE_DEEPSPEED', 'ACCELERATE_USE_CPU',"
        " 'ACCELERATE_DEEPSPEED_CONFIG_FILE')\n"
        "print('ENV', json.dumps([os.environ.get(name) for name in names]) + '\\n', flush=True)\n"
    )
    argv = ("local", "--submit", "--module", "stand_in", "--strategy", "zero2", config)
    result = run_processes("launch", None, *argv, "--processes", num_processes, env=env)
    assert result.code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("ENV")]
    found = sorted(json.loads(line.removeprefix("ENV")) for line in lines)
    expected = ["true", "false", str(ROOT / "configs/deepspeed/zero2.json")]
    assert found == [[str(rank), *expected] for rank in range(num_processes)]
