"""A model as a judge: prompts in, JSON verdicts out that fit a schema, one repair each.

`verdicts(endpoint, prompts, schema)`; what is asked belongs to the caller. Writes nothing but the
endpoint's own cache and ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phiforge.verify.answers import OracleError

if TYPE_CHECKING:
    from phiforge.inference.endpoint import Endpoint
    from phiforge.inference.interface import Prompt


def verdicts(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    schema: Any,
    *,
    max_tokens: int = 1024,
    seed: int = 0,
    template_version: str = "",
) -> list[Any | OracleError]:
    """For each prompt the value that fits `schema` (see `Endpoint.generate_json`), asked greedily.

    An OracleError stands in the place of an answer that did not come or does not fit. Raises
    BudgetExceeded, because no later prompt could be answered either.
    """
    from phiforge.inference.endpoint import Answer, BudgetExceeded, EndpointError
    from phiforge.inference.interface import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
    why = "no answer"
    try:
        results: Sequence[Sequence[Any]] = endpoint.generate_json(
            prompts, schema, seed=seed, sampling=sampling, template_version=template_version
        )
    except BudgetExceeded:
        raise
    except EndpointError as error:
        results, why = error.results, str(error)
    rows = [*results, *[()] * (len(prompts) - len(results))]
    found: list[Any | OracleError] = []
    for row in rows:
        outcome = row[0] if row else None
        if isinstance(outcome, Answer):
            found.append(outcome.value)
        else:
            message = why if outcome is None else f"{outcome.kind}: {outcome.message}"
            found.append(OracleError(f"the judge gave no verdict: {message}"))
    return found
