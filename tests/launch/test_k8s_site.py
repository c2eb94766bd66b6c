"""Kubernetes as sites have it: secrets by reference, labels, taints, patches of a manifest."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.k8s_patch import patched
from tests.launch.texts import POD, TRAIN, container, documents
from tests.processes import ROOT

COMMAND = ["k8s", TRAIN[0], "run_dir=/data/runs/vae", *POD]
Run = Callable[..., str]


@pytest.fixture
def manifest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """What is printed for some options."""
    monkeypatch.chdir(ROOT)

    def run(*options: str) -> str:
        assert main([*COMMAND, *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The one paragraph with which some options are refused; nothing is printed besides."""
    monkeypatch.chdir(ROOT)

    def run(*options: str) -> str:
        assert main([*COMMAND, *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return run


def job_of(text: str) -> dict[str, Any]:
    return documents(text)[-1]


def test_variables_come_from_secrets_and_no_value_stands_in_the_manifest(manifest: Run):
    names = ["wandb", "hub.keys"]
    main_container = container(manifest("--secret", names[0], "--secret", names[1], "--env", "A=1"))
    assert main_container["envFrom"] == [{"secretRef": {"name": name}} for name in names]
    assert {"name": "A", "value": "1"} in main_container["env"]


SECRETS = """WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
COMET_APIKEY PGPASSWORD DB_PASSWORD CLIENT_SECRET token AZURE_STORAGE_KEY SSH_PRIVATE_KEY
AZURE_STORAGE_CONNECTION_STRING"""
NO_SECRETS = """TOKENIZERS_PARALLELISM AWS_ACCESS_KEY_ID AWS_WEB_IDENTITY_TOKEN_FILE NCCL_DEBUG
GOOGLE_APPLICATION_CREDENTIALS KEY SORT_KEY PASSWORD_FILE MAX_TOKENS MONKEY"""


@pytest.mark.parametrize(
    ("place", "remedy"),
    [(["slurm", TRAIN[0]], "give --env-file FILE"), (COMMAND, "give --secret NAME")],
    ids=["slurm", "k8s"],
)
def test_a_secret_is_not_written_into_a_text(
    place: list[str],
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    for name in SECRETS.split():
        assert main([*place, "--env", f"{name}=s3cr3t"]) == 2, name
        printed = capsys.readouterr()
        assert f"--env {name}=... looks like a secret" in printed.err
        assert remedy in printed.err
        assert "s3cr3t" not in printed.out + printed.err
    assert main([*place, *(f"--env={name}=1" for name in NO_SECRETS.split())]) == 0
    assert main([*place, "--env", "WANDB_API_KEY="]) == 0  # taken away, on purpose


@pytest.mark.parametrize(
    "text", ["y", "N", "1e3", "1234e56", "08", "0o17", "+0o7", ".5e3", "1_0e2", "yes", "7", ""]
)
def test_a_text_is_no_number_to_kubectl(text: str, manifest: Run):
    """kubectl's parser takes more words for numbers and truths than PyYAML's, which reads it here.

    `kubectl patch --local` agrees with these quotes for 2,900 texts.
    """
    found = manifest("--env", f"A={text}", "--label", f"commit={text}", "--label", f"x{text}=v")
    assert f"value: '{text}'\n" in found
    assert found.count(f"commit: '{text}'\n") == 3


@pytest.mark.parametrize("text", ["$(RUN_DIR)", "$$", "a$$$(b", "$HOME $", "$(a) $$(b)"])
def test_a_dollar_is_no_variable_of_kubernetes(text: str, manifest: Run):
    def received(written: str) -> str:
        """What Kubernetes makes of a value or an argument, by the rule of its API."""
        return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else "GONE", written)

    found = container(manifest("--env", f"A={text}", f"note={text}"))
    [written] = [one["value"] for one in found["env"] if one["name"] == "A"]
    assert received(written) == text
    run = found["args"][-1].rpartition("-m pipeline.train ")[2].partition("\n")[0]
    assert shlex.split(received(run))[-1] == f"note={text}"


def test_a_mistyped_variable_is_reported_without_its_value(refusal: Run):
    told = refusal("--env", "MY-KEY=s3cr3t")
    assert told == "error: --env 'MY-KEY' is not a variable: write NAME=VALUE.\n"


def test_labels_are_on_every_object_and_on_the_pods(manifest: Run):
    wanted = {"kueue.x-k8s.io/queue-name": "q", "equal": "a=b", "empty": ""}
    options = [word for k, v in wanted.items() for word in ("--label", f"{k}={v}")]
    text = manifest(*options, "--nodes", "2", "--claim-size", "1Gi")
    objects = documents(text)
    assert [one["metadata"]["labels"] for one in objects] == [wanted] * 4
    assert job_of(text)["spec"]["template"]["metadata"]["labels"] == wanted
    # The Service finds its pods by the label that Kubernetes itself gives them.
    assert objects[2]["spec"]["selector"] == {"batch.kubernetes.io/job-name": "vae"}


@pytest.mark.parametrize(
    ("taint", "expected"),
    [
        ("gpu", {"operator": "Exists"}),
        ("gpu:NoExecute", {"operator": "Exists", "effect": "NoExecute"}),
        ("gpu=yes", {"operator": "Equal", "value": "yes"}),
        ("gpu=:NoSchedule", {"operator": "Equal", "value": "", "effect": "NoSchedule"}),
    ],
)
def test_a_taint_is_written_as_kubectl_shows_it(
    taint: str, expected: dict[str, str], manifest: Run
):
    pod = job_of(manifest("--toleration", taint))["spec"]["template"]["spec"]
    assert pod["tolerations"] == [{"key": "gpu", **expected}]


@pytest.mark.parametrize("option", ["--label", "--node-selector"])
def test_a_label_without_a_value_is_refused(option: str, refusal: Run):
    assert f"{option} 'team' is not a label: write KEY=VALUE." in refusal(option, "team")


def manifest_objects() -> list[dict[str, Any]]:
    pod = {
        "containers": [{"name": "main", "image": "i", "args": ["a", "b"], "env": [{"name": "A"}]}],
        "volumes": [{"name": "shm", "emptyDir": {}}],
        "tolerations": [{"key": "a"}],
    }
    job = {"spec": {"completions": 2, "template": {"spec": pod}}}
    names = {"metadata": {"name": "vae", "namespace": "ml"}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", **names}
    return [config, {"apiVersion": "batch/v1", "kind": "Job", **names, **job}]


POD_SPEC = "spec: {{template: {{spec: {}}}}}"


@pytest.mark.parametrize(
    ("patch", "place", "expected"),
    [
        ("{tolerations: [{key: b}]}", "tolerations", [{"key": "b"}]),
        ("{tolerations: null}", "tolerations", None),
        ("{hostNetwork: true}", "hostNetwork", True),
        ("{volumes: [{name: x}]}", "volumes", [{"name": "shm", "emptyDir": {}}, {"name": "x"}]),
        (
            "{volumes: [{name: shm, emptyDir: {medium: Memory}}]}",
            "volumes",
            [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        ),
        ("{imagePullSecrets: [{name: r}]}", "imagePullSecrets", [{"name": "r"}]),
        (
            "{containers: [{name: main, args: [c], env: [{name: A, value: x}, {name: B}]}]}",
            "containers",
            [
                {
                    "name": "main",
                    "image": "i",
                    "args": ["c"],
                    "env": [{"name": "A", "value": "x"}, {"name": "B"}],
                }
            ],
        ),
        ("{affinity: {nodeAffinity: {x: null, y: 1}}}", "affinity", {"nodeAffinity": {"y": 1}}),
    ],
)
def test_a_patch_is_merged_as_kubernetes_does_it(
    patch: str, place: str, expected: object, tmp_path: Path
):
    path, before = tmp_path / "patch.yaml", manifest_objects()
    path.write_text(POD_SPEC.format(patch))
    objects = manifest_objects()
    config, job = patched(objects, path)
    assert objects == before
    pod, old = (one["spec"]["template"]["spec"] for one in (job, before[1]))
    assert pod.get(place) == expected
    assert {k: v for k, v in pod.items() if k != place} == {
        k: v for k, v in old.items() if k != place
    }
    assert (config, job["metadata"], job["spec"]["completions"]) == (
        before[0],
        before[1]["metadata"],
        2,
    )


def test_a_whole_job_and_several_documents_are_patches_too(tmp_path: Path):
    path = tmp_path / "patch.yaml"
    path.write_text(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: vae, labels: {a: b}}\n"
        "---\n---\nkind: ConfigMap\nimmutable: true\n"
    )
    config, job = patched(manifest_objects(), path)
    assert job["metadata"] == {"name": "vae", "namespace": "ml", "labels": {"a": "b"}}
    assert config["immutable"] is True


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("kind: Deployment", "Deployment is not in the manifest, which has ConfigMap, Job."),
        ("kind: [Job]", "['Job'] is not in the manifest, which has ConfigMap, Job."),
        ("{}\n---\nkind: Service", "Service is not in the manifest, which has ConfigMap, Job."),
        ("metadata: {name: other}", "Job.metadata.name cannot be changed."),
        ("metadata: {namespace: x}", "Job.metadata.namespace cannot be changed."),
        ("", "patch.yaml is no part of an object: write, for example, `spec: {suspend: true}`"),
        ("- op: add", "patch.yaml is no part of an object"),
        ("a: [", "patch.yaml: while parsing"),
        (POD_SPEC.format("{containers: [{image: x}]}"), "spec.containers has an element without n"),
        (POD_SPEC.format("{containers: [main]}"), "spec.containers has an element without name"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(
    patch: str, message: str, refusal: Run, tmp_path: Path
):
    path = tmp_path / "patch.yaml"
    path.write_text(patch)
    assert message in refusal("--patch", str(path))


def test_a_patch_that_is_not_there_is_refused(refusal: Run, tmp_path: Path):
    assert "No such file or directory: " in refusal("--patch", f"{tmp_path}/none.yaml")
