"""What is particular to the SQLite store: its file, its errors, its threads and other processes."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC222, ASYNC240
# Nothing else runs on the event loop while these tests wait for a file or a process.

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import msgspec
import pytest

import harness
from harness.checkpoint import FileCheckpointStore, RunQuery, SQLiteCheckpointStore
from harness.checkpoint.base import this_process
from harness.checkpoint.database import Database
from harness.checkpoint.local import file_system
from harness.checkpoint.reading import read_only
from harness.errors import CheckpointCorrupt, CheckpointError, OwnershipLost, RecordTooNew, StoreBusy
from harness.mailbox import Cancel, Guidance
from harness.records import encode
from harness.testing.store_contract import journal, noted, started, summaries
from support.read_only import only_to_be_read, powerless

LIBRARY = str(Path(harness.__file__).parent.parent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "runs.db"


async def write_run(path: Path, run_id: str = "run", *, records: int = 3) -> None:
    """Leave a run of some records in a closed file."""
    store = SQLiteCheckpointStore(path)
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, [started()], owner=owner)
    for seq in range(1, records):
        await store.append(run_id, seq, [noted(seq)], owner=owner)
    await store.release(owner)
    await store.close()


@contextmanager
def sqlite(path: Path) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(path))) as connection:
        yield connection


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_file_and_its_log_are_private(path: Path) -> None:
    before = os.umask(0)
    try:
        store = SQLiteCheckpointStore(path)
        owner = await store.claim("run", this_process())
        await store.append("run", 0, [started()], owner=owner)
    finally:
        os.umask(before)
    assert mode(path.parent) == 0o700
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["runs.db", "runs.db-shm", "runs.db-wal"]
    assert {mode(file) for file in files} == {0o600}
    await store.close()


async def test_the_settings_that_make_a_commit_durable_are_read_back(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    settings = await store.settings()
    await store.close()
    assert (settings["journal_mode"], settings["synchronous"], settings["fullfsync"]) == ("wal", 2, 1)


async def test_closing_leaves_one_whole_file(path: Path) -> None:
    await write_run(path)
    assert [file.name for file in path.parent.iterdir()] == ["runs.db"]
    with sqlite(path) as connection:
        assert connection.pragma("integrity_check") == "ok"


async def test_a_path_is_a_file_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await write_run(Path(":memory:"))
    assert (tmp_path / ":memory:").stat().st_size > 0


async def test_a_newer_file_is_refused_by_name(path: Path) -> None:
    await write_run(path)
    with sqlite(path) as connection:
        connection.pragma("user_version", 99)
    with pytest.raises(RecordTooNew, match=r"runs\.db.* 99.*update"):
        await SQLiteCheckpointStore(path).claim("run", this_process())


async def test_a_newer_record_is_refused_by_name(path: Path) -> None:
    await write_run(path)
    with sqlite(path) as connection:
        connection.execute("UPDATE journal SET records = CAST(replace(records, 'Noted', 'Later') AS BLOB)")
    store = SQLiteCheckpointStore(path)
    with pytest.raises(RecordTooNew, match="'Later'"):
        await journal(store, "run")
    await store.close()


async def test_the_database_of_another_application_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bookmarks.db"
    with sqlite(path) as connection:
        connection.execute("CREATE TABLE place (url TEXT); INSERT INTO place VALUES ('x')")
    before = path.read_bytes()
    with pytest.raises(CheckpointCorrupt, match=r"bookmarks\.db.*another application"):
        await SQLiteCheckpointStore(path).claim("run", this_process())
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 1000)
    with pytest.raises(CheckpointCorrupt, match=r"notes\.txt.*not a SQLite database"):
        await journal(SQLiteCheckpointStore(path), "run")
    assert path.read_text() == "dear diary, " * 1000


async def test_damaged_pages_are_a_typed_error(path: Path) -> None:
    await write_run(path, records=400)
    data = bytearray(path.read_bytes())
    for page in range(2048, len(data), 2048):
        data[page : page + 100] = b"\xff" * 100
    path.write_bytes(data)
    store = SQLiteCheckpointStore(path)
    with pytest.raises(CheckpointCorrupt, match=r"runs\.db"):
        await journal(store, "run")
    await store.close()


@pytest.mark.parametrize("garbage", [b"", b"[", b"{}", b"\xff\xfe", b"[1]", b"[" * 100_000])
async def test_damaged_records_are_a_typed_error(path: Path, garbage: bytes) -> None:
    await write_run(path)
    with sqlite(path) as connection:
        connection.execute("UPDATE journal SET records = ? WHERE position & 0xffffffff = 2", (garbage,))
    store = SQLiteCheckpointStore(path)
    with pytest.raises(CheckpointCorrupt, match="run 'run'"):
        await journal(store, "run")
    await store.close()


async def test_damaged_records_do_not_make_up_for_each_other(path: Path) -> None:
    await write_run(path, records=4)
    with sqlite(path) as connection:
        records = connection.execute("SELECT records FROM journal ORDER BY position").fetchall()
        for seq, data in ((2, records[1][0][:-1]), (3, records[2][0][1:])):
            connection.execute("UPDATE journal SET records = ? WHERE position & 0xffffffff = ?", (data, seq))
    store = SQLiteCheckpointStore(path)
    entries = store.read("run")
    assert (await anext(entries)).seq == 1
    with pytest.raises(CheckpointCorrupt, match="run 'run'"):
        await anext(entries)
    await store.close()


async def test_a_missing_record_is_noticed(path: Path) -> None:
    await write_run(path, records=4)
    with sqlite(path) as connection:
        connection.execute("DELETE FROM journal WHERE position & 0xffffffff = 2")
    store = SQLiteCheckpointStore(path)
    with pytest.raises(CheckpointCorrupt, match="between 1 and 3"):
        await journal(store, "run")
    await store.close()


async def test_places_that_cannot_hold_a_file_are_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.db").mkdir()
    for path in (tmp_path / "file" / "runs.db", tmp_path / "file" / "a" / "runs.db", tmp_path / "folder.db"):
        with pytest.raises(CheckpointError, match=path.name if path.name == "folder.db" else "file"):
            await SQLiteCheckpointStore(path).claim("run", this_process())


async def test_a_read_only_folder_is_a_typed_error(path: Path) -> None:
    path.parent.mkdir()
    with only_to_be_read(path.parent):
        done = powerless(OPEN, "sqlite", path, "")
    told = json.loads(done.stdout)
    assert set(told["refused"]) == set(told["read"].values())
    assert all("runs.db" in said for said in told["refused"])


OPEN = """
import asyncio, json, sys
from harness.checkpoint import FileCheckpointStore, RunQuery, SQLiteCheckpointStore
from harness.checkpoint.base import Owner, this_process
from harness.errors import CheckpointError
from harness.mailbox import Guidance
from harness.records import Noted

