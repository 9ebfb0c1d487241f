"""CLIP score, with a small random CLIP of the real classes in a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_clip import save_toy_clip

from localdit.evaluation.clip_score import load_clip, measure_prompts
from localdit.evaluation.prompts import prompt_of
from localdit.pictures import Settings, write_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_toy_clip(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> dict[Path, str]:
    """Pictures of several sizes, with prompts of several lengths."""
    random = np.random.default_rng(1)
    texts = ["a red circle", "a", "", "a green star left of a red square", "blue", "a red circle"]
    asked = {}
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.png"
        Image.fromarray(random.integers(0, 256, (20 + 7 * i, 50 - 5 * i, 3), dtype=np.uint8)).save(path)
        asked[path] = text
    return asked


def plain_score(clip, path: Path, prompt: str) -> float:
    """A picture and a prompt through CLIP's parts: the shorter side to 8 pixels, the middle, the cosine."""
    with Image.open(path) as picture:
        scale = 8 / min(picture.size)
        width, height = (max(8, int(side * scale)) for side in picture.size)
        small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 8) // 2, (height - 8) // 2
    array = np.asarray(small.crop((left, top, left + 8, top + 8)), np.float64) / 255
    mean, std = (
        np.array(value)
        for value in (clip.processor.image_processor.image_mean, clip.processor.image_processor.image_std)
    )
    pixels = torch.from_numpy((array - mean) / std).permute(2, 0, 1)[None].float()
    words = clip.processor.tokenizer.backend_tokenizer.encode(prompt).ids
    ids = torch.tensor([words[: clip.text_limit - 1] + words[-1:] if len(words) > clip.text_limit else words])
    model = clip.model
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double()
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0].double()
    return max(0.0, 100 * float(image @ text / image.norm() / text.norm()))


def test_a_score_is_a_hundred_cosines_and_none_is_negative(folder, prompts):
    clip = load_clip(str(folder))
    scores, how, warnings = measure_prompts(clip, prompts, {}, batch_size=4)
    assert list(scores) == list(prompts)
    for path, score in scores.items():
        assert score == pytest.approx(plain_score(clip, path, prompts[path]), abs=0.05)
    assert min(scores.values()) == 0
    assert max(scores.values()) > 1
    assert (how["pictures"], how["clip"]) == (6, str(folder))
    assert warnings == []


def test_a_score_does_not_depend_on_the_batch(folder, prompts):
    clip = load_clip(str(folder))
    together, alone = (measure_prompts(clip, prompts, {}, batch_size=size)[0] for size in (6, 1))
    assert together == pytest.approx(alone, abs=1e-3)


def test_a_long_prompt_is_cut_before_its_last_token_and_counted(folder, prompts):
    clip = load_clip(str(folder))
    path = next(iter(prompts))
    scores, how, warnings = measure_prompts(clip, {**prompts, path: "a red star " * 20}, {})
    assert how["prompts_cut"] == 1
    assert warnings == ["1 of 6 prompts are longer than CLIP's 40 tokens, and were cut"]
    assert scores[path] == pytest.approx(plain_score(clip, path, "a red star " * 20), abs=0.05)


def test_what_cannot_be_read_has_no_score(folder, prompts):
    paths = list(prompts)
    paths[2].write_bytes(b"")
    bad: dict[Path, str] = {}
    scores = measure_prompts(load_clip(str(folder)), prompts, bad, batch_size=2)[0]
    assert bad == {paths[2]: "is empty"}
    assert list(scores) == [path for path in paths if path != paths[2]]
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        measure_prompts(load_clip(str(folder)), {paths[2]: "a"}, {})


@pytest.mark.parametrize("name", ["missing/folder", "."])
def test_a_clip_that_is_not_there_is_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no CLIP could be loaded from {name} .*give --clip-score a folder"):
        load_clip(name)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    save_toy_clip(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no CLIP could be loaded from .*safetensors"):
        load_clip(str(tmp_path))


def test_a_picture_tells_its_prompt_or_a_text_beside_it_does(tmp_path):
    picture = Image.new("RGB", (8, 8))
    write_png(picture, tmp_path / "own.png", Settings(prompt="a red star", seed=1), {"scheduler": "DDIM"})
    (tmp_path / "own.txt").write_text("another")
    assert prompt_of(tmp_path / "own.png") == "a red star"
    picture.save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"photo\.jpg tells no prompt: .* or have photo\.txt beside it"):
        prompt_of(tmp_path / "photo.jpg")
    (tmp_path / "photo.txt").write_text("\n a dog \na wet dog\n")
    assert prompt_of(tmp_path / "photo.jpg") == "a dog"
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert prompt_of(tmp_path / "damaged.png") is None
