"""Sources: every layout gives the same samples, bad ones are skipped and listed, no work is done twice."""

import csv
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile_files import BOMBS, UNREADABLE, picture, raw_header, sample, tar
from PIL import ExifTags, Image

from localdit.data import index as index_module
from localdit.data.images import BadSample, decode_image
from localdit.data.records import MAX_CAPTION_BYTES
from localdit.data.scenes import COLORS, SHAPES, captions, detect, scene
from localdit.data.shards import ShardCache
from localdit.data.sources import Bad, Source, open_source


@pytest.fixture
def opened(tmp_path):
    """`open_source` with an index of the test's own, and any number of bad samples."""
    return partial(open_source, index=tmp_path / "index", max_bad_fraction=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    return path


@pytest.fixture
def scans(monkeypatch) -> list[int]:
    """One entry for each picture whose header is read."""
    seen: list[int] = []

    def counted(data: bytes) -> Image.Image:
        seen.append(len(data))
        return open_image(data)

    open_image = index_module.open_image
    monkeypatch.setattr(index_module, "open_image", counted)
    return seen


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put(folder: Path, *names: str, caption: str = "a picture") -> None:
    """Pictures with a caption beside each."""
    for name in names:
        write(folder / name, picture())
        write((folder / name).with_suffix(".txt"), caption)


def names(source: Source) -> list[str]:
    return [source.record(i).name for i in range(len(source))]


def all_captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {record.name: record.captions for record in map(source.record, range(len(source)))}


def reasons(source: Source) -> dict[str, str]:
    found = {bad.name: bad.reason for bad in source.bad}
    assert len(found) == len(source.bad)
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Folders ------------------------------------------------------------------------------------------------


def test_a_folder_has_a_caption_beside_each_picture(opened, folder):
    put(folder, "b.png", "cats/a.png", "cats/old/c.png")
    write(folder / "cats/a.txt", "\ufeff  a cat  \n\n\ta black cat\r\n")
    write(folder / "README.md", "about")
    source = opened(folder)
    assert names(source) == ["b.png", "cats/a.png", "cats/old/c.png"]
    assert source.record(1).captions == ("a cat", "a black cat")
    assert source.record(1).weights == (1, 1)
    assert (len(source), list(source.bad), source.shards) == (3, [], None)
    for i, name in enumerate(names(source)):
        data = (folder / name).read_bytes()
        assert source.read(i) == data
        assert source.record(i).digest == hashlib.sha256(data).hexdigest()


def test_sizes_are_those_of_the_upright_picture(opened, folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sizes = [(random.randint(1, 99), random.randint(1, 99)) for _ in range(5)]
    for i, (width, height) in enumerate(sizes):
        write(folder / f"{i}.txt", "a")
        write(folder / f"{i}.jpg", picture(width, height, "JPEG", exif=exif if i % 2 else b""))
    source = opened(str(folder))
    assert source.sizes.dtype == np.int32
    assert source.sizes.tolist() == [[h, w] if i % 2 else [w, h] for i, (w, h) in enumerate(sizes)]
    for i, (width, height) in enumerate(source.sizes.tolist()):
        assert (source.record(i).width, source.record(i).height) == (width, height)
        assert decode_image(source.read(i)).size == (width, height)


def test_captions_can_stand_in_one_table_with_weights(opened, folder):
    put(folder, "a.png", "b c/ä.png", "d.png")
    lines = [
        {"file": "a.png", "caption": "one"},
        {"file": "./b c//ä.png", "captions": ["x", {"text": " y ", "weight": 2.5}]},
        {"file": "d.png", "captions": ["first"]},
        {"file_name": "d.png", "text": "second"},
    ]
    write(folder / "captions.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    source = opened(str(folder))
    assert all_captions(source) == {"a.png": ("one",), "b c/ä.png": ("x", "y"), "d.png": ("first", "second")}
    assert source.record(1).weights == (1, 2.5)
    assert not source.bad


def test_metadata_of_the_imagefolder_convention_is_read(opened, folder):
    put(folder, "a.png", "train/b.png")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                ["file_name", "text", "artist"],
                ["a.png", 'one, "quoted"\nin two lines', "x"],
                ["train/b.png", "twø"],
            ]
        )
    assert all_captions(opened(str(folder))) == {
        "a.png": ('one, "quoted"\nin two lines',),
        "train/b.png": ("twø",),
    }
    os.remove(folder / "metadata.csv")
    write(
        folder / "metadata.jsonl",
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "train/b.png", "text": "2"}',
    )
    assert all_captions(opened(str(folder))) == {"a.png": ("one",), "train/b.png": ("2",)}


