"""Oracles: verdicts, what leaves a response unscored, what fails at opening, what is remembered.

Run: pytest tests/posttrain/test_pivotal_oracles.py.
"""

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from stub_server import React, StubServer, status

from phiforge.core.records import Problem
from phiforge.data.benchmarks import read_benchmark
from phiforge.inference.endpoint import Budget, BudgetExceeded, Endpoint, Patience
from phiforge.posttrain.pivotal.inputs import as_prompts
from phiforge.posttrain.pivotal.oracle_code import program_of, until_end_of_function
from phiforge.posttrain.pivotal.oracles import Oracle, open_oracle
from phiforge.posttrain.pivotal.scoring import Scorer, each
from phiforge.verify import OracleError
from phiforge.verify.sandbox import Sandbox, SandboxUnavailable

SUM = Problem(id="sum", prompt="6 * 7?", answer="42", kind="number")


def verdicts(oracle, *responses, problem=SUM):
    return [
        "unscored" if isinstance(v, OracleError) else v
        for v in oracle.many([(problem, response) for response in responses])
    ]


# -------------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, "did you mean 'math'"),
        ("", {}, "unknown name"),
        ("number", {"tolerence": 0.1}, "did you mean 'tolerance'"),
        ("number", {"tolerance": 2}, "tolerance is 2"),
        ("exact", {"thinking": "no"}, "thinking is 'no'"),
        ("code", {"form": "program"}, "form is 'program'"),
        ("judge", {}, "needs endpoint"),
        ("judge", {"endpoint": {"model": "m"}, "template": "{problem}"}, "response"),
        ("judge", {"endpoint": {"model": "m"}, "template": "{problm}"}, "double other braces"),
        ("judge", {"endpoint": {"modell": "m"}}, "modell"),
        ("command:", {}, "empty"),
        ("command:/no/such/program", {}, "cannot start"),
    ],
)
def test_mistakes_are_found_at_opening(name, options, message):
    with pytest.raises(ValueError, match=message):
        open_oracle(name, **options)


# ------------------------------------------------------------------------------ exact answers


def test_exact_number_math_and_choice():
    assert verdicts(open_oracle("exact"), "Answer: 42", "42", "Answer: 41") == [True, False, False]
    assert verdicts(open_oracle("number"), "#### 42", "so 42.0", "41") == [True, True, False]
    with open_oracle("math") as oracle:
        assert verdicts(oracle, r"\boxed{6 \cdot 7}", r"\boxed{43}", "") == [True, False, False]
    choice = Problem(
        id="c", prompt="?", answer="B", kind="choice", metadata={"options": ["x", "y"]}
    )
    said = verdicts(open_oracle("choice"), "Answer: (B)", "Answer: y", "Answer: A", problem=choice)
    assert said == [True, True, False]


def test_options_reach_the_oracle():
    near = open_oracle("number", tolerance=0.05)
    assert verdicts(near, "41", "39") == [True, False]
    assert verdicts(open_oracle("number", anchored=True), "it is 42", "Answer: 42") == [False, True]


def test_a_question_without_an_answer_is_unscored_and_the_rest_goes_on():
    oracle = open_oracle("number")
    unanswered = Problem(id="none", prompt="?", kind="number")
    found = oracle.many([(unanswered, "42"), (SUM, "42")])
    assert isinstance(found[0], OracleError)
    assert "problem none: it has no reference answer" in str(found[0])
    assert found[1] is True
    assert oracle.refuses(unanswered)
    assert oracle.refuses(SUM) is None
    with pytest.raises(OracleError, match="no reference answer"):
        oracle(unanswered, "42")


def test_a_reference_that_is_no_number_is_unscored():
    assert verdicts(
        open_oracle("number"), "42", problem=Problem(id="w", prompt="?", answer="many")
    ) == ["unscored"]


def test_thinking():
    thought = "<think>Answer: 41</think>Answer: 42"
    assert verdicts(open_oracle("exact"), thought, "<think>Answer: 42") == [True, False]
    assert verdicts(open_oracle("exact", thinking="keep"), "<think>Answer: 42") == [True]
    opened = open_oracle("exact", thinking="opened")
    assert verdicts(opened, "Answer: 42", "41?</think>Answer: 42") == [False, True]


