"""Writers: the rows of one export task -> one file in a format that others load directly.

Add a format: one file with a Component that writes and reads `Rows`, and its name below.
"""

from typing import Annotated

from pydantic import Field

from pipeline.writers.base import FIELDS, NO_LABEL, BaseWriter, Rows
from pipeline.writers.parquet import ParquetWriter
from pipeline.writers.tar import TarWriter

__all__ = ["FIELDS", "NO_LABEL", "BaseWriter", "ParquetWriter", "Rows", "TarWriter", "Writer"]

Writer = Annotated[TarWriter | ParquetWriter, Field(discriminator="kind")]
