"""Peers and their environments, models and batches on disk, and the commands' misuse."""

import sys

import numpy as np
import pytest

from phiforge.bench import environments, models, run
from phiforge.bench.engine_plan import tiny_config
from phiforge.bench.environments import PEERS
from phiforge.bench.train_plan import nano_step
from phiforge.core.usage import UsageError
from phiforge.model import huggingface


def test_every_peer_has_a_script_and_requirements():
    for peer in PEERS.values():
        assert peer.script.is_file()
        assert peer.requirements.read_text().strip()
        assert "import phiforge" not in peer.script.read_text()
        assert "from phiforge" not in peer.script.read_text()


def test_a_missing_environment_is_skipped_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peer = PEERS["litgpt"]
    python, remedy = environments.find(peer, {})
    assert python is None
    assert "`phiforge bench setup litgpt` makes it" in remedy
    made = environments.python_of(environments.environment_folder(peer))
    made.parent.mkdir(parents=True)
    made.symlink_to(sys.executable)
    ready = made.parents[1] / "phiforge-requirements.txt"
    ready.write_text("litgpt==0.1")
    assert "has other requirements" in environments.find(peer, {})[1]
    ready.write_text(peer.requirements.read_text())
    assert environments.find(peer, {}) == (made, "")


def test_a_python_can_be_given(tmp_path):
    peer = PEERS["transformers"]
    assert environments.find(peer, {"transformers": sys.executable})[1] == ""
    with pytest.raises(UsageError, match=r"--peer-python transformers=.*no such file"):
        environments.find(peer, {"transformers": str(tmp_path / "python")})


def test_choosing_peers():
    names = [peer.name for peer in environments.choose([], "engine")]
    assert names == ["transformers", "llama.cpp"]
    assert [p.name for p in environments.choose([], "train")] == ["transformers", "litgpt"]
    assert environments.choose(["none"], "engine") == []
    with pytest.raises(UsageError, match="no peer 'vllm'; known: transformers, litgpt"):
        environments.choose(["vllm"], "engine")
    with pytest.raises(UsageError, match="no peer 'vllm'"):
        environments.setup("vllm")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sizes": ("huge",)}, "--size 'huge': choose one of nano, pts, small-100m, phi-4-layers"),
        ({"repeat": 0}, "--repeat is 0"),
        ({"threads": -1}, "--threads is -1"),
        ({"peer_pythons": {"vllm": "x"}}, "no peer 'vllm'"),
    ],
)
def test_misuse_is_said_before_anything_starts(changes, expected):
    with pytest.raises(UsageError, match=expected):
        run.run(run.Options(task="engine", **changes))


def test_the_model_folder_is_the_same_every_time(tmp_path):
    config = tiny_config()
    models.write_model(config, tmp_path / "a")
    models.write_model(config, tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    model, tokenizer = huggingface.load(tmp_path / "a")
    assert model.config.num_parameters == config.num_parameters
    assert tokenizer.vocab_size == config.vocab_size


def test_prompts_differ_by_round_and_prefixes_are_of_one_path():
    assert models.random_prompts(50, 2, 4, 1) == models.random_prompts(50, 2, 4, 1)
    assert models.random_prompts(50, 2, 4, 1) != models.random_prompts(50, 2, 4, 2)
    prefixes = models.path_prefixes(50, 24, 192, 0)
    assert [len(prefix) for prefix in prefixes] == list(range(8, 193, 8))
    assert all(prefixes[-1][: len(prefix)] == prefix for prefix in prefixes)


@pytest.mark.parametrize("documents", [None, (5, 20)])
def test_batches_fill_their_rows(tmp_path, documents):
    file = tmp_path / "b.npz"
    models.write_batches(file, 50, 3, 4, 64, documents)
    arrays = np.load(file)
    assert arrays["token_ids"].shape == (3, 4, 64)
    assert arrays["documents"].min() == 0, "no padding"
    ends = arrays["targets"] == -100
    starts = arrays["positions"] == 0
    assert (ends[..., -1]).all()
    assert (np.roll(ends, 1, axis=-1) == starts).all(), "a document's last token has no target"
    assert starts.sum() == (12 if documents is None else ends.sum())
    if documents:
        assert arrays["documents"].max() >= 3


def test_the_nano_step_is_the_recipes():
    config, step, planned = nano_step()
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (2, 1, 1024)
    assert (step.tokens, step.context, planned) == (2048, 128, 3000 * 2048)
