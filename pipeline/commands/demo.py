"""`make demo`: the main job, end to end, by the commands that a person would type.

    sprites -> shards -> AE, DAE, VAE, beta-VAE on two processes each -> latents -> verify, probe

Every command is printed before it runs, and writes into `demo/`. A second start resumes, as each
command does.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common import needs

if __name__ == "__main__":
    needs.check()  # before anything of the extra is imported

import numpy as np
from PIL import Image

from pipeline.common.errors import DONE, UserError
from pipeline.common.files import local_directory, write_json

MODELS = ("ae", "dae", "vae", "beta_vae")
PICTURE_GAP_PX = 12
FACTORS = ("x", "y", "label")
LATENTMILL = (sys.executable, "-m", "latentmill")


class StepFailedError(Exception):
    """A command of the demo failed, and has printed its error."""


@dataclass(frozen=True)
class Row:
    """One model's line of the final table."""

    model: str
    before: float  # held-out squared error per image at step 0
    after: float  # and at the end
    nats: float | None  # bound on -ln p(x) per image
    kl: float | None  # nats per image
    scores: Mapping[str, float]  # linear probe of the latents, by factor
    seconds: float  # training, start-up and evaluation included


def step(*command: object) -> str:
    """Print and run a command; return its stdout. Its stderr is shown."""
    words = [str(word) for word in command]
    ours = tuple(words[: len(LATENTMILL)]) == LATENTMILL
    shown = ["latentmill", *words[len(LATENTMILL) :]] if ours else words
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout, end="")
        raise StepFailedError(f"the command above ended with exit code {done.returncode}")
    return done.stdout


def train(model: str, root: Path, *, processes: int, overrides: Sequence[str]) -> float:
    """Train one model and return its seconds, or those of an earlier demo that trained it."""
    run, taken = root / "runs" / model, root / "runs" / f"{model}-seconds.json"
    start = time.monotonic()
    where = (f"data.path={root / 'sprites'}", f"run_dir={run}")
    on_cores = ("--device", "cpu", "--processes", processes)
    step(*LATENTMILL, "train", model, *on_cores, *where, *overrides)
    if not taken.exists():
        write_json(taken, {"seconds": time.monotonic() - start})
    return float(json.loads(taken.read_bytes())["seconds"])


def export(model: str, root: Path, *, processes: int) -> Path:
    """Export the latents of one model, verify them, and return their directory."""
    out = root / "latents" / model
    where = (f"run={root / 'runs' / model}", f"out={out}")
    on_cores = ("--device", "cpu", "--processes", processes)
    step(*LATENTMILL, "export", "run", "parquet", *on_cores, *where)
    print(step(*LATENTMILL, "verify", out, "--source", root / "sprites"), end="")
    return out


def probe(out: Path, root: Path, *, with_pixels: bool) -> list[dict[str, Any]]:
    """Probe one export for the position and the shape."""
    source = ("--source", root / "sprites") if with_pixels else ()
    targets = [word for factor in FACTORS for word in ("--target", factor)]
    return json.loads(step(*LATENTMILL, "probe", out, *source, *targets, "--json"))["scores"]


def linear(scores: Sequence[Mapping[str, Any]], features: str) -> dict[str, float]:
    """Return the linear scores from one kind of features, by target."""
    return {score["target"]: score["linear"] for score in scores if score["features"] == features}


def evaluations(run: Path) -> list[dict[str, float]]:
    """Return a run's evaluations of the averaged weights, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval_ema/loss" in record]


def table(rows: Sequence[Row], pixels: Mapping[str, float], chance: float) -> str:
    """Return the final table."""
    lines = [
        f"{'':10}{'squared error':>18}{'nats':>9}{'KL':>8}   {'linear probe':^24}",
        f"{'model':10}{'start':>10}{'end':>8}{'/image':>9}{'nats':>8}"
        f"   {'R2 x':>6}{'R2 y':>8}{'shape':>9}{'seconds':>11}",
    ]
    for row in rows:
        nats = "-" if row.nats is None else f"{row.nats:.1f}"
        kl = "-" if row.kl is None else f"{row.kl:.1f}"
        lines.append(
            f"{row.model:10}{row.before:10.1f}{row.after:8.1f}{nats:>9}{kl:>8}"
            f"   {_scores(row.scores)}{row.seconds:11.0f}"
        )
    lines.append(f"{'pixels':10}{'':35}   {_scores(pixels)}")
    lines.append(f"{'chance':10}{'':35}   {0:6.3f}{0:8.3f}{chance:9.3f}")
    return "\n".join(lines)


def _scores(scores: Mapping[str, float]) -> str:
    return f"{scores['x']:6.3f}{scores['y']:8.3f}{scores['label']:9.3f}"


def picture(root: Path) -> None:
    """Put the last pictures of the four models side by side."""
    last = [max((root / "runs" / model / "images").glob("eval_ema-*.png")) for model in MODELS]
    images = [np.asarray(Image.open(path)) for path in last]
    gap = np.full((images[0].shape[0], PICTURE_GAP_PX, 3), 255, np.uint8)
    columns = [part for image in images for part in (gap, image)][1:]
    Image.fromarray(np.concatenate(columns, axis=1)).save(root / "picture.png")


def demo(root: Path, *, count: int, processes: int, overrides: Sequence[str]) -> None:
    """Run the whole job below `root` and print the table."""
    print(f"Latentmill demo: everything goes to {root}/; stop and start it as you like.")
    step(*LATENTMILL, "pack", "sprites", root / "sprites", "--count", count)
    seconds = {
        model: train(model, root, processes=processes, overrides=overrides) for model in MODELS
    }
    rows: list[Row] = []
    pixels: dict[str, float] = {}
    chance = 0.0
    for model in MODELS:
        scores = probe(export(model, root, processes=processes), root, with_pixels=not rows)
        if not rows:
            pixels = linear(scores, "pixels")
            chance = next(score["chance"] for score in scores if score["target"] == "label")
        first, *_, last = evaluations(root / "runs" / model)
        rows.append(
            Row(
                model=model,
                before=first["eval_ema/squared_error"],
                after=last["eval_ema/squared_error"],
                nats=last.get("eval_ema/nats"),
                kl=last.get("eval_ema/kl"),
                scores=linear(scores, "latents"),
                seconds=seconds[model],
            )
        )
    text = table(rows, pixels, chance)
    (root / "table.txt").write_text(text + "\n")
    picture(root)
    print(f"\n{text}\n{how_to_look(root)}")


def how_to_look(root: Path) -> str:
    """Return where the results are and how to open them."""
    run = root / "runs" / "vae"
    return f"""
Squared error, nats and KL: per held-out image, averaged (EMA) weights. Shape: accuracy.
Pictures   {root}/picture.png: AE, DAE, VAE, beta-VAE; in each: clean | corrupted | reconstruction
           | error. The same of every evaluation in {run}/images/
Metrics    {run}/metrics.jsonl
W&B        .venv/bin/wandb leet {run}/wandb/latest-run        in the terminal
           .venv/bin/wandb sync {run}/wandb/offline-run-*     to your account
Latents    {root}/latents/vae/data/parquet/*.parquet,  statistics in latent_stats.json
This table {root}/table.txt"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.commands.demo", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of all trainings, as a.b=c")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="(%(default)s)")
    parser.add_argument("--count", type=int, default=20_000, help="sprites (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="per run (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        demo(
            local_directory(arguments.out, "--out"),
            count=arguments.count,
            processes=arguments.processes,
            overrides=arguments.overrides,
        )
    except (StepFailedError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return DONE


if __name__ == "__main__":
    sys.exit(main())
