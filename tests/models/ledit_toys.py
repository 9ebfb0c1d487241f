"""Small LEDiT models whose every layer speaks, inputs for them, and two independent answers to both: a naive
twin written by coordinates, and diffusers' DiT."""

import math
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from toys import redraw

from localdit.models.ledit import LEDiTTransformer2DModel

LEDIT_TOY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "sample_size": 8,
    "num_classes": 10,
}


def toy_ledit(
    cls: type[LEDiTTransformer2DModel] = LEDiTTransformer2DModel, *, seed: int = 0, **config: Any
) -> Any:
    """A small model for evaluation with speaking weights. `config` overrides the toy sizes."""
    model = cls(**(LEDIT_TOY | config)).eval()
    redraw(model, seed)
    return model


def ledit_inputs(
    grid: tuple[int, int] = (4, 4), batch: int = 2, *, seed: int = 0, **config: Any
) -> dict[str, Any]:
    """Arguments of the forward pass for a grid of tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    patch, channels = config.get("patch_size", 2), config.get("in_channels", 4)
    shape = (batch, channels, *(patch * size for size in grid))
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "class_labels": torch.randint(0, 11, (batch,), generator=generator),
    }


def sees(variant: str, query: tuple[int, int], key: tuple[int, int], width: int) -> bool:
    """The table of masks, for one pair of tokens (row, column)."""
    (r, c), (key_r, key_c) = query, key
    rectangle = key_r <= r and key_c <= c
    near = abs(key_r - r) <= 1 and abs(key_c - c) <= 1
    return {
        "raster": key_r * width + key_c <= r * width + c,
        "rectangle": rectangle,
        "neighborhood": rectangle or near,
        "corner": not (key_r > r and key_c > c),
    }[variant]


def naive_mask(variant: str, height: int, width: int) -> Tensor:
    """(N, N), pair by pair."""
    tokens = [(r, c) for r in range(height) for c in range(width)]
    return torch.tensor([[sees(variant, query, key, width) for key in tokens] for query in tokens])


def naive_ledit(model: LEDiTTransformer2DModel, inputs: dict[str, Any], dilation: int = 1) -> Tensor:
    """What the model should compute, in float64, from its weights and config alone."""
    config, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    sample, labels, patch = inputs["hidden_states"].double(), inputs["class_labels"], config.patch_size
    batch, channels, height, width = sample.shape
    h, w_, dim = height // patch, width // patch, config.num_attention_heads * config.attention_head_dim

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    # Tokens, one patch at a time; (B, h, w, D).
    patches = sample.reshape(batch, channels, h, patch, w_, patch).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = patches @ w["patch_embed.weight"].flatten(1).T + w["patch_embed.bias"]
    if config.conv_kernel_size:
        kernel, groups, half = w["locality_conv.weight"], config.conv_groups, config.conv_kernel_size // 2
        y = w["locality_conv.bias"].expand(batch, h, w_, dim).clone()
        for r in range(h):
            for c in range(w_):
                for i in range(-half, half + 1):
                    for j in range(-half, half + 1):
                        at = r + i * dilation, c + j * dilation
                        if 0 <= at[0] < h and 0 <= at[1] < w_:
                            per_group = x[:, at[0], at[1]].unflatten(-1, (groups, -1))  # (B, G, D/G)
                            taps = kernel[:, :, i + half, j + half].unflatten(0, (groups, -1))
                            y[:, r, c] += torch.einsum("bgi,goi->bgo", per_group, taps).flatten(1)
        x = y
    x = x.reshape(batch, h * w_, dim)
    if config.conv_norm:
        x = norm(x) * w["locality_norm.weight"] + w["locality_norm.bias"]

    t = torch.as_tensor(inputs["timestep"]).double().expand(batch)
    angles = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    embedded = linear("timestep_embedder.linear_1", torch.cat((angles.cos(), angles.sin()), -1))
    embedded = linear("timestep_embedder.linear_2", nn.functional.silu(embedded))
    cond = nn.functional.silu(embedded + w["class_embedder.weight"][labels])

    factor = 1.0
    if config.scale_attention:
        factor = math.sqrt(math.log(h * w_) / math.log((config.sample_size // patch) ** 2))
    for index, kind in enumerate(naive_kinds(config.attention_pattern, config.num_layers)):
        name = f"transformer_blocks.{index}"
        shift, scale, gate, shift_f, scale_f, gate_f = (
            part[:, None] for part in linear(f"{name}.modulation", cond).chunk(6, -1)
        )
        y = norm(x) * (1 + scale) + shift
        q, k, v = (
            linear(f"{name}.attn1.to_{letter}", y)
            .unflatten(-1, (config.num_attention_heads, -1))
            .transpose(1, 2)
            for letter in "qkv"
        )
        logits = factor * q @ k.transpose(-1, -2) / math.sqrt(config.attention_head_dim)
        if kind == "ca":
            logits = logits.masked_fill(~naive_mask(config.causal_variant, h, w_), -math.inf)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + gate * linear(f"{name}.attn1.to_out.0", attended)
        y = norm(x) * (1 + scale_f) + shift_f
        hidden = nn.functional.gelu(linear(f"{name}.ff.net.0.proj", y), approximate="tanh")
        x = x + gate_f * linear(f"{name}.ff.net.2", hidden)

    shift, scale = (part[:, None] for part in linear("modulation_out", cond).chunk(2, -1))
    x = linear("proj_out", norm(x) * (1 + scale) + shift).reshape(batch, h, w_, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(batch, -1, height, width)


def naive_kinds(pattern: Any, layers: int) -> list[str]:
    half = layers // 2
    return (
        {
            "sa_ca": ["sa", "ca"] * half,
            "ca_sa": ["ca", "sa"] * half,
            "ca_first": ["ca"] * half + ["sa"] * half,
            "sa_first": ["sa"] * half + ["ca"] * half,
            "none": ["sa"] * layers,
        }[pattern]
        if isinstance(pattern, str)
        else list(pattern)
    )


def dit_of(model: LEDiTTransformer2DModel) -> DiTTransformer2DModel:
    """Diffusers' DiT with the model's weights, DiT's own time frequencies, and its position table."""
    config = model.config
    dit = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.norm_eps,
    ).eval()
    ours = model.state_dict()
    theirs = {}
    for name in dit.state_dict():
        source = name.replace("pos_embed.proj", "patch_embed").replace("proj_out_1", "modulation_out")
        source = source.replace("proj_out_2", "proj_out").replace("norm1.linear", "modulation")
        if ".norm1.emb." in source:
            source = source.partition(".norm1.emb.")[2].replace("embedding_table.", "")
        theirs[name] = ours.get(source)
    dit.load_state_dict(theirs, strict=True)
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return dit