def test_verdicts_are_remembered_and_errors_are_not():
    seen = []

    def check(problem, response):
        seen.append(response)
        if response == "down" and seen.count("down") == 1:
            raise OracleError("down")
        return response == "42"

    oracle = Oracle("test", Scorer(each(check)))
    assert verdicts(oracle, "42", "42", "41", "down") == [True, True, False, "unscored"]
    assert verdicts(oracle, "41", "42", "down") == [False, True, False]
    assert seen == ["42", "41", "down", "down"]
    other = Problem(id="other", prompt="?", answer="41")
    assert verdicts(oracle, "42", problem=other) == [True]
    assert seen[-1] == "42"
    assert oracle.num_calls == 5


# ----------------------------------------------------------------------------------- functions


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes an importable module into the working folder; gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_function_by_module_and_by_file(module):
    name = module("grade_one", "def right(problem, response):\n return response == problem.answer")
    for oracle in (f"{name}:right", f"{name}.py:right"):
        assert verdicts(open_oracle(oracle), "42", "41") == [True, False]
    assert os.getcwd() not in sys.path


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("import no_such_module_here", "f", "cannot be imported .*no_such_module_here"),
        ("def f(: pass", "f", "SyntaxError"),
        ("raise SystemExit(3)", "f", "SystemExit"),
        ("def grade(p, r): return True", "grad", "did you mean 'grade'"),
        ("f = 3", "f", "must be a function"),
        ("def f(response): return True", "f", "called with"),
        ("def f(p, r, *, key): return True", "f", "called with"),
        ("async def f(p, r): return True", "f", "plain function"),
        ("def f(p, r) -> float: return 0.5", "f", "returns float"),
        ("def f(p, r) -> 'str': return ''", "f", "returns str"),
    ],
)
def test_a_wrong_function_fails_at_opening(module, text, function, message):
    name = module("grade_wrong", text)
    with pytest.raises(ValueError, match=message):
        open_oracle(f"{name}:{function}")


def test_a_missing_module_or_file_fails_at_opening(module):
    with pytest.raises(ValueError, match="No module named"):
        open_oracle("no_such_module_here:f")
    with pytest.raises(ValueError, match="is no file"):
        open_oracle("no/such.py:f")


def test_what_a_function_does_wrong_leaves_that_response_unscored(module):
    name = module(
        "grade_moody",
        """
        def f(problem, response):
            return {"crash": lambda: 1 / 0, "half": lambda: 0.5, "none": lambda: None}.get(
                response, lambda: response == "42")()
        """,
    )
    oracle = open_oracle(f"{name}:f")
    said = verdicts(oracle, "crash", "half", "none", "42", "41")
    assert said == ["unscored", "unscored", "unscored", True, False]
    with pytest.raises(OracleError, match="ZeroDivisionError"):
        oracle(SUM, "crash")
    with pytest.raises(OracleError, match="must be a bool"):
        oracle(SUM, "half")


def test_check_asks_once_before_anything_is_sampled(module):
    name = module("grade_half", "def f(problem, response): return 0.5")
    with pytest.raises(ValueError, match=r"cannot judge problem 'sum'.*must be a bool"):
        open_oracle(f"{name}:f").check(SUM)
    open_oracle("number").check(SUM)


# ------------------------------------------------------------------------------------ programs

PROGRAM = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    response, answer = asked["response"], asked["problem"]["answer"]
    if response == "die":
        print("out of order", file=sys.stderr)
        os._exit(3)
    if response == "hang":
        time.sleep(60)
    if response == "die after":
        print("true", flush=True)
        os._exit(0)
    texts = {"garbage": "maybe", "two": "true\\ntrue", "number": "1", "flood": "x" * 2_000_000}
    print(texts.get(response, json.dumps(response == answer)), flush=True)
