"""Encoding ahead: what is kept is what the encoders say, and only what changed is made again."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from huggingface_hub.utils import filter_repo_objects
from PIL import Image, ImageOps
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from localdit.assets import MINI
from localdit.cli import encode as command
from localdit.cli.common import Parser
from localdit.data.buckets import bucket_sizes
from localdit.data.cache import SHARD, open_cache, verify
from localdit.data.images import BadSample
from localdit.data.records import Bad, Record
from localdit.data.sources import open_source
from localdit.pipelines.local_dit import LocalDiTPipeline
from localdit.pipelines.sparse_dit import SparseDiTPipeline
from localdit.training import encode as module
from localdit.training.config import load_config
from localdit.training.encode import EncodeConfig, choose_captions, encode, find_encoder, identity, plan
from localdit.training.stopping import Stopped, StopRequest

TOY_VAE = {
    "block_out_channels": [4, 4, 4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
CONFIGS = Path(__file__).parents[2] / "configs" / "local_dit"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """A toy autoencoder and text encoder, and the mini's tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("encoders")
    AutoencoderKL(**TOY_VAE).save_pretrained(folder / "vae")
    sizes = {"vocab_size": 128, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(**sizes, dropout_rate=0.0)).save_pretrained(folder / "text_encoder")
    shutil.copytree(Path(MINI, "tokenizer"), folder / "tokenizer")
    return folder


@pytest.fixture
def config(tmp_path, encoders) -> EncodeConfig:
    """Nine pictures of all shapes with one to three captions, in shards of about two."""
    make_pictures(tmp_path / "pictures", 9)
    return toy_config(tmp_path / "pictures", tmp_path / "cache", encoders)


def toy_config(source, cache, encoders, **options) -> EncodeConfig:
    parts = {part: str(encoders / part) for part in ("vae", "text_encoder", "tokenizer")}
    toy = {"resolution": 64, "samples_per_shard": 2, "batch_size": 2, "num_workers": 2, "flips": True}
    return EncodeConfig(**{"source": str(source), "cache": str(cache), **parts, **toy, **options})


