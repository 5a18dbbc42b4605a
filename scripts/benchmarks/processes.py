"""Tokens per second of one process that has all CPU threads, and of several that share them, in alternating rounds.

    python scripts/benchmarks/processes.py --model DIR --data DIR --processes 2 --out FILE

Runs `poc-lora train` as a user would, alone and under accelerate launch, on the CPU; the figures are those it prints:
tokens without padding, of all adapters, over the seconds in optimizer steps. The first round is not counted.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from poc_lora.config import dump_yaml, load_config
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--data", default=str(DATA_DIR))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    a = parser.parse_intermixed_args()
    threads = torch.get_num_threads()
    settings = [f"model.name={json.dumps(a.model)}", f"data.train={json.dumps([a.data])}", "optim.lr=1e-4"]
    config = load_config(
        ROOT / "configs/demo.yaml", [*settings, "lora.rank=32", "lora.alpha=64", "train.max_steps=12", *a.overrides]
    )
    speeds: dict[int, list[float]] = {1: [], a.processes: []}
    for number in range(1 + a.rounds):
        for processes, measured in speeds.items():
            measured.append(speed(dump_yaml(config), processes, threads // processes))
            print(f"round {number} of {a.rounds}: {processes} processes, {measured[-1]:,.0f} tokens/s", file=sys.stderr)
    counted = {processes: measured[1:] for processes, measured in speeds.items()}
    ratios = [many / one for one, many in zip(*counted.values(), strict=True)]
    report = {
        "tokens_per_s": {
            f"{processes} x {threads // processes} threads": {
                "median": round(statistics.median(measured)),
                "rounds": [round(value) for value in measured],
            }
            for processes, measured in counted.items()
        },
        "ratio": {"median": round(statistics.median(ratios), 3), "rounds": [round(value, 3) for value in ratios]},
        "settings": config.model_dump(mode="json", exclude={"output"}),
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
    }
    print(json.dumps(report))
    if a.out:
        write_json(a.out, report)


def speed(config: str, processes: int, threads: int) -> float:
    """Tokens per second that a training run prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(config)
        launcher = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--config_file"]
        if launcher:
            launcher += [str(ROOT / "configs/accelerate/cpu.yaml"), "--num_processes", str(processes)]
            launcher += ["--main_process_port", "0"]
        ended = subprocess.run(
            [sys.executable, *launcher, "-m", "poc_lora", "train", str(path), f"output={folder}/run"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    (line,) = [line for line in ended.stdout.splitlines() if " tokens/s" in line]
    return float(line.split(" tokens/s")[0].split()[-1].replace(",", ""))


if __name__ == "__main__":
    main()
