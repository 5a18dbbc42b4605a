"""The README's mean-field example runs, and its figures are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_the_merge_is_better(capsys):
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "poc_lora.mfnn" in b]
    short = block.replace("steps=1000", "steps=50")
    assert short != block
    scope = {}
    exec(short, scope)  # noqa: S102
    assert scope["particles"].shape == (8, 256, 3)
    single, merged = map(float, re.findall(r"tensor\((.*?)\)", capsys.readouterr().out))
    assert merged < single  # Jensen: an average's squared error is at most the average squared error


def test_its_images_are_there_and_small():
    images = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert {Path(image).stem for image in images} >= {"figure1", "figure2", "table2", "poc"}
    for image in images:
        assert (ROOT / image).stat().st_size < 100_000, image
