"""The pure parts of rate and composition, and the shared limit on real event loops and threads."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import (
    CircuitBreaker,
    ConfigError,
    FallbackLLM,
    GovernedLLM,
    LLMError,
    LLMSettings,
    LLMUnavailable,
    RateLimit,
    RoutingLLM,
)
from harness.llm.base import LLMRequest
from harness.llm.rate import Ticket
from harness.llm.window import SENDING_S, Window
from harness.messages import user
from harness.perform import MAX_BACKOFF_S, backoff_s
from harness.records import LLMFailed
from harness.testing import ScriptedLLM
from harness.watchdog import Watchdog

REQUEST = LLMRequest("", [user("hi")])

# -- the window ---------------------------------------------------------------------------------

CALLS = st.lists(
    st.tuples(
        st.floats(0, 300),  # when it is asked for
        st.integers(0, 500),  # its worst case
        st.floats(0, 1),  # the part of it that it uses
        st.floats(0, 3),  # until it is handed to its model
        st.floats(0, 120),  # until something is heard of it
        st.floats(0, 1),  # when in between it is really sent
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(calls=CALLS, requests=st.none() | st.integers(1, 8), tokens=st.none() | st.integers(500, 2_000))
def test_no_window_of_a_minute_holds_more_than_the_limit(
    calls: list[tuple[float, int, float, float, float, float]], requests: int | None, tokens: int | None
) -> None:
    window = Window(requests=requests, tokens=tokens, seconds=60)
    order = itertools.count()
    todo: list[tuple[float, int, Callable[[float], None]]] = []
    queue: list[tuple[int, float, float, float, float]] = []
    sends: list[tuple[float, int]] = []

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(todo, (when, next(order), what))

    def arrive(call: tuple[int, float, float, float, float]) -> Callable[[float], None]:
        def arrived(now: float) -> None:
            queue.append(call)
            look(now)

        return arrived

    def look(now: float) -> None:
        while queue:
            worst, part, handing, hearing, when = queue[0]
            opens = window.opens_at(worst, now)
            if opens > now:
                if opens < float("inf"):
                    at(opens, look)
                return
            queue.pop(0)
            booking = window.book(worst)
            begins, heard = now + handing, now + handing + hearing
            last = min(heard, begins + SENDING_S)
            used = int(worst * part)
            sends.append((begins + when * (last - begins), used))

            def begin(now: float, booking=booking) -> None:
                window.begin(booking, now)
                look(now)

            def hear(now: float, booking=booking, used=used) -> None:
                window.sent(booking, now)
                window.settle(booking, used)
                look(now)

            at(begins, begin)
            at(heard, hear)

    for when, *call in calls:
        at(when, arrive((int(call[0]), call[1], call[2], call[3], call[4])))
    steps = 0
    while todo:
        now, _, what = heapq.heappop(todo)
        what(now)
        steps += 1
        assert steps < 20_000, "it looks again and again at the same moment"
    assert len(sends) == len(calls)  # nobody waits for ever
    for begin, _ in sends:
        within = [used for when, used in sends if begin <= when < begin + 60 - 1e-6]
        assert requests is None or len(within) <= requests
        assert tokens is None or sum(within) <= tokens


def test_a_call_that_fills_several_windows_goes_alone_and_counts_for_all_of_them() -> None:
    window = Window(requests=None, tokens=100, seconds=60)
    assert window.opens_at(250, now=0.0) == 0.0
    large = window.book(250)
    window.sent(large, at=0.0)
    assert window.opens_at(1, now=10.0) == 150.0
    assert window.opens_at(1, now=150.0) == 150.0


def test_a_call_that_used_more_than_was_thought_stays_for_longer() -> None:
    window = Window(requests=None, tokens=100, seconds=60)
    booking = window.book(50)
    window.sent(booking, at=0.0)
    window.settle(booking, 200)
    assert window.opens_at(10, now=60.0) == 120.0
    assert window.opens_at(10, now=120.0) == 120.0
    window.settle(booking, 5_000)  # it has left
    assert window.opens_at(100, now=120.0) == 120.0


def test_a_call_that_was_not_made_leaves_its_place() -> None:
    window = Window(requests=1, tokens=None, seconds=60)
    booking = window.book(5)
    assert window.opens_at(5, now=0.0) == float("inf")
    window.cancel(booking)
    window.cancel(booking)
    assert window.opens_at(5, now=0.0) == 0.0


# -- the limit ----------------------------------------------------------------------------------


async def finish(limit: RateLimit, ticket: Ticket) -> None:
    limit.begin(ticket)
    limit.heard(ticket)
    limit.leave(ticket)


async def test_calls_go_in_the_order_in_which_they_came() -> None:
    limit = RateLimit(max_concurrent=1)
    first = limit.join(1, lease_s=60)
    assert first.is_granted
    went: list[int] = []

    async def one(number: int) -> None:
        ticket = limit.join(1_000 - number, lease_s=60)
        await limit.wait(ticket)
        went.append(number)
        await finish(limit, ticket)

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(one(number))
        await asyncio.sleep(0)
        assert (limit.waiting, limit.running, went) == (20, 1, [])
        limit.leave(first)
    assert went == list(range(20))
    assert (limit.waiting, limit.running) == (0, 0)


async def test_who_is_cancelled_while_it_waits_leaves_its_place() -> None:
    limit = RateLimit(requests_per_minute=60, max_concurrent=1)
    first = limit.join(1, lease_s=60)
    waits = [asyncio.create_task(limit.wait(limit.join(1, lease_s=60))) for _ in range(3)]
    last = limit.join(1, lease_s=60)
    await asyncio.sleep(0)
    for task in waits:
        task.cancel()
    await asyncio.wait(waits)
    assert limit.waiting == 1
    limit.leave(first)
    assert last.is_granted


async def test_who_is_cancelled_in_the_moment_it_is_let_through_leaves_its_place() -> None:
    limit = RateLimit(max_concurrent=1)
    first, second, third = (limit.join(1, lease_s=60) for _ in range(3))
    task = asyncio.create_task(limit.wait(second))
    await asyncio.sleep(0)
    limit.leave(first)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert third.is_granted


async def test_a_window_opens_by_itself() -> None:
    limit = RateLimit(requests_per_minute=60, window_s=1)
    loop = asyncio.get_running_loop()
    first = limit.join(1, lease_s=60)
    began = loop.time()
    await finish(limit, first)
    second = limit.join(1, lease_s=60)
    await asyncio.wait_for(limit.wait(second), 10)
    assert loop.time() - began >= 0.99


async def test_tokens_are_reserved_before_and_settled_after() -> None:
    limit = RateLimit(tokens_per_minute=1_000)
    first = limit.join(900, lease_s=60)
    second = limit.join(900, lease_s=60)
    assert not second.is_granted
    limit.settle(first, 50)
    assert second.is_granted
    third = limit.join(60, lease_s=60)
    assert not third.is_granted
    limit.leave(second)  # it was not sent after all
    assert third.is_granted


async def test_a_pause_holds_everybody_back() -> None:
    limit = RateLimit(max_concurrent=9)
    limit.pause(0.2)
    assert 0 < limit.paused_s <= 0.2
    loop = asyncio.get_running_loop()
    began = loop.time()
    tickets = [limit.join(1, lease_s=60) for _ in range(3)]
    await asyncio.wait_for(asyncio.gather(*map(limit.wait, tickets)), 10)
    assert loop.time() - began >= 0.19
    limit.pause(1e9)
    assert limit.paused_s <= 60


async def test_a_call_that_never_ends_holds_its_place_for_its_lease_only() -> None:
    limit = RateLimit(max_concurrent=1)
    limit.join(1, lease_s=0.05)
    await asyncio.wait_for(limit.wait(limit.join(1, lease_s=60)), 10)


async def test_a_call_that_is_never_sent_holds_its_place_in_the_window_for_its_lease_only() -> None:
    limit = RateLimit(requests_per_minute=1)
    limit.join(1, lease_s=0.05)
    await asyncio.wait_for(limit.wait(limit.join(1, lease_s=60)), 10)


def test_threads_with_loops_of_their_own_share_it() -> None:
    limit = RateLimit(max_concurrent=2)
    lock = threading.Lock()
    now = most = calls = 0

    async def one() -> None:
        nonlocal now, most, calls
        ticket = limit.join(1, lease_s=60)
        await limit.wait(ticket)
        with lock:
            now, calls = now + 1, calls + 1
            most = max(most, now)
        await asyncio.sleep(0.001)
        with lock:
            now -= 1
        await finish(limit, ticket)

    async def many() -> None:
        await asyncio.wait_for(asyncio.gather(*(one() for _ in range(25))), 30)

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (calls, most) == (100, 2)
    assert (limit.waiting, limit.running) == (0, 0)


def test_a_loop_that_was_closed_while_it_waited_holds_nobody_up() -> None:
    limit = RateLimit(max_concurrent=1)
    first = limit.join(1, lease_s=60)
    loop = asyncio.new_event_loop()
    stranded = limit.wait(limit.join(1, lease_s=60))
    task = loop.create_task(stranded)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()

    async def wait() -> None:
        ticket = limit.join(1, lease_s=60)
        limit.leave(first)
        await asyncio.wait_for(limit.wait(ticket), 10)

    asyncio.run(wait())
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left behind on purpose
    stranded.close()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"requests_per_minute": 0}, r"RateLimit\(requests_per_minute=\) must be more than 0"),
        (
            {"tokens_per_minute": float("inf")},
            r"RateLimit\(tokens_per_minute=\) must be more than 0, or None for no limit",
        ),
        ({"max_concurrent": -1}, r"RateLimit\(max_concurrent=\) must be more than 0"),
        ({"window_s": 0}, r"RateLimit\(window_s=\) must be a number of seconds"),
        ({"requests_per_minute": 6, "window_s": 1}, "make window_s 10 or more"),
        (
            {"requests_per_minute": 10**400},
            r"requests_per_minute=\) must be .* 10\*\*12 at the most, not 10{19}\.\.\. \(401",
        ),
        ({"tokens_per_minute": 10**12 + 1}, r"10\*\*12 at the most, not 1000000000001$"),
        ({"max_concurrent": 10**5000}, "not a number of thousands of digits"),
        ({"max_concurrent": float("nan")}, r"RateLimit\(max_concurrent=\) must be more than 0, .*, not nan"),
        ({"requests_per_minute": "60"}, r"RateLimit\(requests_per_minute=\) must be more than 0, .*, not '60'"),
        ({"requests_per_minute": True}, r"RateLimit\(requests_per_minute=\) must be more than 0, .*, not True"),
        ({"requests_per_minute": 60, "window_s": 10**400}, r"RateLimit\(window_s=\) .* 10\*\*9 at the most, not 1000"),
        ({"requests_per_minute": 60, "window_s": 1e308}, r"RateLimit\(window_s=\) .* 10\*\*9 at the most, not 1e\+308"),
        ({"window_s": float("nan")}, r"RateLimit\(window_s=\) must be a number of seconds above 0"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(limits: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RateLimit(**limits)  # type: ignore[arg-type]


# -- the breaker --------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    failures=st.integers(1, 4),
    steps=st.lists(st.sampled_from(["call", "up", "down", "gone", "time"]), max_size=60),
)
def test_a_breaker_lets_one_call_through_at_a_time_while_the_model_is_down(failures: int, steps: list[str]) -> None:
    now = 0.0
    breaker = CircuitBreaker(failures=failures, open_s=30, clock=lambda: now)
    in_a_row, opened_at, flying = 0, 0.0, []
    for step in steps:
        if step == "time":
            now += 10
        elif step == "call":
            is_down = in_a_row >= failures
            if is_down and now - opened_at < 30:
                with pytest.raises(LLMUnavailable) as raised:
                    breaker.enter("m")
                assert raised.value.transient
                assert raised.value.retry_after_s == pytest.approx(30 - (now - opened_at))
            else:
                assert breaker.enter("m") is is_down
                flying.append(is_down)
                if is_down:
                    opened_at = now  # whether it is up is found out by this call; others wait for that long
        elif flying:
            probe = flying.pop()
            if step == "up":
                breaker.answered()
                in_a_row = 0
            elif step == "down":
                breaker.failed(probe=probe)
                if probe or in_a_row < failures:
                    in_a_row += 1
                    opened_at = now
            elif probe:
                breaker.given_up()
                opened_at = min(opened_at, now - 30)
        assert breaker.is_open is (in_a_row >= failures)


def test_a_breaker_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="failures"):
        CircuitBreaker(failures=0)
    with pytest.raises(ConfigError, match="open_s"):
        CircuitBreaker(open_s=0)
    for absurd in (10**400, float("inf"), float("nan"), "3", None):
        with pytest.raises(ConfigError, match=r"CircuitBreaker\(open_s=\) must be a number of seconds"):
            CircuitBreaker(open_s=absurd)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"CircuitBreaker\(failures=\) must be 1 or more"):
            CircuitBreaker(failures=absurd)  # type: ignore[arg-type]


numbers = st.integers() | st.floats() | st.just(10**400) | st.booleans() | st.none()


@given(requests=numbers, tokens=numbers, concurrent=numbers, window_s=numbers)
def test_whatever_numbers_a_limit_is_given_it_works_or_is_refused(
    requests: object, tokens: object, concurrent: object, window_s: object
) -> None:
    try:
        limit = RateLimit(
            requests_per_minute=requests,  # type: ignore[arg-type]
            tokens_per_minute=tokens,  # type: ignore[arg-type]
            max_concurrent=concurrent,  # type: ignore[arg-type]
            window_s=window_s,  # type: ignore[arg-type]
        )
    except ConfigError:
        return
    ticket = limit.join(10, lease_s=60)
    assert ticket.is_granted
    limit.leave(ticket)


# -- retries ------------------------------------------------------------------------------------


@given(attempt=st.integers(1, 100_000), asked=st.none() | st.floats(allow_nan=False))
def test_a_pause_is_jitter_and_never_less_than_was_asked_nor_more_than_a_minute(
    attempt: int, asked: float | None
) -> None:
    chosen = backoff_s(attempt, asked)
    assert 0 <= chosen <= MAX_BACKOFF_S
    if asked is not None:
        assert chosen >= min(asked, MAX_BACKOFF_S)
    elif attempt < 6:
        assert chosen <= 0.5 * 2**attempt


def test_jitter_is_full() -> None:
    chosen = [backoff_s(4, None) for _ in range(300)]
    assert min(chosen) < 1
    assert max(chosen) > 7


@pytest.mark.parametrize(("first_s", "silence_s"), [(0.05, 30.0), (30.0, 0.05)])
async def test_the_first_byte_and_the_silence_after_it_have_deadlines_of_their_own(
    first_s: float, silence_s: float
) -> None:
    watchdog = Watchdog()
    watchdog.start(60, silence_s=silence_s, first_s=first_s)
    if first_s > silence_s:
        await asyncio.sleep(0.2)  # the first byte may take its time
        watchdog.seen = True
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(20)
    assert watchdog.caught()
    watchdog.close()


def test_the_first_byte_may_take_as_long_as_any_silence_unless_it_is_said() -> None:
    assert (LLMSettings().first_byte_s, LLMSettings().silence_timeout_s, LLMSettings().call_timeout_s) == (60, 60, 600)
    assert LLMSettings(silence_timeout_s=5).first_byte_s == 5
    assert LLMSettings(silence_timeout_s=5, first_byte_timeout_s=300).first_byte_s == 300


# -- models made of several ---------------------------------------------------------------------


def named(*names: str) -> list[ScriptedLLM]:
    return [ScriptedLLM(["ok"], name=name) for name in names]


def test_models_made_of_several_are_named_after_them() -> None:
    first, second = named("a", "b")
    both = FallbackLLM(first, GovernedLLM(second, RateLimit(max_concurrent=1)))
    assert (both.provider, both.name) == ("fallback", "harness:a > harness:b")
    routed = RoutingLLM(lambda _: "x", {"x": first, "y": both})
    assert routed.name == "x=harness:a, y=fallback:harness:a > harness:b"
    governed = GovernedLLM(first, RateLimit(max_concurrent=1))
    assert (governed.provider, governed.name) == ("harness", "a")


def test_a_call_costs_what_the_dearest_model_asks() -> None:
    cheap = ScriptedLLM(["ok"], price=lambda tokens_in, tokens_out: tokens_in + tokens_out)
    dear = ScriptedLLM(["ok"], price=lambda tokens_in, tokens_out: 9 * tokens_out)
    unknown = ScriptedLLM(["ok"])
    assert FallbackLLM(cheap, dear).price(10, 10) == 90
    assert RoutingLLM(lambda _: "a", {"a": cheap, "b": dear}).price(100, 1) == 101
    assert FallbackLLM(cheap, unknown).price(10, 10) is None
    assert GovernedLLM(dear, RateLimit(max_concurrent=1)).price(1, 1) == 9


def test_wrong_wiring_is_refused() -> None:
    only, limit = ScriptedLLM(["ok"]), RateLimit(max_concurrent=1)
    with pytest.raises(ConfigError, match="two models or more, not 1"):
        FallbackLLM(only)
    with pytest.raises(ConfigError, match="needs a RateLimit"):
        GovernedLLM(only)
    with pytest.raises(ConfigError, match="obeys this RateLimit already"):
        GovernedLLM(GovernedLLM(only, limit), limit)
    for within in (
        FallbackLLM(only, GovernedLLM(only, limit)),
        RoutingLLM(lambda _: "a", {"a": GovernedLLM(only, limit)}),
        GovernedLLM(GovernedLLM(only, limit), RateLimit(max_concurrent=2)),
    ):
        with pytest.raises(ConfigError, match="obeys this RateLimit already"):
            GovernedLLM(within, limit)
    GovernedLLM(FallbackLLM(only, GovernedLLM(only, limit)), RateLimit(max_concurrent=1))
    with pytest.raises(ConfigError, match="needs models"):
        RoutingLLM(lambda _: "a", {})
    with pytest.raises(ConfigError, match="must be a function"):
        RoutingLLM("a", {"a": only})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("select", "said"),
    [
        (lambda _: "smal", "select returned 'smal'; did you mean 'small'"),
        (lambda _: None, "select returned None; the models are: small"),
        (lambda _: 1 / 0, "select failed: ZeroDivisionError"),
    ],
)
def test_a_choice_that_is_none_is_an_error_that_says_so(select: Callable[[LLMRequest], str], said: str) -> None:
    routed = RoutingLLM(select, {"small": ScriptedLLM(["ok"])})
    with pytest.raises(LLMError, match=said) as raised:
        routed.stream(REQUEST)
    assert not raised.value.transient


def failed(model: str, attempt: int = 1, *, heard: bool = False) -> LLMFailed:
    return LLMFailed(1, 0.0, "down", True, attempt=attempt, model=model, heard=heard)


def test_the_next_model_follows_the_one_that_failed() -> None:
    first, second, third = named("m", "m", "m")
    models = FallbackLLM(first, second, third)

    def after(failure: LLMFailed | None) -> str:
        return models.turn(REQUEST, tokens=1, after=failure).model

    assert [after(None), after(failed("harness:m")), after(failed("harness:m #2")), after(failed("harness:m #3"))] == [
        "harness:m", "harness:m #2", "harness:m #3", "harness:m"
    ]  # fmt: skip
    assert after(failed("harness:m #2", heard=True)) == "harness:m #2"
    assert after(failed("somebody:else")) == "harness:m"
    turn = models.turn(REQUEST, tokens=1, after=None)
    assert turn.goes_on(failed("harness:m", 1))
    assert not turn.goes_on(failed("harness:m", 1, heard=True))
    assert not turn.goes_on(failed("harness:m", 3))  # all were asked: now there is a pause


def test_a_model_whose_name_begins_like_another_s_is_not_taken_for_it() -> None:
    models = FallbackLLM(*named("m", "m/large", "n"))
    assert models.turn(REQUEST, tokens=1, after=failed("harness:m/large")).model == "harness:n"
    assert models.turn(REQUEST, tokens=1, after=failed("harness:m")).model == "harness:m/large"


def test_models_made_of_models_made_of_several_know_which_of_theirs_failed() -> None:
    a, b, c = named("a", "b", "c")
    inner = FallbackLLM(a, b)
    routed = RoutingLLM(lambda _: "main", {"main": inner, "other": c})
    first = routed.turn(REQUEST, tokens=1, after=None)
    assert first.model == "main/harness:a"
    assert first.goes_on(failed(first.model))
    assert routed.turn(REQUEST, tokens=1, after=failed(first.model)).model == "main/harness:b"
