"""A CLIP of the real classes at toy size, saved as the published ones are."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE, TEXT_LIMIT = 8, 40  # pixels; tokens, start and end included


def save_toy_clip(folder: Path) -> None:
    """Write model and processor to a folder."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": TEXT_LIMIT,
            "bos_token_id": 0,
            "eos_token_id": len(words) - 1,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": 4},
        projection_dim=8,
    )
    model = CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # biases would make all pictures alike
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    size = {"height": SIDE, "width": SIDE}
    CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size), tokenizer
    ).save_pretrained(folder)
