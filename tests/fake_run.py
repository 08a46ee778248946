"""A run folder as the nano recipe leaves it, with invented numbers: for looking at the report.

Run: python tests/fake_run.py FOLDER, or call `make_run(folder)`. Writes manifests, metrics logs,
pivotal paths, scores and transcripts; no weights. The scores go through `phiforge.evals.scores`.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from phiforge.evals import ask, scores

FAMILIES = {
    "stories": "mathematics",
    "budget": "finance",
    "circuits": "engineering",
    "ordering": "logic",
}
ORDER = ("pretrain", "midtrain", "sft", "dpo-pivotal")
SECONDS = {
    "curate": 9.2, "synthesize": 11.4, "tokenizer": 4.1, "pack": 6.8, "pretrain": 541.0,
    "midtrain": 118.3, "sft": 61.9, "pivotal": 164.2, "dpo-pivotal": 48.5, "evaluate": 112.7,
}  # fmt: skip
READS = {
    "tokenizer": ["curate", "synthesize"], "pack": ["curate", "synthesize", "tokenizer"],
    "pretrain": ["pack", "tokenizer"], "midtrain": ["pack", "tokenizer", "pretrain"],
    "sft": ["pack", "tokenizer", "midtrain"], "pivotal": ["sft", "synthesize"],
    "dpo-pivotal": ["sft", "pivotal"], "evaluate": ["synthesize", "pack", *ORDER],
}  # fmt: skip
STEPS = {"pretrain": (1450, 5.2, 1.05, 4e-3), "midtrain": (220, 1.5, 0.92, 4e-4),
         "sft": (90, 1.2, 0.61, 5e-4), "dpo-pivotal": (27, 0.693, 0.42, 1e-4)}  # fmt: skip
ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def make_run(folder: str | Path, stages: tuple[str, ...] = tuple(SECONDS)) -> Path:
    """Write an invented run with the given stages finished."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(
        "name: nano-s0\nseed: 0\nmodel: {preset: nano}\npretrain:\n  steps: 1450  # all\n"
        "  lr: 0.004\nmidtrain:\n  steps: 220\n"
    )
    for name in stages:
        (folder / name).mkdir(exist_ok=True)
        _manifest(folder, name)
        if name in STEPS:
            _log(folder, name)
    if "synthesize" in stages:
        _problems(folder / "synthesize")
    if "pivotal" in stages:
        _pivotal(folder / "pivotal")
    if "evaluate" in stages:
        _evaluate(folder / "evaluate")
    return folder


def _manifest(folder: Path, name: str) -> None:
    manifest = {
        "stage": name,
        "version": 1,
        "status": "done",
        "fingerprint": f"{name}-fingerprint".encode().hex()[:64],
        "config": {"seed": 0},
        "inputs": {n: {"path": n, "sha256": "0" * 64} for n in READS.get(name, [])},
        "outputs": [{"path": "model/model.safetensors", "bytes": 3_300_000, "sha256": "1" * 64}],
        "output_hash": f"{name}-output".encode().hex()[:64],
        "code": {"phiforge": "0.1.0", "commit": "0123456789ab", "modified": False},
        "environment": {"python": "3.11.7", "system": "Linux x86_64", "processor": "AMD EPYC 9R14",
                        "cores": 2, "torch": "2.13.0"},
        "exec": {"device": "cpu", "threads": 0, "workers": 0},
        "metrics": _metrics(name),
        "started": "2026-11-22T10:00:00+00:00",
        "finished": "2026-11-22T10:05:00+00:00",
        "seconds": SECONDS[name],
    }  # fmt: skip
    (folder / name / "manifest.json").write_text(json.dumps(manifest))


