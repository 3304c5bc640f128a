"""Models of many libraries from tiny configurations with random weights: name to a function that builds one.

Each gives a model in evaluation mode and an example call. ``names`` leaves out what is not installed here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Built = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PICTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}


def _tokens() -> torch.Tensor:
    return torch.arange(2, 22).view(2, 10)


def _of_config(kind: str, auto: str, given: Callable[[], dict[str, Any]], **config: Any) -> Built:
    import transformers

    made = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **config))
    return made.eval(), (), given()


def _encoder_call() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


def _decoder_call() -> dict[str, Any]:
    return {"input_ids": _tokens(), "use_cache": False}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


def _pair() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :4], "use_cache": False}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.linspace(-1, 1, 3200).view(2, 1600)}


_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "camembert": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 16},
    "mpnet": {},
    "ernie": {},
    "megatron-bert": {},
    "roformer": {},
    "deberta-v2": {},
    "modernbert": {"global_attn_every_n_layers": 2},
    "fnet": {"type_vocab_size": 4},
    "rembert": {"input_embedding_size": 32},
    "convbert": {"embedding_size": 32},
    "nystromformer": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "squeezebert": {
        "embedding_size": 32,
        "q_groups": 1,
        "k_groups": 1,
        "v_groups": 1,
        "post_attention_groups": 1,
        "intermediate_groups": 1,
        "output_groups": 1,
    },
}
_SHARED = {"num_key_value_heads": 2}
_EIGHT = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_QUANTIZED = (
    "int8 weight-only",
    "int8 dynamic",
    "int4 weight-only",
    "int8 dynamic, int4",
    "float8 weight-only",
)
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": _SHARED,
    "mistral": _SHARED,
    "qwen2": _SHARED,
    "qwen3": {**_SHARED, "head_dim": 8},
    "gemma": {**_SHARED, "head_dim": 8},
    "gemma2": {**_SHARED, "head_dim": 8},
    "phi": _SHARED,
    "phi3": _SHARED,
    "olmo": _SHARED,
    "olmo2": _SHARED,
    "granite": _SHARED,
    "cohere": _SHARED,
    "stablelm": _SHARED,
    "starcoder2": _SHARED,
    "smollm3": _SHARED,
    "gpt_neox": {},
    "persimmon": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "codegen": {**_GPT, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "mixtral": {**_SHARED, "num_local_experts": 4},
    "qwen2_moe": {
        **_SHARED,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
_HIERARCHY = {"image_size": 32, "num_channels": 3, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_PICTURES: dict[str, dict[str, Any]] = {
    "vit": PICTURE,
    "deit": PICTURE,
    "beit": PICTURE,
    "dinov2": PICTURE,
    "ijepa": PICTURE,
    "vit_mae": PICTURE,
    "resnet": {**_HIERARCHY, "embedding_size": 8},
    "regnet": {**_HIERARCHY, "embedding_size": 8, "groups_width": 4},
    "convnext": {**_HIERARCHY, "num_stages": 4},
    "convnextv2": {**_HIERARCHY, "num_stages": 4},
    "swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "segformer": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
    },
    "poolformer": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
    "mobilenet_v2": {"image_size": 32},
    "efficientnet": {"image_size": 32},
}
_SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "pad_token_id": 0,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
_SEQUENCES: dict[str, dict[str, Any]] = {
    "bart": _SEQ,
    "mbart": _SEQ,
    "pegasus": _SEQ,
    "marian": {**_SEQ, "decoder_start_token_id": 0},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
}
_WAVES = {
    **SMALL,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

_TIMM = (
    "resnet18",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mixer_s32_224",
    "regnetx_002",
    "ghostnet_050",
)


_TORCHVISION = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "efficientnet_b0",
    "regnet_y_400mf",
    "vgg11",
    "swin_t",
)
_DECLARED: list[torch.library.Library] = []


def _torchvision_or_its_python() -> Any:
    """torchvision, also where its C++ part does not fit this build of torch: these models need none of it."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        return importlib.import_module("torchvision")


def _torchvision(name: str) -> Built:
    made = getattr(_torchvision_or_its_python().models, name)(weights=None, num_classes=10)
    return made.eval(), (torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64),), {}


def _timm(name: str) -> Built:
    _torchvision_or_its_python()
    import timm

    size = {"img_size": 64} if name.startswith(("vit", "mixer")) else {}
    made = timm.create_model(name, pretrained=False, num_classes=10, **size).eval()
    return made, (torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64),), {}


def _image(channels: int, size: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * channels * size * size).view(2, channels, size, size)


def _dit() -> Built:
    from diffusers import DiTTransformer2DModel

    made = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    call = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2]), "return_dict": False}
    return made.eval(), (_image(4),), call


def _unet() -> Built:
    from diffusers import UNet2DModel

    made = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return made.eval(), (_image(3, 16), torch.tensor([1, 2])), {"return_dict": False}


def _vae() -> Built:
    from diffusers import AutoencoderKL

    made = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=16)
    return made.eval(), (_image(3, 16),), {"return_dict": False}


