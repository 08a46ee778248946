"""The API under way: many at once, clients that leave, a full queue, failures, the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from served import CONTEXT, NAME, SlowEngine, make_model, make_tokenizer, running

from phiforge.inference.engine import Engine
from phiforge.model.huggingface import save

POISON = 77  # a token whose embedding is damaged


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def long(model, tokenizer):
    """A prompt whose first six samples under seed 0 are long."""
    engine = Engine(model, tokenizer)
    for token in range(5, 60):
        found = engine.generate([[token, 6, 7]], n=6, max_tokens=100)[0]
        if all(len(completion.token_ids) > 60 for completion in found):
            return [token, 6, 7]
    raise AssertionError("no prompt has long answers alone")


@pytest.fixture
def slow(model, tokenizer):
    return SlowEngine(model, tokenizer, rows=4)


def body(**fields):
    return {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 100, "seed": 0} | fields


def frames(url, fields):
    """The events of a stream, as they are on the wire."""
    with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield line.removeprefix("data: ")


def test_sixteen_streams_at_once_share_the_batch_and_get_their_own_answers(model, tokenizer):
    engine = Engine(model, tokenizer, rows=16)
    prompts = [[5 + i, 6, 7] for i in range(16)]
    alone = engine.generate(prompts, max_tokens=40, seed=3)
    with running(engine) as served, ThreadPoolExecutor(16) as pool:

        def stream(prompt):
            *events, last = frames(
                served.url, body(prompt=prompt, seed=3, max_tokens=40, stream=True)
            )
            assert last == "[DONE]"
            return "".join(json.loads(event)["choices"][0]["text"] for event in events)

        assert list(pool.map(stream, prompts)) == [each[0].text for each in alone]
        served.wait_idle()


def test_concurrent_calls_take_the_steps_of_one(slow):
    slow.num_steps, step = 0, slow.step

    def counted():
        slow.num_steps += 1
        return step()

    slow.step = counted
    with running(slow) as served, ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda i: served.post(
                    "/v1/completions", body(prompt=[5 + i], max_tokens=30)
                ).json(),
                range(4),
            )
        )
    longest = max(answer["usage"]["completion_tokens"] for answer in answers)
    total = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert longest <= slow.num_steps < max(total, longest + 15)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(slow, long, stream):
    with running(slow) as served:
        before = slow.num_generated_tokens
        if stream:
            events = frames(served.url, body(prompt=long, n=2, stream=True))
            for _ in range(4):
                next(events)
            events.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json=body(prompt=long, n=2), timeout=0.2)
        served.wait_idle()
        drawn = slow.num_generated_tokens - before
        assert drawn < 2 * 50, "two of 100 tokens were asked for"
        time.sleep(5 * slow.seconds)
        assert slow.num_generated_tokens - before == drawn, "nothing goes on"


def test_the_openai_package_may_close_a_stream_early(slow, long):
    with running(slow) as served:
        before = slow.num_generated_tokens
        with served.client.completions.create(**body(prompt=long), stream=True) as stream:
            for _ in range(3):
                next(stream)
        served.wait_idle()
        assert slow.num_generated_tokens - before < 50


def test_a_full_queue_says_when_to_come_back(slow, long):
    with running(slow, max_queue=2) as served:
        events = frames(served.url, body(prompt=long, n=6, stream=True))
        next(events)  # four rows draw, two samples wait
        answer = served.post("/v1/completions", body())
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert error["type"] == "rate_limit_error"
        assert "6 samples are running or waiting" in error["message"]
        with pytest.raises(openai.RateLimitError):
            served.client.completions.create(**body())
        assert httpx.get(f"{served.url}/health").status_code == 200
        events.close()
        served.wait_idle()
        assert served.post("/v1/completions", body(max_tokens=1)).status_code == 200


def test_a_damaged_answer_fails_alone(tokenizer):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.embedding.weight[POISON] = float("nan")
    expected = Engine(model, tokenizer).generate([[5, 6, 7]], max_tokens=40)[0][0].text
    engine = SlowEngine(model, tokenizer, rows=4)
    with running(engine) as served, ThreadPoolExecutor(2) as pool:
        healthy = pool.submit(served.post, "/v1/completions", body(max_tokens=40))
        time.sleep(0.1)
        for _ in range(2):
            answer = served.post("/v1/completions", body(prompt=[5, POISON, 7]))
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
            assert "NaN" in answer.json()["error"]["message"]
        with pytest.raises(openai.InternalServerError):
            served.client.completions.create(**body(prompt=[5, POISON]))
        *_, last = frames(served.url, body(prompt=[5, POISON, 7], stream=True))
        assert json.loads(last)["error"]["code"] == "engine_failed"
        scored = served.post(
            "/v1/completions", body(prompt=[5, POISON, 7], max_tokens=0, echo=True, logprobs=0)
        )
        assert scored.status_code == 500
        assert healthy.result().json()["choices"][0]["text"] == expected
        again = served.post("/v1/completions", body(max_tokens=40)).json()
        assert again["choices"][0]["text"] == expected
        served.wait_idle()


def test_an_engine_whose_step_breaks_fails_the_running_calls_and_goes_on(slow):
    with running(slow) as served:
        step, broken = slow.step, [True]

        def once():
            if broken:
                broken.clear()
                raise MemoryError("no more")
            return step()

        slow.step = once
        answer = served.post("/v1/completions", body())
        assert answer.status_code == 500
        assert "no more" in answer.json()["error"]["message"]
        assert served.post("/v1/completions", body(max_tokens=2)).status_code == 200
        assert served.api.loop.num_open == 0


def test_the_end_lets_running_answers_finish_and_takes_no_more(slow, long):
    with running(slow, drain_seconds=30) as served, httpx.Client() as kept:
        assert kept.get(f"{served.url}/ready").status_code == 200
        events = frames(served.url, body(prompt=long, max_tokens=30, stream=True))
        next(events)
        served.stop()
        *_, last = events
        assert last == "[DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


def test_after_the_deadline_the_last_frame_is_an_error(slow, long):
    with running(slow, drain_seconds=0.1) as served:
        events = frames(served.url, body(prompt=long, stream=True))
        next(events)
        served.stop()
        *_, last = events
        error = json.loads(last)["error"]
        assert error["code"] == "shutting_down"
        assert error["type"] == "server_error"


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("runs") / "mine-s0"
    save(model, tokenizer, folder / "sft" / "model")
    return folder


def test_the_command_serves_a_run_until_it_is_told_to_stop(run_folder):
    command = [sys.executable, "-m", "phiforge", "serve", str(run_folder), "--port", "0", "--json"]
    command += ["--threads", "1", "--drain-seconds", "0.2", "--api-key-env", "TEST_KEYS"]
    environment = os.environ | {"TEST_KEYS": "k1 k2", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        assert told["model"] == "mine-s0-sft"
        assert told["context"] == CONTEXT
        assert told["pid"] == process.pid
        assert told["runner"]
        client = openai.OpenAI(base_url=told["url"] + "/v1", api_key="k2", max_retries=0)
        answer = client.completions.create(model=told["model"], prompt=[5, 6], seed=1, max_tokens=9)
        engine = Engine.from_folder(run_folder / "sft" / "model")
        expected = engine.generate([[5, 6]], seed=1, max_tokens=9)[0][0]
        assert answer.choices[0].text == expected.text
        with client.completions.create(
            model=told["model"], prompt=[5, 6], n=64, max_tokens=100, stream=True
        ) as stream:
            next(stream)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(openai.APIError):  # the error frame, unless it was done
                for _ in stream:
                    pass
        out, error = process.communicate(timeout=20)
        assert process.returncode == 0, error
        assert out == ""
        assert "Traceback" not in error
    finally:
        process.kill()
        process.wait()


def test_misuse_exits_with_2_before_the_model_is_loaded(run_folder, monkeypatch, tmp_path):
    from phiforge.core.usage import UsageError
    from phiforge.serve.server import bind, serve

    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set"):
        serve(run_folder, api_key_env="NO_SUCH_KEY")
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UsageError, match="holds no key"):
        serve(run_folder, api_key_file=tmp_path / "keys")
    with pytest.raises(UsageError, match="--weights is 'int3'; allowed: fp32, bf16, int8, int4"):
        serve(run_folder, weights="int3")
    taken = bind("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(UsageError, match=r"--port .*in use; choose another"):
        serve(run_folder, port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="no model here"):
        serve(tmp_path)
