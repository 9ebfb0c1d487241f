"""Reading a cache: the right numbers for each item, drawn by seed and position, from whole shards alone."""

import hashlib
import json
import pickle
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader

from localdit.data import cache as module
from localdit.data.cache import open_cache, verify

BUCKETS = [(64, 96), (64, 64), (96, 64)]
ENCODERS = {part: {"name": f"a/{part}", "sha256": 64 * c} for part, c in zip(("vae", "text_encoder"), "ab")}


def write_shard(folder, kind, number, tensors):
    data = save(tensors, {"notes": "{}"})
    name = f"{kind}-{number:032x}-{hashlib.sha256(data).hexdigest()}.safetensors"
    (folder / name).write_bytes(data)
    return {"file": name, "bytes": len(data)}


@pytest.fixture
def made(tmp_path):
    """A cache of three shards as its format says, and what each item must be, in the order of the items.

    Pieces of 4, 3 and 1 samples; sample 2 of the first piece is bad, and so is the only one of the last.
    """
    layout = [({0: [1], 1: [0, 3]}, 4), ({1: [2], 2: [0, 1]}, 3), ({}, 1)]
    shards, items = [], []
    empty = torch.randn(1, 5).half()
    for number, (places, pictures) in enumerate(layout):
        captions = [torch.randint(1, 4, ()).item() for _ in range(pictures)]
        features = [[torch.randn(torch.randint(1, 9, ()), 5).half() for _ in range(n)] for n in captions]
        weights = [torch.rand(n) + 0.1 for n in captions]
        flat = [x for picture in features for x in picture]
        text = {
            "features": torch.cat(flat),
            "tokens": torch.tensor([len(x) for x in flat], dtype=torch.int32),
            "weights": torch.cat(weights),
            "captions": torch.tensor(captions, dtype=torch.int32),
            "empty": empty,
        }
        names = [f"{number}/{i}.png" for i in range(pictures)]
        images = {"names": torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)}
        for bucket, positions in places.items():
            height, width = BUCKETS[bucket]
            for name in ("moments", "moments_flipped"):
                images[f"{height}x{width}.{name}"] = torch.randn(
                    len(positions), 8, height // 8, width // 8
                ).half()
            images[f"{height}x{width}.positions"] = torch.tensor(positions, dtype=torch.int32)
            for row, p in enumerate(positions):
                moments = [images[f"{height}x{width}.{n}"][row] for n in ("moments", "moments_flipped")]
                items.append((bucket, number, names[p], moments, features[p], weights[p]))
        shards.append(
            {
                "counts": {str(bucket): len(positions) for bucket, positions in places.items()},
                "images": write_shard(tmp_path, "images", number, images),
                "text": write_shard(tmp_path, "text", number, text),
            }
        )
    index = {
        "format": 1,
        "encoders": ENCODERS,
        "preprocessing": {"buckets": BUCKETS, "flips": True},
        "bad": [{"name": "0/2.png", "reason": "is empty"}],
        "shards": shards,
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path, items, empty, index


def test_each_item_is_the_picture_and_one_of_its_captions(made):
    folder, items, empty, _ = made
    cache = open_cache(folder)
    assert len(cache) == len(items) == 6
    assert cache.groups.tolist() == [bucket for bucket, *_ in items]
    assert cache.shards.tolist() == [shard for _, shard, *_ in items]
    assert [cache.name(i) for i in range(6)] == [name for _, _, name, *_ in items]
    assert torch.equal(cache.empty_text, empty.float())
    assert cache.bad == [("0/2.png", "is empty")]
    for i, (_, _, _, moments, captions, _) in enumerate(items):
        for position in range(20):
            item = cache[i, position]
            assert {name: x.dtype for name, x in item.items()} == {
                "moments": torch.float32,
                "text": torch.float32,
                "text_mask": torch.bool,
            }
            assert any(torch.equal(item["moments"], x.float()) for x in moments)
            assert any(torch.equal(item["text"], x.float()) for x in captions)
            assert item["text_mask"].tolist() == [True] * len(item["text"])
    with pytest.raises(IndexError, match="index must be from 0 to 5, got 6"):
        cache[6, 0]


def test_captions_come_by_weight_and_flips_at_even_odds_by_seed_and_position(made):
    folder, items, _, _ = made
    cache, again, other = open_cache(folder), open_cache(folder), open_cache(folder, seed=1)
    i = max(range(6), key=lambda i: len(items[i][5]))
    _, _, _, moments, captions, weights = items[i]

    def draw(cache, position):
        item = cache[i, position]
        flipped = torch.equal(item["moments"], moments[1].float())
        return flipped, next(n for n, x in enumerate(captions) if torch.equal(item["text"], x.float()))

    draws = [draw(cache, position) for position in range(1000)]
    assert draws[:50] == [draw(again, position) for position in range(50)]
    assert draws[:50] != [draw(other, position) for position in range(50)]
    counts = Counter(caption for _, caption in draws)
    shares = weights / weights.sum()
    for caption, share in enumerate(shares.tolist()):
        assert counts[caption] / 1000 == pytest.approx(share, abs=0.08)  # five standard deviations
    assert sum(flipped for flipped, _ in draws) / 1000 == pytest.approx(0.5, abs=0.08)
    both = sum(flipped for flipped, caption in draws if caption == 0)
    assert both / counts[0] == pytest.approx(0.5, abs=0.3)  # the one tells nothing of the other


def test_without_flips_every_picture_is_as_it_was(made):
    folder, items, _, index = made
    index["preprocessing"]["flips"] = False
    (folder / "index.json").write_text(json.dumps(index))
    cache = open_cache(folder)
    assert all(
        torch.equal(cache[i, p]["moments"], items[i][3][0].float()) for i in range(6) for p in range(9)
    )


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_reads_what_the_process_reads(made, context):
    folder, _, _, _ = made
    cache = open_cache(folder)
    here = [cache[0, 0], cache[3, 1]]  # open in this process before the workers begin
    keys = [[(1, 0), (2, 7), (3, 1)], [(3, 1)], [(4, 2), (5, 3)]]  # the first spans two shards
    loader = DataLoader(
        cache,
        batch_sampler=keys,
        num_workers=1,
        multiprocessing_context=context,
        collate_fn=cache.collate,
    )
    for batch, chosen in zip(loader, keys, strict=True):
        alone = [cache[key] for key in chosen]
        assert torch.equal(batch["moments"], torch.stack([item["moments"] for item in alone]))
        lengths = [len(item["text"]) for item in alone]
        assert batch["text"].shape[:2] == batch["text_mask"].shape == (len(chosen), max(lengths))
        assert batch["text_mask"].sum(1).tolist() == lengths
        for text, mask, item in zip(batch["text"], batch["text_mask"], alone):
            assert torch.equal(text[mask], item["text"])
            assert not text[~mask].any()
    assert torch.equal(here[0]["moments"], cache[0, 0]["moments"])


def test_a_cache_that_is_open_can_be_pickled(made):
    cache = open_cache(made[0], seed=4)
    item = cache[0, 3]
    again = pickle.loads(pickle.dumps(cache))
    assert all(torch.equal(again[0, 3][name], item[name]) for name in item)


def test_few_shards_are_open_at_a_time(made, monkeypatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)
    opened = []
    monkeypatch.setattr(
        module, "open_shard", lambda path, real=module.open_shard: opened.append(path) or real(path)
    )
    cache = open_cache(made[0])
    first = [cache[i, 0]["moments"] for i in (0, 3, 0, 3)]
    assert len([path for path in opened if path.name.startswith("images")]) == 4
    assert torch.equal(first[0], first[2])
    assert cache._images.cache_info().currsize == 1


def test_a_cache_by_another_encoder_is_refused(made):
    folder = made[0]
    assert len(open_cache(folder, expected={part: entry["sha256"] for part, entry in ENCODERS.items()})) == 6
    with pytest.raises(
        ValueError, match=r"made by another vae, a/vae \(aaaaaaaaaaaa\), than this run's \(cccc"
    ):
        open_cache(folder, expected={"vae": 64 * "c"})


def test_verify_names_each_damaged_shard(made):
    folder, _, _, index = made
    assert list(verify(folder)) == []
    flipped, cut, lost = (index["shards"][number]["images"]["file"] for number in (0, 1, 2))
    data = bytearray((folder / flipped).read_bytes())
    data[-3] ^= 16
    (folder / flipped).write_bytes(data)
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-1])
    (folder / lost).unlink()
    found = {sentence.split()[0]: sentence for sentence in verify(folder)}
    assert found.keys() == {flipped, cut, lost}
    assert "is damaged: delete it" in found[flipped]
    assert "bytes long, and must be" in found[cut]
    assert "is missing" in found[lost]
    with pytest.raises(ValueError, match=r"is not whole: .*; run localdit encode again"):
        open_cache(folder)


