"""Synthetic scenes: coloured shapes in relations, drawn, described in words, and read back from pixels.

A scene is drawn from an index alone, so a data set is a range of integers. Some combinations are held out of
training. `detect` reads colour, shape, size and relation from a picture without learning, which turns prompt
agreement into a number.

Positions and radii are in units of the picture's side: x to the right, y downwards, both from 0 to 1.
"""

import hashlib
import math
import random
import string
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

# At least 90 apart in RGB, objects from objects and objects from backgrounds: half of that is room for error.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (250, 130, 0),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "cyan": (30, 205, 220),
    "blue": (35, 75, 235),
    "purple": (145, 45, 190),
    "pink": (255, 120, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "beige": (222, 198, 150),
    "navy": (15, 25, 105),
    "maroon": (100, 10, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")

# What a lower-cased prompt in English may hold: ASCII without blanks and capitals.
CHARACTERS = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
# Two large objects, a gap and two margins fit in a row; small and large are a factor of 1.4 apart.
_RADII = {"small": (0.100, 0.115), "large": (0.165, 0.185)}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape: (x, y) is the centre of its bounding box, radius that of a circle as big to see."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. objects[0] is <relation> objects[1].

    A drawn scene has one or two objects; one that `detect` found may have any number. The relation is None
    unless there are exactly two.
    """

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence true of a scene, and what it states besides colours, shapes and their relation."""

    text: str
    names_size: bool
    names_background: bool


def scene(index: int, *, seed: int = 0, held_out: bool = False, objects: int | None = None) -> Scene:
    """The scene number `index`: one object or two, at even odds.

    Args:
        index: Any integer. Equal arguments give equal scenes, on every machine.
        seed: Another seed, another endless series of scenes.
        held_out: Draw from the tenth of all combinations that is kept out of training (`is_held_out`), rather
            than from the other nine.
        objects: 1 or 2 for scenes of so many alone.
    """
    rng = random.Random(f"{seed}/{index}")
    while True:
        drawn = _draw_one(rng) if rng.random() < 0.5 else _draw_two(rng)
        if is_held_out(drawn) == held_out and objects in (None, len(drawn.objects)):
            return drawn


def class_name(scene: Scene) -> str:
    """What a model that is told a class, and no sentence, calls a scene of one object: "red circle"."""
    (one,) = scene.objects
    return f"{one.color} {one.shape}"


def canonical(scene: Scene) -> Scene:
    """The same scene read from left to right or from top to bottom: its relation is "left of" or "above"."""
    if scene.relation in ("right of", "below"):
        return Scene(scene.background, scene.objects[::-1], _INVERSE[scene.relation])
    return scene


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is among the tenth that training never shows.

    A combination is colour, shape and background of one object, or the colours and shapes of two and their
    relation, where "A left of B" and "B right of A" are one. Sizes and positions play no part.
    """
    scene = canonical(scene)
    words = [word for o in scene.objects for word in (o.color, o.shape)]
    words.append(scene.background if scene.relation is None else scene.relation)
    digest = hashlib.sha256("/".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Draw a scene, antialiased, as an RGB picture of size × size pixels."""
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels for the shapes to be told apart, got {size}")
    fine = 4 * size  # every pixel is the mean of 4x4
    canvas = Image.new("RGB", (fine, fine), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for o in scene.objects:
        points = fine * (np.array((o.x, o.y)) + o.radius * _outline(o.shape))
        draw.polygon((points - 0.5).ravel().tolist(), fill=COLORS[o.color])  # PIL counts from pixel centres
    return canvas.reduce(4)


def captions(scene: Scene) -> list[Caption]:
    """Every wording for a scene: 10 for one object; 24 for a horizontal and 16 for a vertical pair.

    Some name the sizes, some the background, some both or neither. Half of the wordings for a pair name the
    second object first, with the inverse relation.
    """
    wordings = []
    for names_size in (False, True):
        nouns = [_with_article(o, names_size) for o in scene.objects]
        if scene.relation is None:
            plain = [nouns[0], f"a picture of {nouns[0]}"]
            wordings.append(Caption(f"a {scene.background} background with {nouns[0]}", names_size, True))
        else:
            first, second = nouns
            plain = [f"{first} {phrase} {second}" for phrase in _PHRASES[scene.relation]]
            plain += [f"{second} {phrase} {first}" for phrase in _PHRASES[_INVERSE[scene.relation]]]
        for text in plain:
            wordings.append(Caption(text, names_size, False))
            wordings.append(Caption(f"{text} on a {scene.background} background", names_size, True))
    return wordings


def as_users_write(
    text: str, described: Scene, names_size: list[bool], rng: random.Random
) -> tuple[str, list[bool]]:
    """Perhaps leave out one size, perhaps the articles; perhaps put nonsense beside or onto a word or two."""
    if rng.random() < 0.5:
        one = rng.randrange(len(described.objects))
        o = described.objects[one]
        text = text.replace(f"{o.size} {o.color} {o.shape}", f"{o.color} {o.shape}")
        names_size = [named and i != one for i, named in enumerate(names_size)]
    words = text.split()
    if rng.random() < 0.5:
        words = [word for word in words if word not in ("a", "an")]
    for _ in range(rng.randint(0, 2)):
        nonsense = "".join(rng.choices(rng.choice((CHARACTERS, string.ascii_lowercase)), k=rng.randint(1, 6)))
        i = rng.randrange(len(words))
        words[i] = rng.choice((f"{words[i]}{nonsense}", f"{words[i]} {nonsense}", f"{nonsense} {words[i]}"))
    return " ".join(words), names_size


def detect(image: Image.Image) -> Scene:
    """Read a scene back from a picture of any size, sharp or somewhat blurred and noisy.

    The background is the colour of the border, an object a connected region that differs from it; its colour
    is the nearest of `COLORS`, its shape the best match among `SHAPES` drawn with the same centroid and area,
    its size follows from the radius of that shape at that area.

    Returns the canonical scene: two objects are ordered from left to right or from top to bottom, whichever
    distance is the larger. Any other number of objects, none included, is listed by area, largest first.
    Radii are in units of the shorter side of an oblong picture.
    """
    scale = 128 / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)  # antialiased downwards
    pixels = np.asarray(picture, dtype=np.float32)  # (h, w, 3)
    smooth = np.asarray(picture.filter(ImageFilter.BoxBlur(1)), dtype=np.float32)

    border = np.ones((height, width), dtype=bool)
    border[2:-2, 2:-2] = False
    ground = np.median(smooth[border], axis=0)  # (3,)
    contrast = np.linalg.norm(smooth - ground, axis=-1)  # (h, w)
    # The relative part keeps apart two objects whose blurred edges meet; the absolute one ignores noise.
    labels = _label(contrast > max(45.0, 0.3 * float(np.quantile(contrast, 0.99))))

    regions, areas = np.unique(labels[labels >= 0], return_counts=True)
    found = []
    for region in regions[areas >= 100]:  # the smallest shape covers 300 pixels, a speck a few
        inside = labels == region
        core = inside & (contrast >= np.median(contrast[inside]))
        paint = np.median(smooth[core], axis=0)  # (3,)
        # A pixel between background and paint is covered in proportion: this is where the true edge lies.
        cover = (pixels - ground) @ (paint - ground) / max(float(np.square(paint - ground).sum()), 1.0)
        cover = np.where(_grow(inside, 3) & ~_grow((labels >= 0) & ~inside, 3), cover.clip(0, 1), 0.0)
        if cover.sum() < 1:  # hemmed in by others, of whose surroundings it is a part
            cover = inside.astype(np.float64)
        found.append((float(cover.sum()), _measure(cover, _nearest(paint, COLORS))))

    found.sort(key=lambda pair: pair[0], reverse=True)
    objects = tuple(o for _, o in found)
    relation = None
    if len(objects) == 2:
        across, down = ((objects[1].x - objects[0].x) * width, (objects[1].y - objects[0].y) * height)
        relation = "left of" if abs(across) >= abs(down) else "above"
        if (across if relation == "left of" else down) < 0:
            objects = objects[::-1]
    return Scene(_nearest(ground, BACKGROUNDS), objects, relation)


# Drawing


@cache
def _outline(shape: str) -> NDArray[np.float64]:
    """The corners (n, 2) of a shape of radius 1, its bounding box centred on the origin.

    Proportions are chosen so that shapes of one radius look equally big.
    """
    match shape:
        case "circle":
            points = _polygon(128)
        case "square":
            points = 0.9 * math.sqrt(2) * _polygon(4, turn=0.125)
        case "triangle":
            points = 1.25 * _polygon(3)
        case "diamond":
            points = 1.15 * _polygon(4)
        case "star":
            points = 1.2 * _polygon(10)
            points[1::2] *= 0.45
        case "cross":
            long, half = 1.05, 0.37
            arm = np.array(((half, -long), (half, -half), (long, -half)))
            turns = [np.array(((c, -s), (s, c))) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
            points = np.concatenate([arm @ turn.T for turn in turns])
    return points - (points.min(axis=0) + points.max(axis=0)) / 2


def _polygon(corners: int, turn: float = 0.0) -> NDArray[np.float64]:
    """A regular polygon (corners, 2) in the unit circle, the first corner on top, turned clockwise."""
    angle = 2 * math.pi * (np.arange(corners) / corners + turn)
    return np.stack((np.sin(angle), -np.cos(angle)), axis=1)


def _area_and_centroid(outline: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """By the shoelace formula."""
    after = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * after[:, 1] - after[:, 0] * outline[:, 1]
    return float(cross.sum() / 2), ((outline + after) * cross[:, None]).sum(axis=0) / (3 * cross.sum())


def _draw_one(rng: random.Random) -> Scene:
    look = rng.choice(list(COLORS)), rng.choice(SHAPES)
    size = rng.choice(SIZES)
    placed = SceneObject(
        *look, size, rng.uniform(0.33, 0.67), rng.uniform(0.33, 0.67), rng.uniform(*_RADII[size])
    )
    return Scene(rng.choice(list(BACKGROUNDS)), (placed,))


def _draw_two(rng: random.Random) -> Scene:
    """Two objects that differ in colour, shape or both, side by side or one above the other."""
    looks = [(color, shape) for color in COLORS for shape in SHAPES]
    sizes = rng.choice(SIZES), rng.choice(SIZES)
    radii = [rng.uniform(*_RADII[size]) for size in sizes]
    relation = rng.choice(RELATIONS)
    pair = list(zip(rng.sample(looks, 2), sizes, radii))
    if relation in ("right of", "below"):
        pair.reverse()  # placed from left to right or from top to bottom

    # The room that the objects leave along the axis goes to the gap and, not quite evenly, to the margins.
    axis = 0 if relation in ("left of", "right of") else 1
    reach = [radius * float(_outline(look[1])[:, axis].max()) for look, _, radius in pair]
    room = 1 - 2 * sum(reach)
    gap = room * rng.uniform(0.4, 0.5)
    start = (room - gap) * rng.uniform(0.4, 0.6)
    along = start + reach[0], start + 2 * reach[0] + gap + reach[1]

    objects = []
    for (look, size, radius), centre in zip(pair, along):
        across = rng.uniform(0.38, 0.62)
        x, y = (centre, across) if axis == 0 else (across, centre)
        objects.append(SceneObject(*look, size, x, y, radius))
    if relation in ("right of", "below"):
        objects.reverse()
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(objects), relation)


def _with_article(o: SceneObject, names_size: bool) -> str:
    noun = f"{o.size} {o.color} {o.shape}" if names_size else f"{o.color} {o.shape}"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# Reading back


def _nearest(value: NDArray[np.floating], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(value - palette[name])))


def _label(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the regions of a mask (h, w) that edges connect, each by its first pixel; -1 outside."""
    outside = mask.size
    ids = np.append(np.where(mask.ravel(), np.arange(mask.size), outside), outside)
    while True:
        grid = np.pad(ids[:-1].reshape(mask.shape), 1, constant_values=outside)
        around = (grid[1:-1, 1:-1], grid[:-2, 1:-1], grid[2:, 1:-1], grid[1:-1, :-2], grid[1:-1, 2:])
        least = np.where(mask, np.minimum.reduce(around), outside).ravel()
        new = np.append(least, outside)
        new = new[new]  # a label is a pixel of the same region: taking that one's label doubles the stride
        if np.array_equal(new, ids):
            return np.where(mask, ids[:-1].reshape(mask.shape), -1)
        ids = new


def _grow(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Add what lies within a square of so many pixels, at most 7, to each side of the mask (h, w)."""
    # A mean over the square is above zero where a maximum is, and far cheaper.
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.BoxBlur(pixels))) > 0


def _aligned(cover: NDArray[np.floating], centroid: tuple[float, float], area: float) -> NDArray[np.float32]:
    """Sample coverage on a 48x48 grid around its centroid whose half side is the root of its area."""
    step = 2 * math.sqrt(area) / 48
    left, top = (c - math.sqrt(area) for c in centroid)
    grid = Image.fromarray(cover.astype(np.float32)).transform(
        (48, 48),
        Image.Transform.AFFINE,
        (step, 0, left, 0, step, top),
        resample=Image.Resampling.BILINEAR,
    )
    return np.asarray(grid)


@cache
def _template(shape: str) -> NDArray[np.float32]:
    """The 48x48 coverage of a shape, aligned as `_aligned` does."""
    fine = Image.new("L", (512, 512))
    points = 256 + 150 * _outline(shape)
    ImageDraw.Draw(fine).polygon((points - 0.5).ravel().tolist(), fill=255)
    area, centroid = _area_and_centroid(150 * _outline(shape))
    x, y = 256 + centroid
    return _aligned(np.asarray(fine.filter(ImageFilter.BoxBlur(4))) / 255, (x, y), area)


def _measure(cover: NDArray[np.floating], color: str) -> SceneObject:
    """Shape, place and size of the one object whose coverage (h, w), from 0 to 1, is given."""
    height, width = cover.shape
    area = float(cover.sum())
    x = float(cover.sum(axis=0) @ (np.arange(width) + 0.5)) / area
    y = float(cover.sum(axis=1) @ (np.arange(height) + 0.5)) / area
    aligned = _aligned(cover, (x, y), area)
    shape = min(SHAPES, key=lambda name: float(np.square(aligned - _template(name)).sum()))

    unit_area, centroid = _area_and_centroid(_outline(shape))
    radius = math.sqrt(area / unit_area)
    boundary = math.sqrt(_RADII["small"][1] * _RADII["large"][0])
    side = min(width, height)
    return SceneObject(
        color,
        shape,
        "small" if radius / side < boundary else "large",
        float(x - radius * centroid[0]) / width,
        float(y - radius * centroid[1]) / height,
        radius / side,
    )
