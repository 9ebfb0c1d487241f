"""What the package carries besides code: LocalDiT-Mini, a complete pipeline in diffusers' folder layout."""

from pathlib import Path

MINI = str(Path(__file__).parent / "mini")  # for `LocalDiTPipeline.from_pretrained(MINI)`
