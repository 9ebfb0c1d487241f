"""Encoding ahead of training: the latents and text features of a source, made once and kept in a cache.

The source is cut into pieces, and each piece makes two shards, one of its pictures and one of its captions.
Which pieces there are, and what their shards are called, is a function of the source's records and the
configuration: an encoder, a preprocessing, a picture or a caption that changes gives the shards concerned
another name, and they are made; the others are there already. `localdit.data.cache` reads the result.
"""

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import diffusers
import numpy as np
import PIL
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import localdit
from localdit.assets import MINI
from localdit.data.buckets import bucket_sizes, fit, nearest_buckets
from localdit.data.cache import FORMAT, INDEX, SHARD, bucket_name, open_shard
from localdit.data.images import BadSample, decode_image
from localdit.data.records import Bad, Record
from localdit.data.sources import Source, open_source
from localdit.files import locked, staged_file
from localdit.pipelines import find_pipeline
from localdit.pipelines.common import (
    VAE_REMEDY,
    float32_where_asked,
    require_finite,
    text_encoder_class,
)
from localdit.training.stopping import Stopped, StopRequest

# B batch   C latent channels   H W picture   h w latent   T text tokens   K channels of the text features

Kind = Literal["images", "text"]
Engine = Literal["accelerate", "ray"]
Dtype = Literal["float32", "bfloat16", "float16"]
ENCODER_FILES = {  # that an encoder is made of, by the ends of their names
    "vae": (".safetensors", ".json"),
    "text_encoder": (".safetensors", ".json"),
    "tokenizer": (".model", ".json"),
}
_NEEDED = {  # one of these, since the libraries make up what they do not find
    "vae": (".safetensors",),
    "text_encoder": (".safetensors",),
    "tokenizer": ("tokenizer.json", "spiece.model"),
}
PREPROCESSING = 1  # raised with whatever changes what is made of the same picture and caption


@dataclass(frozen=True)
class EncodeConfig:
    """What to encode, by which encoders, and how.

    An encoder is named by its folder, by a hub name OWNER/NAME, or by OWNER/NAME/FOLDER for a part of a
    pipeline on the hub; "mini" is that of the pipeline in the package. Weights are read from safetensors
    alone. A model of pixels has no vae, and one of classes no text encoder: captions are kept as they are.
    """

    source: str | dict[str, Any]  # what `localdit.data.sources.open_source` takes
    cache: str  # folder to fill
    pipeline: str = "LocalDiTPipeline"  # makes features of captions; another one is package.module.Class
    vae: str | None = None  # an AutoencoderKL
    text_encoder: str | None = None  # that of the pipeline
    tokenizer: str | None = None  # of the text encoder
    resolution: int = (
        512  # pixels: each picture takes the size nearest in ratio among those of about this squared
    )
    square: bool = False  # take the square in the middle of each picture instead, resolution² pixels
    flips: bool = False  # keep the latents of the mirrored pictures too
    max_sequence_length: int = 120  # tokens that a caption may have
    captions_per_image: int | None = None  # of a picture with more, this many draws by weight; None: all
    dtype: Literal["float16", "bfloat16"] = "float16"  # of what is kept
    vae_dtype: Dtype = "float32"  # that the autoencoder computes in
    text_encoder_dtype: Dtype = "float32"  # that the text encoder computes in
    samples_per_shard: int = 512  # on average: a shard has from half to twice as many
    batch_size: int = 8  # pictures, or captions, that an encoder takes at a time
    num_workers: int = 8  # threads that read and decode, in each process
    max_bad_fraction: float = 0.01  # of the samples, that may be unusable before the run gives up
    seed: int = 0  # of the choice of captions where there are too many

    def __post_init__(self) -> None:
        counts = (
            "max_sequence_length",
            "captions_per_image",
            "samples_per_shard",
            "batch_size",
            "num_workers",
        )
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ValueError(
                "text_encoder and tokenizer must be given together or not at all, "
                f"got {self.text_encoder!r} and {self.tokenizer!r}"
            )
        if self.max_bad_fraction > 1:
            raise ValueError(f"max_bad_fraction must be at most 1, got {self.max_bad_fraction}")
        bucket_sizes(self.resolution)  # these two raise where there are none
        find_pipeline(self.pipeline)


