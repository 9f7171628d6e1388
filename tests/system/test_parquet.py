"""A small file that stands for a large one is refused before it fills the memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsc_hub.data import table_files
from dsc_hub.errors import DataError
from dsc_hub.system import parquet

MIB = 2**20


def bomb(path: Path, rows: int, each: int) -> Path:
    """Many rows of one long text, which is stored once."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * each]))
    pq.write_table(pa.table({"prompt": text}), path, compression="zstd", store_schema=False)
    return path


def test_rows_come_in_order_and_whole(tmp_path: Path):
    table = pa.table({"prompt": [f"{n}" for n in range(1000)], "n": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert list(parquet.rows(tmp_path / "a.parquet")) == table.to_pylist()
    assert [row["n"] for row in table_files.read_rows(tmp_path / "a.parquet", "prompt")] == list(range(1000))


@pytest.mark.parametrize("compressed", ["by the dictionary", "by zstd"])
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, compressed: str):
    path = tmp_path / "bomb.parquet"
    if compressed == "by the dictionary":
        bomb(path, 20_000, MIB)  # 20 GB
    else:
        table = pa.table({"prompt": ["x" * MIB] * 256})
        with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as file:
            for _ in range(9):
                file.write_table(table)
    assert path.stat().st_size < 5 * MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"stands for more than 2\.0 GiB"):
        for _ in table_files.read_rows(path, "prompt"):
            pass
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 3 * 2**30


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"no"])
def test_what_is_no_parquet_is_an_error_of_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="can't be read as Parquet"):
        list(parquet.rows(tmp_path / "a.parquet"))


DAMAGED = Path(__file__).parent.parent / "data" / "damaged"


@pytest.mark.parametrize("file", sorted(DAMAGED.glob("*.parquet")), ids=lambda p: p.stem)
def test_a_damaged_file_is_an_error_and_does_not_abort_the_process(file: Path):
    """Files that tests/fuzz.py found: the sizes of their columns, or what they hold, ended the process."""
    code = (
        "import sys; from dsc_hub.data import table_files; from dsc_hub.errors import DataError\n"
        "try: list(table_files.read_rows(__import__('pathlib').Path(sys.argv[1]), 'text'))\n"
        "except DataError as e: print(e)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert child.returncode == 0 and "can't be read as Parquet" in child.stdout, child.stderr
