"""What the launchers write for clusters: their texts, their scripts under bash, their mistakes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import local
from launch.__main__ import main
from launch.job import Job, JobError
from tests.processes import ROOT, Result

TRAIN = ("configs/train/vae.yaml", "data.decode={kind: image, size: 64}")
EXPORT = ("configs/export/tar.yaml", "--module", "pipeline.export")
POD = ("--image", "registry.example/latentmill:1", "--claim", "mill")
# Name of the golden file -> command line.
TEXTS = {
    "local_zero2": ("local", *TRAIN, "--processes", "2", "--strategy", "zero2"),
    "slurm_ddp": (
        *("slurm", *TRAIN, "--nodes", "2", "--gpus-per-node", "8", "--time", "1-08:00:00"),
        *("--partition", "gpu", "--sbatch=--account=physics", "--env", "NCCL_SOCKET_IFNAME=ib0"),
    ),
    "slurm_zero3": (
        *("slurm", *TRAIN, "run_dir=runs/with space/50%", "--nodes", "4", "--gpus-per-node", "8"),
        *("--strategy", "zero3", "--grace", "300", "--max-restarts", "3", "--name", "big"),
    ),
    "slurm_cpu": (
        *("slurm", *TRAIN, "--device", "cpu", "--processes-per-node", "2"),
        *("--cpus-per-process", "1", "--time", "00:10:00"),
    ),
    "slurm_export": ("slurm", *EXPORT, "--nodes", "16", "--gpus-per-node", "1"),
    "k8s_ddp": (
        *("k8s", "{config}", "run_dir=/data/runs/vae", *POD, "--nodes", "2"),
        *("--gpus-per-node", "8", "--time", "08:00:00", "--memory", "256Gi", "--env", "A=b c"),
    ),
    "k8s_zero1_cpu": (
        *("k8s", "{config}", "run_dir=/vol/vae", *POD, "--nodes", "2", "--device", "cpu"),
        *("--strategy", "zero1", "--mount", "/vol", "--claim-size", "100Gi", "--namespace", "ml"),
    ),
    "k8s_topology": (
        *("k8s", "{config}", "run_dir=/data/vae", "note=it's: [1, 2]", *POD),
        *("--topology", "configs/accelerate/gpu-ddp.yaml"),
    ),
    "k8s_export": (
        *("k8s", "{config}", "--module", "pipeline.export", "out=/data/latents", *POD),
        *("--nodes", "4", "--name", "latents"),
    ),
}
OF_SLURM = [name for name in TEXTS if name.startswith("slurm")]
OF_K8S = [name for name in TEXTS if name.startswith("k8s")]


@pytest.fixture
def text_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """What the launcher prints for a line of TEXTS."""
    monkeypatch.chdir(ROOT)
    config = tmp_path / "Denoising_VAE.yaml"
    config.write_text("# A comment that travels, too.\nrun_dir: runs/vae\nseed: 1\n")

    def text(name: str) -> str:
        argv = [word.replace("{config}", str(config)) for word in TEXTS[name]]
        assert main(argv) == 0
        return capsys.readouterr().out.replace(sys.executable, "/venv/bin/python")

    return text


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_every_launcher(
    name: str, text_of: Callable[[str], str], golden: Callable[[str, str], None]
):
    golden(f"launch_{name}.txt", text_of(name))


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


def container(text: str) -> dict:
    [found] = documents(text)[-1]["spec"]["template"]["spec"]["containers"]
    return found


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


@pytest.mark.parametrize("name", [*OF_SLURM, *OF_K8S])
def test_scripts_pass_shellcheck(name: str, text_of: Callable[[str], str], tmp_path: Path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed beside this Python: run under `make test`")
    text = text_of(name)
    scripts = [text]
    if name in OF_K8S:
        hooks = container(text).get("lifecycle", {}).values()
        commands = [container(text)["command"], *(hook["exec"]["command"] for hook in hooks)]
        scripts = [script for _bash, _c, script in commands]
    for script in scripts:
        path = tmp_path / "script.sh"
        path.write_text(script)
        # Left to the node on purpose: what a task's own shell expands, what only a trap calls.
        argv = [shellcheck, "--shell=bash", "--exclude=SC2016,SC2329", path]
        checked = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


# Stands in for the `python` of a container: accelerate, which flattens the trainer's code to 1.
ACCELERATE = """\
#!/bin/bash
[[ $OWN ]] && echo "{\\"exit_code\\": $OWN, \\"status\\": \\"x\\"}" >"$RUN_DIR/outcome.json"
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("code", "own", "expected"),
    [(0, "0", 0), (1, "3", 3), (1, "2", 2), (1, "", 1), (1, "null", 1)],
    ids=["done", "preempted", "wrong use", "an older start's outcome", "killed"],
)
def test_a_pod_gives_back_the_exit_code_of_the_run(
    code: int, own: str, expected: int, text_of: Callable[[str], str], tmp_path: Path
):
    """So that podFailurePolicy can tell a mistake from a preemption."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    programs.mkdir()
    (run / "outcome.json").write_text('{"exit_code": 3, "status": "preempted"}\n')
    for name, script in (("python", ACCELERATE), ("sleep", "#!/bin/bash\n")):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    env = {"RUN_DIR": str(run), "JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    env |= {"CODE": str(code), "OWN": own, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    argv = container(text_of("k8s_ddp"))["command"]
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


MISTAKES = {
    "no such config": (["slurm", "no.yaml"], "The file no.yaml does not exist."),
    "no nodes": (["slurm", TRAIN[0], "--nodes", "0"], "--nodes must be at least 1, not 0."),
    "no processes": (["slurm", TRAIN[0], "--gpus-per-node", "0"], "--gpus-per-node must be at lea"),
    "no time": (["slurm", TRAIN[0], "--time", "8h"], "--time '8h' is no time: write HH:MM:SS"),
    "all grace": (
        ["slurm", TRAIN[0], "--time", "00:02:00", "--grace", "120"],
        "--time gives the job 120 s, of which --grace takes 120 s",
    ),
    "no grace": (["slurm", TRAIN[0], "--grace", "0"], "--grace must be at least 1, not 0."),
    "restarts": (["slurm", TRAIN[0], "--max-restarts", "-1"], "--max-restarts must be at least 0"),
    "no name": (["slurm", TRAIN[0], "--name", "Big_Run"], "--name 'Big_Run' is no name for a job"),
    "no variable": (
        ["slurm", TRAIN[0], "--env", "NCCL_DEBUG"],
        "--env 'NCCL_DEBUG' is no variable",
    ),
    "no option": (
        ["slurm", TRAIN[0], "--sbatch", "account=x"],
        "--sbatch 'account=x' is no option",
    ),
    "two strategies": (
        *(["slurm", TRAIN[0], "--strategy", "zero1", "--topology", "pyproject.toml"],),
        "--topology pyproject.toml decides the strategy itself: leave --strategy zero1 out",
    ),
    "no run_dir": (["slurm", "constraints.txt"], "constraints.txt names no run_dir: set it there"),
    "no out": (
        ["slurm", TRAIN[0], "--module", "pipeline.export"],
        "configs/train/vae.yaml names no out: set it there",
    ),
    "in the pod": (
        ["k8s", TRAIN[0], *POD],
        "run_dir is runs/vae, which lies outside --mount /data and would be lost with the pod: add "
        "run_dir=/data/vae",
    ),
    "out of the claim": (["k8s", TRAIN[0], *POD, "run_dir=/data/../vae"], "lies outside --mount"),
    "no size": (["k8s", TRAIN[0], *POD, "--memory", "64 GB"], "--memory '64 GB' is no amount"),
    "no mount": (["k8s", TRAIN[0], *POD, "--mount", "data"], "--mount data must be an absolute"),
    "uneven": (["local", TRAIN[0], "--processes", "0"], "--processes must be at least 1, not 0."),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_processes_that_do_not_divide_over_nodes_are_refused():
    with pytest.raises(JobError, match="5 processes do not divide evenly over --nodes 2"):
        Job(config=ROOT / TRAIN[0], num_processes=5, num_nodes=2)


def test_outside_of_the_project_the_launcher_says_where_to_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", str(ROOT / TRAIN[0]), "--nodes", "2"]) == 2
    assert "multi-node.yaml does not exist here: start in the project's root" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("place", [["slurm"], ["k8s", *POD]], ids=["sbatch", "kubectl"])
class TestSubmitting:
    """With a stand-in for sbatch and kubectl; test_slurm.py has the real Slurm."""

    @pytest.fixture
    def handed_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where the stand-ins leave what they read; the file `refuse` makes them fail."""
        monkeypatch.chdir(ROOT)
        programs = tmp_path / "bin"
        programs.mkdir()
        for name in ("sbatch", "kubectl"):
            program = programs / name
            program.write_text(
                f"#!/bin/bash\ncd {tmp_path} || exit\n[[ -e refuse ]] && exit 1\n"
                'echo "$@" >arguments\ncat >handed_in\n'
            )
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "handed_in"

    def command(self, place: list[str], folder: Path) -> list[str]:
        mount = ["--mount", str(folder)] if place[0] == "k8s" else []
        return [*place, *EXPORT, f"out={folder / 'latents'}", *mount, "--submit"]

    def test_what_is_printed_is_handed_in(
        self,
        place: list[str],
        handed_in: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ):
        assert main(self.command(place, tmp_path)) == 0
        assert capsys.readouterr().out.rstrip("\n") == handed_in.read_text().rstrip("\n")
        expected = {"slurm": "", "k8s": "apply -f -"}[place[0]]
        assert (tmp_path / "arguments").read_text().strip() == expected

    def test_a_refusal_comes_back(self, place: list[str], handed_in: Path, tmp_path: Path):
        (tmp_path / "refuse").touch()
        assert main(self.command(place, tmp_path)) == 1
        assert not handed_in.exists()

    def test_without_the_program_it_says_what_to_do(
        self,
        place: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert main(self.command(place, tmp_path)) == 2
        assert f"--submit needs {'sbatch' if place[0] == 'slurm' else 'kubectl'}, which is not" in (
            capsys.readouterr().err
        )

    @pytest.mark.slow
    def test_a_mistake_in_the_config_is_told_and_nothing_handed_in(
        self, place: list[str], handed_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        run = tmp_path / "run"
        mount = ["--mount", str(tmp_path)] if place[0] == "k8s" else []
        assert main([*place, TRAIN[0], f"run_dir={run}", *mount, "sed=3", "--submit"]) == 2
        assert "sed: unknown key (got 3); did you mean 'seed'?" in capfd.readouterr().err
        assert not handed_in.exists()
        assert not run.exists()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_deepspeed_is_never_told_to_stay_on_the_cpu(
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
    expected = ["true", "false", "configs/deepspeed/zero2.json"]
    assert found == [[str(rank), *expected] for rank in range(num_processes)]