def test_bad_samples_are_skipped_and_listed_and_nothing_is_deleted(opened, folder):
    """Every kind of bad picture and caption beside good ones: R15 to R17."""
    put(folder, *(f"good-{i:02d}.png" for i in range(20)))
    expected = {}
    for kind, (make, reason) in UNREADABLE.items():
        put(folder, f"{kind}.jpg")
        write(folder / f"{kind}.jpg", make())
        expected[f"{kind}.jpg"] = reason
    for kind, make in BOMBS.items():
        put(folder, f"bomb-{kind}.png")
        write(folder / f"bomb-{kind}.png", make())
        expected[f"bomb-{kind}.png"] = "pixels" if kind != "fits" else "is not a picture"
    put(folder, "moving.gif", "deep.tiff")
    expected |= {"moving.gif": None, "deep.tiff": None}  # pictures, whatever they are inside
    for name, caption, reason in [
        ("latin1", b"caf\xe9", "has a caption that is not UTF-8"),
        ("blank", b" \n\t\n", "has no caption"),
        ("empty", b"", "has no caption"),
        ("long", b"a" * (MAX_CAPTION_BYTES + 1), "has a caption that has more than 1,048,576 bytes"),
    ]:
        put(folder, f"{name}.png")
        write(folder / f"{name}.txt", caption)
        expected[f"{name}.png"] = reason
    write(folder / "alone.png", picture())
    expected["alone.png"] = "has no caption"
    before = snapshot(folder)

    source = opened(str(folder))
    good = sorted([*(f"good-{i:02d}.png" for i in range(20)), "moving.gif", "deep.tiff"])
    assert names(source) == good
    found = reasons(source)
    assert found.keys() == {name for name, reason in expected.items() if reason}
    for name, reason in found.items():
        assert expected[name] in reason, name
    assert snapshot(folder) == before


def test_too_many_bad_samples_are_an_error_that_names_the_first(tmp_path, folder):
    put(folder, *(f"{i}.png" for i in range(8)))
    write(folder / "3.txt", "")
    write(folder / "5.png", "a text")
    with pytest.raises(
        ValueError,
        match=r"(?s)2 of 8 samples of .*pictures are bad.*\n  3.png has no caption\n  5.png is not",
    ):
        open_source(str(folder), index=tmp_path / "index", max_bad_fraction=0.24)
    assert len(open_source(str(folder), index=tmp_path / "index", max_bad_fraction=0.25)) == 6


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_the_fraction_must_be_one(folder, fraction):
    with pytest.raises(ValueError, match="max_bad_fraction must be from 0 to 1"):
        open_source(str(folder), max_bad_fraction=fraction)


def test_nothing_outside_the_folder_is_read(opened, folder, tmp_path):
    """By links, by paths in a table, or by a pipe that never ends."""
    outside = tmp_path / "outside"
    put(outside, "secret.png", caption="secret")
    put(folder, "in/a.png")
    for name, target in [
        ("file.png", outside / "secret.png"),
        ("gone.png", folder / "nowhere"),
        ("linked", outside),
    ]:
        (folder / name).symlink_to(target)
    write(folder / "file.txt", "a")
    write(folder / "gone.txt", "a")
    (folder / "inside.png").symlink_to("in/a.png")
    write(folder / "inside.txt", "linked within")
    put(folder, "caption.png")
    os.remove(folder / "caption.txt")
    (folder / "caption.txt").symlink_to(outside / "secret.txt")
    put(folder, "pipe.png")
    os.remove(folder / "pipe.png")
    os.mkfifo(folder / "pipe.png")
    source = opened(str(folder))
    assert all_captions(source) == {"in/a.png": ("a picture",), "inside.png": ("linked within",)}
    assert reasons(source) == {
        "caption.png": "has a caption that is a link that leads out of the folder",
        "file.png": "is a link that leads out of the folder",
        "gone.png": "cannot be read: No such file or directory",
        "linked/": "is a link to a folder, which is not followed",
        "pipe.png": "is no regular file",
    }

    lines = [
        {"file": name, "caption": "x"}
        for name in ("../outside/secret.png", str(outside / "secret.png"), "in/../in/a.png")
    ]
    write(folder / "captions.jsonl", "\n".join(map(json.dumps, lines)))
    source = opened(str(folder))
    assert names(source) == ["in/a.png"]
    for path in ("../outside/secret.png", str(outside / "secret.png")):
        assert reasons(source)[path] == "is named among the captions, but is not in the folder"
    assert reasons(source)["caption.png"] == "is not named in captions.jsonl"


def test_a_bad_line_of_a_table_spoils_its_own_sample_alone(opened, folder):
    put(folder, *"abcdefghij")
    for name in "abcdefghij":
        os.rename(folder / name, folder / f"{name}.png")
    lines = [
        b'{"file": "a.png", "caption": "fine"}',
        b'{"file": "b.png", "caption": "caf\xe9"}',
        b'{"file": "c.png", "caption": ',
        b'["d.png", "caption"]',
        b'{"file": "e.png", "captions": [{"text": "x", "weight": -1}]}',
        b'{"file": "f.png", "captions": [{"text": "x", "weight": NaN}]}',
        b'{"file": "g.png", "caption": 7}',
        b'{"file": "h.png", "caption": "\\ud800"}',
        b'{"caption": "of nothing"}',
        b'{"file": "i.png"}',
        b"[" * 100_000,
        b'{"file": "j\\n.png", "caption": "x"}',
        b'{"file": "j.png", "caption": "also fine"}',
    ]
    write(folder / "captions.jsonl", b"\n".join(lines))
    source = opened(str(folder))
    assert all_captions(source) == {"a.png": ("fine",), "j.png": ("also fine",)}
    unnamed = "is not named in captions.jsonl"
    assert reasons(source) == {
        "captions.jsonl, line 2": "is not UTF-8",
        "captions.jsonl, line 3": "is not JSON",
        "captions.jsonl, line 4": "is not a JSON object",
        "captions.jsonl, line 9": "names no file: file_name or file must be its path",
        "captions.jsonl, line 11": "is not JSON",
        "b.png": unnamed,
        "c.png": unnamed,
        "d.png": unnamed,
        "e.png": "has a caption whose weight is not above 0 and at most 1,000,000",
        "f.png": "has a caption whose weight is not above 0 and at most 1,000,000",
        "g.png": "has a caption that is not a text but int",
        "h.png": "has a caption that is not UTF-8",
        "i.png": "has no caption",
        r"j\n.png": "is named among the captions, but is not in the folder",
    }

    os.remove(folder / "captions.jsonl")
    write(folder / "metadata.csv", b"file_name,text\na.png,fine\nb.png,caf\xe9\nc.png\n,x\nd.png,a,b,c\n")
    source = opened(str(folder))
    assert all_captions(source) == {"a.png": ("fine",), "d.png": ("a",)}
    assert reasons(source)["b.png"] == "has a caption that is not UTF-8"
    assert reasons(source)["c.png"] == "has no caption"


