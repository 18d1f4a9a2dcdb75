"""What TensorBoard, wandb and trackio kept of a run, as they keep it."""

import collections
import json
import struct
import time

import pytest

_BLOCK = 32768  # bytes of wandb's offline log (LevelDB's log format)


def tensorboard_rows(directory):
    """{step: {name: value}}, as TensorBoard reads event files: purged ones are gone."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(module).EventAccumulator(str(directory))
    reader.Reload()
    rows = collections.defaultdict(dict)
    for name in reader.Tags()["scalars"]:
        events = reader.Scalars(name)
        assert len({e.step for e in events}) == len(events)
        for event in events:
            rows[event.step][name] = event.value
    return dict(rows)


def tensorboard_config(directory):
    """The newest config that was recorded."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(module).EventAccumulator(str(directory))
    reader.Reload()
    text = reader.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]
    return json.loads(text.decode().removeprefix("```json").removesuffix("```"))


class WandbFile:
    """An offline run of wandb, read back.

    Attributes:
        id, name, project, config: Of the run.
        rows: [(step, {name: value})] in their order.
    """

    def __init__(self, path):
        self.rows = []
        for record in _complete(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                self.id, self.name = run.run_id, run.display_name
                self.project = run.project
                self.config = {
                    x.key: json.loads(x.value_json) for x in run.config.update
                }
            elif kind == "history":
                items = {
                    ".".join(x.nested_key) or x.key: json.loads(x.value_json)
                    for x in record.history.item
                }
                row = {k: x for k, x in items.items() if not k.startswith("_")}
                self.rows.append((items["_step"], row))


def wandb_files(directory):
    """One of each process that wrote."""
    paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    return [WandbFile(path) for path in paths]


def _complete(path):
    """Its records once the last one is there: another process writes them. Of a run
    that was killed, those that there are."""
    records = []
    for _ in range(100):
        records = list(_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.05)
    return records


def _records(path):
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, joined = path.read_bytes(), 7, b""  # after the file's header
    while at < len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        joined += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(joined)
            yield record
            joined = b""


def trackio_runs(project):
    """[(name, config, [(step, {name: value})])] of a project."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in trackio.Api().runs(project):
        rows = []
        for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
            step = row.pop("step")
            row.pop("timestamp")
            rows.append((step, row))
        config = {k: x for k, x in run.config.items() if not k.startswith("_")}
        found.append((run.name, config, rows))
    return found
