"""A small text encoder, trained from nothing to understand the captions of the synthetic scenes.

The T5 encoder (Raffel et al. 2020) is trained to say, from the words alone, what stands at each place of the
picture. The probe that asks is the cross-attention of a diffusion model in miniature: one learned query per
place, one layer of attention over the words, a linear readout. What it can read, image tokens can read later,
from the frozen features.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer

from localdit.data.samples import Samples
from localdit.data.scenes import (
    BACKGROUNDS,
    CHARACTERS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    as_users_write,
    captions,
    scene,
)
from localdit.training.order import Draws

# B batch   L text tokens   D width   P places

PLACES = ("left", "right", "above", "below", "centre")

# Where the first and the second object of a pair stand.
_STANDS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}
# Class 0 of every attribute is "nothing is said".
_CLASSES = {"color": 1 + len(COLORS), "shape": 1 + len(SHAPES), "size": 1 + len(SIZES)}


def train_tokenizer(captions: Iterable[str], vocab_size: int = 128) -> T5Tokenizer:
    """A T5 tokenizer for lower-case text: frequent words are one token each, anything else is spelt.

    As in T5, <pad> is 0, </s> is 1 and ends every text, <unk> is 2. No lower-case ASCII text holds an <unk>.
    Equal captions in any order give equal tokenizers.

    Args:
        captions: Lower-case texts to count words in.
        vocab_size: The most tokens there may be. Words that find no room, the rarest, are spelt.
    """
    specials = ("<pad>", "</s>", "<unk>")
    room = vocab_size - len(specials) - 1 - len(CHARACTERS)
    if room < 1:
        raise ValueError(f"vocab_size must be at least {vocab_size - room + 1}, got {vocab_size}")
    counts = Counter(word for text in captions for word in text.split())
    if not counts:
        raise ValueError("captions must hold at least one word, got none")

    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:room]
    words = [(f"▁{word}", math.log(counts[word] / counts.total())) for word in frequent]
    # The segmentation with the highest sum of scores wins. With spelling below every word and no score above
    # zero, a known word is never spelt.
    spelling = [(piece, words[-1][1] - 1) for piece in ("▁", *CHARACTERS)]
    vocab = [(special, 0.0) for special in specials] + spelling + words
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def parse_targets(
    described: Scene, names_size: Sequence[bool], names_background: bool
) -> tuple[Tensor, Tensor]:
    """What a caption says, as classes that start at 1; 0 where it says nothing.

    Args:
        described: The scene; colour and shape of its objects, and the relation, are always said.
        names_size: For each object, whether its size is.
        names_background: Whether the background is.

    Returns:
        objects (P, 3): colour, shape and size at each of `PLACES`. A lone object stands at the centre.
        background (): index in `BACKGROUNDS`.
    """
    objects = torch.zeros(len(PLACES), 3, dtype=torch.long)
    stands = ("centre",) if described.relation is None else _STANDS[described.relation]
    for o, place, sized in zip(described.objects, stands, names_size):
        look = list(COLORS).index(o.color), SHAPES.index(o.shape), SIZES.index(o.size) if sized else -1
        objects[PLACES.index(place)] = 1 + torch.tensor(look)
    background = list(BACKGROUNDS).index(described.background) if names_background else -1
    return objects, torch.tensor(1 + background)


class SceneCaptions(Samples):
    """Captions of random scenes in random wordings, tokenised, with what they say.

    Item i depends on the arguments and i alone. Its keys are the arguments of `scene_parsing_loss`.

    Args:
        tokenizer: Maps text to token ids; appends the end of the text itself.
        size: How many items there are.
        seed: Another seed, another set.
        held_out: Draw from the combinations that are kept out of training.
        length: Tokens per item, padded. The longest caption takes 17, with noise 31.
        empty_rate: Share of empty captions: the unconditional prompt says nothing of any place.
        noise_rate: Share of captions worded as users might: a size for one object only, no articles, words
            that mean nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        *,
        seed: int = 0,
        held_out: bool = False,
        length: int = 32,
        empty_rate: float = 0.05,
        noise_rate: float = 0.3,
    ):
        self.tokenizer, self.size, self.seed, self.held_out = tokenizer, size, seed, held_out
        self.length, self.empty_rate, self.noise_rate = length, empty_rate, noise_rate

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """input_ids and attention_mask (L,), objects (P, 3), background ()."""
        index, _ = key
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in [0, {self.size}), got {index}")
        rng = random.Random(f"caption/{self.seed}/{index}")
        described = scene(index, seed=self.seed, held_out=self.held_out)
        caption = rng.choice(captions(described))
        text, names_background = caption.text, caption.names_background
        names_size = [caption.names_size] * len(described.objects)
        draw = rng.random()
        if draw < self.empty_rate:
            text, described, names_background = "", Scene(described.background, ()), False
        elif draw < self.empty_rate + self.noise_rate:
            text, names_size = as_users_write(text, described, names_size, rng)
        objects, background = parse_targets(described, names_size, names_background)
        tokens = self.tokenizer(text, padding="max_length", max_length=self.length, return_tensors="pt")
        ids, mask = tokens.input_ids[0], tokens.attention_mask[0]
        if len(ids) > self.length:
            raise ValueError(f"length must be at least {len(ids)} to hold {text!r}, got {self.length}")
        return {"input_ids": ids, "attention_mask": mask, "objects": objects, "background": background}


