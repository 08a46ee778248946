"""Log-probabilities of given answers, by /completions with `echo`: calls out, scores in.

`score_calls(prompts, completions, tokenizer)` and `read_scores(...)`; `Endpoint.score` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence

from phiforge.inference.endpoint.calls import Answer, Call, Failure, Outcome, all_answered
from phiforge.inference.interface import Prompt, PromptTokenizer, Sampling, prompt_token_ids

_NEEDED = (
    "Scoring needs /completions with token-id prompts, `echo` and `logprobs` (vLLM, phiforge serve "
    "have them): use another server, or our engine"
)


def score_calls(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    tokenizer: PromptTokenizer | None,
) -> list[Call]:
    """One call per non-empty completion. Raises ValueError for prompts that have no token ids."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    calls = []
    for position, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(completion) == 0:
            continue
        is_ids = not isinstance(prompt, str) and all(hasattr(item, "__index__") for item in prompt)
        if tokenizer is None and not is_ids:
            raise ValueError(
                f"prompts[{position}]: scoring works on token ids; give Endpoint a tokenizer, or "
                "prompts of token ids"
            )
        ids = prompt_token_ids(tokenizer, prompt)  # type: ignore[arg-type]
        if not ids:
            raise ValueError(f"prompts[{position}] is empty; nothing precedes its first token")
        whole = [*ids, *(int(index) for index in completion)]
        sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=True)
        calls.append(
            Call(prompt=whole, sampling=sampling, via="completions", allow=("length",), echo=True)
        )
    return calls


def read_scores(
    calls: Sequence[Call],
    completions: Sequence[Sequence[int]],
    results: list[list[Outcome]],
    where: str,
) -> list[list[float]]:
    """Per completion its tokens' log-probabilities.

    Raises ValueError when the server refuses to score or sends none, AnswersFailed when calls
    failed otherwise.
    """
    for (outcome,) in results:
        if isinstance(outcome, Failure) and outcome.kind == "refused":
            raise ValueError(f"{where}: {outcome.message}. {_NEEDED}")
    rows = iter(zip(calls, all_answered(results), strict=True))
    found = []
    for completion in completions:
        if len(completion) == 0:
            found.append([])
            continue
        call, (answer,) = next(rows)
        found.append(_of_completion(len(call.prompt), len(completion), answer, where))
    return found


def _of_completion(whole: int, length: int, answer: Answer, where: str) -> list[float]:
    values = answer.logprobs or ()
    # One more is the token drawn because not every server takes max_tokens 0.
    if len(values) not in (whole, whole + 1):
        raise ValueError(
            f"{where}: {len(values)} log-probabilities came back for {whole} prompt tokens. "
            + _NEEDED
        )
    scores = [value for value in values[whole - length : whole] if value is not None]
    if len(scores) != length:
        raise ValueError(f"{where}: some of the prompt's log-probabilities are null")
    return scores
