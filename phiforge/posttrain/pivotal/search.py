"""Pivotal-token search on an engine: many questions in flight, their rollouts in shared batches.

`for token in search(engine, problems, oracle, gap=0.2): ...` or `Search.questions()` for whole
questions. Writes only the rollout log it is given; results come in question order.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiforge.core.records import Problem
from phiforge.inference.interface import PromptTokenizer, prompt_token_ids
from phiforge.posttrain.pivotal.estimates import Ledger, Prefix, Request, Rollout
from phiforge.posttrain.pivotal.inputs import response_text
from phiforge.posttrain.pivotal.question import investigate
from phiforge.posttrain.pivotal.results import (
    PairsFrom,
    PathChoice,
    PivotalToken,
    QuestionResult,
    Settings,
)
from phiforge.posttrain.pivotal.rollouts import RolloutLog, row_of
from phiforge.verify.answers import OracleError

if TYPE_CHECKING:
    from phiforge.inference.interface import Completion
    from phiforge.inference.interface import Generator as Engine

Oracle = Callable[[Problem, str], bool]
# Six decimals of a log-probability are far below its own rounding error, and halve the log.
LOGPROB_DECIMALS = 6
# Sample numbers of detours: their randomness is not that of the free rollouts of the same prefix.
DETOURS = 1 << 30
# Answers in a row without a verdict after which a search stops: the oracle is broken.
MOST_FAILURES = 2000


def search(
    engine: "Engine",
    problems: Iterable[Problem],
    oracle: Oracle,
    method: str = "balanced",
    gap: float = 0.2,
    seed: int = 0,
    *,
    band: tuple[float, float] = (0.2, 0.8),
    n_filter: int = 32,
    n_rollouts: int = 64,
    temperature: float = 1.0,
    max_tokens: int = 512,
    paths_per_question: int = 2,
    path_choice: PathChoice = "balanced",
    pairs_from: PairsFrom = "pivotal",
    pair_gap: float | None = None,
    min_count: int = 3,
    n_pair: int = 24,
    paths: Mapping[str, Sequence[Sequence[int]]] | None = None,
    max_pairs: int | None = None,
    budget_tokens: int | None = None,
    log: str | Path | None = None,
    questions_in_flight: int = 64,
    rollouts_per_call: int = 4096,
) -> "Search":
    """Find the tokens that move p(success) by `gap` or more (arXiv 2412.08905 §4.3, Fig. 4).

    Draws `n_filter` answers a question, keeps questions with p in `band`, and searches
    `paths_per_question` of these answers. `method`: "fast", "balanced" and "thorough" spend
    rollouts where they decide most and measure every token found on fresh ones; "paper" bisects
    each path at log-probability midpoints with `n_rollouts` rollouts a prefix, as the report says,
    and confirms nothing. Text prompts are encoded as they are; give chat messages for a chat model.
    `max_tokens` bounds path + continuation. `oracle` sees the problem and the decoded response
    without special tokens; when it raises OracleError the rollout is unscored.

    `paths` gives the token ids of the answers to search, by problem id, in place of sampled ones.
    `budget_tokens` (generated tokens) and `max_pairs` are spent in question order: a question
    counts when those before it leave something. `log` makes the search resumable. The last two
    arguments change speed alone. Raises ValueError for settings out of range.
    """
    settings = Settings(
        method=method,
        gap=gap,
        band=band,
        n_filter=n_filter,
        n_rollouts=n_rollouts,
        temperature=temperature,
        max_tokens=max_tokens,
        paths_per_question=paths_per_question,
        path_choice=path_choice,
        pairs_from=pairs_from,
        pair_gap=pair_gap,
        min_count=min_count,
        n_pair=n_pair,
        seed=seed,
    )
    limits = Limits(budget_tokens, max_pairs, questions_in_flight, rollouts_per_call)
    log = Path(log) if log else None
    return Search(engine, list(problems), oracle, settings, limits, log, paths or {})


@dataclass(frozen=True)
class Limits:
    """How much a search may spend, and how much of it at once. None: no limit."""

    budget_tokens: int | None = None
    max_pairs: int | None = None
    questions_in_flight: int = 64
    rollouts_per_call: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"pivotal: {name} is {value!r}; allowed: 1 or more")


@dataclass
class _Active:
    """A question in flight: its coroutine and what it waits for."""

    index: int
    problem: Problem
    prompt: Prefix
    ledger: Ledger
    coroutine: Generator[list[Request], None, QuestionResult]
    requests: list[Request]

    @property
    def num_tokens(self) -> int:
        return sum(self.ledger.num_tokens.values())


class Search:
    """An iterable of PivotalTokens that searches as it is read, once.

    The counters cover the questions given out so far: `num_filter_tokens`, `num_search_tokens`,
    `num_confirm_tokens` and `num_pair_tokens` (both 0 for "paper", which confirms nothing and pairs
    what it has) are tokens of rollouts; `num_questions`, `num_unscored` (rollouts), `num_pairs`.
    """

    def __init__(
        self,
        engine: "Engine",
        problems: list[Problem],
        oracle: Oracle,
        settings: Settings,
        limits: Limits,
        log: Path | None = None,
        paths: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ):
        repeated = [name for name, n in Counter(p.id for p in problems).items() if n > 1]
        if repeated:
            raise ValueError(f"pivotal: problem ids must differ; repeated: {repeated[:3]}")
        self.engine, self.oracle = engine, oracle
        self.settings, self.limits = settings, limits
        self.tokenizer: PromptTokenizer = engine.tokenizer
        self.num_questions = self.num_pairs = self.num_unscored = 0
        self.num_filter_tokens = self.num_search_tokens = 0
        self.num_confirm_tokens = self.num_pair_tokens = 0
        self.num_discarded_tokens = 0
        self._problems = problems
        self._paths = paths or {}
        self._failures, self._failure = 0, "no reason given"
        self._log_path = log
        self._log: RolloutLog | None = None
        self._active: list[_Active] = []
        self._finished: dict[int, QuestionResult] = {}
        self._started = 0
        self._questions = self._run()

    def __iter__(self) -> Iterator[PivotalToken]:
        for question in self._questions:
            yield from question.tokens

    def questions(self) -> Iterator[QuestionResult]:
        """Whole questions, in order; the same run as iterating over tokens."""
        return self._questions

    @property
    def num_tokens(self) -> int:
        """All generated tokens of the questions given out."""
        return (
            self.num_filter_tokens
            + self.num_search_tokens
            + self.num_confirm_tokens
            + self.num_pair_tokens
        )

    # ------------------------------------------------------------------------ question order

    def _run(self) -> Generator[QuestionResult, None, None]:
        if self._log_path is not None:
            self._log = RolloutLog(self._log_path, self._header())
        try:
            while self.num_questions < len(self._problems) and not self._exhausted():
                if self.num_questions in self._finished:
                    yield self._count(self._finished.pop(self.num_questions))
                    continue
                self._admit()
                self._draw([(a, r) for a in self._active for r in a.requests])
                for active in list(self._active):
                    self._advance(active)
            self.num_discarded_tokens = self._tokens_in_flight()
        finally:
            if self._log is not None:
                self._log.close()

    def _exhausted(self) -> bool:
        budget, pairs = self.limits.budget_tokens, self.limits.max_pairs
        spent = budget is not None and self.num_tokens >= budget
        return spent or (pairs is not None and self.num_pairs >= pairs)

    def _count(self, question: QuestionResult) -> QuestionResult:
        if self.limits.max_pairs is not None:
            room = self.limits.max_pairs - self.num_pairs
            question = replace(question, pairs=question.pairs[:room])
        self.num_questions += 1
        self.num_pairs += len(question.pairs)
        self.num_unscored += question.ledger.num_unscored
        self.num_filter_tokens += question.ledger.num_tokens["filter"]
        self.num_search_tokens += question.ledger.num_tokens["search"]
        self.num_confirm_tokens += question.ledger.num_tokens["confirm"]
        self.num_pair_tokens += question.ledger.num_tokens["pair"]
        return question

    def _tokens_in_flight(self) -> int:
        waiting = sum(sum(q.ledger.num_tokens.values()) for q in self._finished.values())
        return waiting + sum(active.num_tokens for active in self._active)

    def _admit(self) -> None:
        """Start questions while there is room and the earlier ones leave some of the budget."""
        budget = self.limits.budget_tokens
        while self._started < len(self._problems):
            if len(self._active) >= self.limits.questions_in_flight:
                return
            if budget is not None and self.num_tokens + self._tokens_in_flight() >= budget:
                return
            problem, ledger = self._problems[self._started], Ledger()
            prompt = prompt_token_ids(self.tokenizer, problem.prompt)
            if not prompt:
                raise ValueError(f"pivotal: problem {problem.id!r} has an empty prompt")
            given = self._given(problem, prompt)
            coroutine = investigate(problem, prompt, ledger, self.settings, self.tokenizer, given)
            first = next(coroutine)
            self._active.append(_Active(self._started, problem, prompt, ledger, coroutine, first))
            self._started += 1

    def _given(self, problem: Problem, prompt: Prefix) -> list[Rollout]:
        """The paths that were asked for, with their log-probabilities and the oracle's word."""
        wanted = [list(path) for path in self._paths.get(problem.id, ())]
        if not wanted:
            return []
        scores = self._sampler_logprobs([list(prompt)] * len(wanted), wanted)
        verdicts = self._judge([(problem, path) for path in wanted])
        if None in verdicts:
            raise ValueError(f"pivotal: the oracle failed on a given path of {problem.id!r}")
        return [
            Rollout(tuple(path), success, logprobs)
            for path, success, logprobs in zip(wanted, verdicts, scores, strict=True)
        ]

    def _sampler_logprobs(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of whole answers under the law that the rollouts are drawn by."""
        temperature = self.settings.temperature
        law = {"temperature": temperature} if temperature != 1.0 else {}
        scores = self.engine.score(prompts, answers, **law)
        return [_rounded(row, len(row)) for row in scores]

    def _advance(self, active: _Active) -> None:
        try:
            active.requests = next(active.coroutine)
        except StopIteration as stop:
            self._active.remove(active)
            self._finished[active.index] = stop.value

    # ------------------------------------------------------------------------------ rollouts

    def _draw(self, wanted: list[tuple[_Active, Request]]) -> None:
        """Answer all requests of a round: from the log, else in as few engine calls as possible."""
        fresh = []
        for active, request in wanted:
            logged = self._logged(active, request)
            if logged is not None:
                active.ledger.add(request, logged)
            else:
                fresh.append((active, request))
        # Log-probabilities are wanted of the filter's answers alone; the rest is one call.
        for _, group in groupby(sorted(fresh, key=_of_search), key=_of_search):
            for part in _parts(list(group), self.limits.rollouts_per_call):
                self._generate(part)

    def _logged(self, active: _Active, request: Request) -> list[Rollout] | None:
        if self._log is None:
            return None
        return self._log.read(active.problem.id, active.prompt, request)

    def _generate(self, part: list[tuple[_Active, Request]]) -> None:
        """One engine call; its rollouts are scored, logged, then added to their ledgers."""
        requests = [request for _, request in part]
        banned = [() if r.forbidden is None else (r.forbidden,) for r in requests]
        completions = self.engine.generate(
            [[*active.prompt, *request.prefix] for active, request in part],
            n=[request.n for request in requests],
            max_tokens=[self._room(request) for request in requests],
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            first_index=[r.first_index + (0 if r.forbidden is None else DETOURS) for r in requests],
            logprobs=requests[0].purpose == "filter",
            forbidden_first=banned if any(banned) else None,
        )
        drawn = self._scored(part, completions)
        if self._log is not None:
            self._log.append(
                row_of(active.problem.id, active.prompt, request, rollouts)
                for (active, request), rollouts in zip(part, drawn, strict=True)
            )
        for (active, request), rollouts in zip(part, drawn, strict=True):
            active.ledger.add(request, rollouts)

    def _room(self, request: Request) -> int:
        """Tokens that may follow a prefix before the answer is cut."""
        return self.settings.max_tokens - len(request.prefix)

    def _scored(
        self, part: list[tuple[_Active, Request]], completions: "list[list[Completion]]"
    ) -> list[list[Rollout]]:
        """The rollouts of a call with the oracle's verdicts, request by request."""
        drawn = [[sample.token_ids for sample in samples] for samples in completions]
        verdicts = iter(
            self._judge(
                [
                    (active.problem, [*request.prefix, *ids])
                    for (active, request), answers in zip(part, drawn, strict=True)
                    for ids in answers
                ]
            )
        )
        laws = iter(self._laws(part, drawn, completions))
        return [
            [Rollout(tuple(ids), next(verdicts), next(laws)) for ids in answers]
            for answers in drawn
        ]

    def _laws(
        self,
        part: list[tuple[_Active, Request]],
        drawn: Sequence[Sequence[Sequence[int]]],
        completions: "list[list[Completion]]",
    ) -> list[tuple[float, ...] | None]:
        """Log-probabilities of each answer by the sampler's law, where a path may be made of it."""
        if part[0][1].purpose != "filter":
            return [None for answers in drawn for _ in answers]
        if self.settings.temperature != 1.0:
            flat = [list(ids) for answers in drawn for ids in answers]
            prompts = [
                list(active.prompt)
                for (active, _), answers in zip(part, drawn, strict=True)
                for _ in answers
            ]
            return list(self._sampler_logprobs(prompts, flat))
        return [
            _rounded(sample.logprobs or (), len(sample.token_ids))
            for samples in completions
            for sample in samples
        ]

    def _judge(self, answers: "list[tuple[Problem, Sequence[int]]]") -> list[bool | None]:
        """The oracle's verdicts on paths' token ids; None where it failed."""
        pairs = [(problem, response_text(self.tokenizer, path)) for problem, path in answers]
        many = getattr(self.oracle, "many", None)
        given = many(pairs) if many is not None else [self._ask(*pair) for pair in pairs]
        errors = [verdict for verdict in given if isinstance(verdict, OracleError)]
        self._failure = str(errors[-1]) if errors else self._failure
        verdicts = [None if isinstance(v, OracleError) else bool(v) for v in given]
        self._failures = 0 if any(v is not None for v in verdicts) else self._failures + len(pairs)
        if self._failures >= MOST_FAILURES:
            raise OracleError(
                f"pivotal: the oracle failed on {self._failures} answers in a row "
                f"({self._failure}); nothing that was scored is lost, mend it and search again"
            )
        return verdicts

    def _ask(self, problem: Problem, response: str) -> "bool | OracleError":
        try:
            return bool(self.oracle(problem, response))
        except OracleError as error:
            return error

    def _header(self) -> dict[str, Any]:
        """What a rollout depends on besides its prefix; the gap is not part of it."""
        names = ("seed", "temperature", "max_tokens")
        return {"format": 1} | {name: getattr(self.settings, name) for name in names}


def _rounded(logprobs: Sequence[float], length: int) -> tuple[float, ...]:
    return tuple(round(float(x), LOGPROB_DECIMALS) for x in logprobs[:length])


def _of_search(item: tuple[_Active, Request]) -> bool:
    return item[1].purpose != "filter"


def _parts(
    items: list[tuple[_Active, Request]], most: int
) -> Iterator[list[tuple[_Active, Request]]]:
    """Cut requests into calls of at most `most` rollouts, at least one request each."""
    part: list[tuple[_Active, Request]] = []
    count = 0
    for item in items:
        if part and count + item[1].n > most:
            yield part
            part, count = [], 0
        part.append(item)
        count += item[1].n
    if part:
        yield part
