"""ComfyUI-RewardForcing: streams Reward Forcing checkpoints inside ComfyUI.

ComfyUI imports this file, under a name of its own; so do test runners that walk the tree. Nodes
are registered inside ComfyUI alone.
"""

import sys

if "comfy" in sys.modules and __package__:
    from .nodes import RewardForcing

    WEB_DIRECTORY = "./nodes/web"

    async def comfy_entrypoint():  # type: ignore[no-untyped-def]
        """ComfyUI's way in."""
        return RewardForcing()
