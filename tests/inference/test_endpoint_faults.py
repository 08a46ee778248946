"""The endpoint client when things go wrong: throttling, errors, hangs, garbage, kills, budgets."""

import email.utils
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from stub_server import React, Request, StubServer, status

from phiforge.inference.endpoint import (
    Answer,
    Budget,
    BudgetExceeded,
    Call,
    Endpoint,
    Failure,
    Patience,
    Prices,
    TooManyFailures,
)
from phiforge.inference.endpoint.pace import Pace, retry_after
from phiforge.inference.interface import Sampling

QUICK = Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02)


@pytest.fixture
def server():
    with StubServer() as found:
        yield found


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache.sqlite"


def opened(server: StubServer, **settings) -> Endpoint:
    return Endpoint(server.url, "m", **{"patience": QUICK, "timeout_seconds": 5.0, **settings})


def one(endpoint: Endpoint, prompt: str = "a"):
    ((outcome,),) = endpoint.answer([Call(prompt=prompt)])
    return outcome


class Sequenced:
    """Reacts to each prompt's first requests in the given way, then answers."""

    def __init__(self, *reactions: React):
        self.reactions, self.seen = reactions, Counter()

    def __call__(self, request: Request) -> React:
        number = self.seen[request.prompt]
        self.seen[request.prompt] += 1
        return self.reactions[number] if number < len(self.reactions) else React()


# ------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_transient_statuses_are_tried_again(server, code):
    server.script = Sequenced(status(code), status(code))
    with opened(server) as endpoint:
        assert isinstance(one(endpoint), Answer)
        assert len(server.requests) == 3
        assert endpoint.usage["teacher"].spent.calls == 1


@pytest.mark.parametrize("code", [302, 400, 401, 403, 404, 413, 422])
def test_other_statuses_are_not(server, code):
    server.script = lambda request: status(code, "because")
    with opened(server) as endpoint:
        outcome = one(endpoint)
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.status, outcome.attempts) == ("refused", code, 1)
    assert outcome.message.startswith(f"HTTP {code}: because")
    assert len(server.requests) == 1


def test_a_used_up_quota_is_not_waited_for(server):
    body = b'{"error": {"message": "pay", "code": "insufficient_quota"}}'
    server.script = lambda request: React("raw", status=429, body=body)
    with opened(server) as endpoint:
        assert one(endpoint).kind == "refused"
    assert len(server.requests) == 1


def test_errors_end_after_some_attempts(server, cache):
    server.script = lambda request: status(500, "down")
    with opened(server, cache=cache) as endpoint:
        outcome = one(endpoint)
        assert (outcome.kind, outcome.attempts) == ("server", 4)
        assert "HTTP 500: down" in outcome.message
        assert endpoint.failures == {"server": 1}
        server.script = lambda request: React()
        assert isinstance(one(endpoint), Answer), "failures are not replayed"
        assert endpoint.failures == {}


@pytest.mark.parametrize(
    ("reaction", "kind", "part"),
    [
        (React("raw", body=b"<html>busy</html>"), "garbage", "no JSON; it begins b'<html>busy"),
        (React("raw", body=b'{"choices": []}'), "garbage", "no choices"),
        (React("raw", body=b'{"object": "x"}'), "garbage", "JSON without 'choices'"),
        (React("raw", body=b'{"choices": [{"text": 3}]}'), "garbage", "without text"),
        (React("raw", body=b"[" * 100_000), "garbage", "it begins b'[[["),
        (React("truncate"), "connection", "the connection broke"),
        (React("disconnect"), "connection", "the connection broke"),
    ],
)
def test_garbage_and_broken_connections(server, reaction, kind, part):
    server.script = Sequenced(reaction, reaction)
    with opened(server) as endpoint:
        assert isinstance(one(endpoint), Answer)
        lost = endpoint.usage["teacher"].lost
        # The server may have charged for what we could not read.
        assert lost.calls == 2
        assert lost.completion_tokens == 2 * 256
        server.script = lambda request: reaction
        outcome = one(endpoint, "again")
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.attempts) == (kind, 3 if kind == "garbage" else 4)
    assert part in outcome.message


def test_a_hanging_server_times_out(server):
    server.script = Sequenced(React("hang"))
    with opened(server, timeout_seconds=0.2) as endpoint:
        assert isinstance(one(endpoint), Answer)
        server.script = lambda request: React("hang")
        outcome = one(endpoint, "b")
    assert (outcome.kind, outcome.attempts) == ("timeout", 4)
    assert "no whole answer within 0.2 s" in outcome.message


