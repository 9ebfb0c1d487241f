"""Scene accuracy counts what a picture shows of what its prompt states."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from localdit.data.scenes import BACKGROUNDS, Scene, SceneObject, is_held_out, render
from localdit.data.sources import SceneClasses
from localdit.evaluation.scenes import Caption, class_prompts, evaluate_scenes, evaluation_prompts, judge

ASIDE, UNDER = {"x": 0.7}, {"x": 0.5, "y": 0.7}
RED = SceneObject("red", "circle", "small", 0.25, 0.5, 0.11)
BLUE = SceneObject("blue", "square", "large", 0.7, 0.5, 0.17)
PAIR = Scene("white", (RED, BLUE), "left of")
SAYS_ALL = Caption("a small red circle left of a large blue square on a white background", True, True)


def moved(o: SceneObject, **changes) -> SceneObject:
    return SceneObject(**{**vars(o), **changes})


def test_a_true_picture_is_right_in_every_respect():
    verdict = judge(PAIR, SAYS_ALL, render(PAIR))
    assert verdict.wrong == []
    assert verdict.count
    assert verdict.attributes
    assert verdict.background
    assert verdict.relation


def test_the_order_of_the_words_does_not_matter():
    inverse = Scene("white", (BLUE, RED), "right of")
    assert judge(inverse, SAYS_ALL, render(PAIR)) == judge(PAIR, SAYS_ALL, render(PAIR))


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (Scene("white", (moved(RED, color="green"), BLUE), "left of"), {"colors"}),
        (Scene("white", (moved(RED, shape="star"), BLUE), "left of"), {"shapes"}),
        (Scene("white", (moved(RED, size="large", radius=0.17), BLUE), "left of"), {"sizes"}),
        (Scene("black", (RED, BLUE), "left of"), {"background"}),
        (Scene("white", (moved(RED, **ASIDE), moved(BLUE, x=0.25)), "right of"), {"relation"}),
        (Scene("white", (moved(RED, x=0.5, y=0.2), moved(BLUE, **UNDER)), "above"), {"relation"}),
        # The colours changed places: each object is half like either, and is recognised as neither.
        (
            Scene("white", (moved(RED, color="blue"), moved(BLUE, color="red")), "left of"),
            {"colors", "relation"},
        ),
        (Scene("white", (RED,)), {"count", "colors", "shapes", "sizes", "relation"}),
    ],
)
def test_what_is_wrong_is_named_and_nothing_else(shown, wrong):
    verdict = judge(PAIR, SAYS_ALL, render(shown))
    assert set(verdict.wrong) == wrong


def test_what_the_prompt_leaves_open_is_not_judged():
    says_little = Caption("a red circle left of a blue square", False, False)
    shown = Scene("black", (moved(RED, size="large", radius=0.17), BLUE), "left of")
    verdict = judge(PAIR, says_little, render(shown))
    assert verdict.sizes is None
    assert verdict.background is None
    assert verdict.attributes
    assert judge(Scene("white", (RED,)), says_little, render(Scene("white", (RED,)))).relation is None


def test_prompts_are_held_out_and_half_of_them_pairs():
    prompts = list(evaluation_prompts(40, seed=3))
    assert [len(s.objects) for s, _ in prompts].count(1) == 20
    assert all(is_held_out(s) for s, _ in prompts)
    assert prompts == list(evaluation_prompts(40, seed=3))
    assert prompts != list(evaluation_prompts(40, seed=4))


class Oracle:
    """A pipeline that draws what it is told, but blank for the last prompt."""

    def __init__(self, prompts):
        self.scenes = {caption.text: described for described, caption in prompts}
        self.seeds = []

    def set_progress_bar_config(self, **kwargs):
        assert kwargs == {"disable": True}

    def __call__(self, texts, generator, **options):
        assert options == {"guidance_scale": 3.0}
        self.seeds += [g.initial_seed() for g in generator]
        images = [render(self.scenes[text]) for text in texts]
        if len(self.seeds) == 10:
            images[-1] = Image.new("RGB", (128, 128), BACKGROUNDS["gray"])
        return SimpleNamespace(images=images)


def test_the_shares_count_the_pictures():
    prompts = list(evaluation_prompts(10, seed=1))
    oracle = Oracle(prompts)
    result = evaluate_scenes(oracle, count=10, seed=1, batch_size=4, guidance_scale=3.0)
    assert (result["count"], result["seed"], result["guidance_scale"]) == (10, 1, 3.0)
    assert oracle.seeds == list(range(1, 11))
    blank, full = ("one_object", "two_objects")[:: 1 if len(prompts[-1][0].objects) == 1 else -1]
    assert result[blank]["color and shape"] == 0.8
    assert result[full]["all attributes"] == 1.0
    assert result["one_object"]["relation"] is None


class Painter:
    """A class-conditional pipeline that paints every class right but two, on any background and at any size:
    it takes stars for crosses, and pink for nothing at all."""

    def __init__(self, names):
        self.labels = {name: label for label, name in enumerate(names)}
        self.asked, self.seeds = [], []

    def set_progress_bar_config(self, **kwargs):
        assert kwargs == {"disable": True}

    def __call__(self, class_labels, generator, height, width):
        assert (height, width) == (96, 160)
        self.asked += class_labels
        self.seeds += [g.initial_seed() for g in generator]
        return SimpleNamespace(images=[self.paint(name, g) for name, g in zip(class_labels, generator)])

    def paint(self, name, generator):
        color, shape = name.split()
        background = list(BACKGROUNDS)[int(torch.randint(len(BACKGROUNDS), (), generator=generator))]
        shown = SceneObject(color, "cross" if shape == "star" else shape, "small", 0.4, 0.6, 0.11)
        return render(Scene(background, (shown,) if color != "pink" else ()), 96)


def test_a_class_conditional_pipeline_is_asked_for_its_classes_in_turn():
    source = SceneClasses(2000)
    names = sorted({source.record(i).captions[0] for i in range(len(source))})
    assert len(names) == 48
    painter = Painter(names)
    result = evaluate_scenes(painter, count=60, seed=5, batch_size=7, height=96, width=160)
    assert painter.asked == names + names[:12]
    assert painter.seeds == list(range(5, 65))
    pink, star = (sum(word in name for name in painter.asked) for word in ("pink", "star"))
    pink_star = painter.asked.count("pink star")
    shares = result["one_object"]
    assert (shares["count"], shares["color"]) == (1 - pink / 60, 1 - pink / 60)
    wrong = pink + star - pink_star
    assert shares["color and shape"] == shares["shape"] == round(1 - wrong / 60, 4)
    assert shares["size"] is shares["background"] is shares["relation"] is None
    assert set(result["two_objects"].values()) == {None}
    assert (result["height"], result["width"]) == (96, 160)


def test_classes_go_by_label_whatever_the_order_of_their_names():
    asked = class_prompts({"red star": 2, "blue circle": 0, "cyan cross": 1}, 4)
    assert [caption.text for _, caption in asked] == ["blue circle", "cyan cross", "red star", "blue circle"]


@pytest.mark.parametrize(
    ("names", "got"),
    [({"red circle": 0, "tench": 1, "goldfish": 2}, "'tench'"), ({}, "no names")],
)
def test_classes_that_are_no_colours_and_shapes_are_refused(names, got):
    with pytest.raises(ValueError, match=f"classes must be called .* as 'red circle', got {got}"):
        evaluate_scenes(Painter(names))
