"""What can be read off the latents of an export by a straight line, with scikit-learn.

latentmill export run parquet run=runs/vae out=exports/vae
python examples/linear_probe.py exports/vae

Prints the accuracy on held-out labels, and R2 of every number in the samples' JSON, beside chance.
"""

import argparse
import json
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import train_test_split

import latentmill as lm


def score(model: Any, z: NDArray[np.float32], target: NDArray[Any]) -> float:
    """Fit on four fifths of the rows; return accuracy or R2 on the others."""
    z, held_out_z, target, held_out = train_test_split(z, target, test_size=0.2, random_state=0)
    return model.fit(z, target).score(held_out_z, held_out)


def numbers_of(text: str | None) -> dict[str, float]:
    """Return the numbers in a sample's JSON, which may be no JSON at all."""
    with suppress(ValueError, AttributeError):  # bool is an int in Python, and no quantity here
        return {n: v for n, v in json.loads(text or "{}").items() if type(v) in (int, float)}
    return {}


def probe(export: str) -> dict[str, tuple[float, ...]]:
    """Return (score, chance) by the name of what was predicted."""
    latents = lm.LatentDataset(export, normalized=True)
    z = latents.column(latents.fields[0]).reshape(len(latents), -1)  # flat, also if it is maps
    valid, label = latents.column("valid"), latents.column("label")
    scores: dict[str, tuple[float, ...]] = {}
    labelled = valid & (label != lm.NO_LABEL)
    if len(np.unique(label[labelled])) > 1:
        models = (LogisticRegression(max_iter=1000), DummyClassifier())  # or the commonest label
        scores["label"] = tuple(score(model, z[labelled], label[labelled]) for model in models)
    notes = [numbers_of(text) for text in latents.column("metadata")]
    for name in sorted({name for note in notes for name in note}):
        value = np.array([note.get(name, np.nan) for note in notes])
        has = np.isfinite(value) & valid
        if has.any():
            model = RidgeCV(alphas=np.logspace(-3, 3, 7))
            scores[name] = score(model, z[has], value[has]), 0.0  # the mean would score 0
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    for name, (found, chance) in probe(parser.parse_args().export).items():
        print(f"{name}: {found:.3f}, chance {chance:.3f}")
