"""VACE beside a student: the network, against diffusers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from rf_core.attention import sdpa
from rf_core.config import ModelConfig, VaceConfig
from rf_core.vace import ControlledModel, Vace
from rf_core.weights.layouts import to_diffusers

CHANNELS = 2 * tiny.CONFIG.in_dim + 64  # of a control: latents kept and changed, and a mask
DEEP = replace(tiny.CONFIG, num_layers=5)


def vace(config: ModelConfig = tiny.CONFIG, layers: tuple[int, ...] = (0,), seed: int = 5) -> Vace:
    """A VACE whose every part matters."""
    return tiny.randomise(Vace(config, VaceConfig(layers=layers, in_channels=CHANNELS)), seed)


def context(frames: int = 3, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """A control's context for latents of 4 x 6."""
    generator = torch.Generator().manual_seed(500 + seed)
    return torch.randn(batch, CHANNELS, frames, 4, 6, generator=generator)


def theirs(base, network: Vace):
    """diffusers' network of the same sizes, with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    c = base.config
    twin = diffusers.WanVACETransformer3DModel(
        patch_size=c.patch_size,
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        vace_layers=list(network.config.layers),
        vace_in_channels=network.config.in_channels,
    )
    weights = {**base.state_dict(), **network.state_dict()}
    twin.load_state_dict({to_diffusers(key): tensor for key, tensor in weights.items()})
    return twin.eval()


@pytest.mark.parametrize("scales", [None, (0.3, 1.7)], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    ("config", "layers", "batch", "size"),
    [
        (tiny.CONFIG, (0, 1), 1, (3, 4, 6)),
        (DEEP, (0, 2), 2, (4, 6, 4)),
        (replace(DEEP, num_heads=4, eps=1e-5), (0, 4), 3, (1, 4, 10)),
    ],
    ids=["every block", "every other block", "the first and the last"],
)
def test_the_bidirectional_flow_is_that_of_diffusers(config, layers, batch, size, scales):
    base, network = tiny.model(config), vace(config, layers)
    frames, rows, columns = size
    generator = torch.Generator().manual_seed(1)
    x, control = (
        torch.randn(batch, channels, frames, rows, columns, generator=generator)
        for channels in (config.in_dim, CHANNELS)
    )
    at, embeds = torch.tensor([875.0, 20.0, 500.0])[:batch], tiny.prompt(batch=batch)
    ours = ControlledModel(base, network)
    tokens = ours.embed_control(control, torch.ones(frames), torch.float32)
    if scales is not None:  # of each layer, as diffusers has them: ours is one for all
        with torch.no_grad():
            for block, scale in zip(network.vace_blocks, scales, strict=True):
                block.after_proj.weight.mul_(scale)
                block.after_proj.bias.mul_(scale)
    mine = ours(x, at[:, None].expand(-1, frames), ours.prompt_context(embeds), None, sdpa, tokens)
    if scales is not None:
        with torch.no_grad():
            for block, scale in zip(network.vace_blocks, scales, strict=True):
                block.after_proj.weight.div_(scale)
                block.after_proj.bias.div_(scale)
    wanted = theirs(base, network)(
        x,
        at,
        embeds,
        control_hidden_states=control,
        control_hidden_states_scale=None if scales is None else torch.tensor(scales),
    ).sample
    plain = base(x, at[:, None].expand(-1, frames), base.prompt_context(embeds))
    assert (mine - wanted).abs().max() <= 2e-5
    assert (mine - plain).abs().max() > 0.05


def flow_of(network, x, at, embeds, *rest):
    return network(x, at, network.prompt_context(embeds), None, sdpa, *rest)


def test_a_vace_that_begins_its_training_hints_nothing_and_alone_gets_gradients():
    base, network = tiny.model(DEEP), Vace(DEEP, VaceConfig(layers=(0, 2), in_channels=CHANNELS))
    network.initialise(base, torch.Generator().manual_seed(0))
    both = ControlledModel(base, network)
    x, at = torch.randn(1, 4, 3, 4, 6), torch.full((1, 3), 500.0)
    tokens = both.embed_control(context(), torch.ones(3), torch.float32)
    flow = flow_of(both, x, at, tiny.prompt(), tokens)
    assert torch.allclose(flow, flow_of(base, x, at, tiny.prompt()), atol=1e-6)
    flow.square().sum().backward()
    assert network.vace_blocks[1].after_proj.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in base.parameters())
    block = network.vace_blocks[1].state_dict()
    own = {key: tensor for key, tensor in block.items() if not key.startswith("after_proj")}
    assert all(torch.equal(t, base.blocks[2].state_dict()[key]) for key, t in own.items())


def test_a_vace_of_other_sizes_or_layers_is_refused():
    with pytest.raises(ValueError, match="numbered from 0"):
        Vace(tiny.CONFIG, VaceConfig(layers=(0, 2), in_channels=CHANNELS))
    with pytest.raises(ValueError, match="take one of the base's sizes"):
        ControlledModel(tiny.model(), vace(DEEP))
    for layers in ((), (1, 2), (0, 2, 1), (0, 0), ("0",)):
        with pytest.raises(ValueError, match="rise from 0"):
            VaceConfig(layers=layers)
