"""Scene accuracy: does a picture show its class, or what its prompt says in combinations never trained on?"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm import tqdm

from localdit.data.scenes import (
    COLORS,
    SHAPES,
    Caption,
    Scene,
    SceneObject,
    canonical,
    captions,
    class_name,
    detect,
    scene,
)
from localdit.evaluation.generation import draw


@dataclass(frozen=True)
class Verdict:
    """What of a prompt a picture shows. None where the prompt does not say."""

    count: bool  # as many objects as described
    colors: bool
    shapes: bool
    sizes: bool | None
    background: bool | None
    relation: bool | None

    @property
    def attributes(self) -> bool:
        """Every colour, shape and stated size."""
        return self.colors and self.shapes and self.sizes is not False

    @property
    def wrong(self) -> list[str]:
        """The respects in which the picture is not what the prompt says."""
        return [name for name, right in vars(self).items() if right is False]


def judge(described: Scene, caption: Caption, picture: Image.Image) -> Verdict:
    """Compare a picture with the scene that its prompt describes, on what the prompt states."""
    described, found = canonical(described), detect(picture)
    if len(found.objects) != len(described.objects):
        background = found.background == described.background
        return Verdict(
            count=False,
            colors=False,
            shapes=False,
            sizes=False if caption.names_size else None,
            background=background if caption.names_background else None,
            relation=None if described.relation is None else False,
        )
    # `detect` reads left to right or downwards; whether the prompt has it so is the relation's matter.
    straight = _likeness(described.objects, found.objects)
    swapped = _likeness(described.objects, found.objects[::-1])
    pairs = list(zip(described.objects, found.objects if straight >= swapped else found.objects[::-1]))
    return Verdict(
        count=True,
        colors=all(a.color == b.color for a, b in pairs),
        shapes=all(a.shape == b.shape for a, b in pairs),
        sizes=all(a.size == b.size for a, b in pairs) if caption.names_size else None,
        background=found.background == described.background if caption.names_background else None,
        relation=None
        if described.relation is None
        else found.relation == described.relation and straight > swapped,
    )


def _likeness(described: tuple[SceneObject, ...], found: tuple[SceneObject, ...]) -> int:
    return sum((a.color == b.color) + (a.shape == b.shape) for a, b in zip(described, found))


def evaluation_prompts(count: int, seed: int) -> Iterator[tuple[Scene, Caption]]:
    """Held-out scenes, one and two objects in turn, each with one of its wordings."""
    index, kept = 0, {1: 0, 2: 0}
    while sum(kept.values()) < count:
        described = scene(index, seed=seed, held_out=True)
        index += 1
        objects = len(described.objects)
        if kept[objects] < (count + 2 - objects) // 2:
            kept[objects] += 1
            yield described, random.Random(f"{seed}/{index}/evaluation").choice(captions(described))


def class_prompts(names: Mapping[str, int], count: int) -> Iterator[tuple[Scene, Caption]]:
    """Classes in turn, by label, each as a scene of one object and a caption that is the class's name. Sizes,
    places and backgrounds are no class's matter, nor the caption's.

    Args:
        names: The label of each name, as `labels` of a pipeline.
        count: How many.

    Raises:
        ValueError: A class is not called as `class_name` calls scenes, or there is none.
    """
    objects = (SceneObject(color, shape, "large", 0.5, 0.5, 0.17) for color in COLORS for shape in SHAPES)
    known = {class_name(shown): shown for shown in (Scene("white", (one,)) for one in objects)}
    if not names or (other := [name for name in names if name not in known]):
        got = repr(other[0]) if names else "no names"
        raise ValueError(f"classes must be called by colour and shape, as 'red circle', got {got}")
    ordered = sorted(names, key=lambda name: names[name])
    for index in range(count):
        name = ordered[index % len(ordered)]
        yield known[name], Caption(name, False, False)


def prompts_for(names: Mapping[str, int] | None, count: int, seed: int) -> Iterator[tuple[Scene, Caption]]:
    """What a pipeline is asked for: `class_prompts` where it has names for its labels, None otherwise."""
    return evaluation_prompts(count, seed) if names is None else class_prompts(names, count)


def scene_accuracy(
    described: Sequence[tuple[Scene, Caption]], verdicts: Sequence[Verdict]
) -> dict[str, dict[str, float | None]]:
    """The share of pictures that are right in each respect, of `one_object` and of `two_objects`."""
    shares = {}
    for name, objects in (("one_object", 1), ("two_objects", 2)):
        of_kind = [v for (about, _), v in zip(described, verdicts) if len(about.objects) == objects]
        shares[name] = {
            "count": _share([v.count for v in of_kind]),
            "color": _share([v.colors for v in of_kind]),
            "shape": _share([v.shapes for v in of_kind]),
            "color and shape": _share([v.colors and v.shapes for v in of_kind]),
            "size": _share([v.sizes for v in of_kind]),
            "all attributes": _share([v.attributes for v in of_kind]),
            "background": _share([v.background for v in of_kind]),
            "relation": _share([v.relation for v in of_kind]),
        }
    return shares


def _share(values: list[bool | None]) -> float | None:
    """Of those that are not None, the share that is true."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def evaluate_scenes(
    pipeline: Any,
    *,
    count: int = 256,
    seed: int = 1,
    batch_size: int = 32,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """Generate pictures of held-out scenes, or of classes, and count what is right in them, without keeping
    any.

    Args:
        pipeline: A pipeline that takes prompts of the scenes; or one with `labels`, whose classes are colours
            and shapes, as "red circle".
        count: Prompts, half with one object and half with two; or pictures of the classes in turn.
        seed: Of the prompts; picture i has its own generator, seeded seed + i.
        batch_size: Pictures at a time. The result does not depend on it.
        num_inference_steps: None for the pipeline's default.
        guidance_scale: None for the pipeline's default.
        height, width: In pixels; None for the pipeline's default.

    Returns:
        `one_object` and `two_objects`: the share of pictures right in each respect.

    Raises:
        ValueError: The pipeline has classes that are no colours and shapes.
    """
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    options = {name: value for name, value in options.items() if value is not None}
    described = list(prompts_for(getattr(pipeline, "labels", None), count, seed))
    pipeline.set_progress_bar_config(disable=True)
    verdicts: list[Verdict] = []
    for start in tqdm(range(0, count, batch_size), desc="scenes", unit="batch"):
        batch = described[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(batch))
        pictures = draw(pipeline, [caption.text for _, caption in batch], seeds, **options)
        verdicts += [judge(*asked, picture) for asked, picture in zip(batch, pictures)]
    return {"count": count, "seed": seed, **options, **scene_accuracy(described, verdicts)}
