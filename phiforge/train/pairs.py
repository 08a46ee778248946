"""Preference pairs as token ids, and micro-batches in which shared prefixes are computed once.

`tokenize(pair, tokenizer)`, then `make_batch(pairs, reference, pad_id)` or a whole step by
`pair_steps(...)`. Nothing is written.

Shapes: b rows, t row length, n completion tokens, p pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from phiforge.core.records import Pair
from phiforge.data.mixture import hash_key
from phiforge.data.packing import permutation
from phiforge.model.tokenizer import Tokenizer
from phiforge.train.batch import StepBatch, first_fit, move, pack_sequences

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TokenPair:
    """A preference on token ids: what follows `prompt` is trained, exactly as it stands."""

    id: str
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def single_token(self) -> bool:
        """Whether both sides are one token, as in pivotal-token pairs."""
        return len(self.chosen) == len(self.rejected) == 1

    @property
    def inputs(self) -> tuple[Ids, Ids]:
        """What the model reads for each side: all but the last token."""
        return self.prompt + self.chosen[:-1], self.prompt + self.rejected[:-1]


@dataclass(frozen=True)
class Reference:
    """Summed log-probabilities of the completions under the frozen starting weights, [p] fp32."""

    chosen_p: Tensor
    rejected_p: Tensor

    def at(self, index: Sequence[int]) -> Reference:
        """The values of some pairs."""
        return Reference(self.chosen_p[list(index)], self.rejected_p[list(index)])


@dataclass(frozen=True)
class PairBatch:
    """Packed prefixes, and where in them each completion token is predicted.

    `place_n` indexes the flattened rows, `side_n` the side a token belongs to: pair i's chosen side
    is i, its rejected side p + i. With one-token sides the order is all chosen, then all rejected.
    """

    token_ids_bt: Tensor
    documents_bt: Tensor
    positions_bt: Tensor
    place_n: Tensor
    target_n: Tensor
    side_n: Tensor
    reference_chosen_p: Tensor
    reference_rejected_p: Tensor
    single_token: bool

    @property
    def num_pairs(self) -> int:
        return len(self.reference_chosen_p)

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.token_ids_bt.numel()

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return move(self, device)


def tokenize(pair: Pair, tokenizer: Tokenizer) -> TokenPair:
    """A record as token ids.

    Token ids in the record are taken as they are, without an end token (pivotal pairs are single
    tokens: an end token would teach the model to stop there). Chats end with the turn's end token,
    plain text with the end of a turn. Raises ValueError for half-given ids and empty sides.
    """
    given = (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)
    if any(ids is not None for ids in given):
        if any(ids is None for ids in given):
            raise ValueError(
                f"pair {pair.id}: prompt_token_ids, chosen_token_ids and rejected_token_ids belong "
                "together; give all three or none"
            )
        prompt, chosen, rejected = (tuple(ids or ()) for ids in given)
    elif isinstance(pair.prompt, str):
        if not (isinstance(pair.chosen, str) and isinstance(pair.rejected, str)):
            raise ValueError(f"pair {pair.id}: prompt is text, so chosen and rejected must be too")
        prompt = tuple(tokenizer.encode(pair.prompt))
        sides = (pair.chosen, pair.rejected)
        chosen, rejected = ((*tokenizer.encode(side), tokenizer.eos_id) for side in sides)
    else:
        prompt = tuple(tokenizer.encode_chat(pair.prompt, add_generation_prompt=True))
        chosen, rejected = (
            _after(prompt, tokenizer, pair, side) for side in (pair.chosen, pair.rejected)
        )
    if not (prompt and chosen and rejected):
        raise ValueError(f"pair {pair.id}: prompt, chosen and rejected need at least one token")
    if chosen == rejected:
        raise ValueError(f"pair {pair.id}: chosen and rejected are the same tokens")
    return TokenPair(pair.id, prompt, chosen, rejected)


def _after(prompt: Ids, tokenizer: Tokenizer, pair: Pair, side: str | list[dict[str, str]]) -> Ids:
    """The tokens a reply adds to the prompt's chat."""
    reply = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
    assert not isinstance(pair.prompt, str)
    whole = tuple(tokenizer.encode_chat([*pair.prompt, *reply]))
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            f"pair {pair.id}: the chat with its reply does not begin with the prompt's tokens; the "
            "reply must be one assistant message"
        )
    return whole[len(prompt) :]


def host_prefixes(sequences: Sequence[Ids]) -> tuple[list[Ids], dict[Ids, int]]:
    """The sequences that are no prefix of another, and for every sequence the one that holds it.

    In sorted order a prefix comes right before a sequence that it begins, or another prefix of it.
    """
    ordered = sorted(set(sequences))
    hosts: list[Ids] = []
    host_of: dict[Ids, int] = {}
    for i in reversed(range(len(ordered))):
        ids = ordered[i]
        if not (hosts and hosts[-1][: len(ids)] == ids):
            hosts.append(ids)
        host_of[ids] = len(hosts) - 1
    return hosts, host_of