def make_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        draw_picture(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("".join(f"{caption(i, j)}\n" for j in range(i % 3 + 1)))


def draw_picture(path: Path) -> None:
    width, height = random.randint(20, 150), random.randint(20, 150)
    Image.frombytes("RGB", (width, height), random.randbytes(3 * width * height)).save(path)


def caption(i: int, j: int) -> str:
    return f"Picture {i} shows {j} " + "star " * ((i + j) % 4)


def fill(config: EncodeConfig, engine="accelerate"):
    return encode(config, Accelerator(), StopRequest(), engine)


def made_of(config: EncodeConfig) -> dict[str, tuple[int, int]]:
    """The shards in a cache, each with its place on the disk and the time it was written."""
    paths = [path for path in Path(config.cache).iterdir() if SHARD.fullmatch(path.name)]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def bytes_of(config: EncodeConfig) -> dict[str, bytes]:
    """All files of a cache, but for the source's index."""
    return {path.name: path.read_bytes() for path in Path(config.cache).iterdir() if path.is_file()}


class Memory:
    """A source in memory."""

    bad: tuple[Bad, ...] = ()

    def __init__(self, count: int):
        self.records = [self.new(f"{i}") for i in range(count)]

    def __len__(self):
        return len(self.records)

    def record(self, i):
        return self.records[i]

    @staticmethod
    def new(name):
        size = random.randint(1, 4000), random.randint(1, 4000)
        return Record(name, *size, (f"a {name}",), (1.0,), hashlib.sha256(name.encode()).hexdigest())


IDENTITIES = {part: {"name": part, "sha256": part} for part in ("vae", "text_encoder", "tokenizer")}


def test_the_cache_holds_what_the_encoders_say(config):
    summary = fill(config)
    assert summary.encoded == {"images": 9, "text": 9}
    assert str(summary) == "pictures: 9 encoded, 0 reused; their captions: 9 encoded, 0 reused; bad: 0"

    cache = open_cache(config.cache)
    vae = AutoencoderKL.from_pretrained(config.vae)
    pipe = LocalDiTPipeline(
        tokenizer=AutoTokenizer.from_pretrained(config.tokenizer),
        text_encoder=T5EncoderModel.from_pretrained(config.text_encoder),
    )
    buckets = bucket_sizes(64)
    assert sorted(cache.name(i) for i in range(len(cache))) == [f"{i:02d}.png" for i in range(9)]
    assert len(set(cache.groups.tolist())) > 2
    for item in range(9):
        name = cache.name(item)
        with Image.open(Path(config.source, name)) as opened:
            picture = opened.convert("RGB")
        height, width = buckets[cache.groups[item]]
        ratio = picture.height / picture.width
        assert abs(np.log(height / width / ratio)) == min(abs(np.log(h / w / ratio)) for h, w in buckets)
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        both = []
        for oriented in (fitted, ImageOps.mirror(fitted)):
            pixels = torch.from_numpy(np.array(oriented)).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                both.append(vae.encode(pixels).latent_dist.parameters[0])
        number = int(Path(name).stem)
        texts = [caption(number, j) for j in range(number % 3 + 1)]
        embeds, mask, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        features = [x[keep] for x, keep in zip(embeds, mask.bool())]
        drawn = [cache[item, position] for position in range(30)]
        assert all(any(close(x["moments"], moments) for moments in both) for x in drawn)
        assert all(any(close(x["text"], y) for y in features) for x in drawn)
        for wanted, key in ((both, "moments"), (features, "text")):
            assert all(any(close(x[key], y) for x in drawn) for y in wanted)  # each comes up
    embeds, mask, *_ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    assert close(cache.empty_text, embeds[0][mask[0].bool()])


def close(kept: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether float16 rounds one to the other: half of the last of 11 bits, plus float32's own errors."""
    return kept.shape == exact.shape and bool(((kept - exact).abs() <= exact.abs() * 2**-11 + 2e-6).all())


def test_an_autoencoder_with_attention_is_no_hindrance(config, tmp_path):
    """Its latents have the channels last in memory, those of several pictures at a time."""
    vae = AutoencoderKL(**TOY_VAE | {"mid_block_add_attention": True})
    vae.save_pretrained(tmp_path / "attentive")
    moments = vae.encode(torch.randn(2, 3, 64, 64)).latent_dist.parameters
    assert not moments.is_contiguous()
    for i in range(9):
        Image.new("RGB", (50, 50), (i, 0, 0)).save(Path(config.source, f"{i:02d}.png"))
    options = {"samples_per_shard": 9, "batch_size": 9}
    config = dataclasses.replace(config, vae=str(tmp_path / "attentive"), **options)
    fill(config)
    cache = open_cache(config.cache)
    assert [cache[i, i]["moments"].shape for i in range(9)] == [(8, 8, 8)] * 9


def test_a_second_run_finds_everything_and_loads_no_encoder(config, monkeypatch):
    fill(config)
    before, index = made_of(config), Path(config.cache, "index.json").read_bytes()
    monkeypatch.setattr(module, "load_encoder", None)
    summary = fill(config)
    assert summary.reused == {"images": 9, "text": 9}
    assert not summary.encoded
    assert made_of(config) == before
    assert Path(config.cache, "index.json").read_bytes() == index


def in_use(config: EncodeConfig, kind: str) -> set[str]:
    shards = json.loads(Path(config.cache, "index.json").read_text())["shards"]
    return {shard[kind]["file"] for shard in shards}


def test_an_edited_caption_makes_its_own_shard_of_text_anew_and_nothing_else(config):
    fill(config)
    before = made_of(config)
    images, text = in_use(config, "images"), in_use(config, "text")
    Path(config.source, "04.txt").write_text("Another story\n")
    fill(config)
    after = made_of(config)
    assert before.items() <= after.items()  # untouched
    (made,) = after.keys() - before.keys()
    assert in_use(config, "images") == images
    assert made in in_use(config, "text")
    assert len(text - in_use(config, "text")) == 1  # the stale one is read no more
    cache = open_cache(config.cache)
    item = next(i for i in range(9) if cache.name(i) == "04.png")
    assert len({cache[item, position]["text"].numpy().tobytes() for position in range(20)}) == 1


def test_an_edited_picture_makes_no_text_anew(config):
    samples = dataclasses.replace(config, samples_per_shard=100)  # one piece, whatever the digests
    fill(samples)
    text = in_use(samples, "text")
    draw_picture(Path(samples.source, "04.png"))
    summary = fill(samples)
    assert in_use(samples, "text") == text
    assert summary.encoded == {"images": 9}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"vae_dtype": "bfloat16"}, {"images"}),
        ({"text_encoder_dtype": "bfloat16"}, {"text"}),
        ({"max_sequence_length": 9}, {"text"}),
        ({"resolution": 80}, {"images"}),
        ({"flips": False}, {"images"}),
        ({"dtype": "bfloat16"}, {"images", "text"}),
        ({"batch_size": 3, "num_workers": 1, "seed": 3, "cache": "elsewhere"}, set()),
    ],
)
def test_what_depends_on_an_option_takes_another_name_when_it_changes(config, change, kinds):
    source = Memory(30)
    before = list(plan(source, config, IDENTITIES))
    after = list(plan(source, dataclasses.replace(config, **change), IDENTITIES))
    for kind in ("images", "text"):
        assert all((getattr(a, kind) != getattr(b, kind)) == (kind in kinds) for a, b in zip(before, after))