def test_a_folder_without_an_index_is_no_cache(tmp_path):
    with pytest.raises(ValueError, match="holds no finished cache"):
        open_cache(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(format=2), "it has format 2, and this version reads 1"),
        (lambda index: index.pop("encoders"), "KeyError"),
        (lambda index: index.update(shards=[]), "its shards are empty"),
        (lambda index: index["shards"][0].update(counts={"9": 1}), "in no bucket"),
        (lambda index: index["shards"][0].update(counts={"0": -1}), "in no bucket"),
        (lambda index: index["shards"][0].update(counts={"0": "many"}), "ValueError"),
        (lambda index: index["shards"][0].update(counts={"0": 2**70}), "OverflowError"),
        (lambda index: index["shards"][0]["text"].update(file="../../etc/passwd"), "not the name of a shard"),
        (lambda index: index["shards"][0]["text"].update(file=7), "TypeError"),
        (lambda index: index["shards"][0]["text"].update(sha256="x"), "TypeError"),
        (lambda index: index.update(preprocessing=3), "TypeError"),
    ],
)
def test_a_changed_index_is_refused_with_words(made, change, words):
    folder, _, _, index = made
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json cannot be used .*{re.escape(words)}"):
        open_cache(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]"])
def test_an_index_that_is_no_index_is_refused(made, data):
    (made[0] / "index.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"index\.json cannot be used"):
        open_cache(made[0])


def test_a_shard_that_is_no_safetensors_file_is_an_error_that_names_it(made):
    folder, _, _, index = made
    entry = index["shards"][1]["images"]
    (folder / entry["file"]).write_bytes(b"\x80\x04" * (entry["bytes"] // 2) + b"." * (entry["bytes"] % 2))
    cache = open_cache(folder)
    with pytest.raises(ValueError, match=rf"{entry['file']} cannot be read .*; run localdit encode again"):
        cache[3, 0]


DAMAGED_SHARDS = {
    "images without moments": ("images", "64x96.moments", None),
    "images without flips": ("images", "64x96.moments_flipped", None),
    "images without positions": ("images", "64x96.positions", None),
    "moments without a channel": ("images", "64x96.moments", torch.ones(1, 8, 12)),
    "moments of nothing": ("images", "64x96.moments", torch.ones(0, 8, 8, 12)),
    "moments in one": ("images", "64x96.moments", torch.tensor(1.0)),
    "positions in pairs": ("images", "64x96.positions", torch.ones(1, 2)),
    "no names": ("images", "names", None),
    "names that are no list": ("images", "names", torch.tensor(list(b"1"), dtype=torch.uint8)),
    "names that are no JSON": ("images", "names", torch.ones(3)),
    **{
        f"text without {name}": ("text", name, None)
        for name in ("features", "tokens", "weights", "captions", "empty")
    },
    "features of one number": ("text", "features", torch.ones(9)),
    "features of another text": ("text", "features", torch.ones(999, 5)),
    "an empty text of one number": ("text", "empty", torch.ones(5)),
    "a token count for each number": ("text", "tokens", torch.ones(4, 3)),
    "too many weights": ("text", "weights", torch.ones(999)),
    "weights of zero": ("text", "weights", torch.zeros_like),
    "captions of negative number": ("text", "captions", torch.tensor([-1, 2, 3, 4])),
}


@pytest.mark.parametrize(("kind", "name", "tensor"), DAMAGED_SHARDS.values(), ids=DAMAGED_SHARDS)
def test_a_shard_that_lacks_a_tensor_or_has_another_is_an_error_that_names_it(made, kind, name, tensor):
    folder, _, _, index = made
    entry = index["shards"][0][kind]
    tensors = load_file(folder / entry["file"])
    before = tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor if isinstance(tensor, torch.Tensor) else tensor(before)
    data = save(tensors)
    (folder / entry["file"]).write_bytes(data)
    index["shards"][0][kind]["bytes"] = len(data)
    (folder / "index.json").write_text(json.dumps(index))

    def read_all():
        cache = open_cache(folder)
        for position in range(40):  # with flips and without, and every caption
            for i in range(3):
                cache[i, position]
                cache.name(i)

    with pytest.raises(ValueError, match=rf"{entry['file']} is damaged .*: delete it"):
        read_all()
