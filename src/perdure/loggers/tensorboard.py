"""Curves for TensorBoard, as event files.

    tensorboard --logdir runs/curves

Every process of a run adds one file to the folder of the run; TensorBoard joins them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perdure.loggers.base import Logger
from perdure.loggers.run_log import LoggedRun, Value
from perdure.utils.extras import imported

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Logger):
    """Write event files of TensorBoard to `folder/project/run`; see `Logger`.

    Needs the extra `perdure[tensorboard]`.
    """

    def open(self, run: LoggedRun) -> "_EventWriter":
        """Open an event file. See `Logger.open`."""
        name = "tensorboard.summary.writer.event_file_writer"
        files = imported(name, "tensorboard", "the logger tensorboard")
        writer = _EventWriter(files.EventFileWriter(str(run.folder / run.project / run.name)))
        if not run.resumed:
            rows = "".join(f"| {name} | `{text}` |\n" for name, text in run.settings.items())
            writer.describe("settings", f"| setting | value |\n|---|---|\n{rows}", 0)
        return writer


class _EventWriter:
    """Writer of one event file."""

    def __init__(self, file: "EventFileWriter") -> None:
        self._file = file

    def write(self, values: Sequence[Value]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for each in values:
            number = Summary.Value(tag=each.name, simple_value=float(each.value))
            self._file.add_event(
                Event(wall_time=each.seconds, step=each.step, summary=Summary(value=[number]))
            )
        self._file.flush()

    def describe(self, name: str, text: str, step: int) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._file.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(name, text)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