def test_squares_alone_are_other_pictures_with_the_same_captions(config):
    source, square = Memory(30), dataclasses.replace(config, square=True)
    before, after = list(plan(source, config, IDENTITIES)), list(plan(source, square, IDENTITIES))
    assert [piece.images for piece in before] != [piece.images for piece in after]
    assert [piece.text for piece in before] == [piece.text for piece in after]


@pytest.mark.parametrize(
    ("part", "kind"), [("vae", "images"), ("text_encoder", "text"), ("tokenizer", "text")]
)
def test_what_an_encoder_made_takes_another_name_when_a_bit_of_it_changes(config, tmp_path, part, kind):
    shutil.copytree(getattr(config, part), tmp_path / "other")
    other = dataclasses.replace(config, **{part: str(tmp_path / "other")})
    source = Memory(9)
    moved = list(plan(source, config, module.identities(other)))
    assert moved == list(plan(source, config, module.identities(config)))  # the folder's name plays no part
    path = random.choice([p for p in (tmp_path / "other").iterdir() if p.suffix in (".json", ".safetensors")])
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    changed = list(plan(source, config, module.identities(other)))
    for each in ("images", "text"):
        assert all((getattr(a, each) != getattr(b, each)) == (each == kind) for a, b in zip(moved, changed))


def test_another_encoder_makes_its_own_shards_and_the_cache_of_the_first_is_refused(config, tmp_path):
    fill(config)
    images, text = in_use(config, "images"), in_use(config, "text")
    shutil.copytree(config.vae, tmp_path / "other")
    AutoencoderKL(**TOY_VAE).save_pretrained(tmp_path / "other")
    other = dataclasses.replace(config, vae=str(tmp_path / "other"))
    assert fill(other).reused == {"text": 9}
    assert images.isdisjoint(in_use(config, "images"))
    assert in_use(config, "text") == text
    assert fill(config).reused == {"images": 9, "text": 9}  # going back costs nothing
    assert in_use(config, "images") == images

    identities = {
        part: identity(find_encoder(getattr(config, part), part), part)
        for part in ("vae", "text_encoder", "tokenizer")
    }
    assert len(open_cache(config.cache, expected=identities)) == 9
    identities["text_encoder"] = identity(find_encoder("mini", "text_encoder"), "text_encoder")
    with pytest.raises(ValueError, match="was made by another text_encoder"):
        open_cache(config.cache, expected=identities)


