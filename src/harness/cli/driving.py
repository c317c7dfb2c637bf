"""Drive a run for a person: show its events, obey signals, turn what it came to into an exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness import host
from harness.cli.asking import Asking, Steering
from harness.cli.codes import FAILED, INTERRUPTED, OutputLost, exit_code, report, silence_stdout
from harness.cli.heading import Header
from harness.cli.interrupts import Interrupts
from harness.cli.ledger import Ledger
from harness.cli.screen import Screen
from harness.cli.text import safe
from harness.events import Event
from harness.keys import join_key, place_of
from harness.records import Origin

if TYPE_CHECKING:
    from harness.cli.wiring import Wired
    from harness.run_stream import RunStream


def drive(
    wired: Wired,
    start: Callable[[], RunStream],
    screen: Screen,
    header: Header,
    ledger: Ledger,
    asking: Asking,
    *,
    only: str = "",
) -> int:
    """Drive one run, or one task of it, to its end or to an interruption.

    Args:
        wired: the runtime.
        start: makes the stream.
        screen: where it is shown.
        header: what is said first.
        ledger: the run's journal so far.
        asking: the person at the terminal.
        only: the scope of the task; empty for the run.

    Returns:
        The exit code.
    """
    viewing = _Viewing(wired, screen, ledger, asking, only)
    with Interrupts(viewing.last_words) as interrupts:
        try:
            code = asyncio.run(viewing.run(start, header, interrupts))
        except asyncio.CancelledError:
            code = INTERRUPTED
        except BrokenPipeError:
            # Nobody looks any more: the run stops as it would at Ctrl-C.
            silence_stdout()
            code = INTERRUPTED if viewing.code is None else viewing.code
        except OutputLost as error:
            silence_stdout()
            print(f"harness: stdout cannot be written: {error.strerror}", file=sys.stderr)
            if viewing.code is None:
                viewing.last_words()
            code = FAILED
        finally:
            viewing.close()
    if code == INTERRUPTED and not viewing.last_words():
        print("Interrupted before the run had begun.", file=sys.stderr)
    return code


class _Viewing:
    """One run, watched."""

    def __init__(self, wired: Wired, screen: Screen, ledger: Ledger, asking: Asking, only: str) -> None:
        self._wired = wired
        self._screen = screen
        self._ledger = ledger
        self._asking = asking
        self._only = only
        self._steering = Steering(self._steer, lambda text: screen.note(safe(text)))
        self._run_id = ledger.state.run_id if ledger.state.seq else ""
        self.code: int | None = None

    def last_words(self) -> bool:
        """Say how to go on, unless that was said. Returns whether there is a run to go on with."""
        self._asking.restore()
        if self._run_id:
            host.hint_interrupted(*self._label_and_key(), Origin("cli"))
        return bool(self._run_id)

    def _label_and_key(self) -> tuple[str, str]:
        """Say what was interrupted, and the key it is resumed by; as the library says it."""
        if self._only:
            place = place_of(self._only)
            return f"Agent {safe(place.agent_id)}", join_key(self._run_id, place.task_id, place.agent_id)
        state = self._ledger.state
        agent_id = state.scopes[""].agent_id if state.scopes else self._wired.agent_id
        return "Orchestration" if state.plan is not None else "Run", join_key(self._run_id, agent_id)

    async def run(self, start: Callable[[], RunStream], header: Header, interrupts: Interrupts) -> int:
        """Show the run's events until its end."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # asyncio.run made it

        def stop() -> None:
            # The footer goes first: what is printed from here on must not be drawn over.
            self.close()
            task.cancel()

        interrupts.on_first(lambda: loop.call_soon_threadsafe(stop))
        async with self._wired.runtime:
            stream = start()
            self._ledger.attach()
            self._asking.tools = self._wired.runtime.tool_registry
            self._asking.attach(self._screen, self._ledger)
            self._screen.open(header, self._ledger)
            self._asking.listen(self._steering.take)
            async with stream:
                async for event in stream:
                    await self._asking.may_show()
                    await self._show(event)
                    self._asking.shown(event)
            self.close()
            await self._steering.join()
        assert stream.result is not None  # the stream has ended
        self.code = exit_code(stream.result)
        interrupts.leave(self.code)
        self._ledger.attach_end(stream.result)
        self._screen.end(stream.result)
        report(stream.result, self._only)
        return self.code

    def close(self) -> None:
        """Stop whatever moves, and leave the terminal as it was found."""
        self._screen.close()
        self._asking.close()

    def _steer(self, text: str) -> asyncio.Task[None] | None:
        if not self._run_id:
            return None
        return asyncio.create_task(self._wired.runtime.steer(join_key(self._run_id), text))

    async def _show(self, event: Event) -> None:
        self._run_id = event.run_id
        if event.seq > self._ledger.state.seq:
            self._ledger.state.run_id = event.run_id
            entries = self._wired.runtime.store.read(event.run_id, after=self._ledger.state.seq)
            self._ledger.follow([entry async for entry in entries])
        self._screen.show(event)