async def main(kind, path, digest):
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    async def records(): return [entry.seq async for entry in store.read("run")]
    async def runs(): return [[run.run_id, run.status] async for run in store.runs(RunQuery())]
    async def blob(): return (await store.get_blob("run", digest)).decode()
    async def mail(): return [mail.command.text for mail in await store.inbox("run")]
    found, refused, me = {}, [], this_process()
    for _ in range(2):  # what is refused in between takes nothing away from reading
        for ask in (records, runs, blob, mail):
            try:
                found[ask.__name__] = await ask()
            except CheckpointError as error:
                found[ask.__name__] = str(error)
        for write in (
            store.claim("run", me), store.claim("new", me), store.post("run", Guidance("no", "ann")),
            store.put_blob("run", b"no"), store.delete("run"),
        ):
            try:
                await write
                refused.append("written")
            except CheckpointError as error:
                refused.append(str(error))
    await store.close()
    print(json.dumps({"read": found, "refused": refused}))

asyncio.run(main(*sys.argv[1:]))
"""

LEAVE = """
import asyncio, os, sys
from harness.checkpoint import FileCheckpointStore, SQLiteCheckpointStore
from harness.checkpoint.base import this_process
from harness.mailbox import Guidance
from harness.testing.store_contract import noted, started

async def main(kind, path, how):
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    await store.append("run", 1, [noted(1), noted(2)], owner=owner)
    await store.post("run", Guidance("slowly", "ann"))
    print(await store.put_blob("run", b"large"), flush=True)
    if how == "killed":
        os._exit(0)
    await store.release(owner)
    await store.close()