class SceneLogits(NamedTuple):
    """What `SceneParser` reads from a text; class 0 is "nothing is said"."""

    color: Tensor  # (B, P, 9)
    shape: Tensor  # (B, P, 7)
    size: Tensor  # (B, P, 3)
    background: Tensor  # (B, 7)


class SceneParser(nn.Module, ConfigMixin):
    """A T5 encoder with a probe that asks its features what stands at each place of the picture.

    `text_encoder` is what is kept after training; the probe is thrown away. It is weak on purpose, one
    attention and one linear layer, so that binding words to places is left to the encoder.

    Args:
        vocab_size: Rows of the embedding table, at least `len(tokenizer)`.
        d_model, d_kv, d_ff, num_layers, num_heads: Sizes of the encoder, in T5's names: width, width of a
            head, inner width of the gated feed-forward, blocks, heads. num_heads divides d_model.
        relative_attention_num_buckets: Learned position offsets per head, half of them for each direction.
        relative_attention_max_distance: Tokens from which on all offsets are one.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 128,
        d_model: int = 128,
        d_kv: int = 32,
        d_ff: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 64,
    ):
        super().__init__()
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            relative_attention_num_buckets=relative_attention_num_buckets,
            relative_attention_max_distance=relative_attention_max_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        self.text_encoder = T5EncoderModel(config)
        # Word order alone says which of two objects stands where. From T5's start, std 1 / sqrt(d_model),
        # that was not learnt in 850 steps of 128 captions; from here it was in 500 steps of 64.
        position_bias = self.text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        nn.init.normal_(position_bias.weight, std=1.0)

        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, d_model))  # the last asks for the background
        self.attention = nn.MultiheadAttention(d_model, num_heads, bias=False, batch_first=True)
        self.to_object = nn.Linear(d_model, sum(_CLASSES.values()))
        self.to_background = nn.Linear(d_model, 1 + len(BACKGROUNDS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SceneLogits:
        """input_ids, attention_mask: (B, L), 1 = keep."""
        features = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, D)
        queries = self.queries.expand(len(features), -1, -1)  # (B, P + 1, D)
        padding = attention_mask == 0
        answers, _ = self.attention(queries, features, features, padding, need_weights=False)
        color, shape, size = self.to_object(answers[:, :-1]).split(list(_CLASSES.values()), dim=-1)
        return SceneLogits(color, shape, size, self.to_background(answers[:, -1]))


def scene_parsing_loss(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, objects: Tensor, background: Tensor
) -> Tensor:
    """Cross-entropy of what the text says: colour, shape, size (each a mean over the places) and background.

    Args:
        model: A `SceneParser`.
        input_ids, attention_mask: (B, L).
        objects, background: (B, P, 3) and (B,), as `parse_targets` gives them.

    Returns the sum of the four, a scalar, float32.
    """
    logits = model(input_ids, attention_mask)
    loss = F.cross_entropy(logits.background.float(), background)
    for one, target in zip((logits.color, logits.shape, logits.size), objects.unbind(-1)):
        loss = loss + F.cross_entropy(one.float().flatten(0, 1), target.flatten())
    return loss


@torch.no_grad()
def fully_parsed(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, objects: Tensor, background: Tensor
) -> Tensor:
    """Whether everything that a text says is read, and nothing that it does not say. Returns (B,), bool."""
    logits = model(input_ids, attention_mask)
    read = torch.stack([one.argmax(-1) for one in (logits.color, logits.shape, logits.size)], dim=-1)
    return (read == objects).flatten(1).all(-1) & (logits.background.argmax(-1) == background)


@dataclass
class SceneParsing:
    """The objective: understand captions of the scenes that training may show."""

    captions: int = 128_000  # in the training set
    seed: int = 0  # of the captions
    empty_rate: float = 0.05  # share of empty captions
    noise_rate: float = 0.3  # share of captions as users might write them, see `SceneCaptions`

    def prepare(self, model: SceneParser, folder: Path, accelerator: Any, stop: Any) -> SceneCaptions:
        """Make the tokenizer, of all words of the captions, and the training set."""
        drawn = (scene(index, seed=self.seed) for index in range(4000))  # enough to meet every word
        texts = (caption.text for described in drawn for caption in captions(described))
        self.tokenizer = train_tokenizer(texts, model.text_encoder.config.vocab_size)
        return SceneCaptions(
            self.tokenizer,
            self.captions,
            seed=self.seed,
            empty_rate=self.empty_rate,
            noise_rate=self.noise_rate,
        )

    def loss(self, model: nn.Module, draws: Draws, **batch: Tensor) -> Tensor:
        """`scene_parsing_loss`."""
        return scene_parsing_loss(model, **batch)

    def validate(self, model: nn.Module, accelerator: Any, stop: Any) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def report(self, model: Any) -> dict[str, float]:
        """Nothing more than the loss."""
        return {}

    def preview(self, model: nn.Module, stop: Any) -> None:
        """There is no picture to show."""

    def export(self, model: SceneParser, folder: Path) -> None:
        """Write the encoder and its tokenizer, as a pipeline's folders of these names hold them."""
        model.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
