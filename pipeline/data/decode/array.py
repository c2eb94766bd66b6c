"""Arrays: `.npy` members of one declared shape, dtype and range.

    .npy bytes -> header check -> copy into the slot of the batch -> range check

The header is parsed as literals only (`allow_pickle=False`), so no code in a file can run.
"""

import io
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.common.component import Component
from pipeline.data.decode.fault import Content, DecodeError
from pipeline.data.decode.image import Suffix

HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArrayDecode(Component):
    """Read a `.npy` member whose values lie in `range`, which maps to the model's [0, 1]."""

    kind: Literal["array"] = "array"
    suffix: Suffix = "npy"  # of the member that holds the array
    # of every array; others are bad samples
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    dtype: Literal["uint8", "uint16", "float16", "float32"] = "float32"  # of the stored values
    range: tuple[float, float]  # stored values that become 0 and 1

    @model_validator(mode="after")
    def _range_is_usable(self) -> Self:
        low, high = self.range
        if not low < high:
            raise ValueError(f"range must be [lowest, highest], but is [{low}, {high}]")
        stored = self.stored_dtype
        info = np.iinfo(stored) if stored.kind == "u" else np.finfo(stored)
        if low < float(info.min) or high > float(info.max):
            raise ValueError(
                f"range [{low}, {high}] exceeds the range of {self.dtype}, [{info.min}, {info.max}]"
            )
        return self

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The declared shape of one array."""
        return self.shape

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """The shape of one array in memory: as declared."""
        return self.shape

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type of the values in the file and in the batch."""
        return np.dtype(self.dtype)

    @property
    def member_suffixes(self) -> Sequence[str]:
        """The one member that holds the array."""
        return (self.suffix,)

    @cached_property
    def _usual_header(self) -> bytes:
        """The header that numpy writes for this declaration; compared before any parsing."""
        buffer = io.BytesIO()
        header = {"descr": self.stored_dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    @cached_property
    def _num_values(self) -> int:
        return math.prod(self.shape)

    def decode(self, data: Content, out: NDArray[Any]) -> None:
        """Copy one file's values into `out` [*shape]; raise DecodeError."""
        header = self._usual_header
        num_bytes = self._num_values * self.stored_dtype.itemsize
        if data.startswith(header) and len(data) == len(header) + num_bytes:
            values = np.frombuffer(data, self.stored_dtype, offset=len(header))
            out[...] = values.reshape(self.shape)
        else:
            out[...] = self._parse(data)
        self._check_range(out)

    def decode_values(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy values of the declared shape and type into `out`; raise DecodeError by range."""
        out[...] = values
        self._check_range(out)

    def _parse(self, data: Content) -> NDArray[Any]:
        """Any valid `.npy` of the declared shape and type: Fortran order, big-endian, version 2."""
        file = io.BytesIO(data)
        try:
            read_header = HEADER_READERS[np.lib.format.read_magic(file)]
            shape, is_fortran, dtype = read_header(file)
        except (ValueError, KeyError, EOFError, TypeError, SyntaxError) as error:
            raise DecodeError("decode", f"npy header: {error}") from None
        if shape != self.shape:
            raise DecodeError("shape", f"{list(shape)} instead of {list(self.shape)}")
        if dtype.newbyteorder("=") != self.stored_dtype:
            raise DecodeError("dtype", f"{dtype} instead of {self.dtype}")
        body = file.read()
        if len(body) != self._num_values * dtype.itemsize:
            raise DecodeError("decode", f"npy: {len(body)} bytes of values, {shape} expected")
        return np.frombuffer(body, dtype).reshape(shape, order="F" if is_fortran else "C")

    def _check_range(self, values: NDArray[Any]) -> None:
        low, high = self.range
        smallest, largest = values.min(), values.max()
        if not (smallest >= low and largest <= high):  # also false for NaN
            raise DecodeError(
                "range", f"values in [{smallest}, {largest}], declared range [{low}, {high}]"
            )

    def event_view(self, x: Tensor) -> Tensor:
        """Return x [b, *shape] unchanged."""
        return x

    def to_unit(self, x: Tensor) -> Tensor:
        """Map stored values to float32 in [0, 1] on x's device: (x - low) / (high - low)."""
        low, high = self.range
        return x.to(torch.float32).sub(low).div_(high - low)