def test_no_server_at_all(server):
    with Endpoint("http://127.0.0.1:9/v1", "m", patience=QUICK) as endpoint:
        outcome = one(endpoint)
        assert outcome.kind == "connection"
        assert "http://127.0.0.1:9/v1: no connection" in outcome.message
        assert "teacher" not in endpoint.usage, "nothing was sent, so nothing is lost"


# ------------------------------------------------------------------------------------- throttling


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(server, form):
    wait = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.script = Sequenced(status(429, Retry_After=wait))
    with opened(server) as endpoint:
        begin = time.monotonic()
        assert isinstance(one(endpoint), Answer)
    assert 0.9 < time.monotonic() - begin < 4


def test_a_long_retry_after_is_not_waited_for(server):
    server.script = lambda request: status(429, "tomorrow", Retry_After="86400")
    with opened(server) as endpoint:
        outcome = one(endpoint)
    assert outcome.kind == "rate"
    assert "tomorrow (it asks to wait 86400 s)" in outcome.message
    assert len(server.requests) == 1


def test_retry_after_forms():
    assert retry_after(None) is None
    assert retry_after("2.5") == 2.5
    assert retry_after("-3") == 0.0
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now=1445412470.0) == 10.0


def test_waits_have_full_jitter_and_an_explicit_generator():
    patience = Patience(first_wait_seconds=1.0, longest_wait_seconds=8.0)
    draws = [[patience.wait(random.Random(seed), k) for seed in range(200)] for k in (1, 3, 50)]
    for found, bound in zip(draws, (1.0, 4.0, 8.0), strict=True):
        assert 0.0 <= min(found) < 0.1 * bound
        assert 0.9 * bound < max(found) <= bound
    assert draws[0] == [patience.wait(random.Random(seed), 1) for seed in range(200)]


def test_pace_cuts_once_per_round_and_grows_with_success():
    pace = Pace(64)
    for _ in range(64):  # one round of calls, all refused
        pace.throttled(0, None)
    assert pace.limit == 48
    pace.throttled(1, None)
    assert pace.limit == 36
    for _ in range(12 * 16):
        pace.succeeded()
    assert pace.limit == 48
    for _ in range(1000):
        pace.succeeded()
    assert pace.limit == 64
    for cut in range(2, 60):
        pace.throttled(cut, None)
    assert pace.limit == 1
    pace.succeeded()
    assert pace.limit == 2


def test_a_server_that_takes_four_at_a_time_gets_everything_answered(server):
    def script(request: Request) -> React:
        return status(429) if server.in_flight > 4 else React(delay=0.005)

    server.script = script
    with opened(server, concurrency=32) as endpoint:
        found = endpoint.generate([f"p{i}" for i in range(150)])
    assert all(row[0].text.startswith("echo: p") for row in found)
    assert len(server.answered) == 150
    assert len(server.requests) < 150 * 4


# ---------------------------------------------------------------------------- stopping the job


def test_a_job_that_mostly_fails_is_stopped_and_says_why(server, cache):
    server.script = lambda request: (
        React() if request.prompt in ("p0", "p1") else status(400, "no such model")
    )
    with opened(server, cache=cache, concurrency=4) as endpoint:
        with pytest.raises(TooManyFailures) as stopped:
            endpoint.answer([Call(prompt=f"p{i}") for i in range(500)])
        assert 20 <= len(server.requests) <= 30
        assert "calls failed (18 refused)" in str(stopped.value)
        assert "HTTP 400: no such model" in str(stopped.value)
        results = stopped.value.results
        assert isinstance(results[0][0], Answer)
        assert isinstance(results[5][0], Failure)
        assert results[400][0] is None


def test_cached_answers_speak_for_the_server(server, cache):
    calls = [Call(prompt=f"p{i}") for i in range(60)]
    with opened(server, cache=cache) as endpoint:
        endpoint.answer(calls[:35])
        server.script = lambda request: status(400)
        found = endpoint.answer(calls)
    assert sum(isinstance(row[0], Failure) for row in found) == 25


def test_a_server_that_dies_in_the_middle_stops_the_job(server):
    server.script = lambda request: React() if request.number < 100 else status(500, "gone")
    with opened(server, concurrency=8) as endpoint, pytest.raises(TooManyFailures, match="gone"):
        endpoint.answer([Call(prompt=f"p{i}") for i in range(400)])
    assert len(server.requests) < 300


# --------------------------------------------------------------------------------------- budget


def tokens(limit: int) -> Sampling:
    return Sampling(max_tokens=limit)


