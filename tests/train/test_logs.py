"""What a run writes as it goes: rows whole or not at all, and no end for want of space."""

import errno
import json
import os

import pytest
from tensorboardX.proto.event_pb2 import Event

from mambamim_jax.checks import ConfigError
from mambamim_jax.train.logs import LogFile, RunLog, complete, open_log, read_rows
from tests.full_disk import full_disk


def events(workdir):
    """(tag, value) of the scalars in TensorBoard's files."""
    (path,) = (workdir / "tensorboard").iterdir()
    found, content = [], path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_rows_without_room_are_whole_or_absent_and_follow_once_there_is_room(tmp_path):
    said = []
    log = RunLog(tmp_path, 0, validated=True, say=said.append)
    log.row({"step": 1})
    with full_disk(20):  # room for one row and a half
        for step in (2, 3):
            log.row({"step": step})
            log.scalars({"step": step, "loss": 0.5})
        log.sync()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert [row["step"] for row in log.rows()] == [1, 2, 3]
    log.row({"step": 4})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert events(tmp_path) == [("loss", 0.5)] * 2
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: {tmp_path}")
    assert said[0].endswith(" cannot be written (File too large); the run goes on")


def test_what_is_missing_in_the_end_is_said(tmp_path):
    said = []
    log = RunLog(tmp_path, 0, say=said.append)
    with full_disk():
        log.row({"step": 1})
        log.row({"step": 2})
        log.close()
    missing = f"{tmp_path / 'metrics.jsonl'}: the last 2 rows are missing, there was no room for them"
    assert said[1:] == [f"WARNING: {missing}"]
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    log, write = LogFile(tmp_path / "rows", lambda *failure: pytest.fail(str(failure))), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    log.add(b"a whole row\n")
    log.close()
    assert (tmp_path / "rows").read_bytes() == b"a whole row\n"


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"^--workdir: .* can't be written \(No space left") as refused:
        open_log(tmp_path, 0, False, print)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_others_have_written_are_kept_in_order_and_read_where_they_can_be(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = {"step": 1, "loss": 0.5, "lr": 0, "seconds": 2.0}
    others = [whole | {"step": 3.0}, whole, whole | {"step": 2, "loss": None}, {"step": 4}]
    lines = [json.dumps(row) for row in others]
    bad = ["[" * 10**5, '{"step": 2.5}', '{"step": NaN}', '{"step": Infinity}', '{"step": true}']
    path.write_text("\n".join([*lines, *bad]) + "\n")
    log = RunLog(tmp_path, 4)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert complete(read_rows(path)) == [whole, whole | {"step": 3}]