def test_names_that_cannot_be_printed_are_refused(opened, folder):
    put(folder, "a.png", "two\nlines.png", "\x1b[31mred.png", "é ü.png")
    for suffix in (".png", ".txt"):
        shutil.copy(folder / f"a{suffix}", os.fsencode(folder) + b"/\xff" + suffix.encode())
    source = opened(str(folder))
    assert names(source) == ["a.png", "é ü.png"]
    assert set(reasons(source)) == {r"two\nlines.png", r"\x1b[31mred.png", r"\udcff.png"}
    assert {bad.reason for bad in source.bad} == {"has a name with control characters, or that is not UTF-8"}


def test_a_table_is_no_way_out_of_the_folder(opened, folder, tmp_path):
    put(folder, "a.png")
    (folder / "captions.jsonl").symlink_to(write(tmp_path / "out.jsonl", '{"file": "a.png", "caption": "x"}'))
    with pytest.raises(ValueError, match=r"captions.jsonl is a link that leads out of the folder"):
        opened(folder)
    os.remove(folder / "captions.jsonl")
    os.mkfifo(folder / "captions.jsonl")
    with pytest.raises(ValueError, match=r"captions.jsonl is no regular file"):
        opened(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no captioned picture"),
        ({"a.txt": "a", ".hidden.png": "x", ".git/b.png": "x"}, "holds no captioned picture"),
        (
            {"captions.jsonl": "", "metadata.csv": ""},
            "one table of captions, got captions.jsonl and metadata.csv",
        ),
        ({"metadata.csv": "path,text\na.png,a\n"}, "must have a column file_name or file"),
        ({"metadata.csv": ""}, "must have a column file_name or file"),
        ({"captions.jsonl": " " * (MAX_CAPTION_BYTES + 2)}, "line 1 is longer than"),
        ({"metadata.csv": 'file,text\na.png,"' + "x" * 200_000}, r"metadata.csv, line \d: field larger"),
    ],
)
def test_a_folder_that_cannot_be_a_source_is_refused(opened, folder, files, message):
    for name, text in files.items():
        write(folder / name, text)
    with pytest.raises(ValueError, match=message):
        opened(str(folder))


# --- The index ----------------------------------------------------------------------------------------------


def test_what_did_not_change_is_not_read_again(opened, folder, scans):
    put(folder, *(f"{i}.png" for i in range(9)))
    write(folder / "3.png", "a text")
    assert names(opened(str(folder))) == [f"{i}.png" for i in range(9) if i != 3]
    assert len(scans) == 9
    first = opened(str(folder))
    assert len(scans) == 9

    write(folder / "2.txt", "another caption")
    write(folder / "3.png", picture())
    os.remove(folder / "4.png")
    put(folder, "10.png")
    source = opened(str(folder))
    assert len(scans) == 9 + 3
    assert sorted(names(source)) == sorted(f"{i}.png" for i in (0, 1, 2, 3, 5, 6, 7, 8, 10))
    assert all_captions(source)["2.png"] == ("another caption",)
    assert first.record(2).captions == ("a picture",)  # what is open stays as it was


def test_a_table_that_changes_is_read_again(opened, folder, scans):
    put(folder, "a.png", "b.png")
    write(folder / "captions.jsonl", '{"file": "a.png", "caption": "1"}\n{"file": "b.png", "caption": "2"}')
    opened(str(folder))
    write(folder / "captions.jsonl", '{"file": "a.png", "caption": "1"}\n{"file": "b.png", "caption": "3"}')
    assert all_captions(opened(str(folder))) == {"a.png": ("1",), "b.png": ("3",)}
    assert len(scans) == 3


