"""A Phi-3 checkpoint whose p(success | prefix) is known in closed form, to measure searches with.

`world = build(folder, seed)` writes a Hugging Face folder that any engine loads, with the numbers
in its `exact/`; `open(folder)` reads them. `world.p(ids)` is exact at temperature 1 in fp32.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phiforge.core.files import atomic_path, write_json
from phiforge.core.records import Problem

if TYPE_CHECKING:
    from phiforge.model.phi import Phi
    from phiforge.model.tokenizer import Tokenizer

VARIANTS = 4  # most tokens a step can choose from
HEAD_SIZE = 64  # what kernels of every engine know
FORMAT = 1
END, PAD = "<|endoftext|>", "<|pad|>"
# A token that cannot follow gets this log-probability: nothing ever draws it, and it stays finite.
NEVER = -80.0
# Engines that load a folder by *.safetensors must not find the numbers: they lie one folder down.
NUMBERS = "exact"


@dataclass(frozen=True)
class Step:
    """What can follow at one step: each variant's probability and its change of the level."""

    probabilities: tuple[float, ...]
    shifts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ExactWorld:
    """A chain of `steps` tokens over `levels` of quality, then Y or N, then the end.

    Token (step, level, variant) says at which level it leaves the chain; a question starts at its
    own level; Y follows from the upper half of the levels. What follows depends on the last token
    alone, so p(success | prefix) does too.
    """

    folder: Path
    seed: int
    steps: int
    levels: int
    script: tuple[Step, ...] = field(repr=False)
    p_of: np.ndarray = field(repr=False)  # p(success) after each token id, float64

    @property
    def question_ids(self) -> range:
        """The token of each question, worst level first."""
        first = self.steps * self.levels * VARIANTS
        return range(first, first + self.levels)

    @property
    def yes_id(self) -> int:
        return self.question_ids.stop

    @property
    def no_id(self) -> int:
        return self.yes_id + 1

    @property
    def end_id(self) -> int:
        return self.yes_id + 2

    @property
    def vocab_size(self) -> int:
        """Token ids, the padding token included."""
        return self.yes_id + 4

    @property
    def max_tokens(self) -> int:
        """The length of every answer: the steps, Y or N, the end."""
        return self.steps + 2

    def p(self, token_ids: Sequence[int]) -> float:
        """p(success | token_ids), prompt and prefix; 0 or 1 once the answer is given.

        Raises ValueError for no tokens or an unknown one.
        """
        last = self._known(token_ids[-1] if len(token_ids) else -1)
        if last >= self.end_id:
            return float(self.yes_id in token_ids)
        return float(self.p_of[last])

    def law(self, last_token: int) -> dict[int, float]:
        """The next token's probabilities after `last_token`; they sum to 1."""
        state = _state_after(self._known(last_token), self.steps, self.levels)
        return _law(state, self.script, self.levels)

    def delta(self, prefix_ids: Sequence[int], token_id: int) -> float:
        """What `token_id` after `prefix_ids` (prompt and path) does to p(success)."""
        return self.p([*prefix_ids, token_id]) - self.p(prefix_ids)

    def problems(self, low: float = 0.25, high: float = 0.75, copies: int = 1) -> list[Problem]:
        """The questions with p(success) in low..high, hardest first, `copies` of each.

        A copy has its number before the question, in base `levels`, spelled with question tokens: p
        is the same and all samples are others. Prompts are token ids.
        """
        return [
            Problem(
                id=f"exact-{self.seed}-{level}-{copy}",
                prompt=[*self._spelled(copy), token],
                answer="Y",
                metadata={"p": float(self.p_of[token])},
            )
            for copy in range(copies)
            for level, token in enumerate(self.question_ids)
            if low <= self.p_of[token] <= high
        ]

    def oracle(self, problem: Problem, response: str) -> bool:
        """Success: the response says Y."""
        return "Y" in response

    def _spelled(self, number: int) -> list[int]:
        digits = []
        while number:
            number, digit = divmod(number, self.levels)
            digits.append(self.question_ids[digit])
        return digits[::-1]

    def _known(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"exact world: token id {token_id} is unknown; ids run from 0 to "
                f"{self.vocab_size - 1}, and a prefix has at least one"
            )
        return token_id