"""


@pytest.fixture
def command(tmp_path):
    file = tmp_path / "with space.py"
    file.write_text(PROGRAM)
    with open_oracle(f"command:{sys.executable} '{file}'", seconds=1.5) as oracle:
        yield oracle


def test_a_program_answers_and_lines_stay_whole(command):
    tricky = 'two\nlines, "quotes", \\ and ünïcödé\u2028' + "x" * 300_000
    assert verdicts(command, "42", "41", tricky) == [True, False, False]
    echoed = Problem(id="e", prompt="?", answer=tricky)
    assert verdicts(command, tricky, problem=echoed) == [True]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("die", "exit code 3: out of order"),
        ("hang", "no answer within 1.5 s"),
        ("garbage", "answered 'maybe'"),
        ("number", "answered '1'"),
        ("two", "more than one line"),
        ("flood", "longer than"),
    ],
)
def test_a_program_that_fails_leaves_it_unscored_and_is_started_again(command, response, message):
    with pytest.raises(OracleError, match=message):
        command(SUM, response)
    assert verdicts(command, "42", "41") == [True, False]


def test_a_program_that_left_after_its_answer_is_started_again(command):
    assert verdicts(command, "die after", "42", "die after", "41") == [True, True, True, False]


def test_a_closed_oracle_leaves_no_process(tmp_path):
    file = tmp_path / "stubborn.py"
    file.write_text("import sys, time, os\nprint(os.getpid(), file=open('pid', 'w'))\n" + PROGRAM)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        oracle = open_oracle(f"command:{sys.executable} {file}")
        assert verdicts(oracle, "42") == [True]
        oracle.close()
    finally:
        os.chdir(here)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert verdicts(oracle, "41") == ["unscored"]


# ---------------------------------------------------------------------------------------- code

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'import math\n\ndef area(r):\n    """Area."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n",
}
GOOD = "    return math.pi * r * r\n"


def code(form, **row):
    metadata = {**HUMANEVAL, "prompt_format": form, **row}
    return Problem(id="HumanEval/x", prompt=HUMANEVAL["prompt"], kind="code", metadata=metadata)


@pytest.fixture(scope="module")
def coder():
    try:
        sandbox = Sandbox()
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))
    with sandbox, open_oracle("code", sandbox=sandbox, limits={"cpu_seconds": 2}) as oracle:
        yield oracle


def test_completions(coder):
    said = verdicts(
        coder,
        GOOD,
        GOOD + "\n\ndef other(:\n    cut short",  # a base model goes on
        GOOD + "\nprint(area(",
        "    return 0\n",
        "    return math.pi * r *",
        "",
        "while True: pass",
        HUMANEVAL["prompt"] + GOOD,
        f"```python\n{HUMANEVAL['prompt']}{GOOD}```",
        problem=code("text"),
    )
    assert said == [True, True, True, False, False, False, False, True, True]


def test_responses(coder):
    fenced = f"Here:\n```python\n{HUMANEVAL['prompt']}{GOOD}```\nDone."
    wrong = fenced.replace("r * r", "r")
    thought = f"<think>\n{wrong}</think>\n{fenced}"
    said = verdicts(coder, fenced, wrong, thought, "I can't.", "", problem=code("chat"))
    assert said == [True, False, True, False, False]


def test_other_tests(coder):
    tests = [{"stdin": "2 3\n", "expected": "5\n"}, {"stdin": "1 1\n", "expected": "2"}]
    adder = Problem(id="add", prompt="?", kind="code", metadata={"tests": tests})
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    assert verdicts(coder, program, "```python\nprint(5)\n```", problem=adder) == [True, False]
    calls = {"tests": [{"entry_point": "f", "arguments": [2], "expected": 4}]}
    square = Problem(id="square", prompt="?", kind="code", metadata=calls)
    assert verdicts(coder, "```\ndef f(x): return x * x\n```", problem=square) == [True]
    mbpp = {"task_id": 1, "test_list": ["assert f(2) == 4"]}
    same = Problem(id="MBPP/1", prompt="?", kind="code", metadata=mbpp)
    assert verdicts(coder, "def f(x): return x + 2\n", problem=same) == [True]


def test_unusable_tests_are_unscored_and_named(coder):
    for metadata in (
        {},
        {"tests": []},
        {"tests": [{"expected": 3}]},
        {"task_id": 1, "test_list": []},
    ):
        bad = Problem(id="bad", prompt="?", kind="code", metadata=metadata)
        assert coder.refuses(bad)
        with pytest.raises(OracleError, match="problem bad"):
            coder(bad, GOOD)
    row = code("text", test="def check(candidate:\n").metadata
    broken = Problem(id="broken", prompt="?", kind="code", metadata=row)
    with pytest.raises(OracleError, match=r"problem broken.*cannot be used"):
        coder(broken, GOOD)


def test_a_sandbox_that_is_gone_leaves_responses_unscored():
    try:
        oracle = open_oracle("code")
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))
    oracle.close()
    with pytest.raises(OracleError, match=r"HumanEval/x.*gone"):
        oracle(code("text"), GOOD)