def test_a_picture_that_comes_or_goes_changes_few_pieces(config):
    config, source = dataclasses.replace(config, samples_per_shard=10), Memory(1000)
    pieces = list(plan(source, config, IDENTITIES))
    assert pieces == list(plan(source, config, IDENTITIES))
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == 1000
    assert all(5 <= len(piece) <= 20 for piece in pieces[:-1])
    assert 60 < len(pieces) < 160
    for change in (lambda i: source.records.insert(i, source.new("new")), source.records.pop):
        change(random.randrange(1000))
        changed = list(plan(source, config, IDENTITIES))
        for kind in ("images", "text"):
            before, after = ({getattr(piece, kind) for piece in these} for these in (pieces, changed))
            assert 1 <= len(after - before) <= 12, (
                kind
            )  # until the ends fall together again; a few, as a rule
        pieces = changed


@pytest.mark.parametrize("per_shard", [1, 2, 3, 7])
def test_pieces_of_any_size_cover_the_source_once(config, per_shard):
    config = dataclasses.replace(config, samples_per_shard=per_shard)
    pieces = list(plan(Memory(50), config, IDENTITIES))
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    assert (pieces[0].start, pieces[-1].stop) == (0, 50)
    assert all(per_shard / 2 <= len(piece) <= 2 * per_shard for piece in pieces[:-1])


def test_captions_are_drawn_by_weight_where_there_are_too_many(config):
    config = dataclasses.replace(config, captions_per_image=2)
    few = Record("few", 9, 9, ("a", "b"), (3.0, 0.5), "00")
    assert choose_captions(few, config) == [("a", 3.0), ("b", 0.5)]

    texts, weights, total = ("a", "b", "c", "d"), (4.0, 3.0, 2.0, 1.0), Counter()
    for i in range(4000):
        record = Record("many", 9, 9, texts, weights, hashlib.sha256(f"{i}".encode()).hexdigest())
        chosen = choose_captions(record, config)
        assert chosen == choose_captions(dataclasses.replace(record, name="moved"), config)
        assert 1 <= len(chosen) <= 2
        assert sum(weight for _, weight in chosen) == 2
        total.update(dict(chosen))
    assert {text: round(count / 8000, 1) for text, count in total.items()} == dict(
        zip(texts, (0.4, 0.3, 0.2, 0.1))
    )


def test_a_picture_that_does_not_decode_is_listed_and_the_others_are_there(config):
    bad = Path(config.source, "03.png")
    bad.write_bytes(bad.read_bytes()[:-200])  # the header is whole
    config = dataclasses.replace(config, max_bad_fraction=0.2)
    for run in ("made", "reused"):
        summary = fill(config)
        assert [sample.name for sample in summary.bad] == ["03.png"], run
        assert "is damaged" in summary.bad[0].reason
        cache = open_cache(config.cache)
        assert cache.bad == [(summary.bad[0].name, summary.bad[0].reason)]
        assert sorted(cache.name(i) for i in range(8)) == [f"{i:02d}.png" for i in range(9) if i != 3]
    assert str(summary).endswith("bad: 1")
    assert bad.exists()


def test_a_piece_without_a_usable_picture_is_no_hindrance(config):
    for i in range(9):
        path = Path(config.source, f"{i:02d}.png")
        path.write_bytes(path.read_bytes()[:-200] if i < 8 else path.read_bytes())
    fill(dataclasses.replace(config, max_bad_fraction=1.0))
    cache = open_cache(config.cache)
    assert [cache.name(i) for i in range(len(cache))] == ["08.png"]
    assert cache.empty_text.shape[1] == 12


def test_too_many_bad_pictures_end_the_run_and_leave_no_index(config):
    for i in (2, 5):
        path = Path(config.source, f"{i:02d}.png")
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=r"of 9 samples cannot be used, more than max_bad_fraction = 0\.15.*02"
    ):
        fill(dataclasses.replace(config, max_bad_fraction=0.15))
    with pytest.raises(ValueError, match="no finished cache"):
        open_cache(config.cache)