@dataclass(frozen=True)
class Piece:
    """Neighbours in the source, and the keys of the two shards that are made of them."""

    start: int
    stop: int
    images: str
    text: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Summary:
    """What became of the samples. Pictures count once, whatever they have of captions and flips."""

    encoded: Mapping[str, int]  # samples whose shard of this kind was made
    reused: Mapping[str, int]  # samples whose shard of this kind was there
    bad: Sequence[Bad]
    cut_captions: int  # longer than max_sequence_length

    def __str__(self) -> str:
        pictures, captions = (
            f"{self.encoded[kind]:,} encoded, {self.reused[kind]:,} reused" for kind in ("images", "text")
        )
        cut = f" ({self.cut_captions:,} captions cut to fit)" if self.cut_captions else ""
        return f"pictures: {pictures}; their captions: {captions}{cut}; bad: {len(self.bad):,}"


def encode(
    config: EncodeConfig, accelerator: Accelerator, stop: StopRequest, engine: Engine = "accelerate"
) -> Summary:
    """Fill a cache, or bring it up to date.

    Every process calls it and makes its share of the shards that are not there. The index is written last:
    until then the one that was there can still be read, with its shards. No shard is ever deleted.

    Args:
        config: What to encode.
        accelerator: Of the processes that share the work; with Ray, of the one that hands it out.
        stop: Asked after each shard.
        engine: "accelerate" encodes in these processes, "ray" in those of a Ray cluster (started here unless
            there is one), on machines that see the cache and the source under the same paths.

    Raises:
        ValueError: Too many samples are bad, or the configuration cannot work.
        BlockingIOError: Another run fills the same cache.
        Stopped: When asked to, between two shards.
    """
    if config.vae is None:
        raise ValueError("vae must name an autoencoder: of pixels there is nothing to encode ahead")
    if engine == "ray" and accelerator.num_processes > 1:
        raise ValueError("the engine ray starts processes of its own: run it without accelerate launch")
    folder, main = Path(config.cache), accelerator.is_main_process
    with accelerator.main_process_first():
        source = open_config_source(config, progress=main)
    encoders = _by_main_process(accelerator, lambda: identities(config))
    pieces = []
    for piece in plan(source, config, encoders, progress=main):
        if stop:
            raise Stopped("stopped before the first shard; run the same again to begin")
        pieces.append(piece)

    with ExitStack() as held:

        def look() -> dict[tuple[str, str], str]:
            there = finished(folder)
            if any((kind, getattr(piece, kind)) not in there for piece in pieces for kind in WORKERS):
                held.enter_context(locked(folder))  # a cache that is whole can be shared by many
                there = finished(folder)
            return there

        # Shards appear while other processes begin: that all go by one list of them keeps the shares apart.
        there = _by_main_process(accelerator, look)
        bad = list(source.bad)
        for kind in WORKERS:
            missing = {getattr(p, kind): p for p in pieces if (kind, getattr(p, kind)) not in there}
            mine = list(missing.values())[accelerator.process_index :: accelerator.num_processes]
            if not mine:
                continue  # no encoder need be loaded
            share = f" (1 of {accelerator.num_processes} shares)" if accelerator.num_processes > 1 else ""
            with tqdm(
                total=sum(map(len, mine)),
                desc={"images": "pictures", "text": "captions"}[kind] + share,
                unit="image",
                disable=not main,
                dynamic_ncols=True,
            ) as progress:
                make = make_on_ray if engine == "ray" else make_here
                for found in make(kind, mine, config, source, accelerator.device, progress.update):
                    bad += found
                    check_bad(bad, source, config)
                    if stop:
                        raise Stopped("stopped between two shards; run the same again to go on")

        accelerator.wait_for_everyone()

        def finish() -> Summary:
            index, summary = describe(folder, source, config, encoders, pieces, there)
            check_bad(summary.bad, source, config)
            text, path = json.dumps(index), folder / INDEX
            if not (path.is_file() and path.read_bytes() == text.encode()):
                with staged_file(path) as staged:
                    staged.write_text(text, encoding="utf-8")
            return summary

        return _by_main_process(accelerator, finish)


