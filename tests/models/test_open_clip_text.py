"""An open_clip text tower becomes a `CLIPTextModel` that computes what open_clip's layout says."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from localdit.models.open_clip_text import load_open_clip_text, to_open_clip

WORDS, PLACES, WIDTH, HIDDEN, LAYERS = 37, 9, 128, 96, 3


def tower(prefix: str = "") -> dict[str, Tensor]:
    """Random tensors in open_clip's layout, each of which speaks."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (WORDS, WIDTH),
        "positional_embedding": (PLACES, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        shapes |= {
            f"transformer.resblocks.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": (WIDTH,),
                "ln_1.bias": (WIDTH,),
                "attn.in_proj_weight": (3 * WIDTH, WIDTH),
                "attn.in_proj_bias": (3 * WIDTH,),
                "attn.out_proj.weight": (WIDTH, WIDTH),
                "attn.out_proj.bias": (WIDTH,),
                "ln_2.weight": (WIDTH,),
                "ln_2.bias": (WIDTH,),
                "mlp.c_fc.weight": (HIDDEN, WIDTH),
                "mlp.c_fc.bias": (HIDDEN,),
                "mlp.c_proj.weight": (WIDTH, HIDDEN),
                "mlp.c_proj.bias": (WIDTH,),
            }.items()
        }
    return {f"{prefix}{name}": 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def naive(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Every token's state after the last norm, in float64, from the tensors alone: (B, L, D)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, length = WIDTH // 64, ids.shape[1]
    x = w["token_embedding.weight"][ids] + w["positional_embedding"][:length]
    for i in range(LAYERS):
        block = {name.split(f"resblocks.{i}.")[-1]: t for name, t in w.items() if f"resblocks.{i}." in name}
        y = F.layer_norm(x, (WIDTH,), block["ln_1.weight"], block["ln_1.bias"], 1e-5)
        qkv = y @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in qkv.split(WIDTH, dim=-1))
        logits = q @ k.transpose(-1, -2) / math.sqrt(64)
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ block["attn.out_proj.weight"].T + block["attn.out_proj.bias"]
        y = F.layer_norm(x, (WIDTH,), block["ln_2.weight"], block["ln_2.bias"], 1e-5)
        y = y @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]
    return F.layer_norm(x, (WIDTH,), w["ln_final.weight"], w["ln_final.bias"], 1e-5)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "clip.safetensors"


@pytest.mark.parametrize("length", [5, PLACES])
def test_it_computes_what_the_layout_says(path, length):
    """And again when it was saved and loaded as a folder of transformers."""
    weights = tower()
    save_file(weights, path)
    model, report = load_open_clip_text(path)
    assert not model.training
    assert (
        report.found
        == f"{len(weights)} tensors: an open_clip text tower of 3 blocks of 128, 37 words and 9 places"
    )
    assert report.chosen == "a CLIPTextModel with heads of 64 and QuickGELU"
    ids = torch.randint(0, WORDS, (3, length))
    expected = naive(weights, ids)
    model.save_pretrained(path.parent / "folder")
    for each in (model, CLIPTextModel.from_pretrained(path.parent / "folder")):
        with torch.no_grad():
            states = each(ids).last_hidden_state
        assert ((states - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("prefix", ["", "text."])
def test_what_lies_beside_the_tower_is_left_aside_by_name(path, prefix):
    """A vision tower, the projections, the temperature and a constant mask; the tower's tensors return."""
    weights = tower(prefix)
    others = {
        "visual.conv1.weight": torch.randn(3, 3),
        "visual.transformer.resblocks.0.ln_1.weight": torch.randn(3),
        "logit_scale": torch.tensor(4.6),
        f"{prefix}text_projection": torch.randn(WIDTH, 8),
        f"{prefix}attn_mask": torch.zeros(PLACES, PLACES),
    }
    save_file(weights | others, path)
    model, report = load_open_clip_text(path, dtype=torch.bfloat16)
    assert {name for names in report.dropped.values() for name in names} == others.keys()
    back = to_open_clip(model.state_dict())
    assert {f"{prefix}{name}" for name in back} == weights.keys()
    assert all(tensor.equal(weights[f"{prefix}{name}"].bfloat16()) for name, tensor in back.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.resblocks.1.ls_1.gamma": (WIDTH,)},
            r"surplus \(1\):\n    transformer.resblocks.1.ls_1",
        ),
        ({"transformer.resblocks.2.attn.in_proj_bias": None}, r"missing \(1\):\n    transformer.resblocks.2"),
        (
            {"transformer.resblocks.0.mlp.c_proj.weight": (WIDTH, 3)},
            r"misshapen \(1\):\n .*mlp.c_proj.weight",
        ),
        ({"ln_final.bias": None}, r"missing \(1\):\n    ln_final.bias"),
        ({"token_embedding.weight": None}, r"the checkpoint must hold token_embedding.weight"),
        ({"token_embedding.weight": (WORDS, 100)}, "must be a multiple of 64 wide, the file has 100"),
        ({"transformer.resblocks.1.ln_1.weight": None}, r"missing \(1\):\n    transformer.resblocks.1.ln_1"),
    ],
)
def test_a_tower_that_is_not_whole_is_refused(path, change, message):
    weights = tower()
    for name, shape in change.items():
        weights.pop(name, None)
        weights |= {} if shape is None else {name: torch.ones(shape)}
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        load_open_clip_text(path)


def test_thirds_have_memory_of_their_own(path):
    """Queries, keys and values can be changed one by one."""
    save_file(tower(), path)
    model, _ = load_open_clip_text(path)
    before = load_file(path)["transformer.resblocks.0.attn.in_proj_weight"]
    with torch.no_grad():
        next(
            p for name, p in model.named_parameters() if name.endswith("layers.0.self_attn.k_proj.weight")
        ).zero_()
    after = to_open_clip(model.state_dict())["transformer.resblocks.0.attn.in_proj_weight"]
    assert (after != before).any(dim=1).tolist() == [False] * WIDTH + [True] * WIDTH + [False] * WIDTH
