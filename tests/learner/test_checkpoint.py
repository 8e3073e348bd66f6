import json
import os

import pytest
import torch

from perdure.errors import RunError
from perdure.learner.checkpoint import Snapshot, Store
from perdure.utils.atomic_files import write_atomically


def snapshot(k):
    return Snapshot(
        tensors={
            "model.w": torch.full((2, 3), float(k)),
            "count": torch.tensor(k),
            "empty": torch.zeros(0),
        },
        private={"memory.inputs": torch.full((4,), -float(k)), "mask": torch.tensor([True, False])},
        facts={"position": {"step": k}, "nothing": None, "rates": [0.1, 1e-300, float("inf")]},
    )


def test_a_saved_checkpoint_loads_with_equal_tensors(tmp_path):
    store = Store(tmp_path)
    assert store.load() is None and store.numbers() == []
    store.save(1, snapshot(7))
    back = Store(tmp_path).load()
    for mine, theirs in ((back.tensors, snapshot(7).tensors), (back.private, snapshot(7).private)):
        assert mine.keys() == theirs.keys()
        assert all(
            torch.equal(mine[name], value) and mine[name].dtype == value.dtype
            for name, value in theirs.items()
        )
    assert back.facts == snapshot(7).facts


def test_the_store_keeps_the_last_two_checkpoints(tmp_path):
    store = Store(tmp_path)
    for number in (1, 2, 3, 4):
        store.save(number, snapshot(number))
    assert store.numbers() == [3, 4] and int(store.load().tensors["count"]) == 4
    assert int(store.load(3).tensors["count"]) == 3
    for folder in (store.public, store.private):
        assert {path.stem for path in folder.glob("0*")} == {"000003", "000004"}


def test_tensors_that_share_memory_are_saved_separately(tmp_path):
    weight = torch.arange(4.0)
    Store(tmp_path).save(
        1, Snapshot(tensors={"a": weight, "b": weight.detach(), "c": weight.view(2, 2).T})
    )
    back = Store(tmp_path).load().tensors
    assert torch.equal(back["a"], back["b"]) and torch.equal(back["c"], weight.view(2, 2).T)


def test_private_checkpoint_files_have_mode_0600(tmp_path):
    store = Store(tmp_path)
    store.save(1, snapshot(1))
    assert store.private.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store.private.iterdir()} == {0o600}
    assert b"memory.inputs" not in (store.public / "000001.safetensors").read_bytes()


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    """The power fails while number 2 is written, so number 1 is the last checkpoint."""
    store = Store(tmp_path)
    store.save(1, snapshot(1))
    latest = (store.public / "latest.json").read_bytes()
    store.save(2, snapshot(2))
    (store.public / "latest.json").write_bytes(latest)
    (store.public / "000002.safetensors").write_bytes(b"torn")
    (store.public / ".000002.json.draft").write_bytes(b"{")
    assert store.numbers() == [1] and int(store.load().tensors["count"]) == 1
    store.save(2, snapshot(5))
    assert int(store.load().tensors["count"]) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint/000002.safetensors", b"torn"),
        ("checkpoint/000002.safetensors", None),
        ("private/000002.safetensors", b"\xff" * 40),
        ("private/000002.safetensors", None),
        ("checkpoint/000002.json", b'{"position": '),
    ],
)
def test_the_error_of_a_damaged_checkpoint_names_complete_ones(tmp_path, name, content):
    store = Store(tmp_path)
    for number in (1, 2):
        store.save(number, snapshot(number))
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        RunError, match=r"checkpoint 000002 in .* cannot be read .*complete ones: \[1, 2\]"
    ):
        store.load(2)
    assert int(store.load(1).tensors["count"]) == 1


@pytest.mark.parametrize("place", ["checkpoint", "private"])
def test_a_changed_number_is_found_and_the_older_copy_loaded(tmp_path, place):
    """Eight bytes of a tensor are other numbers, which safetensors does not see."""
    store = Store(tmp_path)
    for number in (1, 2):
        store.save(number, snapshot(number))
    path = tmp_path / place / "000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(each ^ 1 for each in content[-8:]))
    with pytest.raises(RunError, match=r"000002.safetensors: its checksum is wrong"):
        store.load(2)
    with pytest.warns(UserWarning, match=r"checksum is wrong.* continued from 000001"):
        assert int(store.load().tensors["count"]) == 1


def test_a_changed_number_in_the_facts_is_refused(tmp_path):
    store = Store(tmp_path)
    store.save(1, snapshot(1))
    path = store.public / "000001.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    for read in (store.load, lambda: store.facts(1)):
        with pytest.raises(RunError, match=r"000001.json cannot be read \(its checksum is wrong"):
            read()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"number": null}', b"[3]"])
def test_a_damaged_file_latest_json_is_refused(tmp_path, content):
    store = Store(tmp_path)
    store.save(1, snapshot(1))
    (store.public / "latest.json").write_bytes(content)
    with pytest.raises(
        RunError,
        match=r"latest.json cannot be read .*restore it from a backup, or use another folder",
    ):
        store.load()


def test_an_unknown_checkpoint_number_is_refused(tmp_path):
    store = Store(tmp_path)
    store.save(1, snapshot(1))
    with pytest.raises(RunError, match="checkpoint 000009"):
        store.load(9)


def test_the_store_sets_an_open_private_folder_to_mode_0700(tmp_path):
    (tmp_path / "private").mkdir(mode=0o755)
    draft = tmp_path / "private" / f".000001.safetensors.{os.getpid()}.draft"
    draft.touch(mode=0o644)  # left by a crash
    Store(tmp_path).save(1, snapshot(1))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "private").iterdir()] == [0o600]


def test_write_atomically_replaces_the_file_or_changes_nothing(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_atomically(path, b"first")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert path.read_bytes() == b"first"
    write_atomically(path, json.dumps([1]).encode())
    assert path.read_bytes() == b"[1]" and [p.name for p in path.parent.iterdir()] == [
        "result.json"
    ]
