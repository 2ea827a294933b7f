"""Scalars for TensorBoard, written by the thread that has them.

torch's ``SummaryWriter`` writes from a thread of its own. Where the disk is full that thread ends,
and the next flush waits for it for ever; here it is an error like any other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from common.disk import writing_into


class Board:
    """Writes one file of events.

    Args:
        folder: Made where it is missing.
        purge_from: TensorBoard drops what older files of the folder have from this step on; None:
            nothing.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, purge_from: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder = folder
        self._event = Event
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        with writing_into(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / name).open("wb")
            self._writer = RecordWriter(self._file)
            self._add(file_version="brain.Event:2")
            if purge_from is not None:
                self._add(step=purge_from, session_log=SessionLog(status=SessionLog.START))
            self._file.flush()

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars of one step.

        Raises:
            OutputError: The disk is full.
        """
        from torch.utils.tensorboard.summary import scalar

        with writing_into(self.folder):
            for name, value in scalars.items():
                self._add(step=step, summary=scalar(name.replace("->", "_to_"), value))
            self._file.flush()

    def _add(self, **fields: object) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
