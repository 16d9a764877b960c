"""A real ComfyUI server with a fresh copy of the pack, and what tests ask of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
RUN_SECONDS = 300
DROPPED = "Exception ignored in: <function WeakSet"
"""What Python prints where an interrupt falls into the callback of a weak reference, as asyncio has
for every task, and is lost."""
PATIENCE = 180  # seconds to wait for what must come: a fault alone takes them, a busy machine some


def comfy_root() -> Path | None:
    """Where ComfyUI is: COMFYUI_PATH, or comfy-cli's default place."""
    path = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    return path if (path / "main.py").is_file() else None


def copy_pack(target: Path, without: tuple[str, ...] = ("tests/", "docs/")) -> None:
    """The files a clone would have, less some folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if not name.startswith(without) and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@dataclass
class Run:
    """What a queued prompt did."""

    history: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    """Pictures that ComfyUI sends of latents."""
    interrupted_after: int = 0
    """Steps that were done when the interrupt was asked for."""

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """What the sampler sends of each chunk's images."""
        return [event["data"] for event in self.events if event["type"] == "rf.pictures"]

    @property
    def error(self) -> dict[str, Any] | None:
        """The execution error, if there was one."""
        messages = self.history["status"]["messages"]
        return next((data for kind, data in messages if kind == "execution_error"), None)

    def output(self, node: str) -> dict[str, Any]:
        """What a node showed."""
        assert self.error is None, self.error["exception_message"]
        return self.history["outputs"][node]


class Server:
    """A ComfyUI on a free port, with folders of its own."""

    def __init__(self, base: Path, *flags: str) -> None:
        root = comfy_root()
        assert root is not None
        self.base = base
        copy_pack(base / "custom_nodes" / "ComfyUI-RewardForcing")
        for name in ("diffusion_models", "loras", "vae", "text_encoders"):
            (base / "models" / name).mkdir(parents=True, exist_ok=True)
        (base / "input").mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port)]
        command += ["--base-directory", str(base)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *flags], cwd=root, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait()

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self.log_path.read_text(errors="replace")

    def tracebacks(self, since: int = 0) -> list[str]:
        """Those it has printed after so many characters of its log, each with what led to it."""
        parts = self.log[since:].split("Traceback (most recent call last)")
        return [f"{before[-300:]}Traceback{after[:3000]}" for before, after in pairwise(parts)]

    @property
    def output(self) -> Path:
        """Its output folder."""
        return self.base / "output"

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(timeout=PATIENCE)

    def interrupt(self) -> None:
        """End it as Ctrl-C does, pressed again where Python has lost it."""
        sent, end = 0, time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.log}"
            if self.log.count(DROPPED) == sent:
                self.process.send_signal(signal.SIGINT)
                sent += 1
            time.sleep(0.1)

    def get(self, path: str) -> Any:
        """A JSON answer."""
        with urllib.request.urlopen(self.address + path) as answer:
            return json.loads(answer.read())

    def post(self, path: str, data: Any = None) -> Any:
        """The JSON answer to a post, also when it is a refusal."""
        body = json.dumps(data or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as refusal:
            return json.loads(refusal.read())

    def refusal(self, prompt: dict[str, Any]) -> str:
        """What validation says about a prompt it refuses."""
        answer = self.post("/prompt", {"prompt": prompt})
        assert answer.get("node_errors"), answer
        errors = [e for node in answer["node_errors"].values() for e in node["errors"]]
        return " ".join(f"{e['message']} {e['details']}" for e in errors)

    def run(self, prompt: dict[str, Any], interrupt_after: int | None = None, **extra: Any) -> Run:
        """Queue a prompt and wait; interrupted once so many steps are done, if asked."""
        return asyncio.run(self._run(prompt, interrupt_after, extra))

    async def _run(
        self, prompt: dict[str, Any], interrupt_after: int | None, extra: dict[str, Any]
    ) -> Run:
        client = uuid.uuid4().hex
        run = Run(history={})
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
        ):
            queued = {"prompt": prompt, "client_id": client, "extra_data": extra}
            answer = await asyncio.to_thread(self.post, "/prompt", queued)
            assert "prompt_id" in answer, answer
            asked = False
            async with asyncio.timeout(RUN_SECONDS):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        run.previews.append(message.data)
                        continue
                    event = json.loads(message.data)
                    run.events.append(event)
                    done = event["data"]["value"] if event["type"] == "progress" else 0
                    if interrupt_after and not asked and done >= interrupt_after:
                        asked, run.interrupted_after = True, done
                        await asyncio.to_thread(self.post, "/interrupt")
                    if event["type"] in (
                        "execution_success",
                        "execution_error",
                        "execution_interrupted",
                    ):
                        break
        for _ in range(100):
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                run.history = history[answer["prompt_id"]]
                return run
            await asyncio.sleep(0.1)
        raise AssertionError("the run is not in the history")

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise AssertionError(f"ComfyUI did not start:\n{self.log}")
