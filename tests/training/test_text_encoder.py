"""The text side of LocalDiT-Mini: its tokenizer, the captions it learns from, and the objective."""

import math
import random
import re
import string
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel, T5Tokenizer

from localdit.data.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, is_held_out, scene
from localdit.data.scenes import captions as wordings
from localdit.training.text_encoder import (
    PLACES,
    SceneCaptions,
    SceneParser,
    SceneParsing,
    fully_parsed,
    scene_parsing_loss,
    train_tokenizer,
)

TEXTS = [caption.text for index in range(400) for caption in wordings(scene(index))]
TOY = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return train_tokenizer(TEXTS)


def batch_of(data: SceneCaptions, count: int) -> dict[str, Tensor]:
    return torch.utils.data.default_collate([data[index, 0] for index in range(count)])


def loud(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


# Tokenizer


def test_words_of_the_grammar_are_one_token_each(tokenizer):
    text = random.choice(TEXTS)
    assert tokenizer(text).tokens() == [f"▁{word}" for word in text.split()] + ["</s>"]
    words = {word for text in TEXTS for word in text.split()}
    assert all(len(tokenizer(word).input_ids) == 2 for word in words)


def test_special_tokens_are_numbered_as_in_t5(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer("").input_ids == [1]
    padded = tokenizer(["", "a star"], padding="max_length", max_length=4)
    assert padded.input_ids[0] == [1, 0, 0, 0]
    assert padded.attention_mask == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_any_lower_case_text_is_spelt_without_unknowns_and_read_back(tokenizer):
    characters = string.ascii_lowercase + string.digits + string.punctuation
    for _ in range(100):
        words = ["".join(random.choices(characters, k=random.randint(1, 9))) for _ in range(5)]
        ids = tokenizer("  ".join(words)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[:-1]) == " ".join(words)


def test_a_tokenizer_depends_on_the_counts_of_words_alone(tokenizer):
    shuffled = random.sample(TEXTS, len(TEXTS))
    assert train_tokenizer(shuffled).get_vocab() == tokenizer.get_vocab()


def test_words_that_find_no_room_are_spelt():
    spare = 3 + 1 + len(string.ascii_lowercase + string.digits + string.punctuation)
    tokenizer = train_tokenizer(["often often rare"], vocab_size=spare + 1)
    assert len(tokenizer) == spare + 1
    assert tokenizer("often rare").tokens() == ["▁often", "▁", "r", "a", "r", "e", "</s>"]
    with pytest.raises(ValueError, match=f"vocab_size must be at least {spare + 1}, got {spare}"):
        train_tokenizer(["often"], vocab_size=spare)
    with pytest.raises(ValueError, match="captions must hold at least one word"):
        train_tokenizer(["", " "])


@pytest.mark.parametrize("loader", [AutoTokenizer, T5Tokenizer])
def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path, loader):
    tokenizer.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    texts = [random.choice(TEXTS), "an unseen word, or 2?", ""]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert len(loaded) == len(tokenizer)


# Captions


def said(text: str) -> tuple[dict[str, tuple[int, int, int]], int]:
    """What a caption says, found by a pattern in the words: objects by place, and the background."""
    color, shape, size = ("|".join(words) for words in (COLORS, SHAPES, SIZES))
    objects = [
        (1 + list(COLORS).index(c), 1 + SHAPES.index(s), 1 + SIZES.index(z) if z else 0)
        for z, c, s in re.findall(rf"(?:({size}) )?({color}) ({shape})", text)
    ]
    places = {"left": ("left", "right"), "right": ("right", "left")}
    places |= dict.fromkeys(("above", "over"), ("above", "below"))
    places |= dict.fromkeys(("below", "under"), ("below", "above"))
    relation = re.search("|".join(places), text)
    ground = re.search(f"({'|'.join(BACKGROUNDS)}) background", text)
    stands = places[relation[0]] if relation else ("centre",)
    return dict(zip(stands, objects, strict=True)), 1 + list(BACKGROUNDS).index(ground[1]) if ground else 0


@pytest.mark.parametrize("held_out", [False, True])
def test_targets_are_what_the_words_say(tokenizer, held_out):
    data = SceneCaptions(tokenizer, 200, held_out=held_out, empty_rate=0, noise_rate=0)
    for index in range(200):
        item = data[index, 0]
        objects, background = said(tokenizer.decode(item["input_ids"], skip_special_tokens=True))
        for place, target in zip(PLACES, item["objects"].tolist()):
            assert tuple(target) == objects.get(place, (0, 0, 0))
        assert item["background"].item() == background


@pytest.mark.parametrize("held_out", [False, True])
def test_pairs_come_from_their_side_of_the_split(tokenizer, held_out):
    data = SceneCaptions(tokenizer, 100, seed=random.randrange(1000), held_out=held_out, empty_rate=0)
    pairs = [objects for objects in batch_of(data, 100)["objects"].tolist() if not objects[-1][0]]
    assert len(pairs) > 20
    for left, right, above, below, _ in pairs:
        first, second = (left, right) if left[0] else (above, below)
        looks = [
            SceneObject(list(COLORS)[color - 1], SHAPES[shape - 1], "small", 0, 0, 0)
            for color, shape, _ in (first, second)
        ]
        drawn = Scene("white", tuple(looks), "left of" if left[0] else "above")
        assert is_held_out(drawn) == held_out


def test_an_item_depends_on_seed_and_index_alone(tokenizer):
    seed = random.randrange(1000)
    short, long = (SceneCaptions(tokenizer, size, seed=seed) for size in (20, 40))
    later = [long[index, 7] for index in reversed(range(20))]
    for index in range(20):
        for name, tensor in short[index, 0].items():
            assert torch.equal(tensor, later[19 - index][name])
    other = SceneCaptions(tokenizer, 20, seed=seed + 1)
    assert not torch.equal(batch_of(short, 20)["input_ids"], batch_of(other, 20)["input_ids"])
    with pytest.raises(IndexError, match=r"index must be in \[0, 20\), got 20"):
        short[20, 0]


def test_the_empty_caption_says_nothing(tokenizer):
    data = SceneCaptions(tokenizer, 9, empty_rate=1.0)
    batch = batch_of(data, 9)
    assert batch["input_ids"].tolist() == [[1] + [0] * 31] * 9
    assert not batch["objects"].any()
    assert not batch["background"].any()


def test_noise_hides_at_most_a_size_of_what_is_said(tokenizer):
    plain = batch_of(SceneCaptions(tokenizer, 300, empty_rate=0, noise_rate=0), 300)
    noisy = batch_of(SceneCaptions(tokenizer, 300, empty_rate=0, noise_rate=1), 300)
    assert (plain["input_ids"] != noisy["input_ids"]).any(-1).float().mean() > 0.75
    assert (noisy["input_ids"] != tokenizer.unk_token_id).all()
    assert torch.equal(plain["objects"][..., :2], noisy["objects"][..., :2])
    assert torch.equal(plain["background"], noisy["background"])

    before, after = plain["objects"][..., 2], noisy["objects"][..., 2]
    lost = (before != after).sum(-1)
    assert set(lost.tolist()) == {0, 1}
    assert (after[before != after] == 0).all()
    for ids, sizes in zip(noisy["input_ids"], after):
        assert len(re.findall("small|large", tokenizer.decode(ids))) == (sizes > 0).sum()


def test_a_caption_is_never_cut(tokenizer):
    data = SceneCaptions(tokenizer, 50, length=5, empty_rate=0)
    with pytest.raises(ValueError, match="length must be at least"):
        batch_of(data, 50)


# Objective


def test_gradients_reach_every_parameter(tokenizer):
    model = loud(SceneParser(len(tokenizer), **TOY))
    loss = scene_parsing_loss(model, **batch_of(SceneCaptions(tokenizer, 16), 16))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_knowing_nothing_costs_the_logarithm_of_the_choices(tokenizer):
    model = loud(SceneParser(len(tokenizer), **TOY))
    for layer in (model.to_object, model.to_background):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    loss = scene_parsing_loss(model, **batch_of(SceneCaptions(tokenizer, 5), 5))
    choices = [1 + len(names) for names in (COLORS, SHAPES, SIZES, BACKGROUNDS)]
    assert loss.item() == pytest.approx(sum(math.log(n) for n in choices), rel=1e-5)


def test_padding_changes_no_answer(tokenizer):
    """The features of the words too are the same at any padded length: a pipeline pads to 120."""
    model = loud(SceneParser(len(tokenizer), **TOY)).eval()
    texts = ["a red star", "", "a small blue cross on the left of an unheard-of thing"]
    with torch.no_grad():
        for text in texts:
            alone = tokenizer(text, return_tensors="pt")
            padded = tokenizer(text, padding="max_length", max_length=120, return_tensors="pt")
            for a, b in zip(model(**alone), model(**padded)):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            a, b = (model.text_encoder(**tokens).last_hidden_state for tokens in (alone, padded))
            torch.testing.assert_close(a, b[:, : a.shape[1]], rtol=1e-5, atol=1e-5)


def test_captions_count_as_parsed_only_if_all_is_right(tokenizer):
    model = loud(SceneParser(len(tokenizer), **TOY)).eval()
    batch = batch_of(SceneCaptions(tokenizer, 6), 6)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"])
    read = [one.argmax(-1) for one in logits]
    batch["objects"], batch["background"] = torch.stack(read[:3], dim=-1), read[3].clone()
    for item, (place, attribute) in enumerate(((0, 0), (4, 1), (2, 2))):
        batch["objects"][item, place, attribute] = 1 - batch["objects"][item, place, attribute]
    batch["background"][3] = (batch["background"][3] + 1) % 7
    assert fully_parsed(model, **batch).tolist() == [False] * 4 + [True] * 2


def test_the_parser_learns_a_few_captions_by_heart(tokenizer):
    model = SceneParser(len(tokenizer), **TOY)
    batch = batch_of(SceneCaptions(tokenizer, 12, noise_rate=0), 12)
    for name, row in zip(batch, SceneCaptions(tokenizer, 1, empty_rate=1.0)[0, 0].values()):
        batch[name][0] = row
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = scene_parsing_loss(model, **batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fully_parsed(model, **batch).all()


def test_the_finished_encoder_loads_without_this_package(tmp_path: Path):
    objective = SceneParsing(captions=8)
    model = loud(SceneParser.from_config({"vocab_size": 120, **TOY}))
    data = objective.prepare(model, tmp_path, None, None)
    loss = objective.loss(model, None, **batch_of(data, len(data)))
    assert loss.isfinite()

    objective.export(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    tokens = tokenizer(random.choice(TEXTS), return_tensors="pt")
    with torch.no_grad():
        expected = model.text_encoder(**tokens).last_hidden_state
        assert torch.equal(encoder(**tokens).last_hidden_state, expected)