def test_a_picture_that_could_not_be_read_is_tried_again(config, monkeypatch):
    config = dataclasses.replace(config, max_bad_fraction=0.5)
    kind = type(module.open_config_source(config))
    read = kind.read

    def fail(source, i):
        if i == 4:
            raise BadSample("cannot be read: the network is down")
        return read(source, i)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "read", fail)
        summary = fill(config)
    assert summary.bad == [Bad("04.png", "cannot be read: the network is down")]
    assert len(open_cache(config.cache)) == 8
    (gap,) = (name for name in made_of(config) if "-gaps" in name)
    assert gap in in_use(config, "images")

    summary = fill(config)
    assert not summary.bad
    assert summary.encoded.keys() == {"images"}
    assert len(open_cache(config.cache)) == 9
    assert gap not in in_use(config, "images")
    assert list(verify(config.cache)) == []


def test_captions_that_are_cut_are_counted_and_not_printed_one_by_one(config, caplog):
    Path(config.source, "04.txt").write_text("one\n" + "a long story " * 40 + "\nthree")
    summary = fill(config)
    assert summary.cut_captions == 1
    assert "(1 captions cut to fit)" in str(summary)
    assert not caplog.records
    assert fill(config).cut_captions == 1  # told of shards that were there too


class After(StopRequest):
    """Asked to stop when asked for the nth time."""

    def __init__(self, times: int):
        self.left = times

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_a_run_that_is_asked_to_stop_stops_between_two_shards_and_goes_on_later(config):
    config = dataclasses.replace(config, samples_per_shard=4)
    fill(config)
    whole = bytes_of(config)
    shards = [name for name in whole if SHARD.fullmatch(name)]
    config = dataclasses.replace(config, cache=config.cache + "-stopped")
    pieces = len(shards) // 2  # each is asked about before the first shard is made
    with pytest.raises(Stopped, match="run the same again to begin"):
        encode(config, Accelerator(), After(pieces - 1))
    assert not list(Path(config.cache).glob("*.safetensors"))
    for done in range(1, len(shards)):
        with pytest.raises(Stopped, match="run the same again to go on"):
            encode(config, Accelerator(), After(pieces))
        assert len(made_of(config)) == done
        assert not Path(config.cache, "index.json").exists()
    encode(config, Accelerator(), After(pieces + 1))
    assert bytes_of(config) == whole


