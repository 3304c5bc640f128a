"""Models as people have them: ``keys_zoo.py NAME...`` compiles each and says how it was found, as JSON."""

import json
import math
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn

import stitchcache

PIXELS = (torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32),)
STEPS = (torch.linspace(-1, 1, 2 * 5 * 4).reshape(2, 5, 4),)
ROWS = (torch.ones(2, 4),)
NOISE = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)


class Builtins(nn.Module):
    """Calls what torch.export replaces while it traces."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * min(3, x.shape[0]) * max(2, 5) * math.pow(2.0, 3) * math.floor(2.5)


@torch.fx.wrap
def wrapped(x):
    return x * 2


class Wrapped(nn.Module):
    def forward(self, x):
        return wrapped(x)


class Bidirectional(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x)[0]


@torch.library.custom_op("keys_zoo::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return twice(self.linear(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda x: self.linear(x).sin(), lambda x: self.linear(x).cos() * LEVEL, (x,)
        )


LEVEL = 3.0


def swin():
    import transformers

    sizes = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "embed_dim": 16}
    return transformers.SwinModel(transformers.SwinConfig(image_size=32, patch_size=4, **sizes)), PIXELS


def timm_vit():
    import timm

    sizes = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes), PIXELS


def timm_swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "embed_dim": 16}
    return SwinTransformer(img_size=32, patch_size=4, **sizes), PIXELS


def unet():
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return model, (NOISE, torch.tensor([1]))


def dit():
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    channels = {"in_channels": 4, "out_channels": 8, "norm_num_groups": 4, "num_embeds_ada_norm": 10}
    model = diffusers.DiTTransformer2DModel(patch_size=2, **sizes, **channels)
    return model, (NOISE, torch.tensor([1]), torch.tensor([3]))


MODELS = {
    "builtins": lambda: (Builtins(), ROWS),
    "fx.wrap": lambda: (Wrapped(), ROWS),
    "lstm": lambda: (nn.LSTM(4, 8, batch_first=True), STEPS),
    "lstm within": lambda: (Bidirectional(), STEPS),
    "gru": lambda: (nn.GRU(4, 8, batch_first=True), STEPS),
    "custom_op": lambda: (Custom(), ROWS),
    "cond": lambda: (Branches(), ROWS),
    "swin": swin,
    "timm vit": timm_vit,
    "timm swin": timm_swin,
    "diffusers unet": unet,
    "diffusers dit": dit,
}


def found(name):
    torch.manual_seed(0)
    model, args = MODELS[name]()
    model.eval()
    with torch.no_grad():
        want = torch.utils._pytree.tree_leaves(model(*args))
        served = stitchcache.compile(model, args, backend="eager", check="none")
        got = torch.utils._pytree.tree_leaves(served(*args))
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, got, strict=True))
    return {"hit": served.cache_hit, "same": same}


if __name__ == "__main__":
    import logging

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("stitchcache").addHandler(handler)
    logging.getLogger("stitchcache").setLevel("INFO")
    json.dump({**{name: found(name) for name in sys.argv[1:]}, "log": told}, sys.stdout)
