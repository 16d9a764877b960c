"""The trainer's part of the self-check: its losses against recorded outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rf_core.config import NUM_TRAIN_TIMESTEPS
from rf_core.measure.verify import Backend, Kinds, Outputs, Tensors

from .losses import critic_loss, generator_loss, guided, matching_direction, reward_weights


def redmd_losses(config: Mapping[str, Any], tensors: Tensors, backend: Backend) -> Outputs:
    """One sample's rewarded matching loss with its gradient, and the critic's flow loss."""
    t = {name: tensor.to(backend.device, backend.dtype) for name, tensor in tensors.items()}
    mask = t.get("gradient_mask")
    real = guided(t["real_cond"], t["real_uncond"], config["guidance"])
    weight = reward_weights(torch.tensor([config["motion_quality"]]), config["beta"])
    with torch.enable_grad():
        x0 = t["x"].requires_grad_(True)
        direction = matching_direction(x0, t["fake"], real)
        loss = weight.to(x0) * generator_loss(x0, direction, mask)
        (gradient,) = torch.autograd.grad(loss.sum(), x0)
    yield "loss", loss
    yield "grad_x", gradient
    noisy, timestep = t["critic_noisy"], tensors["critic_timestep"].to(backend.device)
    sigma = timestep.view(*timestep.shape, *[1] * (noisy.ndim - 2)) / NUM_TRAIN_TIMESTEPS
    flow = ((noisy.float() - t["critic_x0_pred"].float()) / sigma).to(noisy.dtype)
    yield "critic_loss", critic_loss(flow, t["critic_generated"], t["critic_noise"])


KINDS: Kinds = {"redmd_losses": redmd_losses}
