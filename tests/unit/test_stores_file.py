"""What is particular to the file store: its lines, its locks, its folder."""

# ruff: noqa: ASYNC221, ASYNC222, ASYNC240
# Nothing else runs on the event loop while these tests wait for a file or a process.

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.budget import Spent
from harness.checkpoint import FileCheckpointStore, Owner, RunQuery
from harness.checkpoint.base import this_process
from harness.errors import CheckpointCorrupt, CheckpointError, OwnershipLost, RecordTooNew
from harness.mailbox import Guidance
from harness.records import Record, Reopened, RunCancelled, RunFailed, RunFinished, RunParked
from harness.testing.store_contract import journal, noted, started, summaries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "checkpoints"


async def write_run(folder: Path, run_id: str = "run", *, last: Record | None = None) -> Path:
    """Leave a run of three lines and return its file."""
    store = FileCheckpointStore(folder)
    before = set(folder.glob("*.jsonl"))
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, [started()], owner=owner)
    await store.append(run_id, 1, [noted(1), noted(2)], owner=owner)
    await store.append(run_id, 3, [last or noted(3)], owner=owner)
    await store.close()
    (path,) = set(folder.glob("*.jsonl")) - before
    return path


async def length(folder: Path) -> int:
    return len(await journal(FileCheckpointStore(folder), "run"))


async def go_on(folder: Path, seq: int) -> None:
    """Claim the run and append at a place."""
    store = FileCheckpointStore(folder)
    owner = await store.claim("run", this_process())
    await store.append("run", seq, [noted(9)], owner=owner)
    await store.close()


async def test_a_last_line_torn_at_any_byte_is_cut_off(folder: Path) -> None:
    path = await write_run(folder)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        assert await length(folder) == 3
        await go_on(folder, 3)
        assert await length(folder) == 4
        assert path.read_bytes()[:last] == whole[:last]


async def test_a_first_line_torn_at_any_byte_leaves_an_empty_run(folder: Path) -> None:
    path = await write_run(folder)
    first = path.read_bytes().splitlines(keepends=True)[0]
    for size in range(0, len(first), 7):
        path.write_bytes(first[:size])
        assert await length(folder) == 0
        assert await summaries(FileCheckpointStore(folder)) == []
        await go_on(folder, 0)
        assert await length(folder) == 1


async def test_a_last_line_with_any_byte_changed_is_cut_off(folder: Path) -> None:
    path = await write_run(folder)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for place in range(last, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x20
        path.write_bytes(changed)
        assert await length(folder) == 3, f"byte {place - last} of the last line"
    await go_on(folder, 3)
    assert await length(folder) == 4


@pytest.mark.parametrize("garbage", [b"\0", b"\0" * 5000, b'{"check":"', b"\xff" * 100, b"{}"])
async def test_garbage_after_the_last_line_is_cut_off(folder: Path, garbage: bytes) -> None:
    path = await write_run(folder)
    whole = path.read_bytes()
    path.write_bytes(whole + garbage)
    assert await length(folder) == 4
    await go_on(folder, 4)
    assert path.read_bytes().startswith(whole + b'{"check"')
    assert await length(folder) == 5


async def test_damage_before_the_last_line_names_file_and_line(folder: Path) -> None:
    path = await write_run(folder)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1)
    for place in range(0, last, 11):
        changed = bytearray(whole)
        changed[place] ^= 0x20
        path.write_bytes(changed)
        line = whole[:place].count(b"\n") + 1
        with pytest.raises(CheckpointCorrupt, match=rf"{path.name}.* line {line}"):
            await length(folder)


async def test_a_damaged_line_before_a_torn_one_is_not_cut_off(folder: Path) -> None:
    path = await write_run(folder)
    changed = path.read_bytes()[:-3] + b"x}\n" + b'{"check":"'
    path.write_bytes(changed)
    with pytest.raises(CheckpointCorrupt, match=path.name):
        await go_on(folder, 3)
    assert path.read_bytes() == changed


async def test_missing_lines_are_noticed(folder: Path) -> None:
    path = await write_run(folder)
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last)
    with pytest.raises(CheckpointCorrupt, match="line 2 starts at record 4 where 2 is due"):
        await length(folder)


async def test_lines_longer_than_a_disk_block_are_recovered_too(folder: Path) -> None:
    store = FileCheckpointStore(folder)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [noted(1)], owner=owner)
    await store.append("run", 1, [noted(2, "x" * 300_000)], owner=owner)
    await store.append("run", 2, [noted(3, "y" * 300_000)], owner=owner)
    await store.close()
    (path,) = folder.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-1000])
    await go_on(folder, 2)
    assert await length(folder) == 3


