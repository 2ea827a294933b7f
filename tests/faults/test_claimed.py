"""A second command in the folder of a run that goes on: refused before it changes anything."""

from common.claimed import claim, claims_end


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_commands_do_not_write_into_one_folder(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    unfinished = folder / ".run.pt.half.tmp"  # what the first one is writing
    unfinished.write_bytes(b"half")
    with claims_end():
        claim(folder)
        assert whole.task.run(tmp_path) == 1
        told = (tmp_path / "log.txt").read_text()
        assert told.count(f"{folder}: another command writes into it (process ") == 1
        assert "Traceback" not in told
        assert {path.name for path in listing(folder)} == {".lock", unfinished.name}
    assert whole.task.run(tmp_path) == 0
    assert not unfinished.exists()


def test_nor_do_they_go_on_with_one_run(whole, tmp_path):
    task = whole.task
    assert task.run(tmp_path) == 0
    before = listing(tmp_path / "run")
    with claims_end():
        claim(tmp_path / "run")
        assert task.run(tmp_path, resume=True) == 1
    assert "another command writes into it" in (tmp_path / "log.txt").read_text()
    after = listing(tmp_path / "run")
    lock = tmp_path / "run" / ".lock"
    assert {**after, lock: b""} == {**before, lock: b""}
