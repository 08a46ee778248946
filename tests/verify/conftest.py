"""The sandbox that tests of verdicts run in: once with forked, once with fresh interpreters."""

import pytest

from phiforge.verify.sandbox import Sandbox, SandboxUnavailable


def started(**options):
    try:
        return Sandbox(**options)
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=["warm", "cold"])
def sandbox(request):
    with started(warm=request.param == "warm") as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def warm():
    with started(preload=["doctest"]) as sandbox:
        yield sandbox
