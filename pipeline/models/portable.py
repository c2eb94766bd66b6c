"""Encoder and decoder as ONNX and torch.export programs, which run without latentmill.

    encoder: x [B, *stored shape], values as stored -> [0, 1] -> network -> bottleneck -> mu, logvar
    decoder: z [B, *latent] -> network -> likelihood's mean -> reconstruction [B, *event] in [0, 1]

The batch size is free, and height and width of pictures for fully convolutional networks, from
latents of 2 x 2 on. Arithmetic and outputs are float32 for any training precision. Every program is
run and compared with the model before it is written, also at another size where sizes are free. The
same model and library versions give the same bytes.
"""

import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline.common.errors import UserError
from pipeline.models.autoencoder import AutoEncoder
from pipeline.models.interchange import Network, StoredValues, TensorInfo

ToUnit = Callable[[Tensor], Tensor]  # stored values [B, *stored shape] -> [B, *event] in [0, 1]
Outputs = Mapping[str, NDArray[Any]]  # by name
Run = Callable[[NDArray[Any]], Outputs]  # runs a written program on a batch

TOLERANCE = 1e-4  # |found - wanted| <= TOLERANCE (1 + |wanted|): ONNX Runtime fuses and reorders
TRACED_ROWS = 2  # a batch of 1 would be traced as a constant
CHECKED_ROWS = (1, 5)
ROWS = max(*CHECKED_ROWS, TRACED_ROWS)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class PortableEncoder(nn.Module):
    """Stored values -> the posterior's parameters."""

    def __init__(self, model: AutoEncoder, to_unit: ToUnit) -> None:
        super().__init__()
        self.network = model.encoder
        self.bottleneck = model.bottleneck
        self.to_unit = to_unit

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return mu and, unless the bottleneck is deterministic, logvar: [B, *latent]."""
        # From channels-last memory torch derives a condition on the width that it cannot prove.
        return self.bottleneck(self.network(self.to_unit(x).contiguous())).moments()


class PortableDecoder(nn.Module):
    """Latents -> the mean reconstruction."""

    def __init__(self, model: AutoEncoder) -> None:
        super().__init__()
        self.network = model.decoder
        self.likelihood = model.config.likelihood

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Return reconstruction [B, *event] in [0, 1]."""
        return {"reconstruction": self.likelihood.mean(self.network(z)).clamp(0, 1)}


@dataclass(frozen=True)
class Input:
    """The one input of a network: examples, and which of its axes have any length."""

    argument: str
    values: NDArray[Any]  # [ROWS, *shape]
    height_axis: int  # of `values`; the width follows
    multiple: int  # of which heights and widths are; 0 = they are fixed

    @cached_property
    def traced(self) -> NDArray[Any]:
        """The rows that are traced: of another size where sizes are free, height unlike width."""
        if not self.multiple:
            return self.values[:TRACED_ROWS]
        more = [(0, 0)] * self.values.ndim
        more[self.height_axis] = (0, self.multiple)
        more[self.height_axis + 1] = (0, 2 * self.multiple)
        return np.pad(self.values[:TRACED_ROWS], more, mode="wrap")

    def dynamic_shapes(self) -> dict[str, dict[int, Dim]]:
        """Return the free axes and their names, as torch's exporters take them."""
        axes = {0: Dim("batch")}
        if self.multiple:
            for axis, name in enumerate(("height", "width"), start=self.height_axis):
                axes[axis] = Dim(name, min=2 * self.multiple)
        return {self.argument: axes}