def _flux() -> Built:
    from diffusers import FluxTransformer2DModel

    made = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    call = {
        "hidden_states": torch.linspace(-1, 1, 64).view(1, 16, 4),
        "encoder_hidden_states": torch.linspace(-1, 1, 256).view(1, 8, 32),
        "pooled_projections": torch.linspace(-1, 1, 32).view(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    return made.eval(), (), call


class Sentences(torch.nn.Module):
    """A sentence encoder's modules, over the features that its tokenizer would make."""

    def __init__(self) -> None:
        super().__init__()
        from sentence_transformers.models import Normalize, Pooling

        self.transformer = _of_config("bert", "AutoModel", _encoder_call, **SMALL)[0]
        self.pooling, self.normalize = Pooling(32), Normalize()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = self.pooling({"token_embeddings": states, "attention_mask": attention_mask})
        found: torch.Tensor = self.normalize(pooled)["sentence_embedding"]
        return found


def _sentences() -> Built:
    return Sentences().eval(), (), _encoder_call()


def _quantized(kind: str) -> Built:
    import torchao.quantization as ao

    groups = ao.PerGroup(32)
    config = {
        "int8 weight-only": lambda: ao.Int8WeightOnlyConfig(),
        "int8 dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int4 weight-only": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
        "int8 dynamic, int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=groups
        ),
        "float8 weight-only": lambda: ao.Float8WeightOnlyConfig(),
    }[kind]()
    made, args, kwargs = _of_config("llama", "AutoModelForCausalLM", _decoder_call, **{**SMALL, **_SHARED})
    ao.quantize_(made, config)
    return made, args, kwargs


def _adapted() -> Built:
    import peft

    made, args, kwargs = _of_config("bert", "AutoModel", _encoder_call, **SMALL)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(made, config).eval(), args, kwargs


@dataclass
class Boxes:
    """A part of a result."""

    corners: torch.Tensor
    scores: torch.Tensor


@dataclass
class Found:
    """A result with another one in it."""

    boxes: Boxes
    count: torch.Tensor


torch.export.register_dataclass(Boxes, serialized_type_name="zoo_models.Boxes")
torch.export.register_dataclass(Found, serialized_type_name="zoo_models.Found")


class Detects(torch.nn.Module):
    """Gives dataclasses in one another."""

    def __init__(self) -> None:
        super().__init__()
        self.corners, self.score = torch.nn.Linear(8, 4), torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> Found:
        scores = self.score(x).sigmoid()
        return Found(Boxes(self.corners(x), scores), (scores > 0.5).sum())


class Branches(torch.nn.Module):
    """Takes a branch by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cond(x.sum() > 0, self.one, self.other, (x,))
        return found


class Counts(torch.nn.Module):
    """Whole numbers in and out."""

    def forward(self, x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x * by, torch.bincount(x.flatten(), minlength=16)


def _own(kind: str) -> Built:
    made: torch.nn.Module
    if kind in ("LSTM", "GRU"):
        made = getattr(torch.nn, kind)(8, 16, 2, batch_first=True)
        return made.eval(), (torch.linspace(-1, 1, 80).view(2, 5, 8),), {}
    if kind == "EmbeddingBag":
        made = torch.nn.EmbeddingBag(32, 8)
        return made.eval(), (torch.arange(12).view(3, 4),), {}
    if kind == "bfloat16":
        made = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(torch.bfloat16)
        return made.eval(), (torch.linspace(-1, 1, 160).view(2, 5, 16).to(torch.bfloat16),), {}
    if kind == "dataclasses":
        return Detects().eval(), (torch.linspace(-1, 1, 16).view(2, 8),), {}
    if kind == "cond":
        return Branches().eval(), (torch.linspace(-1, 2, 16).view(2, 8),), {}
    if kind == "integers":
        return Counts().eval(), (torch.arange(12).view(3, 4), 3), {}
    made = torch.nn.Linear(8, 8, dtype=torch.complex64)
    return made.eval(), (torch.linspace(-1, 1, 16).view(2, 8).to(torch.complex64),), {}


def zoo() -> dict[str, Callable[[], Built]]:
    """Every model by ``library/name``."""
    found: dict[str, Callable[[], Built]] = {}
    for name, more in _ENCODERS.items():
        found[f"transformers/{name}"] = partial(
            _of_config, name, "AutoModel", _encoder_call, **{**SMALL, **more}
        )
    for name, more in _DECODERS.items():
        found[f"transformers/{name}"] = partial(
            _of_config, name, "AutoModelForCausalLM", _decoder_call, **{**SMALL, **more}
        )
    for name, config in _PICTURES.items():
        found[f"transformers/{name}"] = partial(_of_config, name, "AutoModel", _pixels, **config)
    for name, config in _SEQUENCES.items():
        found[f"transformers/{name}"] = partial(_of_config, name, "AutoModel", _pair, **config)
    for name in ("wav2vec2", "hubert"):
        found[f"transformers/{name}"] = partial(_of_config, name, "AutoModel", _sound, **_WAVES)
    for name in _TIMM:
        found[f"timm/{name}"] = partial(_timm, name)
    for name, build in (("DiT", _dit), ("UNet2D", _unet), ("AutoencoderKL", _vae), ("Flux", _flux)):
        found[f"diffusers/{name}"] = build
    found["sentence_transformers/bert"] = _sentences
    for name in _TORCHVISION:
        found[f"torchvision/{name}"] = partial(_torchvision, name)
    for kind in _QUANTIZED:
        found[f"torchao/llama, {kind}"] = partial(_quantized, kind)
    found["peft/bert with LoRA"] = _adapted
    for name in ("llama", "qwen3"):
        found[f"transformers/{name}, 8 layers"] = partial(
            _of_config, name, "AutoModelForCausalLM", _decoder_call, **{**_EIGHT, **_DECODERS[name]}
        )
    for kind in (
        "LSTM", "GRU", "EmbeddingBag", "bfloat16", "complex64", "integers", "cond", "dataclasses",
    ):  # fmt: skip
        found[f"torch/{kind}"] = partial(_own, kind)
    return found


def names() -> list[str]:
    """Those whose library is installed here."""
    libraries = {name.partition("/")[0] for name in zoo()}
    here = {library for library in libraries if importlib.util.find_spec(library) is not None}
    return [name for name in zoo() if name.partition("/")[0] in here]
