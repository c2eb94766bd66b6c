"""Command lines of the launcher, one for each golden text, and the manifests among them."""

import yaml

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
    "slurm_site": (
        *("slurm", *TRAIN, "--nodes", "2", "--gpus-per-node", "8", "--env-file", "my keys.env"),
        *("--sbatch", "account=physics", "--sbatch=--gres=gpu:h100:8", "--sbatch=-C ib"),
    ),
    "slurm_container": (
        *("slurm", *TRAIN, "run_dir=/scratch/runs/vae", "--nodes", "2", "--gpus-per-node", "8"),
        *("--strategy", "zero2", "--container-image", "registry.example#mill:1", "--env", "A=b c"),
        *(
            "--container-mounts",
            "/data:/data,/scratch/my photos:/photos:ro",
            "--env-file",
            "keys.env",
        ),
    ),
    "slurm_container_export": (
        *("slurm", *EXPORT, "out=/scratch/latents", "--nodes", "2", "--device", "cpu"),
        *("--container-image", "./latentmill.sqsh"),
    ),
    "slurm_export": ("slurm", *EXPORT, "--nodes", "16", "--gpus-per-node", "1"),
    "slurm_export_s3": (
        *("slurm", *EXPORT, "out=s3://bucket/latents", "--nodes", "2", "--gpus-per-node", "1"),
    ),
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
    "k8s_site": (
        *("k8s", "{config}", "run_dir=/data/runs/vae", *POD, "--nodes", "2", "--claim-size", "1Ti"),
        *("--label", "kueue.x-k8s.io/queue-name=research", "--label", "team=", "--secret", "wandb"),
        *("--node-selector", "gpu-type=h100", "--image-pull-secret", "registry"),
        *("--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "pool=research"),
        *("--patch", "{patch}"),
    ),
    "k8s_export": (
        *("k8s", "{config}", "--module", "pipeline.export", "out=/data/latents", *POD),
        *("--nodes", "4", "--name", "latents"),
    ),
}
# In the file {patch}: what no option is for.
PATCH = """\
metadata: {annotations: {team: vision}}
spec:
  suspend: true
  template:
    spec:
      priorityClassName: high
      containers:
      - name: main
        env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hub, key: token}}}]
        resources: {limits: {nvidia.com/gpu: null, amd.com/gpu: 1}}
        volumeMounts: [{name: scratch, mountPath: /scratch}]
      volumes: [{name: scratch, emptyDir: {}}]
---
kind: PersistentVolumeClaim
spec: {storageClassName: shared}
"""
OF_SLURM = [name for name in TEXTS if name.startswith("slurm")]
OF_K8S = [name for name in TEXTS if name.startswith("k8s")]


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


def container(text: str) -> dict:
    [found] = documents(text)[-1]["spec"]["template"]["spec"]["containers"]
    return found
