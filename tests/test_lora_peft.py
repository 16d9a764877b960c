import pytest
import torch
from torch import nn

from rf_core.weights.lora import Lora, apply_loras

peft = pytest.importorskip("peft")  # the engine runs without it
LoHaConfig, LoKrConfig, LoraConfig = peft.LoHaConfig, peft.LoKrConfig, peft.LoraConfig


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(12, 12)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.ffn = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return x


LAYERS = {"target_modules": ["q", "ffn.2"], "r": 4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LAYERS, lora_alpha=3),
        LoraConfig(**LAYERS, lora_alpha=3, use_rslora=True),
        LoraConfig(**LAYERS, lora_alpha=3, use_dora=True),
        LoraConfig(**LAYERS, lora_alpha=3, lora_bias=True),
        LoraConfig(
            **LAYERS,
            lora_alpha=3,
            alpha_pattern={r"^blocks\.0\.ffn\.2": 5, "blocks.1.ffn.2": 6, "q": 7},
            rank_pattern={"ffn.2": 3},
        ),
        LoHaConfig(**LAYERS, alpha=3),
        LoKrConfig(**LAYERS, alpha=3),
        LoKrConfig(**LAYERS, alpha=3, decompose_both=True),
        LoKrConfig(**(LAYERS | {"r": 64}), alpha=3, alpha_pattern={"q": 5}),
    ],
)
def test_what_peft_saves_merges_as_peft_merges_it(tmp_path, config):
    torch.manual_seed(0)
    network = Network()
    before = {key: each.clone() for key, each in network.state_dict().items()}
    tuned = peft.get_peft_model(network, config)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            positive = "magnitude" in name
            values = torch.randn_like(parameter)
            parameter.data = values.abs() + 1 if positive else values
    tuned.save_pretrained(tmp_path)
    merged = apply_loras(before, [Lora(path=tmp_path)])
    expected = tuned.merge_and_unload().state_dict()
    for key, each in expected.items():
        torch.testing.assert_close(merged[key], each, atol=1e-4, rtol=1e-5)
        assert torch.equal(each, before[key]) == (key not in merged or merged[key] is before[key])
