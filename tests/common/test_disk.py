"""Files that are written whole or not at all; full disks are in tests/faults/test_disk.py."""

from types import MappingProxyType

from common.disk import write_csv


def test_a_table_has_the_columns_of_all_its_rows_in_order(tmp_path):
    path = tmp_path / "made" / "table.csv"
    write_csv(path, (MappingProxyType({"b": 1, "a": None}), {"a": "x, y", "c": 0.5}))
    assert path.read_bytes() == b'b,a,c\r\n1,,\r\n,"x, y",0.5\r\n'
    write_csv(path, [])
    assert path.read_bytes() == b"\r\n"