@pytest.mark.parametrize("concurrency", [1, 16])
def test_calls_never_pass_the_budget(server, cache, concurrency):
    server.script = lambda request: React(delay=0.002)
    calls = [Call(prompt=f"p{i}") for i in range(50)]
    settings = {"cache": cache, "concurrency": concurrency}
    with opened(server, budget=Budget(max_calls=20), **settings) as endpoint:
        with pytest.raises(BudgetExceeded, match=r"max_calls: .* 20 of 20 are spent") as stopped:
            endpoint.answer(calls)
        assert len(server.requests) == 20
        answered = [row[0] for row in stopped.value.results if row[0] is not None]
        assert len(answered) == 20
        with pytest.raises(BudgetExceeded):
            endpoint.answer(calls)
    assert len(server.requests) == 20
    with opened(server, budget=Budget(max_calls=50), **settings) as endpoint:
        assert all(isinstance(row[0], Answer) for row in endpoint.answer(calls))
    assert len(server.requests) == 50, "raised, it goes on without paying again"


def test_token_and_money_budgets_hold_the_worst_case(server, cache):
    """The server uses 15 tokens a call; each may need 1 + 85 + 14: what is in flight counts."""

    server.script = lambda request: React(delay=0.01)
    calls = [Call(prompt=[i], sampling=tokens(98)) for i in range(50)]
    with opened(server, budget=Budget(max_tokens=450), cache=cache) as endpoint:
        with pytest.raises(BudgetExceeded, match="max_tokens"):
            endpoint.answer(calls)
        spent = endpoint.usage["teacher"].spent
    # One at a time near the limit: the last call went out with 100 tokens left.
    assert spent.tokens == 15 * len(server.answered)
    assert 350 < spent.tokens <= 450
    assert server.most_in_flight <= 4
    prices = Prices(prompt=0.0, completion=1000.0)
    with opened(server, budget=Budget(max_usd=0.2), prices=prices, role="usd") as endpoint:
        with pytest.raises(BudgetExceeded, match=r"max_usd: .* may need \$0.098"):
            endpoint.answer(calls)
        assert 0.1 < endpoint.usage["usd"].spent.usd <= 0.2


def test_unseen_outcomes_count_against_the_budget(server):
    server.script = Sequenced(React("disconnect"), React("disconnect"))
    with opened(server, budget=Budget(max_calls=2)) as endpoint:
        with pytest.raises(BudgetExceeded, match="max_calls"):
            one(endpoint)
        assert endpoint.usage["teacher"].lost.calls == 2
    server.script = Sequenced(status(429), status(500))
    with opened(server, budget=Budget(max_calls=1)) as endpoint:
        assert isinstance(one(endpoint, "b"), Answer), "refused attempts cost nothing"


def test_a_money_budget_needs_prices(server):
    with pytest.raises(ValueError, match="max_usd is set but prices is not"):
        opened(server, budget=Budget(max_usd=1.0))
    with pytest.raises(ValueError, match="max_calls is -1"):
        Budget(max_calls=-1)


def test_roles_have_ledgers_of_their_own(server, cache):
    for role, prompt in (("teacher", "a"), ("judge", "b")):
        with opened(server, cache=cache, role=role, budget=Budget(max_calls=1)) as endpoint:
            one(endpoint, prompt)
            with pytest.raises(BudgetExceeded, match=role):
                one(endpoint, "other")
            usage = endpoint.usage
    assert {name: used.spent.calls for name, used in usage.items()} == {"teacher": 1, "judge": 1}


# ----------------------------------------------------------------- processes, kills, interruptions

CLIENT = """
import sys
from pathlib import Path
from phiforge.inference.endpoint import Budget, BudgetExceeded, Call, Endpoint
url, cache, first, last, limit = sys.argv[1:]
budget = Budget(max_calls=int(limit)) if limit != "none" else None
with Endpoint(url, "m", cache=Path(cache), concurrency=8, budget=budget) as endpoint:
    calls = [Call(prompt=f"p{i}") for i in range(int(first), int(last))]
    print("ready", flush=True)
    try:
        found = endpoint.answer(calls)
        print("answered", sum(row[0].text.startswith("echo") for row in found))
    except BudgetExceeded:
        print("exceeded")
"""


