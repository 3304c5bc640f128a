"""Models for test_model.py: code of a test file itself is rewritten by pytest, and has no key."""

import torch
from torch import nn

SCALE = 2.0


class Lora(nn.Module):
    """A linear layer with adapters by name; the active one is a plain attribute, as in peft."""

    def __init__(self, size, names):
        super().__init__()
        self.base = nn.Linear(size, size)
        self.lora_a = nn.ModuleDict({name: nn.Linear(size, 2, bias=False) for name in names})
        self.lora_b = nn.ModuleDict({name: nn.Linear(2, size, bias=False) for name in names})
        self.active = [names[0]]
        self.merged = False

    def forward(self, x):
        result = self.base(x)
        for name in self.active:
            result = result + self.lora_b[name](self.lora_a[name](x))
        return result


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Lora(4, ["one", "two"]) for _ in range(2)))

    def forward(self, x):
        return self.layers(x)

    def set_adapter(self, name):
        for layer in self.layers:
            layer.active = [name]


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = {"calls": torch.zeros(())}

    def forward(self, x):
        self.state["calls"].add_(1)
        return x * self.state["calls"]


class ByGlobal(nn.Module):
    def forward(self, x):
        return x * SCALE


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.thing = (n for n in range(3))

    def forward(self, x):
        return x + 1
