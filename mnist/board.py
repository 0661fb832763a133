"""What TensorBoard shows of a run."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any


def write_events(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write the history as TensorBoard's event file `path`, if TensorBoard is installed.

    All of it, every time: an epoch more leaves the bytes before it as they were, so a TensorBoard that is reading
    goes on, and a run that resumes leaves no epoch twice. The history has no clock, and so neither have the events.
    """
    try:  # TensorBoard's public writer would import TensorFlow where that is installed; these do not
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        return
    file = BytesIO()
    writer: Any = RecordWriter(file)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in history:
        values = [Summary.Value(tag=name, simple_value=row[name]) for name in row if name not in ("epoch", "step")]
        writer.write(Event(step=int(row["step"]), summary=Summary(value=values)).SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
