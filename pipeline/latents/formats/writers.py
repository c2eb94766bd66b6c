"""Writers: the rows of one export task -> one file in a format that others load directly.

Add a format: one file with a Component that writes and reads `Rows`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.common.labels import NO_LABEL
from pipeline.latents.formats.npy.writer import NpyWriter
from pipeline.latents.formats.parquet.writer import ParquetWriter
from pipeline.latents.formats.safetensors.writer import SafetensorsWriter
from pipeline.latents.formats.tar.writer import TarWriter
from pipeline.latents.formats.writing import (
    COLUMNS,
    FIELDS,
    BaseWriter,
    Column,
    ColumnType,
    Dtype,
    Rows,
)

__all__ = [
    "COLUMNS",
    "FIELDS",
    "NO_LABEL",
    "BaseWriter",
    "Column",
    "ColumnType",
    "Dtype",
    "NpyWriter",
    "ParquetWriter",
    "Rows",
    "SafetensorsWriter",
    "TarWriter",
    "Writer",
]

Writer = Annotated[
    TarWriter | ParquetWriter | NpyWriter | SafetensorsWriter, Field(discriminator="kind")
]