def check_packages() -> None:
    """Raise UserError unless all that ONNX needs is installed."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx needs {', '.join(missing)}, which is not installed: `pip install "
            f"'latentmill[onnx]'` brings {', '.join(ONNX_PACKAGES)} (in a clone: `pip install -c "
            "constraints.txt -e '.[onnx]'`). Or leave out --onnx."
        )


def export_networks(
    model: AutoEncoder,
    to_unit: ToUnit,
    stored: StoredValues,
    stored_shape: tuple[int, ...],
    *,
    onnx: bool,
    torch_export: bool,
    height_axis: int = 1,
) -> tuple[dict[str, Network], dict[str, bytes]]:
    """Return the descriptions of encoder and decoder, and their files by name.

    stored_shape: of one sample as the data holds it. onnx, torch_export: the formats. height_axis:
    of a batch of stored pictures; the width follows. Raises UserError if a program does not compute
    what the model computes.
    """
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    generator = np.random.default_rng(0)
    x = generator.uniform(*stored.range, (ROWS, *stored_shape)).astype(stored.dtype)
    z = generator.standard_normal((ROWS, *model.latent_shape), np.float32)
    factor = free_sizes(model)
    modules = {
        "encoder": (PortableEncoder(model, to_unit), Input("x", x, height_axis, factor)),
        "decoder": (PortableDecoder(model), Input("z", z, 2, 1 if factor else 0)),
    }
    writers = {"onnx": _onnx} if onnx else {}
    writers |= {"pt2": _torch_export} if torch_export else {}
    networks: dict[str, Network] = {}
    files: dict[str, bytes] = {}
    for name, (module, takes) in modules.items():
        batches = [takes.values[:rows] for rows in CHECKED_ROWS]
        batches += [takes.traced[:1]] if takes.multiple else []
        wanted = [_to_numpy(module(torch.from_numpy(batch))) for batch in batches]
        program = _trace(module, takes)
        digests: dict[str, str] = {}
        for suffix, write in writers.items():
            file = f"{name}.{suffix}"
            files[file], run = write(program, takes, list(wanted[0]))
            for batch, outputs in zip(batches, wanted, strict=True):
                check_outputs(file, run(batch), outputs)
            digests[file] = hashlib.sha256(files[file]).hexdigest()
        networks[name] = Network(
            files=digests,
            inputs=_describe({takes.argument: takes.values}),
            outputs=_describe(wanted[0]),
        )
    return networks, files


def free_sizes(model: AutoEncoder) -> int:
    """Return what must divide the height and width of pictures; 0 = they are fixed.

    Latents of a single row or column would be traced as constants: their sizes are fixed, too.
    """
    is_free = model.config.backbone.fully_convolutional and min(model.latent_shape[1:]) > 1
    return model.event_shape[1] // model.latent_shape[1] if is_free else 0


def check_outputs(file: str, found: Outputs, wanted: Outputs) -> None:
    """Raise UserError unless a program's outputs are the model's, within TOLERANCE."""
    for name, values in wanted.items():
        # Written so that NaN fails.
        close = np.abs(found[name] - values) <= TOLERANCE * (1 + np.abs(values))
        if not close.all():
            row = int(np.argwhere(~close)[0][0])
            raise UserError(
                f"{file} does not compute what the model computes: {(~close).sum()} of "
                f"{close.size} values of {name} differ by more than {TOLERANCE:g} (1 + |value|) at "
                f"a batch of {len(values)}; the first is {found[name][~close][0]:g} instead of "
                f"{values[~close][0]:g} (row {row}). Nothing was exported. If the model itself "
                "gives NaN, take another checkpoint (--step); else leave this format out."
            )


def _to_numpy(outputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: value.detach().numpy() for name, value in outputs.items()}


def _describe(arrays: Outputs) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo.model_validate(
            {"name": name, "dtype": value.dtype.name, "shape": value.shape[1:]}
        )
        for name, value in arrays.items()
    )


def _trace(module: nn.Module, takes: Input) -> ExportedProgram:
    """Return the program with its free axes, without paths of this machine."""
    example = torch.from_numpy(takes.traced)
    program = torch.export.export(module, (example,), dynamic_shapes=takes.dynamic_shapes())
    program.example_inputs = None  # would be stored as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of our files, and of torch's
    return program


def _torch_export(
    program: ExportedProgram, takes: Input, outputs: Sequence[str]
) -> tuple[bytes, Run]:
    """Return the content of a `.pt2`, and the program as read back from it."""
    del takes, outputs  # the program knows their names
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    module = torch.export.load(io.BytesIO(content)).module()
    return content, lambda values: _to_numpy(module(torch.from_numpy(values)))


def _onnx(program: ExportedProgram, takes: Input, outputs: Sequence[str]) -> tuple[bytes, Run]:
    """Return the content of an `.onnx`, and the session of ONNX Runtime that runs it."""
    with _quiet():
        converted = torch.onnx.export(
            program,
            input_names=[takes.argument],
            output_names=outputs,
            dynamic_shapes=takes.dynamic_shapes(),  # names the axes
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert converted is not None  # only without dynamo
    content = converted.model_proto.SerializeToString(deterministic=True)
    runtime: Any = import_module("onnxruntime")  # an extra
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(values: NDArray[Any]) -> Outputs:
        return dict(zip(names, session.run(None, {takes.argument: values}), strict=True))

    return content, run


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the messages of torch's exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own deprecated class.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