def _by_main_process(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """What `work` gives in the main process, in every process."""
    return broadcast_object_list([work() if accelerator.is_main_process else None])[0]


def open_config_source(config: EncodeConfig, progress: bool = False) -> Source:
    """The source, with its index in the cache."""
    return open_source(
        config.source,
        index=Path(config.cache) / "source",
        max_bad_fraction=config.max_bad_fraction,
        progress=progress,
    )


def check_bad(bad: Sequence[Bad], source: Source, config: EncodeConfig) -> None:
    """Raise where too many samples are bad."""
    count = len(source) + len(source.bad)
    if len(bad) > config.max_bad_fraction * count:
        first = "; ".join(f"{sample.name} {sample.reason}" for sample in bad[:5])
        raise ValueError(
            f"{len(bad)} of {count} samples cannot be used, more than max_bad_fraction = "
            f"{config.max_bad_fraction} allows. The first: {first}"
        )


# What there is to make


def plan(
    source: Source, config: EncodeConfig, encoders: Mapping[str, Any], progress: bool = False
) -> Iterator[Piece]:
    """The pieces of a source, in its order: a function of its records and the configuration alone.

    Where a piece ends is told by the digests of its pictures, so that a picture which comes or goes changes
    the piece it is in, and the pieces after it stay what they were.
    """
    identity = {part: encoder["sha256"] for part, encoder in encoders.items()}
    common = [FORMAT, PREPROCESSING, config.dtype]
    for_images = [*common, identity["vae"], config.vae_dtype, config.flips]
    for_text: list[Any] = [FORMAT]
    if config.text_encoder:
        for_text = [*common, identity["text_encoder"], identity["tokenizer"], config.text_encoder_dtype]
        for_text += [config.max_sequence_length, config.pipeline]
    size, buckets = config.samples_per_shard, bucket_sizes(config.resolution, config.square)
    records: list[Record] = []
    for i in tqdm(range(len(source)), desc="plan", unit="image", disable=not progress, leave=False):
        records.append(source.record(i))
        marked = int(records[-1].digest[:8], 16) % max(size // 2, 1) == 0
        if (marked and len(records) >= size / 2) or len(records) == 2 * size or i + 1 == len(source):
            sizes = [buckets[bucket] for bucket in buckets_of(records, config)]
            images = [[record.digest, *bucket] for record, bucket in zip(records, sizes)]
            text = [choose_captions(record, config) for record in records]
            yield Piece(i + 1 - len(records), i + 1, _key(for_images, images), _key(for_text, text))
            records = []


def buckets_of(records: Sequence[Record], config: EncodeConfig) -> NDArray[np.int64]:
    """The bucket of each picture."""
    sizes = np.array([(record.width, record.height) for record in records], dtype=np.int32)
    return nearest_buckets(sizes, bucket_sizes(config.resolution, config.square))


def choose_captions(record: Record, config: EncodeConfig) -> list[tuple[str, float]]:
    """The captions to keep, with their weights.

    Where there are more than `captions_per_image`, so many are drawn by weight, and one that is drawn n times
    is kept with the weight n: on average over pictures each wording counts as much as without the limit.
    """
    limit = config.captions_per_image
    if limit is None or len(record.captions) <= limit:
        return list(zip(record.captions, record.weights))
    rng = random.Random(f"{config.seed}/{record.digest}")
    drawn = Counter(rng.choices(range(len(record.captions)), record.weights, k=limit))
    return [(record.captions[i], float(count)) for i, count in sorted(drawn.items())]


def finished(folder: Path) -> dict[tuple[str, str], str]:
    """The shards in a folder that need not be made again: file by kind and key.

    Those with gaps, for pictures that could not be read, are made again: reading may have failed for a while.
    """
    return {shard: file for shard, file in _shards(folder).items() if not SHARD.fullmatch(file)["gaps"]}  # type: ignore[index]


def find_encoder(name: str, part: str) -> Path:
    """The folder of an encoder, downloaded from the hub where it is not here.

    Args:
        name: As `EncodeConfig` has it.
        part: "vae", "text_encoder" or "tokenizer", or what a network that reads pictures is called in errors.
    """
    folder = Path(MINI if name == "mini" else name)
    if folder.is_dir():
        return folder / part if (folder / "model_index.json").is_file() else folder
    repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)*", name):
        raise ValueError(f"{part} must be a folder that exists, or OWNER/NAME on the hub, got {name!r}")
    endings = ENCODER_FILES.get(part, (".safetensors", ".json"))
    files = [f"{inside}/*{suffix}".lstrip("/") for suffix in endings]
    deeper = f"{inside}/*/*".lstrip("/")  # to the hub a star stands for slashes too
    return Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=deeper), inside)


