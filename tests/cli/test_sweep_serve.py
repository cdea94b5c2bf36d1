"""`sweep serve`, and searches on the storage that it serves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Command, contents
from support.engines import free_port, wait_for_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: the server asks for no password"),
        (["--port", "0"], "'--port'"),
        (["--storage", "journal:///a.log"], "--storage journal:///a.log: only databases can be served"),
        (["--storage", "grpc://localhost:1"], "only databases can be served"),
        (["--storage", "nowhere"], "--storage 'nowhere': not a URL"),
    ],
)
def test_what_cannot_be_served_is_refused(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("sweep", "serve", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before


def test_a_server_says_where_it_is_and_leaves_when_told(here: Path) -> None:
    port = free_port()
    words = [sys.executable, "-m", "mup_megatron", "sweep", "serve", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        said = server.stderr.readline()
        assert said == f"sqlite:///results/served.db is served at grpc://localhost:{port}\n"
        wait_for_port(port)
        second = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert second.returncode == 2
        assert f"--port {port}: cannot be listened at" in second.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM
    assert (here / "results" / "served.db").exists()
