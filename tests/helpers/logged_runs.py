"""Curves as the packages of the loggers read them back from the disk."""

import struct
from pathlib import Path

Curves = dict[str, list[tuple[int, float]]]
"""Steps and values by the name of the curve."""
BLOCK = 32768
"""Bytes of a block in an offline file of Weights & Biases."""
HEADER = 7


def tensorboard_curves(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        name: [(event.step, event.value) for event in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }


def tensorboard_text(folder: Path, name: str) -> str:
    """Return the last text with a name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read.Tensors(name)[-1].tensor_proto.string_val[0].decode()


def wandb_records(path: Path):
    """Yield the records of an offline file, which has the format of LevelDB's log.

    Weights & Biases reads it in its service only; the records are its own messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position = HEADER
    parts = b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def wandb_curves(folder: Path) -> tuple[Curves, set[str]]:
    """Return the curves of all offline folders, and the keys of their runs."""
    import json

    found: Curves = {}
    keys = set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                keys.add(record.run.run_id)
            if record.WhichOneof("record_type") != "history":
                continue
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in row.items():
                if not name.startswith("_") and name != "step":
                    found.setdefault(name, []).append((row["step"], value))
    return found, keys