def make_batch(pairs: Sequence[TokenPair], reference: Reference, pad_id: int) -> PairBatch:
    """One micro-batch: distinct prefixes packed into rows, causal attention inside each.

    A prefix of another prefix costs nothing: all pairs along one path come from one forward pass
    over the path. `reference` has a value per pair.
    """
    hosts, host_of = host_prefixes([ids for pair in pairs for ids in pair.inputs])
    width = max(map(len, hosts))
    rows = first_fit([len(host) for host in hosts], width)
    packed = pack_sequences([(host, [0] * len(host)) for host in hosts], rows, width, pad_id)
    start_of = {}
    for r, row in enumerate(rows):
        start = r * width
        for host in row:
            start_of[host] = start
            start += len(hosts[host])
    place, target, side = [], [], []
    for k, name in enumerate(("chosen", "rejected")):
        for i, pair in enumerate(pairs):
            first = start_of[host_of[pair.inputs[k]]] + len(pair.prompt) - 1
            completion: Ids = getattr(pair, name)
            place += range(first, first + len(completion))
            target += completion
            side += [k * len(pairs) + i] * len(completion)
    return PairBatch(
        packed.token_ids_bt,
        packed.documents_bt,
        packed.positions_bt,
        torch.tensor(place),
        torch.tensor(target),
        torch.tensor(side),
        reference.chosen_p,
        reference.rejected_p,
        all(pair.single_token for pair in pairs),
    )


def cut(pairs: Sequence[TokenPair], micro_tokens: int) -> Iterator[list[int]]:
    """Consecutive pair numbers with at most `micro_tokens` of distinct prefixes (or one pair)."""
    current: list[int] = []
    for i in range(len(pairs)):
        inputs = [ids for j in (*current, i) for ids in pairs[j].inputs]
        if current and sum(map(len, host_prefixes(inputs)[0])) > micro_tokens:
            yield current
            current = []
        current.append(i)
    yield current


def separate_tokens(pairs: Sequence[TokenPair]) -> int:
    """Tokens of one epoch with a sequence per side, as trainers take pairs that share nothing."""
    return sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def path_chains(pairs: Sequence[TokenPair]) -> list[list[int]]:
    """Pair numbers by path: runs of single-token pairs each of whose prompts begins the next."""
    if not pairs:
        return []
    ordered = sorted(range(len(pairs)), key=lambda i: (pairs[i].prompt, pairs[i].id))
    chains: list[list[int]] = [ordered[:1]]
    for before, i in pairwise(ordered):
        shared = pairs[i].prompt[: len(pairs[before].prompt)] == pairs[before].prompt
        if shared and pairs[i].single_token and pairs[before].single_token:
            chains[-1].append(i)
        else:
            chains.append([i])
    return chains


def epoch_order(chains: Sequence[Sequence[int]], seed: int, epoch: int) -> list[int]:
    """Pair numbers in the order of an epoch: chains of one path stay together, chains shuffled."""
    shuffled = permutation(hash_key(seed, "pairs", epoch), len(chains))
    return [i for chain in shuffled for i in chains[int(chain)]]


@dataclass(frozen=True)
class PairSteps:
    """The steps of DPO: `batch(step)` is a function of the step alone."""

    pairs: Sequence[TokenPair]
    reference: Reference
    pairs_per_step: int
    micro_tokens: int
    pad_id: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.pairs) // self.pairs_per_step)

    @cached_property
    def _chains(self) -> list[list[int]]:
        # Sorting compares whole prompts: once, not at every step.
        return path_chains(self.pairs)

    def batch(self, step: int) -> StepBatch:
        """The pairs of a step (0-based), cut into micro-batches; the unit is the pair."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = epoch_order(self._chains, self.seed, epoch)
        chosen = order[at * self.pairs_per_step : (at + 1) * self.pairs_per_step]
        return StepBatch(list(self._parts(chosen)), len(chosen))

    def everything(self) -> Iterator[PairBatch]:
        """All pairs once, in their own order."""
        yield from self._parts(range(len(self.pairs)))

    def _parts(self, numbers: Sequence[int]) -> Iterator[PairBatch]:
        selected = [self.pairs[i] for i in numbers]
        for group in cut(selected, self.micro_tokens):
            index = [numbers[i] for i in group]
            yield make_batch([selected[i] for i in group], self.reference.at(index), self.pad_id)

    def with_reference(self, reference: Reference) -> PairSteps:
        """The same steps with other reference values."""
        return replace(self, reference=reference)
