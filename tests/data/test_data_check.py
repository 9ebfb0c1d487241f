"""`localdit data check`: its numbers are right, what is bad is listed, and the picture is one."""

import json
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile_files import TRUNCATED, picture
from PIL import Image

from localdit import cli
from localdit.data.buckets import bucket_sizes
from localdit.data.check import check, draw, table
from localdit.data.sources import Bad, Source, open_source


def count_letters(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    return path


@pytest.fixture
def opened(tmp_path):
    return partial(open_source, index=tmp_path / "index", max_bad_fraction=1)


def put(folder: Path, name: str, data: bytes, *captions: str) -> None:
    (folder / f"{name}.png").write_bytes(data)
    (folder / f"{name}.txt").write_text("\n".join(captions), encoding="utf-8")


@pytest.fixture
def sizes() -> list[tuple[int, int]]:
    return [(random.randint(1, 400), random.randint(1, 400)) for _ in range(23)]


@pytest.fixture
def source(folder, opened, sizes) -> Source:
    """Pictures of random sizes; number i has captions of 1, ..., i % 3 + 1 words, three letters each."""
    for i, (width, height) in enumerate(sizes):
        put(
            folder,
            f"{i:02d}",
            picture(width, height),
            *(" ".join(["abc"] * (k + 1)) for k in range(i % 3 + 1)),
        )
    return opened(str(folder))


def test_the_numbers_are_right(source, sizes):
    facts = check(source, 256, count_tokens=count_letters, max_length=7).facts()
    widths, heights = (sorted(side) for side in zip(*sizes))
    assert (facts["pictures"], facts["bad"], facts["copies"], facts["decoded"]) == (23, 0, 0, False)
    assert facts["width"] == {
        "least": widths[0],
        "median": widths[11],
        "95 %": widths[21],
        "most": widths[22],
    }
    assert facts["height"]["median"] == heights[11]
    assert facts["megapixels"]["most"] == pytest.approx(max(w * h for w, h in sizes) / 1e6)
    words = sorted(k + 1 for i in range(23) for k in range(i % 3 + 1))
    assert facts["captions"] == len(words)
    assert facts["words"]["median"] == words[(len(words) - 1) // 2]
    assert facts["tokens"]["most"] == 11
    assert facts["too_long"] == words.count(3)
    assert facts["captions_per_picture"] == {"least": 1, "median": 2, "95 %": 3, "most": 3}

    counts: Counter = Counter()
    enlarged, cropped = 0, []
    for width, height in sizes:

        def scale(bucket: tuple[int, int], width: int = width, height: int = height) -> float:
            return max(bucket[0] / height, bucket[1] / width)

        def kept(bucket: tuple[int, int], width: int = width, height: int = height) -> float:
            return bucket[0] * bucket[1] / (scale(bucket) ** 2 * width * height)

        best = max(bucket_sizes(256), key=kept)
        counts[best] += 1
        enlarged += scale(best) > 1
        cropped.append(1 - kept(best))
    assert {(b["height"], b["width"]): b["pictures"] for b in facts["buckets"] if b["pictures"]} == counts
    assert facts["enlarged"] == enlarged
    assert facts["cropped"] == pytest.approx(np.mean(cropped))


def test_decoding_finds_what_headers_do_not_tell(folder, opened, source):
    put(folder, "10", TRUNCATED["PNG"](), "cut off")
    put(folder, "17", b"a text", "text")
    put(folder, "20", (folder / "19.png").read_bytes(), "the same again")
    source = opened(str(folder))
    quick, thorough = check(source, 256), check(source, 256, decode=True)
    assert [bad.name for bad in quick.bad] == ["17.png"]
    assert [bad.name for bad in thorough.bad] == ["17.png", "10.png"]
    assert thorough.bad[1].reason.startswith("is damaged")
    assert (len(quick.sizes), len(thorough.sizes)) == (22, 21)
    assert quick.copies == thorough.copies == 1
    assert len(thorough.bucket) == len(thorough.captions) == 21
    assert 10 not in thorough.examples


def test_the_table_says_what_the_facts_say(source):
    report = check(source, 256, count_tokens=count_letters, max_length=7)
    facts = report.facts()
    lines = table(facts)
    assert "23 pictures with 45 captions, 0 bad" in lines
    assert re.search(rf"megapixels +0\.\d\d .* {facts['megapixels']['most']:.2f}\n", lines)
    assert f"{facts['too_long']} captions ({facts['too_long'] / 45:.1%}) of more than 7 tokens" in lines
    for bucket in facts["buckets"]:
        listed = f"{bucket['width']:>5} x {bucket['height']:<5}" in lines
        assert listed == (bucket["pictures"] > 0)
    assert max(map(len, lines.splitlines())) <= 110

    words = table(check(source, 256).facts())
    assert "tokens" not in words


def test_reasons_that_differ_in_numbers_are_one(source):
    report = check(source, 256)
    bad = [
        Bad(f"{i}.png", f"has {i}x9 pixels, more than the 67,108,864 that are read")
        for i in range(1000, 1003)
    ]
    bad.append(Bad("a.png", "has no caption"))
    facts = type(report)(**{**vars(report), "bad": bad}).facts()
    assert [(reason["count"], reason["example"]) for reason in facts["reasons"]] == [
        (3, "1000.png"),
        (1, "a.png"),
    ]
    lines = table(facts)
    assert "bad, 14.81%" in lines
    assert "       3  has 1000x9 pixels, more than the 67,108,864 that are read  (such as 1000.png)" in lines


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_picture_can_be_drawn_of_any_source(folder, opened, tmp_path, count):
    """Few pictures, captions in any script and with signs of formulas, pictures that turn out bad."""
    for i in range(count):
        put(folder, f"{i:02d}", picture(30 + i, 20), ["$x^2$ a_b \\frac", "赤い円 🙂", "word " * 200][i % 3])
    put(folder, "00", TRUNCATED["PNG"](), "cut off")
    source = opened(str(folder))
    tokens = count_letters if count == 3 else None
    draw(check(source, 128, count_tokens=tokens), source, "$a_b$ 赤", tmp_path / "check.png")
    with Image.open(tmp_path / "check.png") as image:
        assert image.size == (1400, 800)
        assert len(image.convert("RGB").getcolors(10**7)) > 10


def test_the_picture_of_nothing_can_be_drawn(folder, opened, tmp_path):
    put(folder, "00", TRUNCATED["PNG"](), "cut off")
    source = opened(str(folder))
    report = check(source, 128, decode=True, count_tokens=count_letters)
    assert "0 pictures with 0 captions, 1 bad" in table(report.facts())
    draw(report, source, "empty", tmp_path / "check.png")


# --- The command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; give back stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, code: int = 0) -> tuple[str, str]:
        assert cli.main(["data", "check", *args, "--index", "index"]) == code
        said = capsys.readouterr()
        return said.out, said.err

    return run


def test_the_command_writes_table_list_and_picture(command, folder, source, tmp_path):
    put(folder, "03", b"a text", "text")
    out, err = command("pictures", "--resolution", "128")
    assert "22 pictures with 44 captions, 1 bad" in out
    assert err == ""
    written = ["data-check/check.png", "data-check/check.json", "data-check/bad.jsonl"]
    assert out.splitlines()[-3:] == written
    assert sorted(path.name for path in (tmp_path / "data-check").iterdir()) == [
        "bad.jsonl",
        "check.json",
        "check.png",
    ]
    (line,) = (tmp_path / "data-check/bad.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "name": "03.png",
        "reason": "is not a picture in the format JPEG or PNG or WEBP",
    }


def test_the_command_prints_json_and_takes_a_source_in_json(command, source, tmp_path):
    spec = {"kind": "scenes", "count": 9, "size": 64}
    out, _ = command(json.dumps(spec), "--resolution", "64", "--json", "--out", "a/b")
    facts = json.loads(out)
    assert facts["source"] == spec
    assert facts["pictures"] == 9
    assert json.loads((tmp_path / "a/b/check.json").read_text()) == facts


def test_the_command_counts_tokens(command, source):
    tokenizer = str(Path(cli.__file__).parents[1] / "assets/mini/tokenizer")
    out, _ = command("pictures", "--tokenizer", tokenizer, "--max-length", "3", "--json")
    facts = json.loads(out)
    assert facts["max_length"] == 3
    assert facts["tokens"]["least"] >= 2  # with the one that ends a text
    assert facts["too_long"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nowhere",), "there is no folder nowhere"),
        (("pictures", "--resolution", "500"), "resolution must be a multiple of 16, at least 64, got 500"),
        (("pictures", "--max-length", "0"), "--max-length must be at least 1, got 0"),
        (('{"kind": "folder"',), "SOURCE must be a JSON object if it begins with a brace"),
        (("pictures",), "pictures holds no captioned picture; 1 are bad, first:\n  a.png has no caption"),
    ],
)
def test_the_command_says_what_is_wrong(command, folder, args, message):
    (folder / "a.png").write_bytes(picture())
    _, err = command(*args, code=2)
    assert f"localdit: error: {message}" in err


def test_without_an_action_the_command_says_how(capsys):
    with pytest.raises(SystemExit):
        cli.main(["data"])
    assert "the following arguments are required: ACTION" in capsys.readouterr().err
