"""Writers: the rows of one export task -> one file in a format that others load directly.

Add a format: one file with a Component that writes and reads `Rows`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.writers.base import (
    COLUMNS,
    FIELDS,
    NO_LABEL,
    BaseWriter,
    Column,
    ColumnType,
    Dtype,
    Rows,
)
from pipeline.writers.npy import NpyWriter
from pipeline.writers.parquet import ParquetWriter
from pipeline.writers.safetensors import SafetensorsWriter
from pipeline.writers.tar import TarWriter

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
