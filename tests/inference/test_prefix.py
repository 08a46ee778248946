"""The plan covers every prompt's tokens exactly once, parents first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.inference.engine.prefix import plan

prompts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(prompts, st.integers(1, 4))
def test_chains_spell_the_prompts(given_prompts, min_shared):
    distinct = list(dict.fromkeys(given_prompts))
    found = plan(distinct, min_shared)
    assert sorted(distinct) == found.prompts
    for prompt, end in zip(found.prompts, found.ends, strict=True):
        place = 0
        for index in found.chain(end):
            segment = found.segments[index]
            assert segment.start == place
            assert segment.parent < index
            assert segment.num_new > 0
            place = segment.end
        assert found.segments[end].start < len(prompt) <= place
        assert found.segments[end].token_ids[: len(prompt)] == prompt
    assert found.ends == sorted(found.ends)


def test_prefixes_of_a_path_cost_the_path():
    path = tuple(range(100))
    found = plan([path[:i] for i in range(1, 101)])
    assert [segment.num_new for segment in found.segments] == [100]


def test_a_long_common_start_is_computed_once():
    start = tuple(range(40))
    found = plan([(*start, 50, i) for i in range(5)])
    assert sum(segment.num_new for segment in found.segments) == 41 + 5
    short = plan([(*start[:20], i) for i in range(5)])
    assert sum(segment.num_new for segment in short.segments) == 5 * 21


def test_deep_trees_need_no_deep_stack():
    chain = [tuple([0] * i + [1]) for i in range(1, 1200)]
    assert len(plan(chain, 1).segments) > 1199
