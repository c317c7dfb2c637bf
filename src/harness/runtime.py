"""AgentRuntime: wire agents, tools, a model and a store once, and run any goal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from harness import host
from harness.agent import AgentConfig
from harness.approval import Decision, Gate
from harness.budget import GuardrailConfig
from harness.checkpoint.base import LEASE_S, CheckpointStore, RunQuery, RunSummary
from harness.errors import ConfigError, HarnessError, LLMError, OwnershipLost, PlanError
from harness.hitl.base import Approver, Callback
from harness.keys import join_key
from harness.launch import Launcher, Start, Stores, hint
from harness.plan import Plan
from harness.records import ApprovalRequested, Origin, Routed, Site
from harness.registry import AgentRegistry, ToolRegistry, nearest
from harness.replay import Replay
from harness.result import RunResult
from harness.run_stream import OverRun, Run, RunStream, result_of_run
from harness.wiring import COORDINATOR, People, Wirings

if TYPE_CHECKING:
    from harness.hitl.policy import Policy

T = TypeVar("T")

logger = logging.getLogger("harness")


class AgentRuntime:
    """Everything a run needs, wired once.

    Args:
        llm: the model: an ``LLM``, or any object with ``async complete(system, messages, **kw)``.
        agents: the agents, as a list; or give a registry.
        tools: the tools, as a list of functions and objects; or give a registry.
        agent_registry: the agents.
        tool_registry: the tools.
        guardrail_config: the limits of every run; the defaults are GuardrailConfig's.
        checkpoint_store: where runs are kept; None keeps them in one SQLite file in the state directory.
        llm_by_site: models for call sites that are to have one of their own: ``classifier``, ``router``, ``planner``,
            ``synthesiser``, ``summariser``.
        approver: who is asked about calls that an agent's ``hitl_tools`` or the policy hold back; with None the run
            parks, and is answered by ``answer`` from any process.
        policy: rules, or a function, that decide which calls run, are forbidden or asked about; None lets all run
            that ``hitl_tools`` does not name.
        approve_plans: whether a plan waits for a person's yes before anything of it runs.
        answer_within_s: seconds a question stands before it counts as a no; None for ever.
        deps: the user's own object, handed to tools as ``ToolContext.deps``.
        auto_resume: whether the first entry call honours ``--resume KEY`` in ``sys.argv``.
        strict: whether a resume refuses a configuration that differs from the run's.
        origin: how runs are said to have been started; None describes the running script.
        lease_s: seconds a live process that drives a run may be silent before another may take the run.

    Raises:
        ConfigError: an agent allows an unknown tool, a name is taken, an object is no model or no tool.

    >>> from harness.checkpoint import MemoryCheckpointStore
    >>> from harness.testing import ScriptedLLM
    >>> runtime = AgentRuntime(
    ...     llm=ScriptedLLM(["It is 4."]), agents=[AgentConfig("maths")], checkpoint_store=MemoryCheckpointStore()
    ... )
    >>> runtime.run_sync(runtime.run_agent("maths", "What is 2 + 2?")).answer
    'It is 4.'
    """

    def __init__(
        self,
        *,
        llm: object,
        agents: Iterable[AgentConfig] = (),
        tools: Iterable[object] = (),
        agent_registry: AgentRegistry | None = None,
        tool_registry: ToolRegistry | None = None,
        guardrail_config: GuardrailConfig | None = None,
        checkpoint_store: CheckpointStore | None = None,
        llm_by_site: Mapping[Site, object] | None = None,
        approver: Approver | Callback | None = None,
        policy: Policy | Gate | None = None,
        approve_plans: bool = False,
        answer_within_s: float | None = None,
        deps: object = None,
        auto_resume: bool = True,
        strict: bool = False,
        origin: Origin | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        if not lease_s > 0:
            raise ConfigError(f"lease_s must be more than 0 seconds, not {lease_s!r}")
        self.agent_registry = AgentRegistry() if agent_registry is None else agent_registry
        self.tool_registry = ToolRegistry() if tool_registry is None else tool_registry
        for what, given in (("agents", agents), ("tools", tools)):
            if isinstance(given, (str, AgentConfig)) or not isinstance(given, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
                raise ConfigError(f"{what}= takes a list, not {type(given).__name__}: {what}=[...]")
        for agent in agents:
            self.agent_registry.register(agent)
        for tool in tools:
            self.tool_registry.register(tool)
        wirings = Wirings(
            self.agent_registry,
            self.tool_registry,
            llm=llm,
            llm_by_site=llm_by_site or {},
            limits=guardrail_config or GuardrailConfig(),
            people=People(approver, policy, approve_plans=approve_plans, answer_within_s=answer_within_s),
            deps=deps,
        )
        for agent_id in self.agent_registry.all_ids():
            wirings.of(agent_id)  # wrong wiring is found now, and no run waits for it
        self._stores = Stores(checkpoint_store)
        self._launcher = Launcher(
            self._stores,
            self.agent_registry,
            wirings,
            lease_s=lease_s,
            strict=strict,
            auto_resume=auto_resume,
            origin=origin,
        )

    # -- entry points ---------------------------------------------------------------------------

    async def dispatch(self, goal: str, *, run_id: str | None = None, continue_from: str | None = None) -> RunResult:
        """Run a goal with one agent or with many: a model says whether it is simple or complex.

        Args:
            goal: what is to be reached, in words.
            run_id: your own id for the run. An id that exists attaches to that run: it never runs twice.
            continue_from: the key of a finished run whose conversation this one goes on with.

        Raises:
            ConfigError: no agent is registered, or ``continue_from`` names a run without an answer.
            RunIdTaken: ``run_id`` names a run with another goal.
            RunNotFound: no run is stored under ``continue_from``.
            OwnershipLost: another process drives this run.
            CheckpointError: the journal cannot be read or written.
        """
        return await self._wait(Start(strategy="dispatch", goal=goal, continue_from=continue_from), run_id)

    def dispatch_stream(
        self, goal: str, *, run_id: str | None = None, continue_from: str | None = None, tokens: bool = False
    ) -> RunStream:
        """Run a goal with one agent or with many and yield its events; see ``dispatch``."""
        return self._stream(Start(strategy="dispatch", goal=goal, continue_from=continue_from), run_id, tokens=tokens)

    async def run_routed(self, goal: str, *, run_id: str | None = None, continue_from: str | None = None) -> RunResult:
        """Run a goal with the agent a model finds best for it; arguments and errors are those of ``dispatch``."""
        return await self._wait(Start(strategy="route", goal=goal, continue_from=continue_from), run_id)

    def run_routed_stream(
        self, goal: str, *, run_id: str | None = None, continue_from: str | None = None, tokens: bool = False
    ) -> RunStream:
        """Run a goal with the best agent and yield its events; see ``run_routed``."""
        return self._stream(Start(strategy="route", goal=goal, continue_from=continue_from), run_id, tokens=tokens)

    async def route(self, goal: str) -> tuple[str, str]:
        """Ask which agent is best for a goal, without running it.

        Returns:
            The agent's id and the reason. An answer that names no agent means the first one.

        Raises:
            ConfigError: no agent is registered.
            LLMError: the model could not be asked.
        """
        result = await self._wait(Start(strategy="pick", goal=goal), None)
        for entry in result.trace:
            if isinstance(entry.record, Routed):
                return entry.record.agent_id, entry.record.warning or entry.record.rationale
        raise LLMError(result.error)

    async def run(self, goal: str, *, run_id: str | None = None, continue_from: str | None = None) -> RunResult:
        """Run a goal with many agents: a planner writes a task graph, its results are brought together.

        Arguments and errors are those of ``dispatch``.
        """
        return await self._wait(Start(strategy="orchestrate", goal=goal, continue_from=continue_from), run_id)

    def run_stream(
        self, goal: str, *, run_id: str | None = None, continue_from: str | None = None, tokens: bool = False
    ) -> RunStream:
        """Run a goal with many agents and yield its events; see ``run``."""
        return self._stream(
            Start(strategy="orchestrate", goal=goal, continue_from=continue_from), run_id, tokens=tokens
        )

    async def run_plan(self, plan: Plan, *, goal: str = "", run_id: str | None = None) -> RunResult:
        """Carry out a plan written by hand.

        Args:
            plan: the tasks; every agent they name must be registered.
            goal: what it is for, as the planner and the synthesiser are told; the plan's rationale or its
                instructions where it is left out.
            run_id: your own id for the run.

        Raises:
            PlanError: the plan names an agent that is not registered.
            RunIdTaken: ``run_id`` names a run with another goal or plan.
            OwnershipLost: another process drives this run.
            CheckpointError: the journal cannot be read or written.
        """
        return await self._wait(self._planned(plan, goal), run_id)

    def run_plan_stream(
        self, plan: Plan, *, goal: str = "", run_id: str | None = None, tokens: bool = False
    ) -> RunStream:
        """Carry out a plan written by hand and yield its events; see ``run_plan``."""
        return self._stream(self._planned(plan, goal), run_id, tokens=tokens)

    async def run_agent(
        self, agent_id: str, task: str, *, run_id: str | None = None, continue_from: str | None = None
    ) -> RunResult:
        """Run one agent on a task and return what came of it.

        Args:
            agent_id: a registered agent.
            task: the goal, in words.
            run_id: your own id for the run. An id that exists attaches to that run: it never runs twice.
            continue_from: the key of a finished run whose conversation this one goes on with.

        Raises:
            ConfigError: the agent is unknown.
            RunIdTaken: ``run_id`` names a run with another goal or agent.
            OwnershipLost: another process drives this run.
            CheckpointError: the journal cannot be read or written.
        """
        start = Start(strategy="react", goal=task, agent_id=agent_id, continue_from=continue_from)
        return await self._wait(start, run_id)

    def run_agent_stream(
        self,
        agent_id: str,
        task: str,
        *,
        run_id: str | None = None,
        continue_from: str | None = None,
        tokens: bool = False,
    ) -> RunStream:
        """Run one agent on a task and yield its events; see ``run_agent``.

        Args:
            agent_id: a registered agent.
            task: the goal, in words.
            run_id: your own id for the run.
            continue_from: the key of a finished run whose conversation this one goes on with.
            tokens: also yield TOKEN events.
        """
        start = Start(strategy="react", goal=task, agent_id=agent_id, continue_from=continue_from)
        return self._stream(start, run_id, tokens=tokens)

    async def resume(self, key: str, *, strict: bool | None = None) -> RunResult:
        """Go on with a run; a finished one returns its result.

        Args:
            key: ``<run_id>``, ``<run_id>:<agent_id>`` where one agent runs it, or ``<run_id>:<task_id>:<agent_id>``,
                which drives that task of a plan and stops; a later resume of the run takes its result.
            strict: refuse a configuration that differs; None takes the runtime's setting.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigChanged: strict, and the configuration differs.
            ConfigError: an agent of the run is not registered here, or the task was not begun (anew).
            OwnershipLost: another process drives this run.
        """
        return await self._result(lambda: self._launcher.resume(key, strict))

    def resume_stream(
        self, key: str, *, replay: bool = False, tokens: bool = False, strict: bool | None = None
    ) -> RunStream:
        """Go on with a run and yield RESUMED, the plan there is, and what is new; see ``resume``.

        Args:
            key: as for ``resume``.
            replay: yield the run's events from its start.
            tokens: also yield TOKEN events.
            strict: refuse a configuration that differs; None takes the runtime's setting.
        """
        return RunStream(lambda: self._launcher.resume(key, strict), tokens=tokens, replay=replay, on_cut=hint)

    def replay_stream(self, key: str, *, speed: float = 0.0) -> Replay:
        """Show a run's events once more, from its journal alone: nothing is driven, asked or written.

        Args:
            key: as for ``resume``. The key of a task shows that task.
            speed: 0 shows all at once, 1 takes the seconds the run was driven, 2 half of them.

        Raises:
            ConfigError: ``speed`` is negative, or the task was not begun.
            RunNotFound: no run is stored under the key (once the replay is entered).
        """
        return Replay(lambda: self._launcher.stored(key), speed=speed)

    async def pending(self, key: str) -> list[ApprovalRequested]:
        """Return the questions of a run that wait for an answer, in the order they were asked.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigError: the run is over.
        """
        return await self._launcher.questions(key)

    async def answer(self, key: str, decision: Decision, *, approval_id: str | None = None, by: str = "") -> None:
        """Answer a question, in any process that reaches the store; a run that is parked goes on when it is resumed.

        Args:
            key: the run.
            decision: ``Approve()``, ``ApproveForSession()``, ``Edit(arguments)``, ``Reject(reason)``, ``Steer(text)``.
            approval_id: which question; may be left out where one waits.
            by: who answers, as it is written down; the user of this process where it is left out.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigError: no such question waits, or it must be said which.
        """
        await self._launcher.answer(key, decision, approval_id, by or host.who())

    async def steer(self, key: str, text: str, agent: str = "", *, by: str = "") -> None:
        """Tell the agents at work something before their next model call, from any process; once, also over a crash.

        Args:
            key: the run; one that nobody drives is told when it is resumed.
            text: what to tell them, as human guidance.
            agent: the one to tell; all that are at work where it is left out.
            by: who speaks, as it is written down; the user of this process where it is left out.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigError: the run is over, or the key is one of a task.
        """
        await self._launcher.steer(key, text, agent, by or host.who())

    async def cancel(self, key: str, reason: str = "", *, by: str = "") -> None:
        """End a run for good, whichever process drives it. Its calls are cancelled first.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigError: the run is over, or the key is one of a task.
        """
        await self._launcher.cancel(key, reason, by or host.who())

    async def fork(
        self, key: str, *, at: int | None = None, run_id: str | None = None, origin: Origin | None = None
    ) -> str:
        """Copy a run up to a step under a new id; ``resume`` the new one to drive it.

        It goes on with whatever the resuming runtime is wired with, another model for instance: the steps that were
        copied are not paid again.

        Args:
            key: the run to copy.
            at: the first step that is not copied; None copies all but the last step. The steps of a run with several
                agents are numbered in the order in which they began.
            run_id: the new run's id; None makes one.
            origin: how the new run is said to have been started; None says the same as the run that is copied.

        Returns:
            The new run's id.

        Raises:
            RunNotFound: no run is stored under the key.
            RunIdTaken: the new id exists.
            ConfigError: the run has no such step.
        """
        return await self._launcher.fork(key, at, run_id, origin)

    def runs(self, query: RunQuery | None = None) -> AsyncIterator[RunSummary]:
        """Yield summaries of the stored runs, the last started first."""
        return self.store.runs(query or RunQuery())

    async def recover(self) -> list[RunResult]:
        """Go on with every run that was left unfinished and whose agents are registered here; return their results."""
        waiting = [run async for run in self.store.runs(RunQuery(status="interrupted"))]
        known = {COORDINATOR, *self.agent_registry.all_ids()}
        results = await asyncio.gather(
            *(self.resume(join_key(run.run_id)) for run in waiting if run.agent_id in known), return_exceptions=True
        )
        done: list[RunResult] = []
        for result in results:
            if isinstance(result, OwnershipLost):
                continue
            if isinstance(result, HarnessError):
                logger.warning("a run could not be recovered: %s", result)
                continue
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        return done

    def run_sync(self, entry: Awaitable[T]) -> T:
        """Run an entry call to its end from a script that has no event loop, and close the runtime."""

        async def main() -> T:
            async with self:
                return await entry

        return asyncio.run(main())

    async def aclose(self) -> None:
        """Stop what still runs here (it can be resumed) and close the store, if it is the runtime's own."""
        await asyncio.gather(*(run.stop() for run in list(self._launcher.active.values())))
        await self._stores.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._launcher.active:
            await asyncio.wait({run.task for run in self._launcher.active.values()})
        await self.aclose()

    @property
    def store(self) -> CheckpointStore:
        """Where runs are kept."""
        return self._stores.durable

    # -- what they have in common ---------------------------------------------------------------

    def _planned(self, plan: Plan, goal: str) -> Start:
        if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise ConfigError(f"run_plan() takes a Plan, not {type(plan).__name__}: Plan([Task(...), ...])")
        known = self.agent_registry.all_ids()
        unknown = [
            f"task {task.id!r} is for an unknown agent {task.agent_id!r}{nearest(task.agent_id, known)}"
            for task in plan.tasks
            if task.agent_id not in known
        ]
        if unknown:
            raise PlanError(unknown)
        goal = goal or plan.rationale or "\n".join(task.instruction for task in plan.tasks)
        return Start(strategy="orchestrate", goal=goal, plan=plan)

    def _stream(self, start: Start, run_id: str | None, *, tokens: bool) -> RunStream:
        return RunStream(lambda: self._launcher.begin(start, run_id), tokens=tokens, replay=False, on_cut=hint)

    async def _wait(self, start: Start, run_id: str | None) -> RunResult:
        return await self._result(lambda: self._launcher.begin(start, run_id))

    async def _result(self, open_run: Callable[[], Coroutine[None, None, Run]]) -> RunResult:
        run = await open_run()
        if isinstance(run, OverRun):
            return run.result()
        run.join()
        try:
            return await result_of_run(run)
        except asyncio.CancelledError:
            await run.leave()
            hint(run)
            raise
