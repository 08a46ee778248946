"""JSON by schema: reading, checking, one repair, no response_format; and `phiforge ask`."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from stub_server import React, Request, StubServer, status

from phiforge import cli
from phiforge.inference.endpoint import Answer, Budget, BudgetExceeded, Endpoint, Failure
from phiforge.inference.endpoint.schema import check_schema, problems
from phiforge.inference.endpoint.structured import Unfit, read_value, shape_of


class Verdict(BaseModel):
    score: int
    reason: str


GOOD = '{"score": 3, "reason": "fine"}'
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 5}},
    "required": ["score"],
}


@pytest.fixture
def server():
    with StubServer() as found:
        yield found


def is_repair(request: Request) -> bool:
    return request.prompt.startswith("That answer is not valid")


def says(first: str, repaired: str = GOOD):
    return lambda request: React(text=repaired if is_repair(request) else first)


# -------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here it is:\n```json\n{GOOD}\n```\nDone.",
        f"```\n{GOOD}\n```",
        f"Sure! {GOOD} I hope [this] helps {{}}.",
        f'<think>{{"score": 9}}</think>{GOOD}',
        f'First {{"note": 1}}, then {GOOD}',
        '{"score": 3, "reason": "fi\nne"}',
    ],
)
def test_values_are_found_in_texts(text):
    value = read_value(text, shape_of(Verdict))
    assert isinstance(value, Verdict)
    assert value.score == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("I would rather not.", "no JSON in 'I would"),
        ('{"score": 3', "no JSON in"),
        ('{"score": "many", "reason": "x"}', "score: Input should be a valid integer"),
        ('{"score": 3}', "reason: Field required"),
        ("[" * 20_000, "no JSON in"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(Unfit, match=message.replace("[", r"\[")):
        read_value(text, shape_of(Verdict))


def test_schemas_that_would_not_be_checked_are_refused():
    with pytest.raises(ValueError, match=r"schema\.properties\.a\.format: this keyword"):
        shape_of({"properties": {"a": {"format": "email"}}})
    with pytest.raises(ValueError, match="pydantic model or a JSON Schema"):
        shape_of("object")
    check_schema(Verdict.model_json_schema())


def random_value(generator: random.Random, depth: int = 0) -> Any:
    kinds = ["null", "bool", "int", "float", "str"] + ["list", "dict"] * (depth < 3)
    match generator.choice(kinds):
        case "null":
            return None
        case "bool":
            return generator.random() < 0.5
        case "int":
            return generator.randint(-2, 6)
        case "float":
            return generator.choice([0.5, 2.0, 3.25, -1.0])
        case "str":
            return generator.choice(["", "a", "abc", "b1"])
        case "list":
            return [random_value(generator, depth + 1) for _ in range(generator.randint(0, 3))]
    return {name: random_value(generator, depth + 1) for name in "abc" if generator.random() < 0.6}


def random_schema(generator: random.Random, depth: int = 0) -> dict[str, Any]:
    def below() -> Any:
        return random_schema(generator, depth + 1) if depth < 3 else generator.random() < 0.8

    parts: dict[str, Any] = {
        "type": lambda: generator.choice(
            ["object", "array", "string", "integer", "number", "boolean", "null", ["null", "array"]]
        ),
        "enum": lambda: [random_value(generator, 2) for _ in range(3)],
        "const": lambda: random_value(generator, 3),
        "properties": lambda: {name: below() for name in "ab"},
        "required": lambda: ["a"],
        "additionalProperties": below,
        "items": below,
        "prefixItems": lambda: [below()],
        "minItems": lambda: 1,
        "maxItems": lambda: 2,
        "uniqueItems": lambda: True,
        "minimum": lambda: 0,
        "exclusiveMaximum": lambda: 5,
        "multipleOf": lambda: 0.5,
        "minLength": lambda: 1,
        "maxLength": lambda: 2,
        "pattern": lambda: "^a",
        "anyOf": lambda: [below(), below()],
        "oneOf": lambda: [below(), below()],
        "allOf": lambda: [below()],
        "$ref": lambda: "#/$defs/x",
    }
    names = generator.sample(sorted(parts), generator.randint(0, 3))
    if generator.random() < 0.5:
        names = ["type", *(name for name in names if name != "type")]
    return {name: parts[name]() for name in names}


def test_the_schema_check_agrees_with_jsonschema():
    jsonschema = pytest.importorskip("jsonschema")
    generator = random.Random(0)
    outcomes = [0, 0]
    for _ in range(3000):
        schema = random_schema(generator) | {"$defs": {"x": {"type": ["array", "integer"]}}}
        check_schema(schema)
        value = random_value(generator)
        expected = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (not problems(value, schema)) == expected, (schema, value)
        outcomes[expected] += 1
    assert min(outcomes) > 300


# ------------------------------------------------------------------------------------ generating


def test_a_schema_is_sent_and_the_value_is_checked(server):
    server.script = says(GOOD)
    with Endpoint(server.url, "m") as endpoint:
        ((found,),) = endpoint.generate_json(["judge this"], Verdict)
    assert isinstance(found, Answer)
    assert found.value == Verdict(score=3, reason="fine")
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    form = request.body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"] == Verdict.model_json_schema()


def test_one_repair_call_that_says_what_is_wrong(server, tmp_path):
    server.script = says('{"score": 9}', '{"score": 5}')
    with Endpoint(server.url, "m", cache=tmp_path / "c.sqlite") as endpoint:
        found = endpoint.generate_json(["a", "b"], SCHEMA, n=2)
        assert [[answer.value for answer in row] for row in found] == [[{"score": 5}] * 2] * 2
        assert len(server.requests) == 8
        messages = next(r for r in server.requests if is_repair(r)).body["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == '{"score": 9}'
        assert "$.score: must be at most 5, found 9" in messages[2]["content"]
        again = endpoint.generate_json(["a", "b"], SCHEMA, n=2)
    assert len(server.requests) == 8, "first answers and repairs are replayed"
    assert again[0][0].value == {"score": 5}


def test_what_stays_unfit_is_a_failure_and_is_asked_again(server, tmp_path):
    server.script = says('{"score": 9}', "sorry")
    with Endpoint(server.url, "m", cache=tmp_path / "c.sqlite") as endpoint:
        ((found,),) = endpoint.generate_json(["a"], SCHEMA)
        assert isinstance(found, Failure)
        assert (found.kind, found.attempts) == ("schema", 2)
        assert "must be at most 5, found 9; after the repair: no JSON in 'sorry'" in found.message
        server.script = says('{"score": 1}')
        ((found,),) = endpoint.generate_json(["a"], SCHEMA)
    assert isinstance(found, Answer)
    assert len(server.requests) == 3


def test_a_budget_in_the_middle_keeps_what_fits(server):
    server.script = lambda request: React(text='{"score": 1}' if request.prompt == "a" else "no")
    with Endpoint(server.url, "m", concurrency=1, budget=Budget(max_calls=2)) as endpoint:
        with pytest.raises(BudgetExceeded) as stopped:
            endpoint.generate_json(["a", "b", "c"], SCHEMA)
        ((first,), (second,), (third,)) = stopped.value.results
    assert isinstance(first, Answer)
    assert first.value == {"score": 1}
    assert isinstance(second, Failure)
    assert second.kind == "schema"
    assert third is None


def test_other_failures_are_not_repaired(server):
    server.script = lambda request: React(text='{"score": 1', finish_reason="length")
    with Endpoint(server.url, "m") as endpoint:
        ((found,),) = endpoint.generate_json(["a"], SCHEMA)
    assert isinstance(found, Failure)
    assert found.kind == "length"
    assert len(server.requests) == 1


def test_servers_without_response_format_get_the_schema_in_words(server):
    def script(request: Request) -> React:
        if "response_format" in request.body:
            return status(400, "response_format is unknown")
        return React(text='{"score": 1}')

    server.script = script
    with (
        Endpoint(server.url, "m", concurrency=1) as endpoint,
        pytest.warns(UserWarning, match="takes no response_format"),
    ):
        found = endpoint.generate_json(["a", "b", "c"], SCHEMA)
    assert [row[0].value for row in found] == [{"score": 1}] * 3
    assert len(server.requests) == 4, "asked once whether it does"
    assert '"maximum": 5' in server.requests[-1].prompt


def test_a_bad_request_is_no_lack_of_response_format(server):
    server.script = lambda request: status(400, "too long")
    with Endpoint(server.url, "m", concurrency=1) as endpoint:
        ((found,),) = endpoint.generate_json(["a"], SCHEMA)
        assert found.kind == "refused"
        server.script = says(GOOD)
        endpoint.generate_json(["b"], SCHEMA)
    assert "response_format" in server.requests[-1].body


# ------------------------------------------------------------------------------------------- ask


@pytest.fixture
def phiforge(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["phiforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capsys.readouterr()
        return int(stopped.value.code or 0), found.out, found.err

    return call


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def file(tmp_path) -> str:
    lines = [{"id": "x", "prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "q.jsonl"


def test_ask_answers_a_file_and_goes_on(server, phiforge, file):
    arguments = ["ask", file, "--model", "m", "--out", "a.jsonl", "--base-url", server.url]
    code, out, _ = phiforge(*arguments, "--dry-run", "--price", 1, 2, "--json")
    assert code == 0
    estimate = json.loads(out)
    assert (estimate["calls"], estimate["worst_completion_tokens"]) == (2, 2048)
    assert estimate["worst_usd"] == pytest.approx((estimate["expected_usd"] * 2), rel=0.2)
    assert not server.requests
    assert not Path("a.jsonl.cache").exists()
    code, _, error = phiforge(*arguments, "--max-calls", 1)
    assert code == 1
    assert "max_calls: the next call" in error
    assert "a.jsonl: 1 of 2 rows" in error
    assert "Traceback" not in error
    code, out, _ = phiforge(*arguments, "--n", 2, "--json", "--temperature", 1)
    assert code == 0
    summary = json.loads(out)
    assert (summary["answered"], summary["cached"]) == (4, 1)
    assert summary["spent_so_far"]["calls"] == 4
    assert [(row["id"], row["index"]) for row in rows("a.jsonl")] == [
        ("x", 0),
        ("x", 1),
        ("2", 0),
        ("2", 1),
    ]
    assert rows("a.jsonl")[0]["text"] == "echo: one #0+0"


def test_ask_by_schema(server, phiforge, file, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    server.script = lambda request: React(
        text="no" if "one" in str(request.body) else '{"score":1}'
    )
    arguments = ["ask", file, "--model", "m", "--out", "a.jsonl", "--base-url", server.url]
    code, _, error = phiforge(*arguments, "--json-schema", "schema.json")
    assert code == 1
    assert "failed: 1 schema" in error
    failed, good = rows("a.jsonl")
    assert failed["error"]["kind"] == "schema"
    assert good["value"] == {"score": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "q.jsonl: No such file"),
        ("", "no prompt in it"),
        ("{", "q.jsonl:1: not valid JSON"),
        ('{"text": "x"}', "q.jsonl:1: needs 'prompt'"),
    ],
)
def test_ask_misused(phiforge, tmp_path, content, message):
    if content is not None:
        (tmp_path / "q.jsonl").write_text(content)
    code, _, error = phiforge("ask", "q.jsonl", "--model", "m", "--out", "a.jsonl")
    assert code == 2
    assert message in error
