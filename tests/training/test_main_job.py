"""The demo with fewer steps: every command runs, and its numbers make sense."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands.demo import MODELS
from tests.processes import Result

STEPS = 300


def last(run: Path, name: str) -> float:
    """The last logged value of a metric."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record[name] for record in reversed(records) if name in record)


# The demo with fewer models: the picture and the last words name the VAE.
SCRIPT = """
import sys
from pipeline.commands import demo
demo.MODELS = {models!r}
sys.exit(demo.main())
"""


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "models", [("vae",), pytest.param(MODELS, marks=pytest.mark.soak)], ids="-".join
)
def test_demo_end_to_end(
    run_processes: Callable[..., Result], tmp_path: Path, models: tuple[str, ...]
):
    out, script = tmp_path / "demo", tmp_path / "demo.py"
    script.write_text(SCRIPT.format(models=models))
    overrides = (f"num_steps={STEPS}", f"evaluation.every_steps={STEPS}")
    arguments = ("--out", out, "--count", 4000, "--processes", 2, *overrides)
    result = run_processes(script, None, *arguments, timeout=1140)
    assert result.code == 0, result.output
    assert "Warning" not in result.output

    table = (out / "table.txt").read_text()
    assert table in result.output
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    assert set(rows) == {*models, "pixels", "chance"}
    chance = float(rows["chance"][-1])
    for model in models:
        before, after, nats, kl, r2_x, r2_y, shape, _ = rows[model]
        assert float(after) < float(before) / 4
        assert min(float(r2_x), float(r2_y)) > 0.8
        assert float(shape) > chance
        assert (nats == "-") == (model in ("ae", "dae"))
        if nats == "-":
            assert kl == "-"
        else:
            assert float(kl) == pytest.approx(last(out / "runs" / model, "eval_ema/kl"), abs=0.05)
    if "beta_vae" in models:
        assert float(rows["vae"][3]) > float(rows["beta_vae"][3]) > 0
    assert (out / "picture.png").stat().st_size > 0
    for path in re.findall(
        r"\S+/(?:picture\.png|table\.txt|images/|metrics\.jsonl)", result.output
    ):
        assert Path(path).exists(), path