async def test_a_newer_line_is_refused_by_name(folder: Path) -> None:
    path = await write_run(folder)
    body = path.read_bytes().splitlines()[-1][20:].replace(b'"version":1', b'"version":9')
    with path.open("ab") as file:
        file.write(b'{"check":"%08x",%b\n' % (zlib.crc32(body), body))
    with pytest.raises(RecordTooNew, match=rf"{path.name}.*9.*update"):
        await length(folder)
    with pytest.raises(RecordTooNew):
        await go_on(folder, 4)


async def test_a_file_under_the_name_of_another_run_is_refused(folder: Path) -> None:
    other = await write_run(folder, "other")
    (await write_run(folder)).write_bytes(other.read_bytes())
    with pytest.raises(CheckpointCorrupt, match="'other'"):
        await length(folder)
    with pytest.raises(CheckpointCorrupt, match="'other'"):
        await go_on(folder, 4)


async def test_files_and_folders_are_private(folder: Path) -> None:
    before = os.umask(0)
    try:
        store = FileCheckpointStore(folder)
        owner = await store.claim("run", this_process())
        await store.append("run", 0, [started()], owner=owner)
        await store.put_blob("run", b"value")
    finally:
        os.umask(before)
    kinds = {place.suffix for place in folder.iterdir()}
    assert kinds == {".jsonl", ".lock", ".blobs"}
    for place in [folder, folder.parent, *folder.rglob("*")]:
        assert stat.S_IMODE(place.stat().st_mode) == (0o700 if place.is_dir() else 0o600), place
    await store.close()


async def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = FileCheckpointStore(folder)
    for run_id in ("../out", "/tmp/out", "a/../../out", ".", "..", "", "~"):
        owner = await store.claim(run_id, this_process())
        await store.append(run_id, 0, [started()], owner=owner)
        await store.put_blob(run_id, b"value")
    await store.close()
    assert list(tmp_path.iterdir()) == [folder]
    assert all(place.stem.isalnum() and len(place.stem) == 64 for place in folder.iterdir())


async def test_a_claim_that_wrote_nothing_leaves_nothing(folder: Path) -> None:
    store = FileCheckpointStore(folder)
    await store.release(await store.claim("run", this_process()))
    assert list(folder.iterdir()) == []


async def test_the_folder_comes_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_DIR", str(folder))
    assert FileCheckpointStore().folder == folder
    monkeypatch.delenv("CHECKPOINT_DIR")
    monkeypatch.setenv("HOME", str(folder))
    assert FileCheckpointStore().folder == folder / ".agent-harness" / "checkpoints"


async def test_a_checkpoint_of_an_older_release_is_refused_by_name(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("old", "old:agent"):
        (folder / f"{name}.json").write_text('{"run_id": "old", "messages": []}')
        store = FileCheckpointStore(folder)
        with pytest.raises(CheckpointError, match=f"{name}.json' is a checkpoint in an older format"):
            await store.claim(name, this_process())
        with pytest.raises(CheckpointError, match=f"{name}.json' is a checkpoint in an older format"):
            await journal(store, name)


async def test_a_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    for folder in (place, place / "below"):
        store = FileCheckpointStore(folder)
        with pytest.raises(CheckpointError, match="file"):
            await store.claim("run", this_process())
        with pytest.raises(CheckpointError, match="file"):
            await journal(store, "run")


async def test_a_journal_removed_under_its_owner_is_noticed(folder: Path) -> None:
    store = FileCheckpointStore(folder)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    next(folder.glob("*.jsonl")).unlink()
    with pytest.raises(CheckpointError, match="was removed"):
        await store.append("run", 1, [noted(1)], owner=owner)
    await store.close()


async def test_a_damaged_blob_is_noticed(folder: Path) -> None:
    store = FileCheckpointStore(folder)
    digest = await store.put_blob("run", b"value")
    next(folder.glob("*.blobs/*")).write_bytes(b"other")
    with pytest.raises(CheckpointCorrupt, match=digest):
        await store.get_blob("run", digest)


FILL = """
import asyncio, resource, sys
from harness.checkpoint import FileCheckpointStore
from harness.checkpoint.base import this_process
from harness.errors import CheckpointError
from harness.records import Noted

async def main():
    store = FileCheckpointStore(sys.argv[1])
    owner = await store.claim("run", this_process())
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    seq = 0
    try:
        while True:
            await store.append("run", seq, [Noted(seq, "malformed", "x" * 3000)], owner=owner)
            seq += 1
    except CheckpointError as error:
        await store.append("run", seq, [Noted(seq, "malformed", "small")], owner=owner)
        print(seq + 1, error)
asyncio.run(main())
"""


async def test_a_disk_without_room_leaves_whole_lines_and_can_go_on(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, folder], capture_output=True, text=True, check=True)
    acknowledged, _, message = done.stdout.strip().partition(" ")
    assert "the disk is full" in message
    (path,) = folder.glob("*.jsonl")
    assert path.name in message
    assert path.read_bytes().count(b"\n") == int(acknowledged) == await length(folder)
    await go_on(folder, int(acknowledged))


