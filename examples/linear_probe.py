"""What can be read off the latents of an export by a straight line, with scikit-learn.

latentmill export run parquet run=runs/vae out=exports/vae
python examples/linear_probe.py exports/vae

Prints the accuracy on held-out labels, and R2 of every number in the samples' JSON, beside chance.
"""

import argparse
import json

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

import latentmill as lm


def label_accuracy(z: NDArray[np.float32], label: NDArray[np.int64]) -> tuple[float, float]:
    """Return the accuracy on a fifth of the rows, and that of always saying the commonest label."""
    z, held_out_z, label, held_out = train_test_split(z, label, test_size=0.2, random_state=0)
    classifier = LogisticRegression(max_iter=1000).fit(z, label)
    commonest = np.full_like(held_out, np.bincount(label).argmax())
    return classifier.score(held_out_z, held_out), float(accuracy_score(held_out, commonest))


def ridge_r2(z: NDArray[np.float32], value: NDArray[np.float64]) -> float:
    """Return R2 on a fifth of the rows; always saying the mean would score 0."""
    z, held_out_z, value, held_out = train_test_split(z, value, test_size=0.2, random_state=0)
    return RidgeCV(alphas=np.logspace(-3, 3, 7)).fit(z, value).score(held_out_z, held_out)


def probe(export: str) -> dict[str, tuple[float, float]]:
    """Return (score, chance) by the name of what was predicted."""
    latents = lm.LatentDataset(export, normalized=True)
    z = latents.column("mu").reshape(len(latents), -1)  # flat, also where latents are maps
    valid, label = latents.column("valid"), latents.column("label")
    scores: dict[str, tuple[float, float]] = {}
    labelled = valid & (label != lm.NO_LABEL)
    if labelled.any():
        scores["label"] = label_accuracy(z[labelled], label[labelled])
    notes = [json.loads(text or "{}") for text in latents.column("metadata")]
    for name in sorted({name for note in notes for name in note}):
        # bool is an int in Python, and no quantity here.
        has = np.array([type(note.get(name)) in (int, float) for note in notes]) & valid
        if has.any():
            value = np.array([notes[row][name] for row in np.flatnonzero(has)], np.float64)
            scores[name] = (ridge_r2(z[has], value), 0.0)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    for name, (score, chance) in probe(parser.parse_args().export).items():
        print(f"{name}: {score:.3f}, chance {chance:.3f}")