def identity(folder: str | Path, part: str) -> str:
    """SHA-256 over the weights and the configuration of an encoder: over the names and bytes of its files."""
    paths = sorted(path for path in Path(folder).iterdir() if path.name.endswith(ENCODER_FILES[part]))
    if not any(path.name.endswith(_NEEDED[part]) for path in paths):
        raise ValueError(f"{part} must be a folder with a {' or '.join(_NEEDED[part])} file, got {folder}")
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def identities(config: EncodeConfig) -> dict[str, dict[str, str]]:
    """Name and identity of the encoders."""
    names = {part: getattr(config, part) for part in ENCODER_FILES}
    return {
        part: {"name": name, "sha256": identity(find_encoder(name, part), part)}
        for part, name in names.items()
        if name is not None
    }


def load_encoder(encoder_class: Any, name: str, part: str, dtype: str) -> Any:
    """An encoder with weights, all of them its own: the libraries make up those that are missing."""
    encoder, info = encoder_class.from_pretrained(
        find_encoder(name, part), dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
    )
    if gaps := sorted([*info["missing_keys"], *info["mismatched_keys"]]):
        raise ValueError(f"{part} must be whole, but {name} lacks {len(gaps)} tensors, such as {gaps[0]}")
    return encoder.eval().requires_grad_(False)


def load_vae(config: EncodeConfig) -> AutoencoderKL:
    """The autoencoder that a configuration names."""
    assert config.vae is not None
    return load_encoder(AutoencoderKL, config.vae, "vae", config.vae_dtype)


def load_text_parts(config: EncodeConfig, device: torch.device) -> dict[str, Any]:
    """The tokenizer and the text encoder that a configuration names, as a pipeline takes them."""
    assert config.text_encoder is not None
    assert config.tokenizer is not None
    tokenizer = AutoTokenizer.from_pretrained(find_encoder(config.tokenizer, "tokenizer"))
    kind = text_encoder_class(AutoConfig.from_pretrained(find_encoder(config.text_encoder, "text_encoder")))
    encoder = load_encoder(kind, config.text_encoder, "text_encoder", config.text_encoder_dtype)
    return {"tokenizer": tokenizer, "text_encoder": encoder.to(device)}


def _key(*made_from: Any) -> str:
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _shards(folder: Path) -> dict[tuple[str, str], str]:
    """Every shard in a folder: the one without gaps where there are several of a key, else the newest."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in paths if (match := SHARD.fullmatch(path.name))]
    found.sort(
        key=lambda pair: (not pair[0]["gaps"], pair[0]["gaps"] and pair[1].stat().st_mtime_ns, pair[1])
    )
    return {(match["kind"], match["key"]): path.name for match, path in found}


# Making it


class Worker(Protocol):
    """What makes the shards of one kind."""

    def __init__(self, config: EncodeConfig, source: Source, device: torch.device): ...

    def make(self, piece: Piece, progress: Callable[[int], Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a piece's shard, and notes that go with it.

        `progress` is told how many more pictures are done.
        """


