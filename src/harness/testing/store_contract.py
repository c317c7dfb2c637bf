"""What every CheckpointStore must do, as tests that a store of your own can run.

Derive a test class, say how the store is opened, and pytest (with pytest-asyncio) collects the rest::

    class TestMyStore(CheckpointStoreContract):
        @pytest.fixture
        def open_store(self, tmp_path):
            return lambda: MyStore(tmp_path)
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import pytest_asyncio

from harness.budget import Spent
from harness.checkpoint.base import CheckpointStore, Owner, RunQuery, RunSummary, this_process
from harness.errors import CheckpointConflict, CheckpointError, OwnershipLost, RunNotFound
from harness.mailbox import Answer, Cancel, Command, Guidance, Mail
from harness.records import (
    VERSION,
    DriverStarted,
    Entry,
    Fingerprints,
    Noted,
    Origin,
    ProcessId,
    Record,
    Reopened,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunParked,
    RunStarted,
)

HOSTILE_IDS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\x00b",
    "a",
    "A",
    "%",
    "_",
    "*",
    "'; DROP TABLE run; --",
    '"',
    "a\nb",
    "a ",
    "CON",
    "run:agent",
    "run%3Aagent",
    "é",  # one code point
    "e\u0301",  # the same to the eye, as two
    "🦔",
    "x" * 5_000,
    "x" * 4_999 + "y",
    "\ud800",  # half a surrogate pair: no valid text
)
"""Run ids that have led other stores astray: out of their folder, into another run, into SQL."""


def started(goal: str = "count the hedgehogs", *, agent_id: str = "clerk", origin: Origin | None = None) -> RunStarted:
    """Make the first record of a run."""
    return RunStarted(VERSION, goal, agent_id, Fingerprints("agent", "prompt", "llm"), origin=origin)


def noted(step: int, text: str = "again, please") -> Noted:
    """Make a record that leaves the run's status as it is."""
    return Noted(step, "malformed", text)


async def journal(store: CheckpointStore, run_id: str, *, after: int = 0) -> list[Entry]:
    """Read a run into a list."""
    return [entry async for entry in store.read(run_id, after=after)]


async def summaries(store: CheckpointStore, query: RunQuery | None = None) -> list[RunSummary]:
    """Read the list of runs."""
    return [summary async for summary in store.runs(query or RunQuery())]