def _metrics(name: str) -> dict[str, Any]:
    if name in STEPS:
        tokens = STEPS[name][0] * 4096
        metrics: dict[str, Any] = {
            "loss": STEPS[name][2], "steps": STEPS[name][0], "tokens": tokens,
            "tokens_per_second": tokens / SECONDS[name], "flops": tokens * 6.1e6,
            "flops_formula": "6 x matrix parameters x tokens", "parameters": 1_234_432,
        }  # fmt: skip
        if name in ("pretrain", "midtrain"):
            shares = {"docs": 0.1, "code": 0.1, "worksheets": 0.8}
            metrics["mixture"] = [
                {"source": s, "share": share, "unique_tokens": 400_000, "epoch_tokens": 399_000,
                 "planned_tokens": round(tokens * share), "epochs": tokens * share / 399_000,
                 "drawn_tokens": round(tokens * share * 1.001)}
                for s, share in shares.items()
            ]  # fmt: skip
        return metrics
    if name == "pivotal":
        return {"questions_screened": 256, "questions_in_band": 201, "questions_below_band": 41,
                "questions_above_band": 14, "paths": 402, "pivotal_tokens": 731,
                "pivotal_tokens_rising": 402, "pairs": 894, "rollouts": 30_112,
                "filter_tokens": 310_000, "search_tokens": 394_000}  # fmt: skip
    return {"generated_tokens": 98_000} if name == "evaluate" else {"documents": 1000}


