"""The server these tests share, and the pack in this process.

They run in ComfyUI's own environment (`make test-comfy`); elsewhere none is collected.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .server import Server

PACK = "rf_pack"
_NEEDED = ("aiohttp", "comfy_cli")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, _NEEDED)) else ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests."""
    from .files import write_models, write_nodes, write_video
    from .server import Server, comfy_root

    if comfy_root() is None:
        pytest.skip("there is no ComfyUI; set COMFYUI_PATH")
    base = tmp_path_factory.mktemp("comfy")
    write_models(base / "models")
    write_video(base / "input")
    write_nodes(base / "custom_nodes")
    running = Server(base)  # as installed: what it shows must need no flag
    yield running
    running.stop()


@pytest.fixture(scope="module")
def pack() -> Iterator[Any]:
    """The pack, imported as ComfyUI imports it, on the CPU."""
    from .server import ROOT, comfy_root

    root = comfy_root()
    if root is None:
        pytest.skip("there is no ComfyUI; set COMFYUI_PATH")
    sys.path.insert(0, str(root))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # reads the arguments

    sys.argv = arguments
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(root))


@pytest.fixture
def host(pack: Any) -> Any:
    """`nodes.host` of the pack."""
    return importlib.import_module(f"{PACK}.nodes.host")


@pytest.fixture
def demo(pack: Any) -> Any:
    """`nodes.demo` of the pack."""
    return importlib.import_module(f"{PACK}.nodes.demo")