HOLD = """
import asyncio, sys
from harness.checkpoint import FileCheckpointStore
from harness.checkpoint.base import this_process
from harness.records import Noted

async def main():
    store = FileCheckpointStore(sys.argv[1])
    owner = await store.claim("run", this_process(), lease_s=0)
    await store.append("run", 0, [Noted(0, "malformed", "x")], owner=owner)
    print("holding", flush=True)
    sys.stdin.readline()
asyncio.run(main())
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that owns the run, and end it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "holding\n"
            yield child
        finally:
            child.kill()


async def test_an_owner_that_was_killed_is_replaced_at_once(folder: Path) -> None:
    with holder(folder) as child:
        with pytest.raises(OwnershipLost, match=str(child.pid)):
            await go_on(folder, 1)
        child.kill()
        child.wait()
        await go_on(folder, 1)
    assert await length(folder) == 2


async def test_an_owner_that_is_only_stopped_keeps_its_run(folder: Path) -> None:
    with holder(folder) as child:
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(OwnershipLost, match=f"{child.pid}.*suspended"):
            await go_on(folder, 1)
        with pytest.raises(OwnershipLost, match=str(child.pid)):
            await FileCheckpointStore(folder).delete("run")
    assert await length(folder) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_does_not_own_what_its_parent_owns(folder: Path) -> None:
    store = FileCheckpointStore(folder)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    child = os.fork()
    if child == 0:
        # The event loop of the parent is not the child's to use, hence the thread.
        outcome: list[int] = []
        thread = threading.Thread(target=lambda: outcome.append(asyncio.run(_count_refusals(store, owner))))
        thread.start()
        thread.join()
        os._exit(outcome[0] if outcome else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    await store.append("run", 1, [noted(1)], owner=owner)
    with pytest.raises(OwnershipLost):
        await FileCheckpointStore(folder).claim("run", this_process())
    await store.close()


async def _count_refusals(store: FileCheckpointStore, owner: Owner) -> int:
    refused = 0
    for attempt in (
        store.renew(owner),
        store.append("run", 1, [noted(1)], owner=owner),
        store.claim("run", this_process()),
    ):
        try:
            await attempt
        except OwnershipLost:
            refused += 1
    return refused


async def test_purging_deletes_what_is_over_and_old(folder: Path) -> None:
    over = [
        await write_run(folder, "finished", last=RunFinished("42", 1.0, 1, Spent())),
        await write_run(folder, "failed", last=RunFailed("llm", "down", 1, Spent())),
        await write_run(folder, "cancelled", last=RunCancelled("enough", 1, Spent())),
    ]
    recent = await write_run(folder, "recent", last=RunFinished("42", 1.0, 1, Spent()))
    left = await write_run(folder, "left")
    waiting = await write_run(folder, "waiting", last=RunParked(("q1",), 1, Spent()))
    reopened = await write_run(folder, "reopened", last=Reopened("again"))
    driven = await write_run(folder, "driven", last=RunFailed("llm", "down", 1, Spent()))
    damaged = await write_run(folder, "damaged", last=RunFinished("42", 1.0, 1, Spent()))
    damaged.write_bytes(b"x" + damaged.read_bytes())
    await FileCheckpointStore(folder).put_blob("finished", b"value")
    store = FileCheckpointStore(folder)
    await store.claim("driven", this_process())
    eight_days_ago = time.time() - 8 * 86_400
    await store.post("waiting", Guidance("Go on.", "ann"))
    await store.post("failed", Guidance("Try again.", "ann"))
    for path in [*over, left, waiting, reopened, driven, damaged]:
        os.utime(path, (eight_days_ago, eight_days_ago))

    assert FileCheckpointStore.purge_old(days=9, checkpoint_dir=folder) == 0
    assert FileCheckpointStore.purge_old(checkpoint_dir=folder) == 3
    assert set(folder.glob("*.jsonl")) == {recent, left, waiting, reopened, driven, damaged}
    assert list(folder.glob("*.blobs")) == []
    assert list(folder.glob("*.mail")) == [waiting.with_suffix(".mail")]
    assert [run.status for run in await summaries(store, RunQuery(status="waiting"))] == ["waiting"]
    assert FileCheckpointStore.purge_old(checkpoint_dir=folder / "nowhere") == 0
    await store.close()