def _log(folder: Path, name: str) -> None:
    rng = random.Random(name)
    steps, start, end, lr = STEPS[name]
    with open(folder / name / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss = end + (start - end) * math.exp(-5 * step / steps) + rng.gauss(0, 0.03)
            row = {"step": step, "loss": loss, "lr": lr, "tokens": step * 4096}
            file.write(json.dumps(row) + "\n")
            if name == "pretrain" and step % 200 == 0:
                row = {"step": step, "validation_loss": loss + 0.1}
                file.write(json.dumps(row) + "\n")


def _problems(folder: Path) -> None:
    with open(folder / "problems_test.jsonl", "w") as file:
        for family, field in FAMILIES.items():
            for variant in ("answerable", "bogus"):
                for i in range(3):
                    row = {
                        "id": f"{family}/{variant}/{i}",
                        "prompt": _question(family, i, variant == "bogus"),
                        "answer": None if variant == "bogus" else str(10 + i),
                        "kind": "number",
                        "metadata": {"family": family, "field": field, "variant": variant},
                    }
                    file.write(json.dumps(row) + "\n")


def _question(family: str, i: int, bogus: bool) -> str:
    price = "some dollars" if bogus else f"${3 + i}"
    return (
        f"Tom has {12 + i} apples. He buys 7 more, then gets {3 + i} bags of 4. Each apple costs "
        f"{price}. How many apples does Tom have? ({family})"
    )


def _pivotal(folder: Path) -> None:
    texts = ["12", "+", "7", "=", "19", "\n", "3", "*", "4", "=", "12", "\n", "19", "+", "12", "=",
             "31", "\n", "Answer", ":", " ", "31", "<|im_end|>"]  # fmt: skip
    p: list[float | None] = [0.42, 0.44, None, 0.45, 0.47, 0.91, None, None, 0.9, None, 0.93,
                             0.66, None, None, 0.7, 0.72, 0.95, None, 0.97, None, 0.98, 1.0, 1.0,
                             1.0]  # fmt: skip
    for number, family in enumerate(list(FAMILIES) * 2):
        for name, rows in _pivotal_rows(number, family, texts, p).items():
            with open(folder / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _pivotal_rows(
    number: int, family: str, texts: list[str], p: list[float | None]
) -> dict[str, list[dict[str, Any]]]:
    name, asked, ids = f"{family}/{number}", [500, number], list(range(len(texts)))
    prompt = (
        f"<|im_start|>user<|im_sep|>{_question(family, number, False)}<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    )
    found = [(i, p[i] or 0.0, p[i + 1] or 0.0) for i in (4, 10, 15)]
    path = {"problem_id": name, "family": family, "answer": "31", "path": 0,
            "success": number % 2 == 0, "prompt": prompt, "token_ids": ids, "texts": texts, "p": p,
            "pivotal": [i for i, _, _ in found],
            "tokens": [{"position": i, "delta": b - a, "low": b - a - 0.12, "high": b - a + 0.1}
                       for i, a, b in found]}  # fmt: skip
    tokens = [
        {"problem_id": name, "path": 0, "position": i, "prompt_token_ids": asked,
         "prefix_token_ids": asked + ids[:i], "token_id": ids[i], "token": texts[i],
         "p_before": a, "p_after": b, "delta": b - a, "interval": [b - a - 0.12, b - a + 0.1],
         "n_after": 40, "successes_after": round(40 * b), "n_off": 40, "p_value": 0.0004,
         "family": family,
         "alternatives": [{"token_id": ids[i], "token": texts[i], "n": 33, "successes": 30},
                          {"token_id": 99, "token": "Answer", "n": 24, "successes": 5}]}
        for i, a, b in found
    ]  # fmt: skip
    facts = {"problem_id": name, "p_before": 0.47, "p_chosen": 0.91, "n_chosen": 40,
             "p_rejected": 0.2, "n_rejected": 24, "delta": 0.71,
             "interval": [0.49, 0.83]}  # fmt: skip
    pair = {"id": f"{number}", "prompt": prompt + "12+7=", "chosen": "19", "rejected": "Answer",
            "prompt_token_ids": asked + ids[:4], "chosen_token_ids": [4],
            "rejected_token_ids": [99], "metadata": facts}  # fmt: skip
    return {"paths": [path], "tokens": tokens, "pairs": [pair]}


def _evaluate(folder: Path) -> None:
    transcripts = {name: list(_transcripts(name)) for name in ORDER}
    for name, rows in transcripts.items():
        ask.write(folder / "transcripts" / f"{name}.jsonl", rows)
    together = [t for rows in transcripts.values() for t in rows]
    found = {
        "checkpoints": [
            {"name": n, "style": s}
            for n, s in zip(ORDER, ("probe", "base", "chat", "chat"), strict=True)
        ],
        "accuracy": scores.accuracy(together),
        "refusals": scores.refusals(together),
        "recall": scores.context_recall(together),
        "bits_per_byte": [
            {"checkpoint": name, "source": source, "bits_per_byte": 1.9 - 0.05 * i, "low": 1.8,
             "high": 2.0, "num_documents": 20, "num_tokens": 16000, "num_bytes": 51234}
            for i, name in enumerate(ORDER) for source in ("docs", "code")
        ],
        "comparisons": scores.comparisons(together, ORDER, seed=0),
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(found))


RATES = {"midtrain": 0.71, "sft": 0.572, "dpo-pivotal": 0.966}


def _transcripts(checkpoint: str) -> list[ask.Transcript]:
    rng = random.Random(checkpoint)
    rows = []
    if checkpoint in RATES:
        for temperature in (0.0, 1.0):
            rate = RATES[checkpoint] - 0.2 * temperature
            for family in FAMILIES:
                for i in range(100):
                    right = rng.random() < rate
                    text = f"12+7=19\n3*4=12\n19+12=31\nAnswer: {31 if right else 29}"
                    text = text + ATTACK if i == 1 else text
                    rows.append(_row(checkpoint, "problems", family, i, text, right, temperature))
        for family in FAMILIES:
            for i in range(25):
                refused = rng.random() < (0.05 if checkpoint == "midtrain" else 0.93)
                text = "I cannot answer this: a price is missing." if refused else "Answer: 4"
                rows.append(_row(checkpoint, "bogus", family, i, text, False, 0.0, refused))
    if checkpoint in ("pretrain", "midtrain"):
        for task in ("needle", "recall", "copy"):
            for length in (1.0, 2.0, 4.0):
                for i in range(50):
                    before = {1.0: 0.8, 2.0: 0.1, 4.0: 0.02}[length]
                    rate = 0.97 if checkpoint == "midtrain" else before
                    right = rng.random() < rate
                    row = _row(checkpoint, task, "", i, "k7" if right else "b2", right, 0.0)
                    facts = {"length": length}
                    rows.append(ask.Transcript(**{**vars(row), "id": f"{task}/{length}/{i}",
                                                  "prompt": "a1=k7\n" * int(20 * length),
                                                  "metadata": facts}))  # fmt: skip
    return rows


def _row(
    checkpoint: str, suite: str, family: str, i: int, text: str, right: bool,
    temperature: float, refused: bool = False,
) -> ask.Transcript:  # fmt: skip
    return ask.Transcript(
        checkpoint=checkpoint, suite=suite, id=f"{suite}/{family}/{i}",
        prompt=_question(family, i, suite == "bogus"), response=text, answer="31", correct=right,
        refused=refused, temperature=temperature, sample=0, finish_reason="stop",
        prompt_tokens=40, response_tokens=24, metadata={"family": family},
    )  # fmt: skip


if __name__ == "__main__":
    print(make_run(sys.argv[1]))