def test_one_run_at_a_time_fills_a_cache_and_a_whole_one_is_shared(config, monkeypatch):
    def refuse(folder):
        raise BlockingIOError(11, "is in use", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(module, "locked", refuse)
        with pytest.raises(BlockingIOError, match="is in use"):
            fill(config)
        assert not made_of(config)
    fill(config)
    monkeypatch.setattr(module, "locked", refuse)
    before = bytes_of(config), Path(config.cache, "index.json").stat().st_mtime_ns
    assert fill(config).reused == {"images": 9, "text": 9}
    assert (bytes_of(config), Path(config.cache, "index.json").stat().st_mtime_ns) == before


def test_equal_pieces_share_their_shards(config):
    for name in ("png", "txt"):
        shutil.copy(Path(config.source, f"00.{name}"), Path(config.source, f"000.{name}"))
        shutil.copy(Path(config.source, f"00.{name}"), Path(config.source, f"0000.{name}"))
    summary = fill(dataclasses.replace(config, samples_per_shard=1))
    assert summary.encoded == {"images": 11, "text": 11}
    assert len(made_of(config)) == 2 * 9
    assert len(open_cache(config.cache)) == 11


def fill_in_child(config: EncodeConfig) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which is on its own
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    summary = encode(config, accelerator, StopRequest())
    assert summary.encoded == {"images": 9, "text": 9}  # all of them, on both


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(config):
    fill(config)
    whole = bytes_of(config)
    config = dataclasses.replace(config, cache=config.cache + "-shared")
    debug_launcher(fill_in_child, (config,), num_processes=2)
    assert bytes_of(config) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own options
def test_ray_makes_the_bytes_of_accelerate_though_a_worker_is_killed(encoders, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    make_pictures(tmp_path / "pictures", 60)
    here, there = (toy_config(tmp_path / "pictures", tmp_path / name, encoders) for name in ("here", "there"))
    fill(here)
    killed, done = [], []

    class Killer(StopRequest):
        """Never asks to stop, but kills a worker when it is asked first after a shard was made."""

        def __bool__(self):
            if made_of(there) and not killed:
                processes = psutil.Process().children(recursive=True)
                killed.append(next(p for p in processes if "MapWorker" in " ".join(p.cmdline())))
                done.append(len(made_of(there)))
                killed[0].kill()
            return False

    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
    try:
        summary = encode(there, Accelerator(), Killer(), "ray")
    finally:
        ray.shutdown()
    assert not killed[0].is_running()
    assert 0 < done[0] < len(in_use(there, "images"))
    assert summary.encoded == {"images": 60, "text": 60}
    assert bytes_of(there) == bytes_of(here)


def test_the_command_prints_the_folder_and_says_what_was_done(config, tmp_path, capsys):
    path = tmp_path / "encode.yaml"
    values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    path.write_text(json.dumps(values))
    parser = Parser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["encode", str(path), f"cache={tmp_path}/elsewhere", "flips=false"])
    args.run(args)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/elsewhere\n"
    assert (
        err.splitlines()[-1] == "pictures: 9 encoded, 0 reused; their captions: 9 encoded, 0 reused; bad: 0"
    )
    assert re.search(r"pictures: 100%.* 9/9 .*image/s", err)
    assert not open_cache(tmp_path / "elsewhere").flips


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resolution": 100}, "resolution must be a multiple of 16"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"captions_per_image": 0}, "captions_per_image must be at least 1"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction must be at most 1"),
        ({"max_bad_fraction": -1}, "max_bad_fraction must not be negative"),
        ({"dtype": "float32"}, "dtype must be one of float16, bfloat16"),
        ({"source": 3}, "source must be str, got 3"),
        ({"source": None}, "source must be str, got None"),
        ({"flip": True}, "unknown key flip"),
    ],
)
def test_a_config_is_read_strictly(tmp_path, values, words):
    path = tmp_path / "encode.yaml"
    mini = dict.fromkeys(("vae", "text_encoder", "tokenizer"), "mini")
    path.write_text(json.dumps({"source": "scenes:5", "cache": "cache", **mini, **values}))
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(path, kind=EncodeConfig)


@pytest.mark.parametrize("name", ["encode.yaml", "encode_scenes.yaml"])
def test_the_configs_are_read(name):
    assert load_config(CONFIGS / name, kind=EncodeConfig).cache


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/../c", "https://host/vae"])
def test_a_name_that_can_be_no_encoder_is_an_error(name):
    with pytest.raises(
        ValueError, match=f"vae must be a folder that exists, or OWNER/NAME on the hub, got '{name}'"
    ):
        find_encoder(name, "vae")


def test_encoders_are_found_in_folders_pipelines_and_the_package(encoders, tmp_path):
    assert find_encoder("mini", "vae") == Path(MINI, "vae")
    assert find_encoder(MINI, "tokenizer") == Path(MINI, "tokenizer")
    assert find_encoder(str(encoders / "vae"), "vae") == encoders / "vae"
    with pytest.raises(ValueError, match=r"text_encoder must be a folder with a \.safetensors file"):
        identity(tmp_path, "text_encoder")
    with pytest.raises(
        ValueError, match=r"tokenizer must be a folder with a tokenizer\.json or spiece\.model"
    ):
        identity(encoders / "vae", "tokenizer")