@pytest.mark.slow
def test_public_solutions_pass_and_stubs_do_not(coder):
    folder = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    problems = read_benchmark("humaneval", folder / "humaneval") + read_benchmark(
        "mbpp", folder / "mbpp" / "test.jsonl", limit=100
    )
    chat, text = as_prompts(problems), as_prompts(problems, format="text")
    fenced = [f"So:\n```python\n{p.metadata['solution']}\n```\n" for p in problems]
    # Ids are those of the chat problems, so their verdicts would be remembered.
    renamed = [replace(p, id=f"{p.id} text") for p in text]
    whole = [p.metadata["solution"].removeprefix(str(p.prompt)) + "\nprint(" for p in problems]
    limits = {"cpu_seconds": 60, "wall_seconds": 120}  # a busy machine is no verdict
    with open_oracle("code", limits=limits) as oracle:
        assert all(v is True for v in oracle.many(zip(chat, fenced, strict=True)))
        assert all(v is True for v in oracle.many(zip(renamed[:83], whole[:83], strict=True)))
        assert not any(oracle.many((p, "    pass\n") for p in renamed))


def test_where_a_completion_ends():
    assert until_end_of_function("    return 1\nx = 2\nif x:\n") == "    return 1\nx = 2\n"
    assert until_end_of_function("\n    return 1\n\n@cache\ndef g") == "\n    return 1\n\n"
    whole = "def f():\n    return 1\n\ndef g(): pass\n"
    assert until_end_of_function(whole) == whole
    assert until_end_of_function("\n\n" + whole) == "\n\n" + whole
    assert program_of(code("chat"), "no code") == ""


# --------------------------------------------------------------------------------------- judge


def judge(server, **options):
    patience = Patience(attempts=2, first_wait_seconds=0.01, longest_wait_seconds=0.02)
    client = Endpoint(server.url, "judge", patience=patience, timeout_seconds=5)
    return client, open_oracle("judge", endpoint=client, **options)


def test_judge_sees_the_problem_the_reference_and_the_response():
    def script(request):
        right = "The answer is forty-two" in request.prompt
        return React(text=json.dumps({"correct": right}))

    with StubServer(script) as server:
        client, oracle = judge(server)
        with client:
            assert verdicts(oracle, "The answer is forty-two", "7", "", "7") == [
                True, False, False, False,
            ]  # fmt: skip
        assert all("6 * 7?" in p and "42" in p for p in server.prompts())
        assert len(server.requests) == 2  # nothing for an empty response or a repeated one
        assert server.requests[0].body["temperature"] == 0


def test_judge_garbage_is_repaired_once_then_unscored():
    def script(request):
        if request.prompt.startswith("That answer is not valid"):
            return React(text='{"correct": true}' if request.number < 2 else "never")
        return React(text="it is certainly right")

    with StubServer(script) as server:
        client, oracle = judge(server)
        with client:
            assert verdicts(oracle, "first") == [True]
            assert verdicts(oracle, "second") == ["unscored"]


def test_judge_that_is_down_leaves_responses_unscored():
    with StubServer(lambda request: status(500)) as server:
        client, oracle = judge(server)
        with client:
            assert verdicts(oracle, "a", "b") == ["unscored", "unscored"]
            with pytest.raises(ValueError, match="cannot judge problem 'sum'"):
                oracle.check(SUM)


def test_judge_without_budget_stops():
    right = React(text='{"correct": true}')
    with (
        StubServer(lambda request: right) as server,
        Endpoint(server.url, "judge", budget=Budget(max_calls=1)) as client,
    ):
        oracle = open_oracle("judge", endpoint=client)
        assert verdicts(oracle, "a") == [True]
        with pytest.raises(BudgetExceeded):
            verdicts(oracle, "b")


def test_judge_reads_questions_of_any_form():
    asked = []

    def script(request):
        asked.append(request.prompt)
        return React(text='{"correct": false}')

    messages = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "What?"}]
    with StubServer(script) as server:
        client, oracle = judge(server)
        with client:
            verdicts(oracle, "{x} {0}", problem=Problem(id="m", prompt=messages, answer="1"))
            ids = Problem(id="i", prompt=[1, 2, 3], metadata={"question": "How many?"})
            verdicts(oracle, "3", problem=ids)
            blind = Problem(id="b", prompt=[1, 2, 3])
            assert "token ids" in (oracle.refuses(blind) or "")
            assert verdicts(oracle, "3", problem=blind) == ["unscored"]
    assert "Be {brief}." in asked[0]
    assert "{x} {0}" in asked[0]
    assert "How many?" in asked[1]
