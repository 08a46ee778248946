"""Random arrivals, cancellations, lengths, masks and memory against the plain uncached loop."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from plain_loop import NO_NATIVE, Letters, make_model, plain_generate

from phiforge.inference.engine import Engine, allow_only, forbid_first
from phiforge.inference.engine.scheduler import Scheduler
from phiforge.inference.interface import Request

PATH = tuple(range(30, 130))
PROMPTS = [PATH[:k] for k in (1, 63, 64, 65, 100)] + [(*PATH[:40], 7, 8), (*PATH[:64], 9), (200,)]
FORCED = [(), (), (61,), (61, 62, 63), (61, 1)]
MASKS = {
    "none": None,
    "no first": forbid_first(range(2, 200)),
    "few": allow_only([1, 66, 67, 68]),
    "odd": lambda drawn: np.arange(300) % 2 == len(drawn) % 2,
}
LAWS = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"min_p": 0.05, "top_k": 9}]
LONGEST = 30
MODEL = make_model(num_layers=1, hidden_size=32, intermediate_size=48)


@functools.cache
def reference(kernels: str) -> Engine:
    """Names the model and the kernels for the plain loop; computes nothing."""
    return Engine(MODEL, Letters(), kernels=kernels)  # type: ignore[arg-type]


@functools.cache
def expected(kernels: str, prompt: int, index: int, forced: int, mask: str, law: int):
    """Tokens and log-probabilities of the longest answer; a shorter one is its start."""
    rule_ = MASKS[mask]
    ask = rule_.bind(300) if hasattr(rule_, "bind") else rule_ or (lambda drawn: None)
    return plain_generate(
        reference(kernels), PROMPTS[prompt], index, 3, FORCED[forced], ask,
        max_tokens=LONGEST, **LAWS[law],
    )  # fmt: skip


def consistent(scheduler: Scheduler) -> None:
    """Every block is counted as often as it is named, and free when it is not."""
    pool, rows, tree = scheduler._pool, scheduler._rows, scheduler._tree
    by_rows, by_tree = np.zeros_like(pool._rows), np.zeros_like(pool._nodes)
    for row in range(rows.num_active):
        np.add.at(by_rows, rows.table(row), 1)
    for node in tree._nodes():
        np.add.at(by_tree, node.blocks, 1)
        assert len(node.token_ids) > 0
        assert node.start < node.ready <= node.end or not node.children
        assert len(node.blocks) == (node.end - 1) // 64 - node.start // 64 + 1
    assert (by_rows == pool._rows).all()
    assert (by_tree == pool._nodes).all()
    free = set(np.flatnonzero((by_rows == 0) & (by_tree == 0)).tolist()) - {0}
    assert set(pool._free) == free
    assert len(pool._free) == len(free)


class Traffic(RuleBasedStateMachine):
    """Streams come, advance, are cancelled, while whole calls run in between."""

    kernels = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.open = []
        self.engine = Engine(MODEL, Letters(), rows=3, max_cache_tokens=256, kernels=self.kernels)

    @rule(rows=st.sampled_from([1, 3, 8]), blocks=st.sampled_from([3, 4, 7, 40]))
    def begin_anew(self, rows, blocks):
        self.finish_all()
        limits = {"rows": rows, "max_cache_tokens": 64 * blocks, "kernels": self.kernels}
        self.engine = Engine(MODEL, Letters(), **limits)

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), index=st.integers(0, 1),
        forced=st.integers(0, len(FORCED) - 1), mask=st.sampled_from([*MASKS, "none", "none"]),
        law=st.integers(0, len(LAWS) - 1), length=st.integers(3, LONGEST), logprobs=st.booleans(),
    )  # fmt: skip
    def submit(self, prompt, index, forced, mask, law, length, logprobs):
        request = Request(
            prompt=PROMPTS[prompt], index=index, seed=3, forced=FORCED[forced], mask=MASKS[mask],
            max_tokens=length, logprobs=logprobs, **LAWS[law],
        )  # fmt: skip
        what = (prompt, index, forced, mask, law)
        self.open.append((self.engine.submit(request), what, length, []))

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @rule(data=st.data())
    def iterate(self, data):
        if self.open:
            stream, *_, received = data.draw(st.sampled_from(self.open))
            received += [token for token in [next(stream, None)] if token]

    @rule(data=st.data())
    def cancel(self, data):
        if self.open:
            item = data.draw(st.sampled_from(self.open))
            item[0].take()
            item[0].cancel()
            self.open.remove(item)
            self.check_start(item)

    @rule(prompts=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=3))
    def generate(self, prompts):
        chosen = [PROMPTS[prompt] for prompt in prompts]
        found = self.engine.generate(chosen, n=2, seed=3, max_tokens=4, logprobs=True)
        for prompt, samples in zip(prompts, found, strict=True):
            for index, sample in enumerate(samples):
                tokens, logprobs = expected(self.kernels, prompt, index, 0, "none", 0)
                assert sample.token_ids == tokens[:4]
                assert sample.logprobs == logprobs[:4]

    @rule(prompt=st.integers(0, len(PROMPTS) - 1))
    def score(self, prompt):
        tokens, logprobs = expected(self.kernels, prompt, 0, 0, "none", 0)
        assert self.engine.score([PROMPTS[prompt]], [tokens]) == [list(logprobs)]

    @invariant()
    def blocks_add_up(self):
        if self.engine._scheduler is not None:
            consistent(self.engine._scheduler)

    def check_start(self, item) -> None:
        stream, what, length, _ = item
        tokens, logprobs = expected(self.kernels, *what)
        found = stream.completion
        assert found.token_ids == tokens[:length][: len(found.token_ids)]
        if found.logprobs is not None:
            assert found.logprobs == logprobs[: len(found.logprobs)]

    def finish_all(self) -> None:
        while self.engine.step():
            pass
        for item in self.open:
            stream, what, length, received = item
            received += stream.take()
            self.check_start(item)
            found = stream.completion
            assert len(found.token_ids) == len(expected(self.kernels, *what)[0][:length])
            assert stream.done
            assert tuple(token.token_id for token in received) == found.token_ids
            assert "".join(token.text for token in received) == found.text
        self.open = []

    def teardown(self):
        self.finish_all()


SETTINGS = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestTorchTraffic = Traffic.TestCase
TestTorchTraffic.settings = SETTINGS


class NativeTraffic(Traffic):
    """The same over own kernels."""

    kernels = "native"


@pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
class TestNativeTraffic(NativeTraffic.TestCase):
    """Skipped, with the reason, where own kernels cannot be had."""

    settings = SETTINGS
