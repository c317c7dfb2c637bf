"""The mailroom: a run's mailbox, looked into from time to time while the run is driven."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from harness.approval import Seal
from harness.checkpoint.base import CheckpointStore
from harness.errors import CheckpointError
from harness.inbox import answer_in
from harness.mailbox import Cancel, Mail
from harness.records import ApprovalRequested

LOOK_EVERY_S = 1.0
LOOK_EVERY_WHEN_ASKED_S = 0.2
"""Seconds between two looks into the mailbox: of a run at work, and of one that a person is to answer."""

logger = logging.getLogger("harness")


class Mailroom:
    """Fetches commands for one run. What they come to is the driver's to write down.

    Args:
        store: where the mailbox is.
        run_id: whose it is.
        known: ids of commands that the journal has taken.
        is_asked: whether a person is to answer right now.
        on_mail: called when there is something new.
        on_cancel: called, instead, when the run is to end.

    Attributes:
        waiting: commands that were fetched and not taken yet.
        taken: ids of those that were, and can be removed once that is durable.
    """

    def __init__(
        self,
        store: CheckpointStore,
        run_id: str,
        *,
        known: Collection[str],
        is_asked: Callable[[], bool],
        on_mail: Callable[[], None],
        on_cancel: Callable[[Mail], None],
    ) -> None:
        self.waiting: list[Mail] = []
        self.taken: list[str] = []
        self._store = store
        self._run_id = run_id
        self._known = known
        self._is_asked = is_asked
        self._on_mail = on_mail
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look later, and again and again."""
        # A timer and not a task that sleeps: most runs are over before the first look.
        after_s = LOOK_EVERY_WHEN_ASKED_S if self._is_asked() else LOOK_EVERY_S
        self._timer = self._loop.call_later(after_s, self._begin_look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def look_now(self) -> None:
        """Look at once: somebody in this process has put something there."""
        if self._timer is not None and (self._task is None or self._task.done()):
            self._timer.cancel()
            self._begin_look()

    async def fetch(self) -> bool:
        """Fetch commands that were not taken yet. Returns whether there are any."""
        found = await self._store.inbox(self._run_id)
        here = {mail.id for mail in self.waiting}.union(self._known)
        self.waiting += [mail for mail in found if mail.id not in here]
        # Whoever took these died before it could remove them.
        self.taken += [mail.id for mail in found if mail.id in self._known and mail.id not in self.taken]
        return bool(self.waiting)

    async def holds_answer(self, request: ApprovalRequested, seal: Seal) -> bool:
        """Say whether an answer was received before a question expired; it is taken with the rest of the mail."""
        await self.fetch()
        return answer_in(self.waiting, request, seal) is not None

    async def discard_taken(self) -> None:
        """Remove what was taken; what stays for an error is known by its id and not taken again."""
        taken, self.taken = self.taken, []
        try:
            await self._store.discard_mail(self._run_id, taken)
        except CheckpointError as error:
            logger.warning("run %r: its mailbox could not be emptied: %s", self._run_id, error)

    def _begin_look(self) -> None:
        self._task = self._loop.create_task(self._look())

    async def _look(self) -> None:
        try:
            found = await self.fetch()
        except CheckpointError as error:
            logger.warning("run %r: its mailbox could not be read: %s", self._run_id, error)
            found = False
        cancel = next((mail for mail in self.waiting if isinstance(mail.command, Cancel)), None)
        if cancel is not None:
            self._on_cancel(cancel)
            return
        if found:
            self._on_mail()
        self.start()