asyncio.run(main(*sys.argv[1:]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold; the index of a log is left out, which readers keep their places in."""
    return {
        str(file.relative_to(folder)): b"" if file.name.endswith("-shm") else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("kind", ["sqlite", "sqlite, without the index of its log", "file"])
@pytest.mark.parametrize("left", ["closed", "killed"])
async def test_what_may_only_be_read_is_read_and_left_as_it_is(path: Path, kind: str, left: str) -> None:
    kind, _, without = kind.partition(",")
    done = subprocess.run([sys.executable, "-c", LEAVE, kind, path, left], capture_output=True, text=True, check=True)
    if without:
        path.with_name("runs.db-shm").unlink(missing_ok=left == "closed")
    before = contents(path.parent)
    with only_to_be_read(path.parent):
        read = powerless(OPEN, kind, path, done.stdout.strip())
        after = contents(path.parent)
    assert after == before
    told = json.loads(read.stdout)
    assert told["read"] == {"records": [1, 2, 3], "runs": [["run", "interrupted"]], "blob": "large", "mail": ["slowly"]}
    assert len(told["refused"]) == 10
    sentence = (
        r"runs\.db' cannot be opened for writing \(.*\): check its permissions" if kind == "sqlite" else "runs.db/.*"
    )
    assert all(re.search(sentence, said) for said in told["refused"]), told["refused"]


async def test_what_another_process_writes_is_read_where_this_one_may_not_write(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    for count in (1, 2, 3):
        with only_to_be_read(path.parent):
            told = json.loads(powerless(OPEN, "sqlite", path, "0" * 64).stdout)
        assert told["read"]["records"] == list(range(1, count + 1))
        assert told["read"]["runs"] == [["run", "running"]]
        await store.append("run", count, [noted(count)], owner=owner)
    await store.close()


async def test_a_read_only_file_of_a_release_without_mailboxes_has_no_mail(path: Path) -> None:
    write_old_file(path)
    with only_to_be_read(path.parent):
        told = json.loads(powerless(OPEN.replace('"run")', '"old")'), "sqlite", path, "0" * 64).stdout)
    assert (told["read"]["records"], told["read"]["mail"]) == ([1, 2], [])


async def test_what_was_written_while_it_was_read_without_locks_is_read_again(path: Path) -> None:
    await write_run(path)
    seen: list[int] = []

    def read(database: Database) -> int:
        if not seen:  # somebody comes, writes, and is gone
            asyncio.run(write_run(path, "other"))
        seen.append(len(database.runs(RunQuery())))
        return seen[-1]

    assert await asyncio.to_thread(read_only, path, read, busy_timeout_s=1) == 2
    assert len(seen) == 2


FILL = """
import asyncio, json, resource, sys
from harness.checkpoint import SQLiteCheckpointStore
from harness.checkpoint.base import this_process
from harness.errors import CheckpointError
from harness.records import Noted

async def fill(store, owner):
    for seq in range(1000):
        try:
            await store.append(owner.run_id, seq, [Noted(seq, "malformed", "x" * 3000)], owner=owner)
        except CheckpointError as error:
            return seq, str(error)

async def main():
    store = SQLiteCheckpointStore(sys.argv[1])
    owners = [await store.claim(f"run {number}", this_process()) for number in range(int(sys.argv[2]))]
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    print(json.dumps(await asyncio.gather(*(fill(store, owner) for owner in owners))))
asyncio.run(main())
"""


@pytest.mark.parametrize("runs", [1, 5])
async def test_on_a_full_disk_what_is_kept_is_what_was_acknowledged(path: Path, runs: int) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, path, str(runs)], capture_output=True, text=True, check=True)
    store = SQLiteCheckpointStore(path)
    for number, (acknowledged, message) in enumerate(json.loads(done.stdout)):
        assert "runs.db" in message
        assert len(await journal(store, f"run {number}")) == acknowledged > 0
        owner = await store.claim(f"run {number}", this_process())
        await store.append(f"run {number}", acknowledged, [noted(1)], owner=owner)
    await store.close()


@pytest.mark.parametrize("others", [0, 1])
async def test_a_database_locked_by_another_ends_in_store_busy_and_nothing_written(path: Path, others: int) -> None:
    store = SQLiteCheckpointStore(path, busy_timeout_s=0.05)
    owner = await store.claim("run", this_process())
    for number in range(others):
        await store.claim(f"other {number}", this_process())
    with sqlite(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy, match=r"runs\.db"):
            await store.append("run", 0, [started()], owner=owner)
        with pytest.raises(StoreBusy):
            await store.claim("new", this_process())
        connection.execute("ROLLBACK")
    assert await journal(store, "run") == []
    await store.append("run", 0, [started()], owner=owner)
    await store.close()


async def test_waiting_for_a_lock_does_not_block_the_event_loop(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    owner = await store.claim("run", this_process())
    with sqlite(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        append = asyncio.create_task(store.append("run", 0, [started()], owner=owner))
        ticks = 0
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            await asyncio.sleep(0.001)
            ticks += 1
        assert ticks > 10
        assert not append.done()
        connection.execute("ROLLBACK")
    await append
    assert len(await journal(store, "run")) == 1
    await store.close()


DRIVE = """
import asyncio, sys
from harness.checkpoint import SQLiteCheckpointStore
from harness.checkpoint.base import this_process
from harness.records import Noted

async def main():
    store = SQLiteCheckpointStore(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    owner = await store.claim(sys.argv[2], this_process())
    for seq in range(50):
        await store.append(sys.argv[2], seq, [Noted(seq, "malformed", sys.argv[2])], owner=owner)
    await store.release(owner)
    await store.close()
asyncio.run(main())
"""


async def test_processes_that_open_a_new_file_at_once_all_append(path: Path) -> None:
    names = [f"run {number}" for number in range(4)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVE, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0] * 4
    store = SQLiteCheckpointStore(path)
    for name in names:
        records = [entry.record for entry in await journal(store, name)]
        assert records == [noted(seq, name) for seq in range(50)]
    await store.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_gets_a_connection_of_its_own(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    owner = await store.claim("parent", this_process())
    await store.append("parent", 0, [started()], owner=owner)
    await asyncio.sleep(0.05)  # a thread of the parent in the middle of SQLite would leave its locks held in the child
    child = os.fork()
    if child == 0:
        status = 1
        try:
            thread = threading.Thread(target=asyncio.run, args=(_drive(store, "child"),))
            thread.start()  # the event loop of the parent is not the child's to use
            thread.join(timeout=20)
            status = int(thread.is_alive())
        finally:
            os._exit(status)
    for seq in range(1, 100):
        await store.append("parent", seq, [noted(seq)], owner=owner)
    assert os.waitpid(child, 0)[1] == 0
    assert len(await journal(store, "child")) == 100
    assert len(await journal(store, "parent")) == 100
    await store.close()
    with sqlite(path) as connection:
        assert connection.pragma("integrity_check") == "ok"


async def _drive(store: SQLiteCheckpointStore, run_id: str) -> None:
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, [started()], owner=owner)
    for seq in range(1, 100):
        await store.append(run_id, seq, [noted(seq)], owner=owner)
    await store.release(owner)
    await store.close()


def test_one_store_serves_event_loops_one_after_the_other_and_side_by_side(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    asyncio.run(_drive(store, "first"))
    asyncio.run(_drive(store, "second"))
    threads = [threading.Thread(target=asyncio.run, args=(_drive(store, f"{number}"),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def lengths() -> list[int]:
        return [len(await journal(store, run.run_id)) for run in await summaries(store, RunQuery())]

    assert asyncio.run(lengths()) == [100] * 5
    asyncio.run(store.close())


async def test_a_file_that_was_removed_is_not_written_any_more(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(OwnershipLost):
        await store.renew(owner)
    await store.release(owner)
    again = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=again)
    await store.close()
    assert len(await journal(SQLiteCheckpointStore(path), "run")) == 1


async def test_a_run_is_not_claimed_in_a_file_that_was_removed(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    await store.release(await store.claim("before", this_process()))
    for file in path.parent.iterdir():
        file.unlink()
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    await store.release(owner)
    await store.close()
    assert len(await journal(SQLiteCheckpointStore(path), "run")) == 1


async def test_a_large_value_does_not_make_the_next_step_larger(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [noted(1, "x" * 1_000_000)], owner=owner)
    log = path.with_name("runs.db-wal")
    sizes = [log.stat().st_size]
    for seq in range(1, 41):
        await store.append("run", seq, [noted(seq, "x" * 450)], owner=owner)
        sizes.append(log.stat().st_size)
    assert (sizes[-1] - sizes[0]) / 40 < 5_000
    await store.close()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/runs.db", "ext4"),
        ("/mnt/nas/runs.db", "nfs4"),
        ("/mnt/nas2/runs.db", "ext4"),
        ("/mnt/my disk/a/runs.db", "cifs"),
        ("/mnt/nas/local/runs.db", "xfs"),
        ("/over/runs.db", "nfs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    mounts = (
        "/dev/sda / ext4 rw 0 0\nproc /proc proc rw 0 0\nnas:/a /mnt/nas nfs4 rw 0 0\n"
        "//win/x /mnt/my\\040disk cifs rw 0 0\n/dev/sdb /mnt/nas/local xfs rw 0 0\n"
        "/dev/sdc /over ext4 rw 0 0\nnas:/b /over nfs rw 0 0\n"
    )
    assert file_system(Path(path), mounts) == kind


async def test_an_owner_in_another_container_is_replaced_only_when_its_lease_is_over(path: Path) -> None:
    store = SQLiteCheckpointStore(path)
    elsewhere = msgspec.structs.replace(this_process(), pid=999_999, start_time="1", namespace="another")
    await store.claim("held", elsewhere)
    with pytest.raises(OwnershipLost, match="999999"):
        await store.claim("held", this_process())
    await store.claim("over", elsewhere, lease_s=0)
    assert (await store.claim("over", this_process())).process == this_process()
    await store.close()


WITHOUT_MAILBOXES = """
CREATE TABLE run (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    goal TEXT, agent_id TEXT, origin BLOB, status TEXT, started_at REAL
) STRICT;
CREATE TABLE owner (
    token INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    run INTEGER NOT NULL,
    process BLOB NOT NULL,
    lease_until REAL NOT NULL
) STRICT;
CREATE TABLE journal (position INTEGER PRIMARY KEY, at REAL NOT NULL, records BLOB NOT NULL) STRICT;
CREATE TABLE blob (run INTEGER NOT NULL, digest TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (run, digest)) STRICT;
PRAGMA application_id = 0x72616831;
PRAGMA user_version = 1;
"""
"""What the first release made."""


def write_old_file(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True)
    with sqlite(path) as connection:
        connection.pragma("page_size", 2048)
        connection.pragma("journal_mode", "wal")
        connection.execute(WITHOUT_MAILBOXES)
        connection.execute(
            "INSERT INTO run (run_id, goal, agent_id, status, started_at) VALUES ('old', 'count', 'clerk', ?, 1.0)",
            ("interrupted",),
        )
        connection.execute("INSERT INTO journal VALUES ((1 << 32) + 2, 1.0, ?)", (encode([started(), noted(1)]),))
    path.chmod(0o600)


async def test_a_file_of_a_release_without_mailboxes_gets_one(path: Path) -> None:
    write_old_file(path)
    store = SQLiteCheckpointStore(path)
    assert await store.inbox("old") == []
    mail = await store.post("old", Cancel("enough", "ann"))
    assert await store.inbox("old") == [mail]
    assert [entry.record for entry in await journal(store, "old")] == [started(), noted(1)]
    await store.close()
    again = SQLiteCheckpointStore(path)
    assert await again.inbox("old") == [mail]
    owner = await again.claim("old", this_process())
    await again.append("old", 2, [noted(2)], owner=owner)
    await again.close()
    with sqlite(path) as connection:
        assert connection.pragma("user_version") == 1, "the older release still opens it"


POST = """
import asyncio, sys
from harness.checkpoint import FileCheckpointStore, SQLiteCheckpointStore
from harness.mailbox import Guidance

async def main():
    kind, path, who = sys.argv[1:]
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(40):
        mail = await store.post("run", Guidance(str(number), who))
        print(mail.id, flush=True)
    await store.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["sqlite", "file"])
async def test_two_processes_post_at_once_to_a_run_that_is_owned(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    store = (SQLiteCheckpointStore if kind == "sqlite" else FileCheckpointStore)(path)
    owner = await store.claim("run", this_process())
    await store.append("run", 0, [started()], owner=owner)
    people = [
        subprocess.Popen(
            [sys.executable, "-c", POST, kind, str(path), who],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": LIBRARY},
        )
        for who in ("ann", "bob")
    ]  # fmt: skip
    for process in people:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in people:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for number in range(20):
        await store.append("run", 1 + number, [noted(number)], owner=owner)
    posted = [process.communicate()[0].split() for process in people]
    assert [process.returncode for process in people] == [0, 0]
    found = await store.inbox("run")
    assert len(found) == 80
    for who, ids in zip(("ann", "bob"), posted, strict=True):
        mine = [mail for mail in found if isinstance(mail.command, Guidance) and mail.command.by == who]
        assert [mail.id for mail in mine] == ids, "in the order they were posted"
        assert [mail.command for mail in mine] == [Guidance(str(number), who) for number in range(40)]
    assert len(await journal(store, "run")) == 21
    await store.close()