def start_client(server, cache, first=0, last=200, limit="none") -> subprocess.Popen:
    arguments = [server.url, str(cache), str(first), str(last), str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def committed(cache: Path) -> set[bytes]:
    with sqlite3.connect(cache) as connection:
        found = {row[0] for row in connection.execute("SELECT key FROM answers")}
    connection.close()
    return found


def test_kill_9_loses_only_what_was_in_flight(server, cache):
    server.script = lambda request: React(delay=0.05)
    client = start_client(server, cache)
    wait_for(lambda: len(server.answered) >= 60)
    client.kill()
    client.wait()
    kept = len(committed(cache))
    paid = len(server.answered)
    # In flight (8), and what had arrived in the last 20 ms: here at most another round.
    assert paid - 24 <= kept <= paid
    asked_before = Counter(request.prompt for request in server.requests)
    again = start_client(server, cache)
    out, _ = again.communicate(timeout=60)
    assert "answered 200" in out
    assert len(committed(cache)) == 200
    asked = Counter(request.prompt for request in server.requests)
    twice = [prompt for prompt, number in asked.items() if number > 1]
    assert sum(asked.values()) == sum(asked_before.values()) + 200 - kept
    assert len(twice) == sum(asked_before.values()) - kept, "no committed answer is paid again"


def test_a_killed_clients_calls_count_against_the_budget(server, cache):
    server.script = lambda request: React("hang")
    client = start_client(server, cache, limit=8)
    wait_for(lambda: len(server.requests) == 8)
    client.kill()
    client.wait()
    server.script = lambda request: React()
    with opened(server, cache=cache, budget=Budget(max_calls=8)) as endpoint:
        assert endpoint.usage["teacher"].lost.calls == 8
        with pytest.raises(BudgetExceeded, match="8 of 8 are spent"):
            one(endpoint)


def test_two_processes_share_cache_and_budget(server, cache):
    server.script = lambda request: React(delay=0.01)
    clients = [start_client(server, cache, first, first + 60, 80) for first in (0, 60)]
    outs = [client.communicate(timeout=60)[0] for client in clients]
    assert "exceeded" in outs[0] + outs[1]
    assert len(server.requests) == 80
    assert len(committed(cache)) == 80
    with opened(server, cache=cache) as endpoint:
        assert endpoint.usage["teacher"].spent.calls == 80
        endpoint.answer([Call(prompt=f"p{i}") for i in range(120)])
    assert len(server.requests) == 120


def test_ctrl_c_keeps_what_has_arrived(server, cache):
    server.script = lambda request: React(delay=0.01 if request.number < 20 else 30.0)
    with opened(server, cache=cache, concurrency=4, timeout_seconds=60.0) as endpoint:
        number = threading.main_thread().ident
        assert number is not None

        def interrupt() -> None:
            wait_for(lambda: len(server.requests) >= 23)
            signal.pthread_kill(number, signal.SIGINT)

        threading.Thread(target=interrupt).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            endpoint.answer([Call(prompt=f"p{i}") for i in range(100)])
        assert time.monotonic() - begin < 20
        assert len(committed(cache)) == 20
        assert endpoint.usage["teacher"].lost.calls >= 3
        server.script = lambda request: React()
        endpoint.answer([Call(prompt=f"p{i}") for i in range(100)])
    assert len(server.answered) == 100


def test_an_error_of_the_callers_progress_ends_the_job(server, cache):
    server.script = lambda request: React(delay=0.01)

    def broken(count: int) -> None:
        raise RuntimeError("the caller's")

    with opened(server, cache=cache, concurrency=2) as endpoint:
        with pytest.raises(RuntimeError, match="the caller's"):
            endpoint.generate([f"p{i}" for i in range(200)], progress=broken)
        assert 0 < len(committed(cache)) < 200


def test_a_forked_child_must_open_its_own(server):
    endpoint = opened(server)
    endpoint.generate(["a"])
    child = os.fork()
    if child == 0:
        try:
            endpoint.generate(["b"])
        except ValueError as error:
            os._exit(7 if "opened in another process" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    endpoint.close()


def test_a_file_that_is_no_cache_is_refused(server, cache):
    cache.write_text("not a database, and longer than a header would be " * 10)
    with pytest.raises(ValueError, match="not a replay cache of this version"):
        opened(server, cache=cache)
    other = cache.with_name("other.sqlite")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine(x)")
    connection.close()
    with pytest.raises(ValueError, match="give another path"):
        opened(server, cache=other)


def test_a_full_disk_is_said_and_nothing_arrived_is_dropped(server, cache):
    with opened(server, cache=cache) as endpoint:
        one(endpoint, "before")
        connection = endpoint._store._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")
        server.script = lambda request: React(text="long " * 2000)
        with pytest.raises(OSError, match=r"cache\.sqlite: database or disk is full; free"):
            endpoint.answer([Call(prompt=f"p{i}") for i in range(20)])
        connection.execute("PRAGMA max_page_count=100000")
        number = len(server.requests)
        endpoint.answer([Call(prompt=f"p{i}") for i in range(20)])
        assert len(server.requests) == number == 21
    assert len(committed(cache)) == 21