@pytest.mark.asyncio
class CheckpointStoreContract:
    """The tests. Override ``open_store``; set ``reopens`` to False for a store whose data ends with the object.

    >>> from harness.checkpoint import MemoryCheckpointStore
    >>> class TestMemory(CheckpointStoreContract):
    ...     reopens = False
    ...
    ...     @pytest.fixture
    ...     def open_store(self):
    ...         return MemoryCheckpointStore
    """

    reopens: bool = True
    """Whether a store that is opened again finds what the one before it wrote."""

    @pytest.fixture
    def open_store(self) -> Callable[[], CheckpointStore]:
        """Return a function that opens a store; in one test all of them are on the same data, empty at first."""
        raise NotImplementedError("override the fixture open_store: it returns a function that opens the store")

    @pytest_asyncio.fixture
    async def store(self, open_store: Callable[[], CheckpointStore]) -> AsyncIterator[CheckpointStore]:
        """Open a store for one test and close it."""
        store = open_store()
        yield store
        await store.close()

    @pytest.fixture
    def me(self) -> ProcessId:
        """Identify this process, which is alive."""
        return this_process()

    @pytest.fixture(scope="class")
    @classmethod
    def dead(cls) -> ProcessId:
        """Identify a process that really ran, and is over."""
        program = (
            "import sys, msgspec; from harness.checkpoint.base import this_process; "
            "sys.stdout.buffer.write(msgspec.json.encode(this_process()))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        return msgspec.json.decode(done.stdout, type=ProcessId)

    # Appending and reading

    async def test_it_is_a_checkpoint_store(self, store: CheckpointStore) -> None:
        assert isinstance(store, CheckpointStore)

    async def test_what_is_appended_is_read_back_in_order(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        first: list[Record] = [started(), DriverStarted(VERSION, 1, me)]
        at = await store.append("run", 0, first, owner=owner)
        later = await store.append("run", 2, [noted(1, "zwölf 🦔")], owner=owner)
        assert later >= at > 0
        assert await journal(store, "run") == [
            Entry("run", 1, at, first[0]),
            Entry("run", 2, at, first[1]),
            Entry("run", 3, later, noted(1, "zwölf 🦔")),
        ]

    @pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6, 7, 2**40])
    async def test_reading_starts_after_a_sequence_number(
        self, store: CheckpointStore, me: ProcessId, after: int
    ) -> None:
        owner = await store.claim("run", me)
        await store.append("run", 0, [noted(1), noted(2), noted(3)], owner=owner)
        await store.append("run", 3, [noted(4)], owner=owner)
        await store.append("run", 4, [noted(5), noted(6)], owner=owner)
        assert [entry.seq for entry in await journal(store, "run", after=after)] == list(range(after + 1, 7))

    async def test_a_long_run_is_read_whole(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        seq = 0
        for size in [1, 2, 3] * 150:
            await store.append("run", seq, [noted(seq + place) for place in range(1, size + 1)], owner=owner)
            seq += size
        entries = await journal(store, "run")
        assert [entry.seq for entry in entries] == list(range(1, seq + 1))
        assert [entry.record for entry in entries] == [noted(place) for place in range(1, seq + 1)]
        assert [entry.seq for entry in await journal(store, "run", after=700)] == list(range(701, seq + 1))

    async def test_large_records_are_kept_whole(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        large = noted(1, "long \n text " * 100_000)
        await store.append("run", 0, [large], owner=owner)
        await store.append("run", 1, [noted(2)], owner=owner)
        assert [entry.record for entry in await journal(store, "run")] == [large, noted(2)]

    async def test_an_unknown_run_reads_as_empty(self, store: CheckpointStore) -> None:
        assert await journal(store, "nobody") == []
        assert await summaries(store) == []

    async def test_a_claimed_run_without_records_is_not_listed(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        assert await journal(store, "run") == []
        assert await summaries(store) == []
        await store.release(owner)
        assert await summaries(store) == []

    @pytest.mark.parametrize("expected", [0, 1, 3, 100])
    async def test_an_append_at_another_place_writes_nothing(
        self, store: CheckpointStore, me: ProcessId, expected: int
    ) -> None:
        owner = await store.claim("run", me)
        await store.append("run", 0, [started(), noted(1)], owner=owner)
        before = await journal(store, "run")
        with pytest.raises(CheckpointConflict, match="'run'"):
            await store.append("run", expected, [noted(9), RunFinished("done", 1.0, 1, Spent())], owner=owner)
        assert await journal(store, "run") == before
        assert [run.status for run in await summaries(store)] == ["running"]
        await store.append("run", 2, [noted(2)], owner=owner)

    async def test_fifty_runs_append_at_once(self, store: CheckpointStore, me: ProcessId) -> None:
        async def drive(run_id: str) -> None:
            owner = await store.claim(run_id, me)
            await store.append(run_id, 0, [started(run_id)], owner=owner)
            for seq in range(1, 11):
                await store.append(run_id, seq, [noted(seq, run_id)], owner=owner)
            await store.release(owner)

        names = [f"run {number}" for number in range(50)]
        await asyncio.gather(*map(drive, names))
        for name in names:
            records = [entry.record for entry in await journal(store, name)]
            assert records == [started(name), *(noted(seq, name) for seq in range(1, 11))]

    async def test_one_conflict_among_many_appends_fails_only_itself(
        self, store: CheckpointStore, me: ProcessId
    ) -> None:
        owners = [await store.claim(f"run {number}", me) for number in range(10)]
        for owner in owners:
            await store.append(owner.run_id, 0, [started()], owner=owner)
        expected = [1, 1, 0, 1, 5, 1, 1, 1, 2, 1]
        done = await asyncio.gather(
            *(
                store.append(owner.run_id, seq, [noted(1), RunFinished("done", 1.0, 1, Spent())], owner=owner)
                for owner, seq in zip(owners, expected, strict=True)
            ),
            return_exceptions=True,
        )
        assert [isinstance(outcome, float) for outcome in done] == [seq == 1 for seq in expected]
        assert [type(outcome) for outcome in done if not isinstance(outcome, float)] == [CheckpointConflict] * 3
        for owner, seq in zip(owners, expected, strict=True):
            assert len(await journal(store, owner.run_id)) == (3 if seq == 1 else 1)

    async def test_a_cancelled_append_leaves_a_whole_journal(self, store: CheckpointStore, me: ProcessId) -> None:
        owners = [await store.claim(f"run {number}", me) for number in range(5)]
        tasks = [
            asyncio.create_task(store.append(owner.run_id, 0, [started(), noted(1)], owner=owner)) for owner in owners
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for owner in owners:
            await store.release(owner)
            again = await store.claim(owner.run_id, me)
            length = len(await journal(store, owner.run_id))
            assert length in (0, 2)
            await store.append(owner.run_id, length, [noted(2)], owner=again)

    # Owning

    async def test_a_run_with_a_live_owner_is_refused_and_its_owner_named(
        self, store: CheckpointStore, me: ProcessId
    ) -> None:
        await store.claim("run", me)
        with pytest.raises(OwnershipLost, match=str(me.pid)):
            await store.claim("run", me)

    async def test_a_released_run_can_be_claimed_again(self, store: CheckpointStore, me: ProcessId) -> None:
        first = await store.claim("run", me)
        await store.append("run", 0, [started()], owner=first)
        await store.release(first)
        second = await store.claim("run", me)
        assert second.token > first.token
        with pytest.raises(OwnershipLost, match="'run'"):
            await store.append("run", 1, [noted(1)], owner=first)
        await store.append("run", 1, [noted(2)], owner=second)

    async def test_releasing_twice_or_late_does_nothing(
        self, store: CheckpointStore, me: ProcessId, dead: ProcessId
    ) -> None:
        first = await store.claim("run", dead)
        await store.append("run", 0, [started()], owner=first)
        second = await store.claim("run", me)
        await store.release(first)
        await store.release(Owner("nobody", 7, me))
        await store.append("run", 1, [noted(1)], owner=second)
        await store.release(second)
        await store.release(second)

    async def test_a_dead_owner_is_replaced_at_once_and_shut_out(
        self, store: CheckpointStore, me: ProcessId, dead: ProcessId
    ) -> None:
        stale = await store.claim("run", dead)
        await store.append("run", 0, [started()], owner=stale)
        assert [run.status for run in await summaries(store)] == ["interrupted"]
        owner = await store.claim("run", me)
        assert owner.token > stale.token
        assert owner.process == me
        with pytest.raises(OwnershipLost):
            await store.append("run", 1, [noted(1)], owner=stale)
        with pytest.raises(OwnershipLost):
            await store.renew(stale)
        assert len(await journal(store, "run")) == 1
        await store.append("run", 1, [noted(2)], owner=owner)

    async def test_a_live_owner_is_replaced_when_its_lease_is_over(self, store: CheckpointStore, me: ProcessId) -> None:
        late = await store.claim("run", me, lease_s=0)
        owner = await store.claim("run", me)
        with pytest.raises(OwnershipLost):
            await store.append("run", 0, [started()], owner=late)
        await store.append("run", 0, [started()], owner=owner)

    async def test_a_renewed_lease_holds(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me, lease_s=0)
        await store.renew(owner)
        with pytest.raises(OwnershipLost):
            await store.claim("run", me)

    async def test_an_owner_may_not_append_to_another_run(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        other = await store.claim("other", me)
        with pytest.raises(OwnershipLost):
            await store.append("other", 0, [started()], owner=owner)
        with pytest.raises(OwnershipLost):
            await store.append("other", 0, [started()], owner=Owner("other", owner.token, me))
        with pytest.raises(OwnershipLost):
            await store.append("new", 0, [started()], owner=Owner("new", owner.token, me))
        await store.append("other", 0, [started()], owner=other)

    async def test_of_many_claims_at_once_one_wins(self, store: CheckpointStore, me: ProcessId) -> None:
        claims = await asyncio.gather(*(store.claim("run", me) for _ in range(20)), return_exceptions=True)
        assert sorted(type(claim).__name__ for claim in claims) == ["Owner"] + ["OwnershipLost"] * 19

    async def test_a_cancelled_claim_does_not_block_the_run(self, store: CheckpointStore, me: ProcessId) -> None:
        claim = asyncio.create_task(store.claim("run", me))
        await asyncio.sleep(0)
        claim.cancel()
        (outcome,) = await asyncio.gather(claim, return_exceptions=True)
        if isinstance(outcome, Owner):
            await store.release(outcome)
        for _ in range(50):
            try:
                await store.claim("run", me)
            except OwnershipLost:
                await asyncio.sleep(0.01)
            else:
                return
        pytest.fail("a claim that was cancelled still holds the run")

    # Forgetting and listing

    async def test_a_deleted_run_is_gone(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await store.claim("run", me)
        await store.append("run", 0, [started(), noted(1)], owner=owner)
        digest = await store.put_blob("run", b"value")
        keeper = await store.claim("other", me)
        await store.append("other", 0, [started()], owner=keeper)
        assert await store.delete("run")
        assert not await store.delete("run")
        assert await journal(store, "run") == []
        assert [run.run_id for run in await summaries(store)] == ["other"]
        with pytest.raises(CheckpointError):
            await store.get_blob("run", digest)
        with pytest.raises(OwnershipLost):
            await store.append("run", 2, [noted(2)], owner=owner)

    async def test_a_run_begun_anew_after_a_delete_has_nothing_of_the_old_one(
        self, store: CheckpointStore, me: ProcessId
    ) -> None:
        old = await store.claim("run", me)
        await store.append("run", 0, [started("old")], owner=old)
        await store.delete("run")
        new = await store.claim("run", me)
        with pytest.raises(OwnershipLost):
            await store.append("run", 0, [started("old")], owner=old)
        await store.append("run", 0, [started("new")], owner=new)
        assert [run.goal for run in await summaries(store)] == ["new"]

    async def test_runs_are_listed_the_last_started_first(self, store: CheckpointStore, me: ProcessId) -> None:
        at: dict[str, float] = {}
        for name in ("b", "c", "a"):
            owner = await store.claim(name, me)
            origin = Origin("script", ("python", "job.py"), "/tmp", {"k": "v"}) if name == "c" else None
            at[name] = await store.append(name, 0, [started(f"goal {name}", origin=origin)], owner=owner)
            await asyncio.sleep(0.002)
            await store.release(owner)
        owner = await store.claim("b", me)
        updated = await store.append("b", 1, [noted(1)], owner=owner)
        await store.release(owner)
        origin = Origin("script", ("python", "job.py"), "/tmp", {"k": "v"})
        assert await summaries(store) == [
            RunSummary("a", "goal a", "clerk", "interrupted", at["a"], at["a"]),
            RunSummary("c", "goal c", "clerk", "interrupted", at["c"], at["c"], origin),
            RunSummary("b", "goal b", "clerk", "interrupted", at["b"], updated),
        ]
        assert [run.run_id for run in await summaries(store, RunQuery(limit=2))] == ["a", "c"]
        assert await summaries(store, RunQuery(limit=0)) == []

    async def test_the_status_follows_the_records_and_the_owner(self, store: CheckpointStore, me: ProcessId) -> None:
        async def status() -> str:
            (run,) = await summaries(store)
            assert await summaries(store, RunQuery(status=run.status)) == [run]
            for other in ("running", "interrupted", "waiting", "finished", "failed", "cancelled"):
                assert other == run.status or not await summaries(store, RunQuery(status=other))
            return run.status

        owner = await store.claim("run", me)
        await store.append("run", 0, [started(), DriverStarted(VERSION, 1, me)], owner=owner)
        assert await status() == "running"
        await store.append("run", 2, [RunFailed("llm", "no answer", 1, Spent())], owner=owner)
        assert await status() == "failed"
        await store.append("run", 3, [Reopened("again")], owner=owner)
        assert await status() == "running"
        await store.release(owner)
        assert await status() == "interrupted"
        owner = await store.claim("run", me)
        await store.append("run", 4, [noted(1), RunParked(("q1",), 1, Spent())], owner=owner)
        await store.release(owner)
        assert await status() == "waiting"
        await store.post("run", Guidance("Go on.", "ann"))
        assert await status() == "waiting"
        owner = await store.claim("run", me)
        await store.append("run", 6, [DriverStarted(VERSION, 2, me)], owner=owner)
        assert await status() == "running"
        await store.append("run", 7, [RunCancelled("enough", 1, Spent())], owner=owner)
        assert await status() == "cancelled"
        await store.append("run", 8, [Reopened("no"), noted(2), RunFinished("12", 1.0, 2, Spent())], owner=owner)
        await store.append("run", 11, [noted(3)], owner=owner)
        assert await status() == "finished"

    # Mailboxes

    async def begin(self, store: CheckpointStore, me: ProcessId, run_id: str = "run") -> Owner:
        """Write the first record of a run, so that it has a mailbox."""
        owner = await store.claim(run_id, me)
        await store.append(run_id, 0, [started()], owner=owner)
        return owner

    async def test_commands_are_received_in_order_and_whole(self, store: CheckpointStore, me: ProcessId) -> None:
        await self.begin(store, me)
        commands: list[Command] = [
            Answer("q1", "edit", "änn 🦔", "ab" * 32, "a\n\x00\x1b[31m", '{"to":"bob"}'),
            *(Guidance(f"number {number}", "ann", "clerk") for number in range(20)),
            Cancel("enough " * 20_000, "bob"),
        ]
        posted = [await store.post("run", command) for command in commands]
        assert [mail.command for mail in posted] == commands
        assert len({mail.id for mail in posted}) == len(commands)
        assert await store.inbox("run") == posted
        assert await store.inbox("run") == posted, "looking takes nothing"
        times = [mail.received_at for mail in posted]
        assert times == sorted(times)
        assert times[0] > 0

    async def test_commands_stay_until_they_are_discarded(self, store: CheckpointStore, me: ProcessId) -> None:
        await self.begin(store, me)
        posted = [await store.post("run", Guidance(str(number), "ann")) for number in range(4)]
        await store.discard_mail("run", [posted[2].id, posted[0].id])
        assert await store.inbox("run") == [posted[1], posted[3]]
        await store.discard_mail("run", [posted[2].id, "no such command", "../run", "", "*"])
        await store.discard_mail("run", [])
        assert await store.inbox("run") == [posted[1], posted[3]]
        await store.discard_mail("run", [mail.id for mail in posted])
        assert await store.inbox("run") == []
        late = await store.post("run", Guidance("late", "ann"))
        assert await store.inbox("run") == [late]

    async def test_an_unknown_run_has_no_mailbox(self, store: CheckpointStore, me: ProcessId) -> None:
        with pytest.raises(RunNotFound, match="nobody"):
            await store.post("nobody", Cancel("", "ann"))
        await store.claim("empty", me)
        with pytest.raises(RunNotFound, match="empty"):
            await store.post("empty", Cancel("", "ann"))
        assert await store.inbox("nobody") == []
        assert await store.inbox("empty") == []
        await store.discard_mail("nobody", ["x"])
        assert await summaries(store) == []

    async def test_a_deleted_run_has_no_mail_and_one_begun_anew_has_none_of_it(
        self, store: CheckpointStore, me: ProcessId
    ) -> None:
        await self.begin(store, me)
        await store.post("run", Cancel("", "ann"))
        await store.delete("run")
        assert await store.inbox("run") == []
        with pytest.raises(RunNotFound):
            await store.post("run", Cancel("", "ann"))
        await self.begin(store, me)
        assert await store.inbox("run") == []

    async def test_anybody_may_post_whoever_owns_the_run(self, store: CheckpointStore, me: ProcessId) -> None:
        owner = await self.begin(store, me)
        mail = await store.post("run", Guidance("while it is owned", "ann"))
        await store.append("run", 1, [noted(1)], owner=owner)
        assert await store.inbox("run") == [mail]
        await store.release(owner)
        later = await store.post("run", Guidance("while nobody owns it", "ann"))
        assert await store.inbox("run") == [mail, later]
        assert len(await journal(store, "run")) == 2, "a command is no record"

    async def test_runs_do_not_see_each_others_mail(self, store: CheckpointStore, me: ProcessId) -> None:
        kept: dict[str, Mail] = {}
        for number, run_id in enumerate(HOSTILE_IDS):
            try:
                await self.begin(store, me, run_id)
            except CheckpointError:
                continue
            kept[run_id] = await store.post(run_id, Guidance(f"number {number}", "ann"))
        for run_id, mail in kept.items():
            assert await store.inbox(run_id) == [mail]
        for run_id in kept:
            others = [mail.id for other, mail in kept.items() if other != run_id]
            await store.discard_mail(run_id, others)
        for run_id, mail in kept.items():
            assert await store.inbox(run_id) == [mail], "nobody discards another run's mail"
            assert await store.delete(run_id)
            assert await store.inbox(run_id) == []

    async def test_many_may_post_at_once(self, store: CheckpointStore, me: ProcessId) -> None:
        await self.begin(store, me)
        posted = await asyncio.gather(*(store.post("run", Guidance(str(number), "ann")) for number in range(50)))
        found = await store.inbox("run")
        assert sorted(mail.id for mail in found) == sorted(mail.id for mail in posted)
        assert {mail.command for mail in found} == {mail.command for mail in posted}

    async def test_mail_is_kept_over_a_reopening(
        self, open_store: Callable[[], CheckpointStore], me: ProcessId
    ) -> None:
        if not self.reopens:
            pytest.skip("this store keeps nothing when it is closed")
        first, second = open_store(), open_store()
        owner = await self.begin(first, me)
        posted = [
            await second.post("run", Guidance("from elsewhere", "ann")),
            await first.post("run", Cancel("", "me")),
        ]
        assert await first.inbox("run") == await second.inbox("run") == posted
        await first.release(owner)
        await first.close()
        await second.close()
        third = open_store()
        assert await third.inbox("run") == posted
        await third.discard_mail("run", [posted[0].id])
        await third.close()
        assert await first.inbox("run") == posted[1:]
        await first.close()

    # Blobs

    async def test_blobs_are_kept_under_their_digest_for_each_run(self, store: CheckpointStore, me: ProcessId) -> None:
        for run_id in ("run", "other"):
            owner = await store.claim(run_id, me)
            await store.append(run_id, 0, [started()], owner=owner)
        data = bytes(range(256)) * 10_000
        digest = await store.put_blob("run", data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert await store.put_blob("run", data) == digest
        empty = await store.put_blob("run", b"")
        assert await store.get_blob("run", digest) == data
        assert await store.get_blob("run", empty) == b""
        for run_id, wanted in (("other", digest), ("run", "0" * 64), ("run", "../run"), ("run", "")):
            with pytest.raises(CheckpointError):
                await store.get_blob(run_id, wanted)

    # Ids and reopening

    async def test_hostile_ids_never_share_a_row(self, store: CheckpointStore, me: ProcessId) -> None:
        kept: dict[str, str] = {}
        for number, run_id in enumerate(HOSTILE_IDS):
            try:
                owner = await store.claim(run_id, me)
                await store.append(run_id, 0, [started(f"goal {number}")], owner=owner)
            except CheckpointError:
                continue
            kept[run_id] = await store.put_blob(run_id, f"value {number}".encode())
        assert len(kept) >= len(HOSTILE_IDS) - 1, "only text that cannot be encoded may be refused"
        assert {run.run_id for run in await summaries(store)} == set(kept)
        for number, run_id in enumerate(HOSTILE_IDS):
            if run_id in kept:
                assert [entry.record for entry in await journal(store, run_id)] == [started(f"goal {number}")]
                assert await store.get_blob(run_id, kept[run_id]) == f"value {number}".encode()
        for run_id in kept:
            assert await store.delete(run_id)
            assert await journal(store, run_id) == []
        assert await summaries(store) == []

    async def test_a_store_opened_again_sees_everything(
        self, open_store: Callable[[], CheckpointStore], me: ProcessId
    ) -> None:
        if not self.reopens:
            pytest.skip("this store keeps nothing when it is closed")
        first = open_store()
        owner = await first.claim("run", me)
        await first.append("run", 0, [started(), noted(1)], owner=owner)
        digest = await first.put_blob("run", b"value")
        before = await journal(first, "run")
        await first.release(owner)
        await first.close()

        second = open_store()
        assert await journal(second, "run") == before
        assert await second.get_blob("run", digest) == b"value"
        assert [run.status for run in await summaries(second)] == ["interrupted"]
        again = await second.claim("run", me)
        assert again.token > owner.token
        await second.append("run", 2, [noted(2)], owner=again)
        await second.release(again)
        await second.close()
        assert len(await journal(first, "run")) == 3, "a closed store opens itself anew"
        await first.close()

    async def test_two_stores_on_the_same_data_respect_each_other(
        self, open_store: Callable[[], CheckpointStore], me: ProcessId
    ) -> None:
        if not self.reopens:
            pytest.skip("this store keeps its data to itself")
        first, second = open_store(), open_store()
        owner = await first.claim("run", me)
        await first.append("run", 0, [started()], owner=owner)
        with pytest.raises(OwnershipLost):
            await second.claim("run", me)
        with pytest.raises(CheckpointError):
            await second.append("run", 0, [started()], owner=Owner("run", owner.token + 1, me))
        assert len(await journal(second, "run")) == 1
        assert [run.status for run in await summaries(second)] == ["running"]
        await first.release(owner)
        other = await second.claim("run", me)
        await second.append("run", 1, [noted(1)], owner=other)
        with pytest.raises(OwnershipLost):
            await first.append("run", 2, [noted(2)], owner=owner)
        assert len(await journal(first, "run")) == 2
        await first.close()
        await second.close()
