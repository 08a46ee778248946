"""Every hostile program is held: for root and for an ordinary user, warm and cold, layer by layer.

Run: pytest tests/verify/sandbox/test_users.py; with -m slow for the combinations beyond the usual.
"""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from attacker import NOBODY, Attacked, attack

from phiforge.verify.sandbox import hostile

USERS = {"root": None, "user": NOBODY} if os.geteuid() == 0 else {"user": None}


def assert_held(attacked: Attacked, *, complete: bool) -> None:
    escaped = [f for f in attacked.findings if not f["contained"] and not f["expected"]]
    assert not escaped, "\n".join(f"{f['name']}: {f['evidence']}" for f in escaped)
    expected = [f["name"] for f in attacked.findings if not f["contained"]]
    assert not (complete and expected), f"exempt, but every layer is there: {expected}"
    assert len(attacked.findings) >= len(hostile.CASES) - 2  # numpy and sympy may be missing
    assert attacked.processes == []
    assert attacked.files == []


@pytest.fixture(scope="module")
def usual() -> dict[str, "Future[Attacked]"]:
    """The usual sandbox attacked by all users at once: much of an attack is waiting."""
    pool = ThreadPoolExecutor(len(USERS))
    started = {name: pool.submit(attack, user) for name, user in USERS.items()}
    pool.shutdown(wait=False)
    return started


@pytest.mark.parametrize("user", USERS)
def test_warm_with_every_layer(usual: "dict[str, Future[Attacked]]", user: str):
    attacked = usual[user].result()
    if set(attacked.missing) & {"namespaces", "user namespace", "landlock", "seccomp"}:
        pytest.skip(f"this machine lacks {attacked.missing}")
    assert_held(attacked, complete=True)


@pytest.mark.slow
@pytest.mark.parametrize("user", USERS)
def test_cold_with_every_layer(user: str):
    attacked = attack(USERS[user], warm=False)
    if set(attacked.missing) & {"namespaces", "user namespace", "landlock", "seccomp"}:
        pytest.skip(f"this machine lacks {attacked.missing}")
    assert_held(attacked, complete=True)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("layer", ["namespaces", "landlock", "seccomp"])
@pytest.mark.parametrize("user", USERS)
def test_without_one_layer(user: str, layer: str, warm: bool):
    attacked = attack(USERS[user], warm=warm, without=[layer])
    assert layer in attacked.missing
    assert_held(attacked, complete=False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
@pytest.mark.parametrize("user", USERS)
def test_in_bubblewrap(user: str):
    assert_held(attack(USERS[user], backend="bubblewrap"), complete=False)
