"""The package itself: what it offers, when it imports it, and its types."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import latentmill as lm
from pipeline import __version__
from pipeline.common import needs
from tests.latentmill.world import World
from tests.processes import ROOT

INIT = ROOT / "latentmill/__init__.py"


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own."""
    argv = [sys.executable, "-c", script, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def test_all_names_are_there():
    assert lm.__version__ == __version__
    assert dir(lm) == sorted(lm.__all__)
    for name in lm.__all__:
        assert getattr(lm, name) is getattr(lm, name)
    with pytest.raises(AttributeError, match="module 'latentmill' has no attribute 'laod'"):
        _ = lm.laod


def test_editors_see_what_is_imported():
    """What stands under TYPE_CHECKING is what `__getattr__` finds, name for name."""
    tree = ast.parse(INIT.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lm._MODULES
    assert set(seen) == set(lm.__all__) - {"UserError", "__version__"}


NEEDS_NOTHING = """
import sys
heavy = sys.argv[2].split(",")
sys.modules |= dict.fromkeys(heavy)  # as if they were not installed
import latentmill as lm
latents = lm.LatentDataset(sys.argv[1])
print(len(latents), latents[0].mu.shape, lm.__version__)
for name in ("load", "train", "TrainConfig", "OrderedShards", "LoadedModel", "Codes"):
    try:
        getattr(lm, name)
    except lm.UserError as error:
        print(error)
"""


def test_latents_are_read_without_anything_of_training(world: World):
    done = python(NEEDS_NOTHING, world.export, ",".join(needs.TRAIN))
    assert (done.returncode, done.stderr) == (0, "")
    first, *refused = done.stdout.splitlines()
    assert first == f"{len(list(world.photos.iterdir()))} (10,) {__version__}"
    assert len(refused) == 6
    for name, line in zip(("load", "train"), refused, strict=False):
        assert line.startswith(f"latentmill.{name}: not installed here: ")
        assert "`pip install 'latentmill[train]'`" in line


def test_the_import_alone_loads_nothing_heavy():
    script = "import sys, latentmill; print([n for n in sys.argv[1:] if n in sys.modules])"
    done = python(script, *needs.TRAIN, "numpy", "pyarrow")
    assert (done.stdout, done.stderr) == ("[]\n", "")


TYPED = """
import latentmill as lm

model = lm.load("models/photos", step="best")
codes = model.encode(["a.jpg", b"..."])
reveal_type(model)
reveal_type(codes.mu)
reveal_type(codes.logvar)
reveal_type(model.decode(codes.sample(seed=1)))
reveal_type(lm.LatentDataset("latents")[0])
reveal_type(lm.OrderedShards("data", batch_size=8))
reveal_type(lm.train(lm.TrainConfig.load("vae.yaml", "num_steps=3")))
lm.load("models/photos", step="latest")
lm.TrainConfig(run_dir="r", batchsize=3)
"""


@pytest.mark.slow
def test_a_type_checker_knows_what_comes_back(tmp_path: Path):
    (tmp_path / "program.py").write_text(TYPED)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": ["."]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = Path(sys.executable).with_name("pyright")
    argv = [pyright, "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    told = [one["message"].split(" is ")[1] for one in found if one["severity"] == "information"]
    types = (
        "LoadedModel",
        "Tensor",
        "Tensor | None",
        "Tensor",
        "LatentRow",
        "OrderedShards",
        "int",
    )
    assert told == [f'"{name}"' for name in types]
    errors = [one for one in found if one["severity"] == "error"]
    lines = [TYPED.splitlines()[one["range"]["start"]["line"]] for one in errors]
    assert set(lines) == {
        'lm.load("models/photos", step="latest")',
        'lm.TrainConfig(run_dir="r", batchsize=3)',
    }, errors
