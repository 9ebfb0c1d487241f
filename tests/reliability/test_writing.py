"""The figures find their place in the document; the canary of the pickles sings when it is let."""

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from . import Experiment, Outcome
from .__main__ import BEGIN, END, with_row
from .pickles import PAYLOADS


def entry(id: str, claim: str) -> Experiment:
    return Experiment(id, claim, run=None, full=1, small=1, holds=True)


def test_a_row_takes_its_place_and_replaces_its_older_self():
    document = f"before\n\n{BEGIN}\n{END}\n\nafter | R1 | not a row\n"
    for id, claim, passed in (
        ("R10", "b", 5),
        ("R2", "a", 5),
        ("R10", "c", 4),
        ("R10", "b", 3),
        ("R2", "a", 5),
        ("R10", "c", 2),
    ):
        document = with_row(document, entry(id, claim), Outcome(5, passed, "a|\nb"))
    assert document.startswith(f"before\n\n{BEGIN}\n")
    assert document.endswith(f"{END}\n\nafter | R1 | not a row\n")
    assert [line for line in document.splitlines() if line.startswith("| R")] == [
        r"| R2 | a | 5 of 5 | a\| b |",
        r"| R10 | b | **does not hold**: 3 of 5 | a\| b |",
        r"| R10 | c | **does not hold**: 2 of 5 | a\| b |",
    ]
    assert document.count("Measured last with Python") == 1


def test_the_readme_repeats_figures_of_the_document():
    readme, document = (Path(__file__).parents[2] / name for name in ("README.md", "docs/reliability.md"))
    repeated = re.findall(r"\((R\d+)\) \|.* (\d+ of \d+) \|", readme.read_text(encoding="utf-8"))
    assert len(repeated) >= 8
    lines = document.read_text(encoding="utf-8").splitlines()
    for id, figure in repeated:
        assert any(line.startswith(f"| {id} | ") and f" {figure} |" in line for line in lines), id


@pytest.mark.parametrize("payload", sorted(PAYLOADS.keys() - {"cut", "YAML's"}))
def test_each_pickle_would_run_its_code_if_it_were_opened(tmp_path, payload):
    nest = tmp_path / "nest"
    content = PAYLOADS[payload](nest)
    match payload:
        case "plain":
            pickle.loads(content)
        case "NumPy's":
            np.load(io.BytesIO(content), allow_pickle=True)
        case _:
            torch.load(io.BytesIO(content), weights_only=False)
    assert nest.is_dir()
