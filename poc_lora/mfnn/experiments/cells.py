"""Experiments as cells: each cell's result is a file, written when the cell is done, so that a rerun resumes."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from poc_lora import __version__
from poc_lora.config_files import flatten
from poc_lora.errors import Interrupted, RunError
from poc_lora.files import read_json, write_json
from poc_lora.mfnn.experiments.settings import Settings
from poc_lora.progress import progress_bar

Cell = Callable[[], dict[str, Any]]


class Folder:
    """The folder of one experiment: its settings, its cells and its results.

    Raises:
        RunError: If the folder holds an experiment of other settings or of another version.
    """

    def __init__(self, out: Path, name: str, settings: Settings, *, hidden: bool = False):
        self.out, self.name, self.settings, self.hidden = out, name, settings, hidden
        stated = {"experiment": name, "version": __version__, **settings.model_dump(mode="json")}
        path = out / "settings.json"
        if path.is_file():
            found = read_json(path, error=RunError)
            before, after = flatten(found if isinstance(found, dict) else {}), flatten(stated)
            different = [key for key in before | after if before.get(key) != after.get(key)]
            if different:
                raise RunError(
                    f"the folder holds an experiment with other settings: {', '.join(different)}",
                    where=out,
                    fix="give another folder with --out, or remove this one",
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(
                "the folder is not empty and holds no experiment", where=out, fix="give another one with --out"
            )
        else:
            write_json(path, stated)

    def compute(self, cells: Mapping[str, Cell]) -> dict[str, dict[str, Any]]:
        """Returns the results of all cells by name, computing those that have no file yet, in order.

        A result is a dictionary of JSON values; NaN is written as null and read back as NaN. Raises Interrupted on
        Ctrl-C; finished cells stay.
        """
        paths = {name: self.out / "cells" / f"{name}.json" for name in cells}
        missing = [name for name in cells if not paths[name].is_file()]
        try:
            with progress_bar(len(cells), self.name, done=len(cells) - len(missing), hidden=self.hidden) as bar:
                for name in missing:
                    write_json(paths[name], _replaced(cells[name](), math.isnan, None))
                    bar.advance(note=name)
        except KeyboardInterrupt:
            done = sum(path.is_file() for path in paths.values())
            raise Interrupted(
                f"stopped with {done} of {len(cells)} cells done",
                where=self.out,
                fix="the same command resumes from here",
            ) from None
        results = {name: read_json(path, error=RunError) for name, path in paths.items()}
        return {name: _replaced(found, lambda value: value is None, math.nan) for name, found in results.items()}


def _replaced(value: Any, is_odd: Callable[[Any], bool], by: float | None) -> Any:
    """The value with every number or null in it for which `is_odd` replaced."""
    if isinstance(value, dict):
        return {key: _replaced(inner, is_odd, by) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, is_odd, by) for inner in value]
    return by if isinstance(value, float | None) and is_odd(value) else value