@pytest.mark.parametrize("batch", [1, 3, 1024])
def test_a_scan_that_was_stopped_goes_on(opened, folder, scans, monkeypatch, batch):
    """Twice, and each time what was written before is used."""
    monkeypatch.setattr(index_module, "_BATCH", batch)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    put(folder, *(f"{i:02d}.png" for i in range(20)))
    scan = index_module.open_image
    for stop in (8, 16):

        def stopping(data: bytes, stop: int = stop) -> Image.Image:
            if len(scans) >= stop:
                raise KeyboardInterrupt
            return scan(data)

        monkeypatch.setattr(index_module, "open_image", stopping)
        with pytest.raises(KeyboardInterrupt):
            opened(str(folder))
    monkeypatch.setattr(index_module, "open_image", scan)
    assert names(opened(str(folder))) == [f"{i:02d}.png" for i in range(20)]
    wasted = len(scans) - 20
    assert wasted <= 2 * (batch + 5) if batch < 20 else wasted == 16  # of batches not full, and read ahead
    assert not list((folder.parent / "index").glob("*.part-*"))


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-20], lambda data: b"garbage" * 99])
def test_a_damaged_index_is_made_anew(opened, folder, spoil):
    put(folder, *(f"{i}.png" for i in range(5)))
    opened(str(folder))
    (path,) = (folder.parent / "index").glob("*.arrow")
    path.write_bytes(spoil(path.read_bytes()))
    assert names(opened(str(folder))) == [f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("batch", [1, 4, 1024])
def test_good_samples_keep_their_order_wherever_bad_ones_stand(opened, folder, monkeypatch, batch):
    monkeypatch.setattr(index_module, "_BATCH", batch)
    good = [f"{i:02d}.png" for i in range(40) if random.random() < 0.5]
    for i in range(40):
        put(folder, f"{i:02d}.png")
        if f"{i:02d}.png" not in good:
            write(folder / f"{i:02d}.txt", "")
    source = opened(str(folder))
    assert names(source) == good
    assert [bad.name for bad in source.bad] == [
        f"{i:02d}.png" for i in range(40) if f"{i:02d}.png" not in good
    ]
    assert source.record(-1).name == good[-1]
    for i in (len(good), -len(good) - 1):
        with pytest.raises(IndexError):
            source.record(i)
    for i, name in enumerate(good):
        assert source.read(i) == (folder / name).read_bytes()


def test_a_picture_that_changes_or_goes_after_indexing_is_a_bad_sample(opened, folder):
    put(folder, *(f"{i}.png" for i in range(4)))
    source = opened(str(folder))
    data = (folder / "1.png").read_bytes()
    write(folder / "1.png", data[:-1] + bytes([data[-1] ^ 1]))
    os.remove(folder / "2.png")
    write(folder / "3.png", data[:9])
    assert source.read(0)
    for i, reason in [(1, "has changed"), (2, "cannot be read: No such file"), (3, "has changed")]:
        with pytest.raises(BadSample, match=reason):
            source.read(i)


def test_a_source_travels_to_another_process_as_a_path(opened, folder):
    put(folder, *(f"{i}.png" for i in range(50)))
    source = opened(str(folder))
    packed = pickle.dumps(source)
    assert len(packed) < 1000
    other = pickle.loads(packed)
    assert names(other) == names(source)
    assert other.read(7) == source.read(7)


def test_processes_that_start_at_once_share_one_index(folder, tmp_path):
    put(folder, *(f"{i:03d}.png" for i in range(60)))
    code = """
        import sys
        from pathlib import Path
        from localdit.data import index
        from localdit.data.sources import open_source

        scanned, scan = 0, index.open_image

        def counted(data):
            global scanned
            scanned += 1
            return scan(data)

        index.open_image = counted
        source = open_source(sys.argv[1], index=Path(sys.argv[2]))
        print(scanned, [source.record(i).name for i in range(len(source))])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(tmp_path / "index")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate(timeout=120)[0].split(" ", 1) for process in running]
    assert sorted(int(scanned) for scanned, _ in lines) == [0, 0, 60]
    assert len({listed for _, listed in lines}) == 1


# --- Shards -------------------------------------------------------------------------------------------------


def test_shards_are_read_by_offset(opened, folder):
    contents = {}
    for shard in range(3):
        members = []
        for key in range(4):
            members += sample(f"{key:03d}", f"caption {shard} {key}")
            contents[f"train-{shard:02d}.tar/{key:03d}"] = members[-2][1]
        write(folder / f"train-{shard:02d}.tar", tar(*members))
    for spec in (
        f"{folder}/train-{{00..02}}.tar",
        f"{folder}/*.tar",
        {"kind": "shards", "urls": [f"{folder}/train-0{i}.tar" for i in range(3)]},
    ):
        source = opened(spec)
        assert names(source) == list(contents)
        assert source.shards.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert source.record(5).captions == ("caption 1 1",)
        order = random.sample(range(12), 12)
        assert [source.read(i) for i in order] == [list(contents.values())[i] for i in order]
    urls = write(folder / "urls.txt", f"{folder}/train-{{00..01}}.tar\n\n{folder}/train-02.tar\n")
    assert names(opened(str(urls))) == list(contents)


def test_the_parts_of_a_sample_are_found_by_their_key(opened, folder):
    """WebDataset's rule: the path up to the first dot of the name; the parts may stand anywhere."""
    json_captions = json.dumps({"captions": ["x", {"text": "y", "weight": 3}], "width": 7}).encode()
    data = tar(
        *sample("a/1"),
        ("b.seg.png", picture()),
        ("b.JPG", picture(kind="JPEG")),
        ("c.webp", picture(kind="WEBP")),
        ("b.json", json_captions),
        ("c.json", b'{"caption": "of c", "text": "no"}'),
        ("c.txt", b"the text goes before the JSON"),
        ("README", b"x"),
        ("notes.md", b"x"),
        ("._b.jpg", b"x"),
    )
    source = opened(str(write(folder / "a.tar", data)))
    assert all_captions(source) == {
        "a.tar/a/1": ("a picture",),
        "a.tar/b": ("x", "y"),
        "a.tar/c": ("the text goes before the JSON",),
    }
    assert source.record(1).weights == (1, 3)
    assert not source.bad


def test_shards_of_one_name_are_told_apart(opened, folder):
    for part in ("a", "b"):
        write(folder / part / "0.tar", tar(*sample("k")))
    assert names(opened(f"{folder}/{{a,b}}/0.tar")) == [f"{folder}/a/0.tar/k", f"{folder}/b/0.tar/k"]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = size
    return info


def test_bad_members_of_a_shard_spoil_their_own_sample_alone(opened, folder):
    """R18: in one shard, each beside good samples, and a good shard on either side."""
    data = tar(
        *sample("good-1"),
        ("no-caption.png", picture()),
        ("no-picture.txt", b"a"),
        ("latin1.png", picture()),
        ("latin1.txt", b"caf\xe9"),
        ("not-json.png", picture()),
        ("not-json.json", b"{"),
        ("list.png", picture()),
        ("list.json", b'["a"]'),
        *sample("twice"),
        ("both.png", picture()),
        ("both.jpg", picture(kind="JPEG")),
        ("both.txt", b"a"),
        *sample("good-2"),
        *sample("twice"),
        *sample("../../outside"),
        ("/etc/absolute.png", picture()),
        ("/etc/absolute.txt", b"a"),
        header("link.png", kind=tarfile.SYMTYPE, target="/etc/passwd"),
        ("link.txt", b"a"),
        header("device.png", kind=tarfile.CHRTYPE),
        ("device.txt", b"a"),
        ("zero.png", b""),
        ("zero.txt", b"a"),
        ("gif.gif", picture(kind="GIF")),
        ("gif.txt", b"a"),
        ("bomb.png", BOMBS["png"]()),
        ("bomb.txt", b"a"),
        ("long.png", picture()),
        ("long.txt", b"a" * (MAX_CAPTION_BYTES + 1)),
        *sample("new\nline"),
        *sample("good-3"),
    )
    write(folder / "1.tar", data)
    for shard in (0, 2):
        write(folder / f"{shard}.tar", tar(*sample("x"), *sample("y")))
    source = opened(f"{folder}/{{0..2}}.tar")
    assert names(source) == [
        "0.tar/x",
        "0.tar/y",
        "1.tar/good-1",
        "1.tar/good-2",
        "1.tar/good-3",
        "2.tar/x",
        "2.tar/y",
    ]
    assert reasons(source) == {
        "1.tar/no-caption": "has no caption",
        "1.tar/no-picture": "has no picture",
        "1.tar/latin1": "has a caption that is not UTF-8",
        "1.tar/not-json": "has captions that are not JSON",
        "1.tar/list": "has captions in a JSON list, not an object",
        "1.tar/twice": "stands in its shard more than once",
        "1.tar/both": "has several pictures: jpg, png",
        "1.tar/../../outside": "has a path that leads out of the shard",
        "1.tar//etc/absolute": "has a path that leads out of the shard",
        "1.tar/link": "is no regular file in its shard",
        "1.tar/device": "is no regular file in its shard",
        "1.tar/zero": "is empty",
        "1.tar/gif": "is not a picture in the format JPEG or PNG or WEBP",
        "1.tar/bomb": "has 50000x50000 pixels, more than the 67,108,864 that are read",
        "1.tar/long": f"has a caption that has {2**20 + 1:,} bytes, more than the {2**20:,} that are read",
        r"1.tar/new\nline": "has a name with control characters, or that is not UTF-8",
    }


WHOLE = [*sample("a"), *sample("b")]
DAMAGED = {
    "zero-byte": (b"", [], "is empty"),
    "text": (b"no tar file, " * 99, [], "is damaged or cut off"),
    "gzip": (b"\x1f\x8b" + bytes(99), [], "is compressed"),
    "no-picture": (tar(("notes.md", b"x")), [], "holds no picture"),
    "no-end": (tar(*WHOLE, end=False), ["a", "b"], "is damaged or cut off after"),
    "bad-header": (
        tar(*WHOLE, end=False) + b"x" * 512 + tar(*sample("c")),
        ["a", "b"],
        "is damaged or cut off after",
    ),
    "2-gb-member": (tar(*WHOLE, end=False) + raw_header("c.png", 2**31), ["a", "b"], "is damaged or cut off"),
    "2-gb-name": (
        tar(*WHOLE, end=False) + raw_header("././@LongLink", 2**31, tarfile.GNUTYPE_LONGNAME) + bytes(2048),
        ["a", "b"],
        "is damaged or cut off: a header of 2,147,483,648 bytes",
    ),
    "2-gb-pax": (
        tar(*WHOLE, end=False) + raw_header("x", 2**31, tarfile.XHDTYPE) + bytes(2048),
        ["a", "b"],
        "is damaged or cut off: a header of 2,147,483,648 bytes",
    ),
    "negative-size": (
        tar(*WHOLE, end=False) + raw_header("c.png", -512) + bytes(2048),
        ["a", "b"],
        "is damaged",
    ),
    "negative-name": (
        tar(*WHOLE, end=False) + raw_header("x", -(2**40), tarfile.GNUTYPE_LONGNAME) + bytes(2048),
        ["a", "b"],
        "is damaged",
    ),
}


@pytest.mark.parametrize(("data", "good", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_shard_gives_what_it_holds_and_spoils_no_other(opened, folder, data, good, reason):
    write(folder / "0.tar", data)
    write(folder / "1.tar", tar(*sample("x")))
    source = opened(f"{folder}/{{0,1}}.tar")
    found = reasons(source)
    assert names(source) == [f"0.tar/{key}" for key in good] + ["1.tar/x"]
    assert reason in found.pop("0.tar")
    assert set(found) <= {"0.tar/c"}


def test_a_member_of_gigabytes_takes_no_memory(opened, folder):
    """2 GB that are there, as a hole in the file: a picture, a caption, a long name."""
    path = folder / "0.tar"
    with open(path, "wb") as file:
        for name, kind in [("a.png", b"0"), ("b.txt", b"0"), ("c", tarfile.GNUTYPE_LONGNAME)]:
            file.write(raw_header(name, 2**31, kind))
            file.seek(2**31, os.SEEK_CUR)
            file.write(tar(("b.png", picture()), end=False) if name == "a.png" else b"")
        file.write(tar(*sample("d")))
    write(folder / "1.tar", tar(*sample("x")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = opened(f"{folder}/{{0,1}}.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    assert names(source) == ["1.tar/x"]
    assert reasons(source) == {
        "0.tar/a": "has 2,147,483,648 bytes, more than the 268,435,456 that are read",
        "0.tar/b": "has a caption that has 2,147,483,648 bytes, more than the 1,048,576 that are read",
        "0.tar": "is damaged or cut off: a header of 2,147,483,648 bytes",
    }


def test_cut_or_flipped_anywhere_a_shard_gives_good_samples_or_bad_ones(opened, folder):
    whole = tar(*sample("a"), *sample("b"), *sample("c"))
    for number in range(150):
        data = bytearray(whole[: random.choice((len(whole), random.randint(1, len(whole))))])
        for _ in range(random.randint(1, 3)):
            block = random.randrange(-(-len(data) // 512))  # half of the damage is to the header of a block
            data[min(512 * block + random.randrange(random.choice((160, 512))), len(data) - 1)] ^= (
                1 << random.randrange(8)
            )
        write(folder / f"{number:03d}.tar", bytes(data))
    source = opened(f"{folder}/{{000..149}}.tar")
    assert len({*names(source), *reasons(source)}) >= 150
    for i in range(len(source)):
        with Image.open(io.BytesIO(source.read(i))) as image:
            assert image.size == tuple(source.sizes[i])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/missing.tar", "there is no shard .*missing.tar: No such file"),
        ("{}/*.tar.x", r"there is no shard .*\*.tar.x"),
        ({"kind": "shards", "urls": ["a.tar", "a.tar"]}, "each shard must be given once, got a.tar 2 times"),
        ({"kind": "shards", "urls": []}, "urls must name a shard, got none"),
        ({"kind": "shards", "urls": [7]}, "urls must be texts, got 7"),
        ({"kind": "shards", "urls": "a.tar", "cache_gb": 0}, "cache_gb must be a positive number"),
        ("{}/{{0..1.tar", "."),
    ],
)
def test_shards_that_cannot_be_are_refused(opened, folder, spec, message):
    with pytest.raises(ValueError, match=message):
        opened(spec.format(folder) if isinstance(spec, str) else spec)


def test_shards_that_lie_elsewhere_are_fetched_once(opened, folder, tmp_path):
    log = tmp_path / "log"
    contents = [tar(*sample(f"{shard}-a"), *sample(f"{shard}-b")) for shard in range(3)]
    for shard, data in enumerate(contents):
        write(folder / f"{shard}.tar", data)
    spec = {"kind": "shards", "urls": [f"pipe:echo {i} >> {log}; cat {folder}/{i}.tar" for i in range(3)]}
    source = opened(spec)
    local = opened(f"{folder}/{{0..2}}.tar")
    assert [name.split("/")[-1] for name in names(source)] == [name.split("/")[-1] for name in names(local)]
    assert [source.read(i) for i in range(6)] == [local.read(i) for i in range(6)]
    assert pickle.loads(pickle.dumps(source)).read(3) == local.read(3)
    opened(spec)
    assert sorted(log.read_text().split()) == ["0", "1", "2"]


def test_the_cache_of_shards_is_bounded(opened, folder, tmp_path):
    log = tmp_path / "log"
    for shard in range(4):
        write(folder / f"{shard}.tar", tar(*sample(f"{shard}")))
    size = (folder / "0.tar").stat().st_size
    urls = [f"pipe:echo {i} >> {log}; cat {folder}/{i}.tar" for i in range(4)]
    source = opened(
        {"kind": "shards", "urls": urls, "cache": str(tmp_path / "cache"), "cache_gb": 2.5 * size / 1e9}
    )
    for i in (0, 1, 0, 2, 0, 3, 0):  # what was used last stays
        data = (folder / f"{i}.tar").read_bytes()
        assert source.read(i) in data
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar*"))
    assert held <= 2 * size
    fetched = log.read_text().split()[4:]
    assert fetched.count("0") <= 1
    assert len(fetched) <= 4


def test_threads_share_a_cache_that_is_too_small_for_their_shards(tmp_path):
    def fetch(i: int, path: Path) -> None:
        time.sleep(0.001)
        path.write_bytes(bytes([i]) * 1_000)

    def read(i: int) -> bytes:
        with ShardCache(str(tmp_path), 2_500e-9).open(f"{i}", partial(fetch, i)) as file:
            return file.read()

    leftover = write(tmp_path / f".{hashlib.sha256(b'0').hexdigest()[:32]}.tar.tmp-1", "of a killed process")
    shards = [i % 5 for i in range(80)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, shards)) == [bytes([i]) * 1_000 for i in shards]
    assert not leftover.exists()


def test_shards_that_cannot_be_fetched_are_named_and_the_others_kept(opened, folder, tmp_path):
    log = tmp_path / "log"
    for shard in range(3):
        write(folder / f"{shard}.tar", tar(*sample(f"{shard}")))
    switch = tmp_path / "switch"
    urls = [f"pipe:echo {i} >> {log}; cat {folder}/{i}.tar" for i in range(3)]
    urls[1] = f"pipe:cat {switch} > /dev/null || exit 7; {urls[1][5:]}"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 3 shards could not be had .* exit 7"):
            opened({"kind": "shards", "urls": urls})
        assert len(list((tmp_path / "index").glob("*.part-*"))) == 1
    write(switch, "on")
    assert len(opened({"kind": "shards", "urls": urls})) == 3
    assert sorted(log.read_text().split()) == ["0", "1", "2"]


def test_a_shard_larger_than_the_cache_is_refused(opened, folder):
    write(folder / "0.tar", tar(*sample("a", width=100, height=100)))
    with pytest.raises(ValueError, match="is larger than the cache of 9,999 bytes"):
        opened({"kind": "shards", "urls": f"pipe:cat {folder}/0.tar", "cache_gb": 9_999e-9})


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens URLs with curl")
def test_shards_come_by_http(opened, folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    for shard in range(2):
        write(folder / f"{shard}.tar", tar(*sample("a"), *sample("b")))
    with http.server.ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = opened(f"http://localhost:{server.server_port}/{{0..1}}.tar")
        with pytest.raises(ValueError, match=r"1.tarx: the command .* \(curl .* ended with exit 22$"):
            opened(f"http://localhost:{server.server_port}/{{0.tar,1.tarx}}")
        server.shutdown()
    assert names(source) == ["0.tar/a", "0.tar/b", "1.tar/a", "1.tar/b"]
    assert source.read(2) == opened(f"{folder}/1.tar").read(0)


# --- Datasets of Hugging Face -------------------------------------------------------------------------------


@pytest.fixture
def parquet(folder, tmp_path, monkeypatch):
    """Make a folder of Parquet files, one for each list of rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def make(*files: list[dict], captions: object = None) -> str:
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "text": captions or datasets.Value("string"),
                "other": datasets.Value("string"),
            }
        )
        for number, rows in enumerate(files):
            table = datasets.Dataset.from_list([{"other": "o", **row} for row in rows], features=features)
            table.to_parquet(folder / f"train-{number:02d}.parquet")
        return str(folder)

    datasets.disable_progress_bars()
    yield make
    datasets.enable_progress_bars()


def row(text: object, data: bytes | None = None, path: str | None = None) -> dict:
    return {"image": {"bytes": data, "path": path}, "text": text}


def test_a_dataset_is_read_by_row(opened, parquet):
    pictures = [picture(i + 1, 5) for i in range(5)]
    path = parquet([row(f"caption {i}", data) for i, data in enumerate(pictures)])
    source = opened(f"hf:{path}")
    assert names(source) == [f"train/{i:08d}" for i in range(5)]
    assert source.sizes.tolist() == [[i + 1, 5] for i in range(5)]
    assert [source.read(i) for i in range(5)] == pictures
    assert source.record(3).captions == ("caption 3",)
    both = opened({"kind": "hf", "path": path, "split": "train[1:3]", "caption_columns": ["text", "other"]})
    assert [both.record(i).captions for i in range(2)] == [("caption 1", "o"), ("caption 2", "o")]
    assert pickle.loads(pickle.dumps(source)).read(2) == pictures[2]


def test_bad_rows_are_skipped_and_no_other_file_is_read(opened, parquet, tmp_path):
    """A row may name a file of the dataset; not one of this machine's."""
    secret = write(tmp_path / "secret.png", picture())
    inside = write(tmp_path / "pictures" / "files" / "a.bin", picture(3, 4))
    path = parquet(
        [
            row("fine", picture()),
            row("", picture()),
            row(None, picture()),
            row("text", b"a text"),
            row("named", None, str(secret)),
            row("tricky", None, f"{inside.parent}/../../secret.png"),
            row("within", None, str(inside)),
            {"image": None, "text": "none"},
        ]
    )
    source = opened(f"hf:{path}")
    assert all_captions(source) == {"train/00000000": ("fine",), "train/00000006": ("within",)}
    assert source.read(1) == inside.read_bytes()
    assert source.bad == [
        Bad("train/00000001", "has no caption"),
        Bad("train/00000002", "has no caption"),
        Bad("train/00000003", "is not a picture in the format JPEG or PNG or WEBP"),
        Bad("train/00000004", "names a picture outside the dataset"),
        Bad("train/00000005", "names a picture outside the dataset"),
        Bad("train/00000007", "has no picture"),
    ]


def test_a_streamed_dataset_is_the_same_samples_in_shards(opened, parquet, tmp_path):
    import datasets

    pictures = [[picture() for _ in range(3)] for _ in range(2)]
    files = [
        [row([f"{k} {i}", "second"], data) for i, data in enumerate(part)] for k, part in enumerate(pictures)
    ]
    path = parquet(*files, captions=datasets.List(datasets.Value("string")))
    source = opened({"kind": "hf", "path": path, "streaming": True, "cache": str(tmp_path / "cache")})
    assert source.shards.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.record(4).captions == ("1 1", "second")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    shutil.rmtree(tmp_path / "cache")  # it is only a cache
    assert [source.read(i) for i in range(6)] == pictures[0] + pictures[1]


def test_a_folder_of_save_to_disk_is_a_dataset(opened, tmp_path):
    import datasets

    pictures = [picture() for _ in range(3)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [
        {"image": {"bytes": data, "path": None}, "caption": f"number {i}"} for i, data in enumerate(pictures)
    ]
    path = str(tmp_path / "saved")
    datasets.Dataset.from_list(rows, features=features).save_to_disk(path)
    source = opened(f"hf:{path}")
    assert [source.read(i) for i in range(3)] == pictures
    assert source.record(2).captions == ("number 2",)
    for field in ({"split": "train[:1]"}, {"streaming": True}):
        with pytest.raises(ValueError, match="is one split: give no name, split, revision or streaming"):
            opened({"kind": "hf", "path": path, **field})


def test_a_streamed_dataset_must_hold_its_pictures(opened, parquet, tmp_path):
    path = parquet([row("fine", picture()), row("named", None, str(write(tmp_path / "a.png", picture())))])
    with pytest.raises(ValueError, match="holds paths of pictures: give streaming: false"):
        opened({"kind": "hf", "path": path, "streaming": True})
    assert not list((tmp_path / "index" / "shards").glob("*.tar*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_column": "img"}, "must have a column img, got .*: name its columns"),
        ({"caption_columns": ["text", "alt"]}, "must have a column alt"),
        ({"caption_columns": []}, "caption_columns must name columns"),
        ({"split": "test"}, "test"),
        (
            {"trust_remote_code": True},
            "a source of kind hf: got an unexpected keyword argument 'trust_remote_code'",
        ),
    ],
)
def test_a_dataset_without_what_is_asked_for_is_refused(opened, parquet, fields, message):
    path = parquet([row("a", picture())])
    with pytest.raises(ValueError, match=message):
        opened({"kind": "hf", "path": path, **fields})


# --- Scenes, and the description of sources -----------------------------------------------------------------


def test_scenes_of_one_object_are_captioned_by_their_class():
    """What a picture shows is what its caption says, and all 48 classes come up."""
    source = open_source({"kind": "scene_classes", "count": 600, "seed": 3, "size": 64})
    for i in random.sample(range(600), 20):
        (found,) = detect(decode_image(source.read(i))).objects
        assert source.record(i).captions == (f"{found.color} {found.shape}",)
    assert len({source.record(i).captions for i in range(600)}) == len(COLORS) * len(SHAPES)
    assert len({source.record(i).digest for i in range(600)}) == 600


def test_a_folder_of_classes_has_the_name_of_the_folder_for_a_caption(opened, folder, scans):
    put(folder, "n01440764/a.png", "n01440764/deeper/b.png", "n02/c.png", "top.png", caption="not read")
    write(folder / "captions.jsonl", "{}")
    source = opened({"kind": "folder", "path": str(folder), "classes": True})
    assert all_captions(source) == {
        "n01440764/a.png": ("n01440764",),
        "n01440764/deeper/b.png": ("n01440764",),
        "n02/c.png": ("n02",),
    }
    assert reasons(source) == {"top.png": "is in no folder of a class"}
    scans.clear()
    (folder / "captions.jsonl").unlink()
    assert opened(str(folder)).record(0).captions == ("not read",)  # an index of its own
    opened({"kind": "folder", "path": str(folder), "classes": True})
    assert len(scans) == 4  # of the plain folder; the other is not read again


def test_scenes_are_a_source():
    source = open_source({"kind": "scenes", "count": 30, "seed": 5, "size": 96})
    assert (len(source), source.sizes.tolist(), list(source.bad), source.shards) == (
        30,
        [[96, 96]] * 30,
        [],
        None,
    )
    for i in random.sample(range(30), 5):
        drawn = scene(i, seed=5)
        assert source.record(i).captions == tuple(caption.text for caption in captions(drawn))
        assert len(source.record(i).weights) == len(source.record(i).captions)
        image = decode_image(source.read(i))
        assert image.size == (96, 96)
        assert detect(image).background == drawn.background
    assert len({source.record(i).digest for i in range(30)}) == 30
    assert (
        source.record(3).digest
        == open_source({"kind": "scenes", "count": 4, "seed": 5, "size": 96}).record(3).digest
    )
    assert source.record(3).digest != open_source("scenes:4").record(3).digest
    with pytest.raises(IndexError):
        source.read(30)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/", "there is no folder nowhere/"),
        ("scenes:0", "count must be a whole number above 0, got 0"),
        ({"kind": "scenes", "count": True}, "count must be a whole number above 0"),
        ({"kind": "scenes", "number": 3}, "a source of kind scenes: "),
        ({"kind": "folder"}, "a source of kind folder: missing a required argument: 'path'"),
        ({"kind": "zip", "path": "x"}, "kind must be folder, shards, hf, scenes or scene_classes, got 'zip'"),
        ({"path": "x"}, "kind must be folder, shards, hf, scenes or scene_classes, got None"),
        ("s4://bucket/a.tar", "s4://bucket/a.tar: no gopen handler"),
    ],
)
def test_a_source_that_cannot_be_is_refused(opened, spec, message):
    with pytest.raises(ValueError, match=message):
        opened(spec)


def test_a_missing_extra_is_named(monkeypatch, folder):
    for module in ("folders", "shards", "index"):
        monkeypatch.delitem(sys.modules, f"localdit.data.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"sources need pyarrow, of the extra 'train': pip install 'localdit\[train\]'"
    ):
        open_source(str(folder))