@pytest.mark.parametrize(
    ("name", "wanted", "left"),
    [
        ("owner/name", {"config.json", "w.safetensors"}, {"vae/w.safetensors", "w.bin", "README.md"}),
        (
            "owner/name/vae",
            {"vae/config.json", "vae/w.safetensors"},
            {"w.safetensors", "vae/w.bin", "vae/more/w.safetensors", "unet/w.safetensors"},
        ),
    ],
)
def test_of_the_hub_the_encoder_s_files_alone_are_fetched(monkeypatch, name, wanted, left):
    def download(repository, allow_patterns, ignore_patterns):
        assert repository == "owner/name"
        files = filter_repo_objects(
            wanted | left, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert set(files) == wanted
        return "/fetched"

    monkeypatch.setattr(module, "snapshot_download", download)
    assert find_encoder(name, "vae") == Path("/fetched", name.removeprefix("owner/name").strip("/"))


def test_an_encoder_that_lacks_weights_is_refused(config, encoders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoders / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = random.choice([name for name in weights if name.startswith("encoder")])
    del weights[name]
    save_file(weights, path)
    with pytest.raises(
        ValueError, match=f"vae must be whole, but .* lacks 1 tensors, such as {re.escape(name)}"
    ):
        fill(dataclasses.replace(config, vae=str(tmp_path / "vae")))


def test_without_a_text_encoder_captions_are_kept_as_they_are(config):
    config = dataclasses.replace(config, text_encoder=None, tokenizer=None)
    fill(config)
    cache = open_cache(config.cache, seed=1)
    source = open_source(config.source, index=Path(config.cache) / "source")
    drawn = {index: {cache[index, position]["caption"] for position in range(60)} for index in range(9)}
    by_name = {source.record(i).name: set(source.record(i).captions) for i in range(9)}
    assert {cache.name(index): texts for index, texts in drawn.items()} == by_name
    first = [index for index in range(9) if cache.groups[index] == cache.groups[0]]
    batch = cache.collate([cache[index, 0] for index in first])
    assert batch["moments"].shape[0] == len(batch["caption"]) == len(first)
    assert cache.empty_text is None
    before = made_of(config)
    fill(config)
    assert made_of(config) == before
    fill(dataclasses.replace(config, seed=3, max_sequence_length=9))  # which say nothing of captions
    assert made_of(config) == before
    (Path(config.source) / "00.txt").write_text("another caption")
    fill(config)
    cache = open_cache(config.cache)
    assert "another caption" in {cache[i, 0]["caption"] for i in range(9)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": None}, "text_encoder and tokenizer must be given together or not at all"),
        ({"vae": None}, "vae must name an autoencoder: of pixels there is nothing to encode ahead"),
        ({"pipeline": "NoPipeline"}, "pipeline must be .*, got 'NoPipeline'"),
        ({"pipeline": "pathlib.Path"}, "pipeline must be .*, got 'pathlib.Path'"),
    ],
)
def test_parts_that_cannot_encode_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        fill(dataclasses.replace(config, **options))


def test_the_features_are_those_of_the_pipeline_that_is_named(config):
    """SparseDiT's pipeline pads with 0 and has its transformer read the padding; no caption is zeros."""
    config = dataclasses.replace(config, pipeline="SparseDiTPipeline", max_sequence_length=16)
    fill(config)
    cache = open_cache(config.cache)
    pipeline = SparseDiTPipeline(
        tokenizer=AutoTokenizer.from_pretrained(config.tokenizer),
        text_encoder=T5EncoderModel.from_pretrained(config.text_encoder),
    )
    source = open_source(config.source, index=Path(config.cache) / "source")
    captions = {source.record(i).name: source.record(i).captions for i in range(9)}
    alone = next(index for index in range(9) if len(captions[cache.name(index)]) == 1)
    expected, _ = pipeline.encode_prompt(list(captions[cache.name(alone)]), max_sequence_length=16)
    item = cache[alone, 0]
    assert item["text"].shape == (16, 12)
    assert item["text_mask"].all()
    torch.testing.assert_close(item["text"], expected[0], atol=2e-3, rtol=2e-3)  # kept in float16
    assert torch.equal(cache.empty_text, torch.zeros(16, 12))
