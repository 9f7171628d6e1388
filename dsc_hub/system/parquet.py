"""Read the rows of a Parquet file in batches: a file of a few megabytes can expand to many gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsc_hub.errors import DataError

LARGEST_UNPACKED = 2**31  # bytes of all values of a file
ROWS_AT_ONCE = 256  # rows


def rows(path: Path, largest: int = LARGEST_UNPACKED) -> Iterator[dict[str, Any]]:
    """Yield the rows in order. DataError for invalid Parquet, or if the values exceed `largest` bytes.

    The limit is checked by the sizes in the footer before reading, and by the bytes read, since one stored value can
    occur in many rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            footer = file.metadata
            # Not the sizes of the columns: asked for those of a damaged file, pyarrow 26 aborts the process.
            size = sum(footer.row_group(g).total_byte_size for g in range(footer.num_row_groups))
            _check_size(path, size, largest)
            size = 0
            for batch in file.iter_batches(ROWS_AT_ONCE):
                size += batch.nbytes
                _check_size(path, size, largest)
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} can't be read as Parquet: {' '.join(str(e).split())[:200]}") from None


def _check_size(path: Path, size: int, largest: int) -> None:
    if size > largest:
        raise DataError(
            f"{path} stands for more than {largest / 2**30:.1f} GiB of values ({path.stat().st_size:,} bytes on disk)",
            "Split the file.",
        )
