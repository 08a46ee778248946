"""The section on pivotal tokens: yield and cost, the kinds of tokens, answers coloured by p.

`section(data, num_paths)`: RunData in, a Section (or None) out. The page of a search alone
(`posttrain.pivotal.page`) has the same parts, with more answers.
"""

from phiforge.core.page import Section, details, join
from phiforge.posttrain.pivotal.findings import MAX_PATHS, Findings
from phiforge.posttrain.pivotal.kinds import kinds_section
from phiforge.posttrain.pivotal.page import headline, solutions, yield_and_cost
from phiforge.posttrain.pivotal.solutions import choose
from phiforge.report.run_data import RunData

STAGE = "pivotal"


def section(data: RunData, num_paths: int) -> Section | None:
    """What the search found and cost, which tokens decide, and answers with their tokens."""
    findings = load(data)
    if not findings.metrics and not findings.paths:
        return None
    parts = [headline(findings), yield_and_cost(findings)]
    if findings.paths:
        kinds = kinds_section(findings)
        parts.append(details("Which tokens are pivotal", kinds, is_open=True))
        parts.append(solutions(findings, choose(findings.paths, num_paths)))
    return Section(
        "Pivotal tokens",
        join(parts),
        note="Answers of the SFT model. p is the share of sampled continuations that end in a "
        "right answer; hover over a token to read it before and after.",
    )


def load(data: RunData) -> Findings:
    """The stage's files; its manifest has the settings and metrics."""
    paths = data.rows(STAGE, "paths.jsonl", MAX_PATHS)
    shown = {path["problem_id"] for path in paths}
    tokens = [t for t in data.rows(STAGE, "tokens.jsonl") if t["problem_id"] in shown]
    pairs = data.rows(STAGE, "pairs.jsonl")
    return Findings(
        paths=paths,
        tokens=tokens,
        pairs=[p for p in pairs if p["metadata"].get("problem_id") in shown],
        settings=data.manifests.get(STAGE, {}).get("config", {}),
        metrics=data.metrics(STAGE),
    )
