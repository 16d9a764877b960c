"""ComfyUI-RewardForcing: streams Reward Forcing checkpoints inside ComfyUI.

ComfyUI imports this file; so do test runners that walk the tree. Nodes are registered inside
ComfyUI alone. There are none yet: the engine in `rf_core` stands by itself.
"""