def build(folder: str | Path, seed: int = 0, *, steps: int = 40, levels: int = 9) -> ExactWorld:
    """Draw a world and write it: an fp32 Phi-3 folder (replaced if it is one) and its numbers.

    `steps` and `levels` are at least 1 and 2; ValueError when their product is above 5,000.
    """
    if steps < 1 or levels < 2 or steps * levels > 5000:
        raise ValueError(
            f"exact world: steps is {steps} and levels {levels}; allowed: at least 1 step and 2 "
            "levels, at most 5,000 of steps x levels"
        )
    from phiforge.model.huggingface import save

    folder = Path(folder)
    generator = np.random.default_rng(seed)
    script = tuple(_draw_step(generator) for _ in range(steps))
    world = ExactWorld(folder, seed, steps, levels, script, _values(script, levels))
    if (folder / NUMBERS / "world.json").is_file():
        shutil.rmtree(folder / NUMBERS)
    save(_model(world), _tokenizer(world), folder, dtype="float32", card=_CARD)
    _write_numbers(world)
    return world


def open(folder: str | Path) -> ExactWorld:
    """The world that `build` wrote into a folder. Raises ValueError when there is none."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    path = folder / NUMBERS / "world.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make the folder with pivotal.exact.build")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {values.get('format')!r}, this reads {FORMAT}; build anew"
        )
    numbers = load_file(folder / NUMBERS / "numbers.safetensors")
    script = tuple(
        Step(tuple(p[:count].tolist()), tuple(shift[:count].tolist()))
        for p, shift, count in zip(
            numbers["probabilities"], numbers["shifts"], numbers["counts"], strict=True
        )
    )
    names = ("seed", "steps", "levels")
    return ExactWorld(folder, *(values[n] for n in names), script=script, p_of=numbers["p_of"])


# ------------------------------------------------------------------------------------ the chain


def _draw_step(generator: np.random.Generator) -> Step:
    """10 % decisions, 17 % forks of style, 23 % mild choices, 50 % nearly certain tokens.

    Mix, numbers and order of draws are kept as they are: figures on the worlds 0, 18, 42 and 45
    compare with those measured on other programs.
    """
    kind = generator.random()
    if kind < 0.10:
        count = int(generator.integers(2, 5))
        share = generator.dirichlet(np.full(count, 1.2))
        shift = np.rint(generator.normal(0, 3.0, count))
    elif kind < 0.27:
        count = int(generator.integers(2, 5))
        share = generator.dirichlet(np.full(count, 0.8))
        shift = np.where(generator.random(count) < 0.15, generator.choice([-1, 1], count), 0)
    elif kind < 0.50:
        top = generator.uniform(0.8, 0.99)
        share = np.array([top, *((1 - top) * generator.dirichlet(np.ones(3)))])
        shift = np.array([0, *np.where(generator.random(3) < 0.35, -1, 0)])
    else:
        top = 1 - 10 ** -generator.uniform(2, 5)
        share = np.array([top, *((1 - top) * generator.dirichlet(np.ones(2)))])
        shift = np.array([0, *np.where(generator.random(2) < 0.5, -2, 0)])
    share = share / share.sum()
    return Step(tuple(share.tolist()), tuple(int(s) for s in shift))


def _state_after(token: int, steps: int, levels: int) -> int:
    """The state that decides what follows: step x levels + level, then Y due, N due, the end."""
    before_answer = steps * levels
    first_question = before_answer * VARIANTS
    if token >= first_question + levels:
        return before_answer + 2
    if token >= first_question:
        return token - first_question
    step, level = divmod(token // VARIANTS, levels)
    if step + 1 < steps:
        return (step + 1) * levels + level
    return before_answer + (0 if level >= levels // 2 + 1 else 1)


def _law(state: int, script: Sequence[Step], levels: int) -> dict[int, float]:
    """{token: probability} of what follows in a state."""
    before_answer = len(script) * levels
    first_answer = before_answer * VARIANTS + levels  # Y, N, the end
    if state >= before_answer:
        return {first_answer + state - before_answer: 1.0}
    number, level = divmod(state, levels)
    step = script[number]
    return {
        (number * levels + min(max(level + shift, 0), levels - 1)) * VARIANTS + variant: share
        for variant, (share, shift) in enumerate(zip(step.probabilities, step.shifts, strict=True))
    }


def _values(script: Sequence[Step], levels: int) -> np.ndarray:
    """p(success) after every token id, from the last step back to the questions."""
    steps = len(script)
    num_tokens = steps * levels * VARIANTS
    p_of = np.zeros(num_tokens + levels + 4)
    p_of[num_tokens + levels] = 1.0  # Y
    for token in [*reversed(range(num_tokens)), *range(num_tokens, num_tokens + levels)]:
        law = _law(_state_after(token, steps, levels), script, levels)
        p_of[token] = math.fsum(share * p_of[following] for following, share in law.items())
    return p_of


# ------------------------------------------------------------------------------------ the model


def _model(world: ExactWorld) -> Phi:
    """A Phi that draws the chain: its residual stream holds the state of the last token, one-hot.

    Attention and MLP add nothing; the norm makes the one a sqrt(d), so the head's columns are the
    states' log-probabilities over sqrt(d).
    """
    import torch

    from phiforge.model.config import PhiConfig
    from phiforge.model.phi import Phi

    num_states = world.steps * world.levels + 3
    heads = math.ceil(num_states / HEAD_SIZE)
    config = PhiConfig(
        vocab_size=world.vocab_size,
        hidden_size=heads * HEAD_SIZE,
        intermediate_size=HEAD_SIZE,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=1,
        max_position_embeddings=max(256, world.steps + 64),
        rms_norm_eps=1e-12,
        eos_token_ids=(world.end_id,),
    )
    embedding_vd = torch.zeros(config.vocab_size, config.hidden_size)
    for token in range(world.vocab_size):
        embedding_vd[token, _state_after(token, world.steps, world.levels)] = 1.0
    head_vd = torch.full((config.vocab_size, config.hidden_size), NEVER, dtype=torch.float64)
    for state in range(num_states):
        for token, share in _law(state, world.script, world.levels).items():
            head_vd[token, state] = max(math.log(share), NEVER) if share else NEVER
    model = Phi(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.embedding.weight.copy_(embedding_vd)
        assert model.lm_head is not None
        model.lm_head.weight.copy_(head_vd / math.sqrt(config.hidden_size))
    return model.eval()


def _tokenizer(world: ExactWorld) -> Tokenizer:
    """One character per token, so that text goes round: Chinese for the chain, Korean questions."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from phiforge.model.tokenizer import Tokenizer

    chain = [chr(0x4E00 + token) for token in range(world.question_ids.start)]
    questions = [chr(0xAC00 + level) for level in range(world.levels)]
    vocabulary = {name: i for i, name in enumerate([*chain, *questions, "Y", "N", END, PAD])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END, PAD])
    return Tokenizer(backend, eos=END, eod=END, pad=PAD, template=None, context=256)


def _write_numbers(world: ExactWorld) -> None:
    from safetensors.numpy import save_file

    shape = (world.steps, VARIANTS)
    numbers: dict[str, Any] = {
        "probabilities": np.zeros(shape),
        "shifts": np.zeros(shape, dtype=np.int64),
        "counts": np.array([len(step.shifts) for step in world.script]),
        "p_of": world.p_of,
    }
    for i, step in enumerate(world.script):
        numbers["probabilities"][i, : len(step.shifts)] = step.probabilities
        numbers["shifts"][i, : len(step.shifts)] = step.shifts
    folder = world.folder / NUMBERS
    folder.mkdir()
    with atomic_path(folder / "numbers.safetensors") as temporary:
        save_file(numbers, temporary)
    values = {"format": FORMAT, "seed": world.seed, "steps": world.steps, "levels": world.levels}
    write_json(folder / "world.json", values)


_CARD = """## What it is

A known Markov chain in the shape of a language model: p(success | prefix) is exact (`exact/`), so
searches for pivotal tokens can be scored. Load it in fp32 and sample at temperature 1."""
