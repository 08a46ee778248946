"""The report in a real browser: its script runs, nothing else is fetched, something is drawn."""

import http.server
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest
from fake_run import make_run

from phiforge.report import build

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return build(make_run(tmp_path_factory.mktemp("run") / "nano-s0"))


def chromium(folder: Path, *arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "chromium is not installed; .ci/run installs it"
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.browser
def test_the_page_script_runs_and_sections_are_there(page, tmp_path):
    dom = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert "Theme: system" in dom  # written by the page's own script
    for title in ("Stages", "Training", "Accuracy", "Pivotal tokens", "How to reproduce"):
        assert f">{title}<" in dom


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 420])
def test_it_draws_at_desk_and_telephone_width(page, tmp_path, width):
    picture = tmp_path / "page.png"
    chromium(tmp_path, f"--window-size={width},900", f"--screenshot={picture}", page.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # an empty page compresses to a few kilobytes


@pytest.mark.browser
def test_it_asks_the_server_for_nothing_but_itself(page, tmp_path):
    asked: list[str] = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    handler = partial(Server, directory=str(page.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium(tmp_path, "--dump-dom", f"http://127.0.0.1:{server.server_port}/{page.name}")
        server.shutdown()
    assert set(asked) <= {f"/{page.name}", "/favicon.ico"}
