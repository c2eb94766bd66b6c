"""Parquet: one row per sample; the latents as fixed-size lists, nested like the latent's shape.

Columns: key, shard, row, valid, label (null = none), metadata (JSON text), text, fields of the JSON
by the export's setting `columns`, and the latents: mu, logvar or z, and those of mirrored images.
A latent of shape (C, H, W) is fixed_size_list<fixed_size_list<fixed_size_list<float>[W]>[H]>[C]:
pyarrow returns its values without a copy, and Hugging Face `datasets` restores the shape from the
types (it returns a flat list under an Array3D feature as flat: datasets 5.2). The schema's metadata
holds the features for `datasets` and, under "latentmill", shape and types. All files of an export
have the same columns, so what these cannot hold stands there, too, where a file has such rows:

    "escaped": {"text": [rows], "metadata": [rows]}   not UTF-8: see `pipeline.common.texts.escaped`
    "label_text": {"row": text}    of a `.cls` that is no integer, or -1 (escaped); label is null
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.common.labels import NO_LABEL
from pipeline.common.texts import escaped, not_utf8, shown, unescaped
from pipeline.latents.formats.parquet.reader import label_texts_of
from pipeline.latents.formats.writing import COLUMNS, FIELDS, BaseWriter, Column, Rows

# Upper bound; a reader holds one group at a time. All groups have about the same size.
ROW_GROUP_BYTES = 32 << 20
_TYPES = {"float16": pa.float16(), "float32": pa.float32()}
_COLUMN_TYPES = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
}


class ParquetWriter(BaseWriter):
    """A Parquet file with the stem of the source shard."""

    kind: Literal["parquet"] = "parquet"

    @property
    def suffix(self) -> str:
        return ".parquet"

    def write(self, path: Path, rows: Rows) -> None:
        write_parquet(path, rows, rows.latents)

    def read(self, path: Path) -> Rows:
        return read_parquet(path)[0]


def write_parquet(path: Path, rows: Rows, fields: Collection[str]) -> None:
    """Create a file with these fields of the latents, uncompressed: floats hardly compress."""
    table = to_table(rows, fields)
    plain = [_leaf(field, rows.latent_shape) for field in fields]
    others, small = [*COLUMNS, *rows.columns], list(rows.columns)
    num_groups = -(-table.nbytes // ROW_GROUP_BYTES)
    options: dict[str, Any] = {
        "row_group_size": -(-len(rows) // max(num_groups, 1)),
        "compression": dict.fromkeys(others, "ZSTD") | dict.fromkeys(plain, "NONE"),
        "use_dictionary": ["shard", "label", *small],
        "write_statistics": ["key", "row", "label", *small],
    }
    with path.open("xb") as file:
        pq.write_table(table, file, **options)
        file.flush()
        os.fsync(file.fileno())


def read_parquet(path: Path) -> tuple[Rows, dict[str, Any]]:
    """Return the rows, with the fields that the file holds, and its description.

    Raises ValueError when the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        described = json.loads(table.schema.metadata[b"latentmill"])
        has_text = "text" in table.column_names  # missing in older exports
        rows = Rows(
            shard=path.stem,
            keys=table["key"].to_pylist(),
            rows=table["row"].to_numpy(),
            valid=table["valid"].to_numpy(),
            labels=table["label"].fill_null(NO_LABEL).to_numpy(),
            metadata=_texts(table, "metadata", described),
            texts=_texts(table, "text", described) if has_text else [None] * len(table),
            latents={f: to_array(table[f]) for f in FIELDS if f in table.column_names},
            columns={
                name: Column(kind, table[name].to_pylist())
                for name, kind in described.get("columns", {}).items()
            },
            label_texts={i: unescaped(text) for i, text in label_texts_of(described).items()},
        )
        return rows, described
    except (pa.ArrowException, LookupError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error!r}") from error


def _texts(table: Any, name: str, described: Mapping[str, Any]) -> list[str | None]:
    texts: list[Any] = table[name].to_pylist()
    for i in described.get("escaped", {}).get(name, ()):
        texts[i] = unescaped(texts[i])
    return texts


def to_table(rows: Rows, fields: Collection[str]) -> Any:
    """Return the rows as a pyarrow.Table with the schema of the module's docstring."""
    columns: dict[str, Any] = {
        "key": pa.array(rows.keys, pa.string()),
        "shard": pa.array([rows.shard] * len(rows), pa.string()),
        "row": pa.array(rows.rows, pa.int64()),
        "valid": pa.array(rows.valid, pa.bool_()),
        "label": pa.array(rows.labels, pa.int64(), mask=rows.labels == NO_LABEL),
        "metadata": pa.array(map(shown, rows.metadata), pa.string()),
        "text": pa.array(map(shown, rows.texts), pa.string()),
    }
    columns |= {
        name: pa.array(column.values, _COLUMN_TYPES[column.kind])
        for name, column in rows.columns.items()
    }
    columns |= {field: _nested(rows.latents[field]) for field in fields}
    return pa.table(columns).replace_schema_metadata(_schema_metadata(rows, fields))


def to_array(column: Any) -> NDArray[Any]:
    """Return a pyarrow.ChunkedArray of nested fixed-size lists as an array [n, *shape]."""
    values, kind, shape = column.combine_chunks(), column.type, list[int]()
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(len(column), *shape)


def _nested(values: NDArray[Any]) -> Any:
    nested = pa.array(np.ascontiguousarray(values).reshape(-1), _TYPES[values.dtype.name])
    for size in reversed(values.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, size)
    return nested


def _leaf(field: str, shape: tuple[int, ...]) -> str:
    """Return Parquet's name of the column with a field's numbers."""
    return field + ".list.element" * len(shape)


def _schema_metadata(rows: Rows, fields: Collection[str]) -> dict[str, str]:
    dtype = rows.latents[rows.main].dtype.name
    latent: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
    for size in reversed(rows.latent_shape):
        latent = {"feature": latent, "length": size, "_type": "List"}
    kinds = COLUMNS | {name: column.kind for name, column in rows.columns.items()}
    features: dict[str, Any] = {
        name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()
    }
    features |= dict.fromkeys(fields, latent)
    ours: dict[str, Any] = {
        "version": 1,
        "latent_shape": list(rows.latent_shape),
        "dtype": dtype,
        "fields": list(rows.latents),
        "columns": {name: column.kind for name, column in rows.columns.items()},
    }
    texts = {"text": not_utf8(rows.texts), "metadata": not_utf8(rows.metadata)}
    if any(texts.values()):
        ours["escaped"] = {name: places for name, places in texts.items() if places}
    if rows.label_texts:
        ours["label_text"] = {str(i): escaped(text) for i, text in rows.label_texts.items()}
    return {
        "huggingface": json.dumps({"info": {"features": features}}, sort_keys=True),
        "latentmill": json.dumps(ours, sort_keys=True),
    }
