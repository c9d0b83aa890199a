"""The judge against a local server that speaks the chat-completions protocol."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.judge import (
    SYSTEM,
    TEMPLATE,
    TEMPLATE_ID,
    JudgeError,
    JudgeResult,
    JudgeRow,
    JudgeSettings,
    judge_rows,
    parse_rating,
)

CANARY = "sk-canary-5f3a"
VARIABLE = "TEST_JUDGE_KEY"
COST = 30


@dataclass(frozen=True)
class Answer:
    """What the server sends; no status means that it stays silent until the client has given up."""

    status: int | None
    body: str
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: str | None, finish: str = "stop", usage: dict[str, int] | None = None) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body: dict[str, Any] = {"choices": [choice]}
    if usage is None:
        usage = {"prompt_tokens": COST - 10, "completion_tokens": 10, "total_tokens": COST}
    return Answer(200, json.dumps({**body, "usage": usage} if usage else body))


def failure(status: int, message: str = "no", code: str = "", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps({"error": {"message": message, "code": code}}), named)


@dataclass
class Server:
    """Answers request number i by `script[i]`, all further ones by `then`, which sees the request."""

    url: str = ""
    script: list[Answer] = field(default_factory=list)
    then: Callable[[dict[str, Any]], Answer] = field(default=lambda body: completion("Good.\nRating: [[7]]"))
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    given_up: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> Answer:
        with self.lock:
            self.paths.append(path)
            self.keys.append(key)
            self.bodies.append(body)
            return self.script.pop(0) if self.script else self.then(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = state.answer(self.path, self.headers["Authorization"], body)
            if answer.status is None:
                state.given_up.wait(60)
                return
            content = answer.body.encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    state.given_up.set()
    http.shutdown()
    http.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "judge" / "ratings.jsonl"


def settings(server: Server, **changes: Any) -> JudgeSettings:
    return replace(JudgeSettings(server.url, "grader", max_requests=100, max_tokens=100_000, workers=1), **changes)


def rows(count: int) -> list[JudgeRow]:
    return [JudgeRow(f"prompt {index}", f"reference {index}", f"prediction {index}") for index in range(count)]


def lines(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cache.read_text().splitlines()]


def by_number(body: dict[str, Any]) -> Answer:
    """Rates "prediction 3" with 4."""
    number = int(body["messages"][-1]["content"].partition("prediction ")[2].split()[0])
    return completion(f"Fine. Rating: [[{number + 1}]]")


def never(seconds: float) -> None:
    raise AssertionError(f"nothing was to be waited for, but {seconds} s were")


def test_the_request_and_the_score(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{CANARY}\n")
    row = JudgeRow("Name {a} colour.", "Red", "Blue")
    result = judge_rows(settings(server, api_key_variable=VARIABLE, max_reply_tokens=77), [row], cache)
    assert result == JudgeResult([7.0], unparsable=0, requests=1, tokens=COST, from_cache=0)
    assert server.paths == ["/v1/chat/completions"] and server.keys == [f"Bearer {CANARY}"]
    [body] = server.bodies
    text = TEMPLATE.replace("{prompt}", row.prompt).replace("{reference}", "Red").replace("{prediction}", "Blue")
    assert body == {
        "model": "grader",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 77,
    }


def test_no_key_is_sent_where_none_is_named(server: Server, cache: Path) -> None:
    judge_rows(settings(server), rows(1), cache)
    assert server.keys == [None]


def test_the_template_belongs_to_its_id() -> None:
    digest = hashlib.sha256(f"{SYSTEM}\n{TEMPLATE}".encode()).hexdigest()[:16]
    assert (TEMPLATE_ID, digest) == ("judge@1", "887d0af11440fbd3"), "other texts need another id"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\nRating: [[7]]", 7.0),
        ("**Rating: [[10]]**\n", 10.0),
        ("Rating: [[ 6.5 ]].", 6.5),
        ("Rating: [[8/10]]", 8.0),
        ("It claims [[10]] for itself. Rating: [[2]]", 2.0),
        ("It claims [[10]] for itself, and then", None),
        ("Rating: 7", None),
        ("Rating: [7]", None),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[-3]]", None),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_only_a_rating_in_the_agreed_form_at_the_end_is_one(reply: str, score: float | None) -> None:
    assert parse_rating(reply) == score


def test_scores_keep_the_order_of_the_rows_whatever_thread_is_first(server: Server, cache: Path) -> None:
    server.then = by_number
    done: list[int] = []
    result = judge_rows(settings(server, workers=4), rows(9), cache, done.append)
    assert result.scores == [float(index + 1) for index in range(9)]
    assert (result.requests, result.tokens, sum(done)) == (9, 9 * COST, 9)
    assert len(lines(cache)) == 9


@pytest.mark.parametrize(
    "answer", [completion("No idea."), completion(None), completion("I think it is worth [[9]]", finish="length")]
)
def test_a_reply_without_a_rating_is_counted_and_not_asked_for_again(server: Server, cache: Path, answer: Answer) -> None:
    server.then = lambda body: answer
    first = judge_rows(settings(server), rows(2), cache)
    assert first == JudgeResult([None, None], unparsable=2, requests=2, tokens=2 * COST, from_cache=0)
    again = judge_rows(settings(server), rows(2), cache)
    assert again == JudgeResult([None, None], unparsable=2, requests=0, tokens=0, from_cache=2)
    # With more room for the reply it may hold one.
    server.then = by_number
    assert judge_rows(settings(server, max_reply_tokens=1024), rows(2), cache).scores == [1.0, 2.0]
    assert judge_rows(settings(server), rows(2), cache).scores == [1.0, 2.0]


def test_what_is_cached_needs_neither_endpoint_nor_key(server: Server, cache: Path) -> None:
    server.then = by_number
    judge_rows(settings(server), rows(3), cache)
    offline = settings(server, base_url="http://127.0.0.1:9/v1", api_key_variable="TEST_JUDGE_KEY_THAT_IS_NOT_SET")
    done: list[int] = []
    assert judge_rows(offline, rows(3), cache, done.append, never) == JudgeResult([1.0, 2.0, 3.0], 0, 0, 0, from_cache=3)
    assert done == [3]


@pytest.mark.parametrize("changed", ["prompt", "reference", "prediction", "model"])
def test_a_score_belongs_to_all_of_its_content(server: Server, cache: Path, changed: str) -> None:
    row = JudgeRow("a", "b", "c")
    judge_rows(settings(server), [row], cache)
    if changed == "model":
        judge_rows(settings(server, model="other"), [row], cache)
    else:
        judge_rows(settings(server), [replace(row, **{changed: "d"})], cache)
    assert len(server.bodies) == 2
    judge_rows(settings(server), [row], cache)
    assert len(server.bodies) == 2


def test_another_template_asks_again(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_rows(settings(server), rows(1), cache)
    monkeypatch.setattr("pipeline.evaluation.judge.TEMPLATE_ID", "judge@2")
    judge_rows(settings(server), rows(1), cache)
    assert [line["template"] for line in lines(cache)] == ["judge@1", "judge@2"]


def test_equal_rows_share_one_request(server: Server, cache: Path) -> None:
    done: list[int] = []
    result = judge_rows(settings(server), [*rows(2), *rows(2), *rows(1)], cache, done.append)
    assert result == JudgeResult([7.0] * 5, unparsable=0, requests=2, tokens=2 * COST, from_cache=3)
    assert sum(done) == 5


def test_a_torn_last_line_costs_one_request_and_spoils_no_other(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.then = by_number
    judge_rows(settings(server), rows(3), cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-20])
    result = judge_rows(settings(server), rows(4), cache)
    assert result == JudgeResult([1.0, 2.0, 3.0, 4.0], unparsable=0, requests=2, tokens=2 * COST, from_cache=2)
    assert "skipped 1 of 3 lines" in caplog.text
    assert cache.read_bytes().startswith(whole[:-20] + b"\n"), "nothing that was written is removed"
    assert judge_rows(settings(server), rows(4), cache).from_cache == 4


@pytest.mark.parametrize("change", [{"score": 50}, {"score": "8"}, {"tokens": None}, {"key": 3}, {"surplus": 1}])
def test_a_line_that_is_no_rating_is_not_used(server: Server, cache: Path, change: dict[str, Any]) -> None:
    judge_rows(settings(server), rows(1), cache)
    cache.write_text(json.dumps({**lines(cache)[0], **change}) + "\n[]\n")
    assert judge_rows(settings(server), rows(1), cache).scores == [7.0]
    assert len(server.bodies) == 2


def test_an_unreadable_cache_is_named(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.raises(PipelineError, match=r"ratings\.jsonl: cannot be read or written"):
        judge_rows(settings(server), rows(1), cache)


def test_retry_after_is_honoured(server: Server, cache: Path) -> None:
    waits: list[float] = []
    server.script = [failure(429, Retry_After="7"), failure(429, Retry_After="0"), failure(503, Retry_After="2.5")]
    result = judge_rows(settings(server), rows(1), cache, sleep=waits.append)
    assert waits == [7.0, 0.0, 2.5]
    assert (result.scores, result.requests, lines(cache)[0]["requests"]) == ([7.0], 4, 4)


@pytest.mark.parametrize(("ahead", "shortest", "longest"), [(100, 90, 100), (-100, 0, 0)])
def test_retry_after_may_be_a_date(server: Server, cache: Path, ahead: int, shortest: float, longest: float) -> None:
    waits: list[float] = []
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
    server.script = [failure(429, Retry_After=date)]
    judge_rows(settings(server), rows(1), cache, sleep=waits.append)
    assert len(waits) == 1 and shortest <= waits[0] <= longest


def test_a_wait_of_an_hour_is_left_to_the_user(server: Server, cache: Path) -> None:
    server.script = [failure(429, Retry_After="3600")]
    with pytest.raises(JudgeError, match=r"asks to wait 3600 s \(status 429\)"):
        judge_rows(settings(server), rows(1), cache, sleep=never)


def test_waits_grow_and_end(server: Server, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    server.then = lambda body: failure(500, "overloaded", Retry_After="soon")
    with pytest.raises(JudgeError, match="failed 9 times in a row, at last with 500: overloaded") as caught:
        judge_rows(settings(server, max_retries=8), rows(1), cache, sleep=waits.append)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert caught.value.exit_code == 1 and len(server.bodies) == 9
    assert "500: overloaded; try 2 of 9 in 1 s" in caplog.text


def test_a_timeout_is_retried(server: Server, cache: Path) -> None:
    waits: list[float] = []
    server.script = [Answer(None, "")]
    result = judge_rows(settings(server, timeout_seconds=0.2), rows(1), cache, sleep=waits.append)
    assert (result.scores, result.requests, waits) == ([7.0], 2, [1.0])


def test_an_endpoint_that_is_not_there_is_named(server: Server, cache: Path) -> None:
    nowhere = settings(server, base_url="http://127.0.0.1:9/v1", max_retries=1)
    with pytest.raises(JudgeError, match=r"http://127.0.0.1:9/v1 failed 2 times in a row, at last with ConnectError"):
        judge_rows(nowhere, rows(1), cache, sleep=lambda seconds: None)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            failure(401, "bad key"),
            ConfigError,
            r"does not accept the key \(401: bad key\); the environment variable TEST_JUDGE_KEY",
        ),
        (failure(403, "not yours"), ConfigError, r"does not allow this key to use grader \(403: not yours\)"),
        (
            failure(404, "no model"),
            ConfigError,
            r"knows no model grader .*\(404: no model\); check judge.model, and judge.base_url",
        ),
        (failure(400, "too long"), JudgeError, r"refuses the request \(400: too long\)"),
        (failure(429, "pay", code="insufficient_quota"), JudgeError, r"quota is used up \(429: pay\)"),
        (Answer(404, "<h1>Not Found</h1>"), ConfigError, "404: <h1>Not Found</h1>"),
        (Answer(307, "", {"Location": "/elsewhere"}), JudgeError, r"refuses the request \(307: Temporary Redirect\)"),
        (
            Answer(200, "<html>hello</html>"),
            JudgeError,
            r"something that is not JSON: '<html>hello</html>'; check that judge.base_url",
        ),
        (Answer(200, "[]"), JudgeError, r"no chat completion: \[\]"),
        (Answer(200, '{"choices": []}'), JudgeError, "no chat completion"),
        (Answer(200, '{"choices": [{"message": {"content": [1]}}]}'), JudgeError, "no chat completion"),
        (failure(200, "model is loading"), JudgeError, "no chat completion: .*model is loading"),
    ],
)
def test_what_another_try_would_not_change_ends_at_once(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, kind: type[PipelineError], message: str
) -> None:
    monkeypatch.setenv(VARIABLE, CANARY)
    server.script = [completion("Rating: [[3]]"), answer]
    with pytest.raises(kind, match=message):
        judge_rows(settings(server, api_key_variable=VARIABLE), rows(5), cache, sleep=never)
    assert len(server.bodies) == 2
    assert [line["score"] for line in lines(cache)] == [3.0]


def test_a_refused_request_without_a_key_says_how_to_name_one(server: Server, cache: Path) -> None:
    server.script = [failure(401)]
    with pytest.raises(ConfigError, match="set judge.api_key_variable to the name"):
        judge_rows(settings(server), rows(1), cache)


def test_the_request_budget_holds_over_retries_and_runs(server: Server, cache: Path) -> None:
    server.script = [completion("Rating: [[1]]"), failure(500), completion("Rating: [[2]]")]
    with pytest.raises(JudgeError, match=rf"judge.max_requests is 4 and used up: 4 requests and {3 * COST} tokens") as caught:
        judge_rows(settings(server, max_requests=4), rows(5), cache, sleep=lambda seconds: None)
    assert str(cache) in str(caught.value) and "raise judge.max_requests" in str(caught.value)
    assert len(server.bodies) == 4 and [line["score"] for line in lines(cache)] == [1.0, 2.0, 7.0]
    with pytest.raises(JudgeError, match="judge.max_requests is 4 and used up: 4 requests"):
        judge_rows(settings(server, max_requests=4), rows(5), cache)
    assert len(server.bodies) == 4, "running again does not spend it again"
    result = judge_rows(settings(server, max_requests=6), rows(5), cache)
    assert result == JudgeResult([1.0, 2.0, 7.0, 7.0, 7.0], unparsable=0, requests=2, tokens=2 * COST, from_cache=3)


def test_the_token_budget_counts_the_reported_usage(server: Server, cache: Path) -> None:
    server.then = lambda body: completion("Rating: [[4]]", usage={"prompt_tokens": 60, "completion_tokens": 40})
    with pytest.raises(
        JudgeError, match=r"judge.max_tokens is 250 and used up: 3 requests and 300 tokens .*raise judge.max_tokens"
    ):
        judge_rows(settings(server, max_tokens=250), rows(5), cache)
    assert len(server.bodies) == 3 == len(lines(cache))
    assert judge_rows(settings(server, max_tokens=500), rows(5), cache).tokens == 200


def test_several_threads_never_exceed_the_request_budget(server: Server, cache: Path) -> None:
    with pytest.raises(JudgeError, match="judge.max_requests is 5 and used up: 5 requests"):
        judge_rows(settings(server, max_requests=5, workers=8), rows(40), cache)
    assert len(server.bodies) == 5 == len(lines(cache)), "replies under way at the end are kept"


def test_a_budget_that_is_just_enough_is_enough(server: Server, cache: Path) -> None:
    assert judge_rows(settings(server, max_requests=3, max_tokens=3 * COST), rows(3), cache).scores == [7.0] * 3


def test_a_token_budget_needs_an_endpoint_that_reports_usage(server: Server, cache: Path) -> None:
    server.then = lambda body: completion("Rating: [[4]]", usage={})
    with pytest.raises(ConfigError, match="reports no token usage.* set judge.max_tokens to null"):
        judge_rows(settings(server), rows(3), cache)
    assert len(lines(cache)) == 1, "what was paid for is kept"
    assert judge_rows(settings(server, max_tokens=None), rows(3), cache) == JudgeResult([4.0] * 3, 0, 2, 0, from_cache=1)


@pytest.mark.parametrize(("value", "message"), [(None, "is not set or empty"), (" \n", "is not set"), ("a b", "holds spaces")])
def test_a_missing_or_malformed_key_is_told_before_anything_is_sent(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=f"environment variable {VARIABLE} {message}"):
        judge_rows(settings(server, api_key_variable=VARIABLE), rows(1), cache)
    assert server.bodies == []


@pytest.mark.parametrize(
    "answer",
    [
        failure(401, f"Incorrect API key provided: {CANARY}"),
        failure(500, f"internal error for {CANARY}"),
        failure(400, f"{'x' * 290}{CANARY}"),
        Answer(200, f"not JSON, and {CANARY}"),
        Answer(200, json.dumps({"debug": CANARY})),
        completion(f"I was called with {CANARY}. Rating: [[5]]"),
        completion("Rating: [[5]]"),
    ],
)
def test_the_key_is_nowhere_but_in_the_request(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Answer
) -> None:
    monkeypatch.setenv(VARIABLE, CANARY)
    caplog.set_level(logging.DEBUG)
    server.then = lambda body: answer
    chosen = settings(server, api_key_variable=VARIABLE, max_retries=1)
    said = repr(chosen)
    try:
        said += repr(judge_rows(chosen, rows(1), cache, sleep=lambda seconds: None))
    except PipelineError as error:
        said += f"{error}{error.__cause__!r}{error.__context__ if not error.__suppress_context__ else ''}"
    assert server.keys[0] == f"Bearer {CANARY}"
    written = "".join(file.read_text() for file in cache.parent.rglob("*") if file.is_file())
    # A start of the key that a cut left over would be as bad.
    assert all(CANARY[:9] not in text for text in (said, written, caplog.text))


def test_a_malformed_key_is_not_shown(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{CANARY}\n{CANARY}")
    with pytest.raises(ConfigError) as caught:
        judge_rows(settings(server, api_key_variable=VARIABLE), rows(1), cache)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url is 'localhost:8000/v1'; give an address like https://"),
        ({"base_url": "https://"}, "base_url is 'https://'"),
        ({"base_url": "https://host/v1?key=1"}, "base_url is"),
        ({"base_url": "http://host:port/v1"}, "base_url is not an address"),
        ({"max_requests": 0}, "max_requests is 0; it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"workers": 0}, "workers is 0"),
        ({"max_retries": -1}, "max_retries is -1; it must be at least 0"),
        ({"max_reply_tokens": 0}, "max_reply_tokens is 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0; it must be above 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        replace(JudgeSettings("http://host/v1", "m", 1, 1), **changes)


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="base_url holds a user name or password") as caught:
        JudgeSettings(f"https://me:{CANARY}@host/v1", "m", 1, 1)
    assert CANARY not in str(caught.value)


def test_two_calls_on_one_cache_file_ask_for_nothing_twice(server: Server, cache: Path) -> None:
    results: list[JudgeResult] = []

    def call() -> None:
        results.append(judge_rows(settings(server, workers=2, max_requests=6), rows(6), cache))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.from_cache for result in results) == [0, 6]
    assert len(server.bodies) == 6 == len(lines(cache))


def test_no_rows_ask_nothing(server: Server, cache: Path) -> None:
    assert judge_rows(settings(server), [], cache) == JudgeResult([], 0, 0, 0, 0)
    assert server.bodies == []
