"""Manifests of Kubernetes: valid against its schemas, and their scripts at work under bash."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.runs import free_ports, outcome, result_of, write_config
from tests.launch.texts import OF_K8S, POD, container, documents
from tests.processes import ROOT, Processes


@pytest.mark.parametrize("name", OF_K8S)
@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_manifests_are_valid(name: str, version: str, text_of: Callable[[str], str]):
    reason = "pip install kubernetes-validate brings the schemas"
    validator = pytest.importorskip("kubernetes_validate", reason=reason)
    version = validator.latest_version() if version == "latest" else version
    found = documents(text_of(name))
    for document in found:
        validator.validate(document, version, strict=True)
    found[-1]["spec"]["template"]["spec"]["restartPolice"] = "Never"
    with pytest.raises(validator.ValidationError, match="restartPolice"):
        validator.validate(found[-1], version, strict=True)


# Stands in for the `python` of a container: accelerate, which flattens the trainer's code to 1.
ACCELERATE = """\
#!/bin/bash
[[ $* == *" --check" ]] && exit "$CHECKED"
[[ $OWN ]] && echo "{\\"exit_code\\": $OWN, \\"status\\": \\"x\\"}" >"$RUN_DIR/outcome.json"
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("checked", "code", "own", "expected"),
    [
        (0, 0, "0", 0),
        (0, 1, "3", 3),
        (0, 1, "2", 2),
        (0, 1, "", 1),
        (0, 1, "null", 1),
        (2, 0, "", 2),
    ],
    ids=["done", "preempted", "wrong use", "no outcome of this start", "killed", "wrong config"],
)
def test_a_pod_gives_back_the_exit_code_of_the_run(
    checked: int,
    code: int,
    own: str,
    expected: int,
    text_of: Callable[[str], str],
    tmp_path: Path,
):
    """podFailurePolicy distinguishes a mistake from a preemption by it."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    programs.mkdir()
    (run / "outcome.json").write_text('{"exit_code": 3, "status": "preempted"}\n')
    for name, script in (("python", ACCELERATE), ("sleep", "#!/bin/bash\n")):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    env = {"RUN_DIR": str(run), "JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    env |= {"CHECKED": str(checked), "CODE": str(code), "OWN": own}
    env |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    argv = container(text_of("k8s_ddp"))["args"]
    assert subprocess.run(argv, env=os.environ | env, check=False).returncode == expected


def test_the_hook_of_a_pod_touches_stop_until_the_trainer_has_seen_it(
    text_of: Callable[[str], str], tmp_path: Path
):
    """A trainer that is only just starting takes the file for an older one and removes it."""
    hook = container(text_of("k8s_ddp"))["lifecycle"]["preStop"]["exec"]["command"]
    stop = tmp_path / "STOP"
    running = subprocess.Popen(hook, env=os.environ | {"RUN_DIR": str(tmp_path)})
    try:
        for _ in range(2):
            limit = time.monotonic() + 20
            while not stop.exists():
                assert time.monotonic() < limit
                time.sleep(0.02)
            stop.unlink()
    finally:
        running.kill()
        running.wait()


@pytest.mark.distributed
def test_a_pod_that_is_evicted_saves_with_its_peer_and_both_go_on(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The commands of two pods as the manifest has them, on this machine."""
    config, run = write_config(tmp_path, tiny_shards, 1_000_000), tmp_path / "run"
    argv = ["k8s", str(config), *POD, "--mount", str(tmp_path), "--nodes", "2", "--device", "cpu"]
    assert main(argv) == 0
    manifest = capsys.readouterr().out
    [settings] = [one["data"] for one in documents(manifest) if one["kind"] == "ConfigMap"]
    (tmp_path / "topology.yaml").write_text(settings["topology.yaml"])
    pod = container(manifest)
    script = [text.replace("/etc/latentmill/", f"{tmp_path}/") for text in pod["args"]]
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = {one["name"]: one["value"] for one in pod["env"]}
    env |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1"}

    def start(attempt: int) -> list[Processes]:
        port = {"MASTER_PORT": str(free_ports(1)[0])}
        return [
            Processes(
                script,
                tmp_path / f"pod-{index}-{attempt}.log",
                env=env | port | {"JOB_COMPLETION_INDEX": str(index)},
                cwd=ROOT,
            )
            for index in (0, 1)
        ]

    pods = start(1)
    # As kubelet does it: the hook runs while the container does, here from its very start.
    hook = pod["lifecycle"]["preStop"]["exec"]["command"]
    pods.append(Processes(hook, tmp_path / "hook.log", env=env, cwd=ROOT))
    try:
        assert [one.wait().code for one in pods[:2]] == [3, 3], [one.output for one in pods]
        assert pods[2].running
        pods[2].kill()
        stopped = outcome(run)
        assert stopped["message"] == f"stopped by the file {run / 'STOP'}"

        write_config(tmp_path, tiny_shards, stopped["step"] + 3)
        pods = start(2)
        assert [one.wait().code for one in pods] == [0, 0], [one.output for one in pods]
    finally:
        for one in pods:
            if one.running:
                one.kill()
    result_of(run, stopped["step"] + 3)