class ImageWorker:
    """Makes latents of pictures.

    The shard of a piece holds, for each bucket,

        {height}x{width}.moments           (n, 2C, h, w), mean and log-variance of the posterior, not scaled
        {height}x{width}.moments_flipped   likewise, of the mirrored pictures, where there are flips
        {height}x{width}.positions         (n,) int32, the pictures' places in the piece

    and `names`, (bytes,) uint8, a JSON list of what the samples of the piece are called.
    """

    def __init__(self, config: EncodeConfig, source: Source, device: torch.device):
        self.config, self.source, self.device = config, source, device
        self.vae = load_vae(config).to(device)
        self.threads = ThreadPoolExecutor(config.num_workers)

    def make(self, piece: Piece, progress: Callable[[int], Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        records = [self.source.record(i) for i in range(piece.start, piece.stop)]
        buckets = buckets_of(records, self.config)
        sizes = bucket_sizes(self.config.resolution, self.config.square)
        positions = sorted(range(len(piece)), key=lambda position: (buckets[position], position))
        batches = [
            batch
            for _, group in groupby(positions, key=buckets.__getitem__)
            for batch in batched(group, self.config.batch_size)
        ]
        made: dict[str, list[Tensor]] = defaultdict(list)
        bad, gaps = [], False
        loads = ([(piece.start + p, sizes[buckets[p]]) for p in batch] for batch in batches)
        for batch, loaded in zip(batches, self._load_ahead(loads)):
            good = [(p, x) for p, x in zip(batch, loaded) if isinstance(x, Tensor)]
            failed = [(p, x) for p, x in zip(batch, loaded) if isinstance(x, _Failed)]
            bad += [(p, x.reason) for p, x in failed]
            gaps = gaps or any(x.unread for _, x in failed)
            if good:
                name, pixels = bucket_name(sizes[buckets[batch[0]]]), torch.stack([x for _, x in good])
                made[f"{name}.moments"].append(self.moments(pixels))
                made[f"{name}.positions"].append(torch.tensor([p for p, _ in good], dtype=torch.int32))
                if self.config.flips:
                    made[f"{name}.moments_flipped"].append(self.moments(pixels.flip(-1)))
            progress(len(batch))
        names = json.dumps([record.name for record in records]).encode()
        tensors = {name: torch.cat(parts) for name, parts in made.items()}
        tensors["names"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        return tensors, {"bad": sorted(bad), "gaps": gaps}

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance, (B, 2C, h, w), of pictures (B, 3, H, W) of uint8."""
        # The same algorithms whatever ran before, so that a shard's bytes do not depend on who makes it.
        with (
            float32_where_asked(self.vae),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            images = pixels.to(self.device) / 127.5 - 1
            moments = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters
        require_finite(moments, "the VAE's encoder", VAE_REMEDY)
        # Attention in the encoder leaves the channels last, and safetensors refuses that.
        return moments.to("cpu", getattr(torch, self.config.dtype)).contiguous()

    def load(self, i: int, size: tuple[int, int]) -> "Tensor | _Failed":
        """A picture, resized and cropped: (3, height, width) of uint8."""
        try:
            data = self.source.read(i)
        except BadSample as error:
            return _Failed(str(error), unread=True)
        try:
            picture = fit(decode_image(data), size)
        except BadSample as error:
            return _Failed(str(error), unread=False)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def _load_ahead(
        self, batches: Iterable[list[tuple[int, tuple[int, int]]]]
    ) -> Iterator[list["Tensor | _Failed"]]:
        """Load batches of pictures, the next one while this one is being used."""
        coming: list[Any] = []
        for batch in batches:
            ready, coming = coming, [self.threads.submit(self.load, *picture) for picture in batch]
            if ready:
                yield [future.result() for future in ready]
        yield [future.result() for future in coming]


@dataclass(frozen=True)
class _Failed:
    """A picture that there is not."""

    reason: str
    unread: bool  # the bytes could not be had, which may pass; otherwise they are no usable picture


class TextWorker:
    """Makes the features of captions, by the pipeline's own `encode_prompt`. Without a text encoder, keeps
    the captions.

    The shard of a piece holds

        features   (tokens, K), the kept tokens of all captions, one after the other
        tokens     (captions,) int32, how many of them each caption has
        weights    (captions,) float32
        captions   (pictures,) int32, how many captions each picture has
        empty      (T, K), the features of no caption

    and, without a text encoder, instead of the first, the second and the last of these

        texts      (bytes,) uint8, a JSON list of all captions
    """

    def __init__(self, config: EncodeConfig, source: Source, device: torch.device):
        self.config, self.source = config, source
        self.pipeline = None
        if config.text_encoder:
            self.pipeline = find_pipeline(config.pipeline)(**load_text_parts(config, device))

    def make(self, piece: Piece, progress: Callable[[int], Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        chosen = [choose_captions(self.source.record(i), self.config) for i in range(piece.start, piece.stop)]
        captions = [caption for captions in chosen for caption in captions]
        tensors = {
            "weights": torch.tensor([weight for _, weight in captions], dtype=torch.float32),
            "captions": torch.tensor([len(captions) for captions in chosen], dtype=torch.int32),
        }
        with counted_cuts(self.pipeline) as cuts:
            if self.pipeline is None:
                texts = json.dumps([text for text, _ in captions]).encode()
                tensors["texts"] = torch.frombuffer(bytearray(texts), dtype=torch.uint8)
            else:
                features = []
                for batch in batched(captions, self.config.batch_size):
                    features += self.features([text for text, _ in batch])
                tensors["features"] = torch.cat(features)
                tensors["tokens"] = torch.tensor([len(x) for x in features], dtype=torch.int32)
                tensors["empty"] = self.kept(*no_text(self.pipeline, self.config.max_sequence_length))[0]
        progress(len(piece))
        return tensors, {"cut_captions": cuts.count, "gaps": False}

    def features(self, texts: list[str]) -> list[Tensor]:
        """The features of each text's own tokens, (T, K)."""
        return self.kept(*text_features(self.pipeline, texts, self.config.max_sequence_length))

    def kept(self, embeds: Tensor, mask: Tensor) -> list[Tensor]:
        embeds = embeds.to(getattr(torch, self.config.dtype))
        require_finite(embeds, "the text encoder", "keep them in bfloat16 (dtype: bfloat16)")
        return [x[keep].cpu() for x, keep in zip(embeds, mask)]


def text_features(pipeline: Any, texts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """What a pipeline makes of texts, (B, T, K), and which tokens its transformer is to read, (B, T) bool."""
    encoded = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return _with_mask(*encoded[: len(encoded) // 2])


def no_text(pipeline: Any, max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """What a pipeline puts in the place of a caption that is left out, (1, T, K), and its mask (1, T): that
    of a negative prompt that is not given."""
    encoded = pipeline.encode_prompt([""], max_sequence_length=max_sequence_length)
    return _with_mask(*encoded[len(encoded) // 2 :])


def _with_mask(embeds: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pipelines that give no mask have their transformers read the padding too."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return embeds, mask.bool()


WORKERS: dict[Kind, type[Worker]] = {"images": ImageWorker, "text": TextWorker}


def make_here(
    kind: Kind,
    pieces: Sequence[Piece],
    config: EncodeConfig,
    source: Source,
    device: torch.device,
    progress: Callable[[int], Any],
) -> Iterator[list[Bad]]:
    """Make and write the shards of pieces one after the other, and tell the bad samples of each."""
    worker = WORKERS[kind](config, source, device)
    for piece in pieces:
        tensors, notes = worker.make(piece, progress)
        write_shard(Path(config.cache), kind, getattr(piece, kind), tensors, notes)
        yield bad_samples(notes, piece, source)


def make_on_ray(
    kind: Kind,
    pieces: Sequence[Piece],
    config: EncodeConfig,
    source: Source,
    device: torch.device,
    progress: Callable[[int], Any],
) -> Iterator[list[Bad]]:
    """What `make_here` does, by Ray Data: one worker for each GPU of the cluster, or for each CPU.

    A worker that dies is started again, with the shard it was at.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("the engine ray needs the extra 'ray': pip install 'localdit[ray]'") from None

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers about its use otherwise
        ray.init(include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    rows = [{"number": i} | dataclasses.asdict(piece) for i, piece in enumerate(pieces)]
    made = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000)).map(
        cast(Any, _RayWorker),  # Ray's annotation forgets that classes are called too
        fn_constructor_args=(kind, config, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(size=min(gpus or int(resources["CPU"]), len(rows))),
        num_gpus=1 if gpus else 0,
    )
    for row in made.iter_rows():
        piece = pieces[row["number"]]
        progress(len(piece))
        yield bad_samples(json.loads(row["notes"]), piece, source)


class _RayWorker:
    """A `Worker` in a process of Ray's."""

    def __init__(self, kind: Kind, config: EncodeConfig, working_folder: str):
        os.chdir(working_folder)  # which the paths in the configuration start from
        self.kind, self.config = kind, config
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.worker = WORKERS[kind](config, open_config_source(config), device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = row.pop("number")
        piece = Piece(**row)
        tensors, notes = self.worker.make(piece, lambda count: None)
        write_shard(Path(self.config.cache), self.kind, getattr(piece, self.kind), tensors, notes)
        return {"number": number, "notes": json.dumps(notes)}


def write_shard(
    folder: Path, kind: Kind, key: str, tensors: dict[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write a shard under the name that its key and its bytes give it, whole or not at all."""
    # In one entry of the header: the order of several would differ from process to process.
    data = safetensors.torch.save(tensors, metadata={"notes": json.dumps(notes)})
    gaps = "-gaps" if notes["gaps"] else ""
    with staged_file(folder / f"{kind}-{key}-{hashlib.sha256(data).hexdigest()}{gaps}.safetensors") as path:
        path.write_bytes(data)


def bad_samples(notes: Mapping[str, Any], piece: Piece, source: Source) -> list[Bad]:
    """The samples of a piece that the notes of its shard call bad."""
    return [Bad(source.record(piece.start + p).name, reason) for p, reason in notes.get("bad", [])]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def counted_cuts(pipeline: Any) -> Iterator["_Count"]:
    """Count a pipeline's warnings of texts that are cut to fit, in place of printing each."""
    count, logger = _Count(), logging.getLogger(type(pipeline).__module__)
    logger.addFilter(count)
    try:
        yield count
    finally:
        logger.removeFilter(count)


class _Count(logging.Filter):
    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += 1
        return False


# Writing down what there is


def describe(
    folder: Path,
    source: Source,
    config: EncodeConfig,
    encoders: Mapping[str, Any],
    pieces: Sequence[Piece],
    there: Mapping[tuple[str, str], str],
) -> tuple[dict[str, Any], Summary]:
    """The index of a cache whose shards are all made, and what this run did: what was not `there`."""
    shards, numbers = _shards(folder), {}
    for number, size in enumerate(buckets := bucket_sizes(config.resolution, config.square)):
        numbers[bucket_name(size)] = number
    entries, bad, cut = [], list(source.bad), 0
    encoded: Counter[str] = Counter()
    reused: Counter[str] = Counter()
    for piece in pieces:
        files = {kind: shards[kind, getattr(piece, kind)] for kind in WORKERS}
        images, text = (open_shard(folder / file) for file in files.values())
        bad += bad_samples(json.loads(images.metadata()["notes"]), piece, source)
        cut += json.loads(text.metadata()["notes"])["cut_captions"]
        counts = {
            numbers[name.removesuffix(".positions")]: images.get_slice(name).get_shape()[0]
            for name in images.keys()  # noqa: SIM118 (not a dict)
            if name.endswith(".positions")
        }
        entry: dict[str, Any] = {"counts": {str(number): counts[number] for number in sorted(counts)}}
        for kind, file in files.items():
            entry[kind] = {"file": file, "bytes": (folder / file).stat().st_size}
            tally = reused if (kind, getattr(piece, kind)) in there else encoded
            tally[kind] += len(piece)
        entries.append(entry)

    options = dataclasses.asdict(config)
    index = {
        "format": FORMAT,
        "source": options["source"],
        "encoders": {part: {**encoder} for part, encoder in encoders.items()},
        "preprocessing": {
            "version": PREPROCESSING,
            "resolution": config.resolution,
            "buckets": buckets,
            "flips": config.flips,
            "max_sequence_length": config.max_sequence_length,
            "captions_per_image": config.captions_per_image,
            "seed": config.seed,
        },
        "dtype": {name: options[name] for name in ("dtype", "vae_dtype", "text_encoder_dtype")},
        "made_with": {
            library.__name__: library.__version__
            for library in (localdit, torch, diffusers, transformers, PIL)
        },
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in bad],
        "shards": entries,
    }
    return index, Summary(encoded, reused, bad, cut)
