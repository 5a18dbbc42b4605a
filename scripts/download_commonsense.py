"""Build the eight commonsense benchmarks and the training mixture from the original data sets on the Hugging Face Hub.

    pip install 'poc-lora[hub]'
    python scripts/download_commonsense.py --out data/commonsense
    python scripts/download_commonsense.py --out data/commonsense --benchmarks piqa,ARC-Easy

It writes DIR/BENCHMARK/{train,test}.json in the format of LLM-Adapters (instruction, input, output, answer),
DIR/mixture.json with the rows of all eight train files, and DIR/sources.json, which says of each file where it came
from: data set, configurations, split, commit, licence, rows, SHA-256. A file that is there already, whole and of the
same commit, is kept; one of another commit, or changed since, is only replaced with --update; one that this script did
not write is never replaced.

Commits. Every data set is pinned to a commit hash in SOURCES below, so the same rows come every time. Five are commits
of the data set's own `main`. PIQA and Social IQa are loading scripts there, which `datasets` 4 no longer runs; theirs
are commits of the Parquet copy that the Hub itself makes of each data set (its branch refs/convert/parquet). Should the
Hub drop such a commit, the script stops and says so; the table is the one place to change.

Test files. LLM-Adapters tests on `test` for OpenBookQA and ARC, and on `validation` for the others, whose test labels
are not public. `validation` is therefore no split to choose anything on.

The mixture is a re-rendering of LLM-Adapters' commonsense_170k, not a copy of it: the same data sets, wording and
counts, in an order of its own. Its 170,420 rows are 33,410 of Social IQa, 16,113 of PIQA, 63,238 of WinoGrande, 4,957
of OpenBookQA, 1,119 and 2,251 of ARC, 9,427 of BoolQ and 39,905 of HellaSwag. WinoGrande has 40,398 train questions;
63,238 is the sum over its six training sets (xs, s, m, l, xl and debiased), which share questions, and what the other
seven leave of 170,420: so winogrande/train.json holds all six, in that order. The mixture is not called train.json,
since a folder given as `data.train` stands for every train.json inside it, and each row would be learnt twice.

What the wording keeps and drops: BoolQ's passages are left out, and "?" is added to its questions. HellaSwag keeps the
[header], [title] and [step] marks of its WikiHow part. ARC names its options A to E or 1 to 5 and has 3, 4 or 5 of
them; they become answer1 to answer5. White space is kept as it is, also at the ends of PIQA's solutions. In
WinoGrande "Answer format:" stands in the line of the options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.data.commonsense import BY_FOLDER, find_benchmarks
from poc_lora.data.questions import ANSWER_FORMAT
from poc_lora.data.rows import MAX_DATA_BYTES
from poc_lora.errors import DataError, PocLoraError, RequestError
from poc_lora.files import read_json, sha256_file, write_atomic, write_json

MIXTURE = "mixture.json"
RECORD = "sources.json"
LLM_ADAPTERS_ROWS = 170_420  # of commonsense_170k


@dataclass(frozen=True)
class Source:
    """Where a benchmark's rows come from; BY_FOLDER names the data set, the split of the test rows and their number."""

    commit: str
    train_rows: int
    test_configs: tuple[str | None, ...] = (None,)
    train_configs: tuple[str | None, ...] = (None,)


def _config(name: str) -> dict[str, tuple[str | None, ...]]:
    return {"test_configs": (name,), "train_configs": (name,)}


_ARC = "210d026faf9955653af8916fad021475a3f00453"
SOURCES = {
    "social_i_qa": Source("537a2ec8ec565adc0b70b70752893e59e024df26", 33_410),  # of refs/convert/parquet
    "piqa": Source("142c51238b3ca2bc61e9a075913871b8b600e8e1", 16_113),  # of refs/convert/parquet
    "winogrande": Source(
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        63_238,
        test_configs=("winogrande_xl",),
        train_configs=tuple(f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")),
    ),
    "openbookqa": Source("388097ea7776314e93a529163e0fea805b8a6454", 4_957, **_config("main")),
    "ARC-Challenge": Source(_ARC, 1_119, **_config("ARC-Challenge")),
    "ARC-Easy": Source(_ARC, 2_251, **_config("ARC-Easy")),
    "boolq": Source("35b264d03638db9f4ce671b711558bf7ff0f80d5", 9_427),
    "hellaswag": Source("218ec52e09a7e7462a5400043bb9a69a41d06b76", 39_905),
}

# SHA-256 of LLM-Adapters' own rows, spelt as `spell` does: equal digests say that the re-rendering is exact.
LLM_ADAPTERS = {
    "social_i_qa/test.json": "85e48738306e8683182c03c9ed9d3f8dd21b8b32dbf7d0e1cdf3ae379b9e900b",
    "piqa/test.json": "f6b7679ddaf2d2d0a2f0ddea061d113ec1586067a2b58a8b119a3a13fe6e2ea0",
    "winogrande/test.json": "0c76621b430dafa5dd87e85749a90cb4b2ba6a80a081e9eee2b3333ecf3a4aaf",
    "openbookqa/test.json": "6e9cfaddfb4710c62f6362a4da85f06a930a126178e4fa77a6cfda08658f0227",
    "openbookqa/train.json": "a7de306c13692827f791e4d8ddb870f1a260b147fb6766f8492fcc01511c50f9",
    "ARC-Challenge/test.json": "efe58d57415998c503e60314f65f1de4fb97163772a1c4eb487cb0bc41fae3ae",
    "ARC-Challenge/train.json": "e707898891e735310c75da6e360d88caee0e0d76b1dba695a978cc938df307dc",
    "ARC-Easy/test.json": "54310b51571b2d19d537a7ac0ebed310d4a7c8df70839962c7bf9dd96a71f381",
    "ARC-Easy/train.json": "9c09be87a126c5e9ef82b63df630e236ad967085ef577c635546a72f4a29ac7d",
    "boolq/test.json": "4691a390f7cd8f03765ef253bde27f84a5bbf7b5c06ff2c3f09319d225aa8d35",
    "boolq/train.json": "f63847d943a00cdcc506a5b20bde6ad8a0313e333bcd56c2f3fc2dc19189f50d",
}

Row = Mapping[str, Any]

# ---- rendering: a row as its data set has it -> {instruction, input, output, answer} ----------------------------


def render_social_i_qa(row: Row) -> dict[str, str]:
    return _choice(
        f"Please choose the correct answer to the question: {_text(row, 'context')} {_text(row, 'question')}",
        "answer",
        [_text(row, column) for column in ("answerA", "answerB", "answerC")],
        _position(str(row["label"]).strip(), ["1", "2", "3"]),  # in the Parquet copy a label ends with a line end
    )


def render_piqa(row: Row) -> dict[str, str]:
    return _choice(
        f"Please choose the correct solution to the question: {_text(row, 'goal')}",
        "solution",
        [_text(row, "sol1"), _text(row, "sol2")],
        _position(row["label"], [0, 1]),
        between="\n\n",
    )


def render_winogrande(row: Row) -> dict[str, str]:
    return _choice(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        + _text(row, "sentence"),
        "option",
        [_text(row, "option1"), _text(row, "option2")],
        _position(row["answer"], ["1", "2"]),
        before_format=" ",
    )


def render_openbookqa(row: Row) -> dict[str, str]:
    return _labelled(_text(row, "question_stem"), row)


def render_arc(row: Row) -> dict[str, str]:
    return _labelled(_text(row, "question"), row)


def render_boolq(row: Row) -> dict[str, str]:
    if not isinstance(row["answer"], bool):
        raise DataError(f"the answer {row['answer']!r} is neither true nor false")
    question = _text(row, "question")
    return _row(
        f"Please answer the following question with true or false, question: {question}?\n\n{ANSWER_FORMAT} true/false",
        "true" if row["answer"] else "false",
    )


def render_hellaswag(row: Row) -> dict[str, str]:
    return _choice(
        "Please choose the correct ending to complete the given sentence: "
        f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}",
        "ending",
        _texts(row["endings"]),
        _position(row["label"], ["0", "1", "2", "3"]),
    )


RENDER: dict[str, Callable[[Row], dict[str, str]]] = {
    "social_i_qa": render_social_i_qa,
    "piqa": render_piqa,
    "winogrande": render_winogrande,
    "openbookqa": render_openbookqa,
    "ARC-Challenge": render_arc,
    "ARC-Easy": render_arc,
    "boolq": render_boolq,
    "hellaswag": render_hellaswag,
}


def _labelled(question: str, row: Row) -> dict[str, str]:
    """A question whose `choices` name their labels, in letters or digits."""
    if not isinstance(row["choices"], Mapping):
        raise DataError("'choices' is not a mapping of 'text' and 'label'")
    texts, labels = _texts(row["choices"]["text"]), list(row["choices"]["label"])
    if len(texts) != len(labels):
        raise DataError(f"there are {len(texts)} choices but {len(labels)} labels")
    instruction = f"Please choose the correct answer to the question: {question}"
    return _choice(instruction, "answer", texts, _position(row["answerKey"], labels))


def _choice(
    question: str,
    word: str,
    options: Sequence[str],
    correct: int,
    *,
    between: str = " ",
    before_format: str = "\n\n",
) -> dict[str, str]:
    """`question`, then "Word1: ... Word2: ...", then the labels word1/word2/..."""
    if correct >= len(options):
        raise DataError(f"the answer is option {correct + 1} of {len(options)}")
    labels = [f"{word}{number}" for number in range(1, len(options) + 1)]
    shown = between.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, options, strict=True))
    instruction = f"{question}\n\n{shown}{before_format}{ANSWER_FORMAT} {'/'.join(labels)}"
    return _row(instruction, labels[correct])


def _row(instruction: str, answer: str) -> dict[str, str]:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _text(row: Row, column: str) -> str:
    return _texts([row[column]])[0]


def _texts(values: Any) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{value!r} is not text")
    return list(values)


def _position(label: Any, labels: Sequence[Any]) -> int:
    """Where `label` stands; the hidden labels of a test split, "" or -1, are nowhere."""
    if label not in labels:
        raise DataError(f"the label {label!r} is not one of {'/'.join(map(str, labels))}")
    return labels.index(label)


def render(benchmark: str, rows: Iterable[Row], where: str) -> list[dict[str, str]]:
    """All rows, rendered. Raises DataError naming `where` and the row, counted from 1."""
    rendered = []
    for number, row in enumerate(rows, 1):
        try:
            rendered.append(RENDER[benchmark](row))
        except KeyError as missing:
            raise DataError(
                f"column {missing} is missing", where=f"{where}, row {number}", fix=f"its columns are {', '.join(row)}"
            ) from None
        except DataError as problem:
            raise DataError(problem.what, where=f"{where}, row {number}") from None
    return rendered


def spell(rows: Sequence[Mapping[str, str]]) -> bytes:
    """The bytes of a file: one key a line, nothing indented, UTF-8."""
    return json.dumps(rows, indent=0, ensure_ascii=False).encode()


# ---- fetching ---------------------------------------------------------------------------------------------------


def confirm(repository: str, commit: str) -> None:
    """Raise DataError unless the Hub has this commit.

    `datasets` alone would not do: if the Hub can't be reached, it takes whatever commit its cache holds.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(repository, revision=commit).sha
    except Exception as problem:  # no network, no such data set, no such commit: each its own kind
        raise DataError(
            f"the Hub does not give commit {commit}: {_in_a_line(problem)}",
            where=repository,
            fix="check the network, HF_HUB_OFFLINE and HF_ENDPOINT; if the commit is gone, change it in SOURCES",
        ) from None
    if found != commit:
        raise DataError(f"the Hub gives commit {found} for {commit}", where=repository)


def fetch(repository: str, config: str | None, commit: str, split: str) -> Iterable[Row]:
    """The rows of one split. Raises DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError("the datasets library is not installed", fix="pip install 'poc-lora[hub]'") from None
    try:
        rows: Iterable[Row] = datasets.load_dataset(repository, config, revision=commit, split=split)
        return rows
    except Exception as problem:  # the library raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"the data set cannot be loaded: {_in_a_line(problem)}", where=f"{repository}, {split}"
        ) from None


def _in_a_line(problem: Exception) -> str:
    return " ".join(str(problem).split())


# ---- building ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One file to build."""

    benchmark: str
    file: str
    repository: str
    configs: tuple[str | None, ...]
    split: str
    commit: str
    rows: int
    licence: str


def parts(benchmark: str) -> tuple[Part, Part]:
    """A benchmark's train and test files."""
    source, known = SOURCES[benchmark], BY_FOLDER[benchmark]

    def part(kind: str, configs: tuple[str | None, ...], split: str, rows: int) -> Part:
        file = f"{benchmark}/{kind}.json"
        return Part(benchmark, file, known.source, configs, split, source.commit, rows, known.licence)

    return (
        part("train", source.train_configs, "train", source.train_rows),
        part("test", source.test_configs, known.split, known.questions),
    )


def build(out: Path, benchmarks: Sequence[str], *, update: bool) -> None:
    """Write what is missing of these benchmarks, then the mixture if all eight are there. Raises PocLoraError."""
    wanted = [part for benchmark in benchmarks for part in parts(benchmark)]
    files = read_record(out)
    missing = [part for part in wanted if not _is_there(out, part.file, part.commit, files, update=update)]
    _is_there(out, MIXTURE, None, files, update=update)  # to refuse now what would be refused at the end
    for repository, commit in sorted({(part.repository, part.commit) for part in missing}):
        confirm(repository, commit)
    for part in wanted:
        if part not in missing:
            say(f"{part.file}: is there already")
            continue
        where = f"{part.repository}, {part.split}"
        rows: list[dict[str, str]] = []
        for config in part.configs:
            rows += render(part.benchmark, fetch(part.repository, config, part.commit, part.split), where)
        if len(rows) != part.rows:
            raise DataError(f"{len(rows):,} rows came where commit {part.commit} has {part.rows:,}", where=where)
        origin = {
            "data_set": part.repository,
            "configs": [config for config in part.configs if config],
            "split": part.split,
            "commit": part.commit,
            "licence": part.licence,
        }
        entry = _write(out, part.file, rows, origin, files)
        say(f"{part.file}: {_counted(entry)} of {where}, licence {part.licence}{_verdict(part.file, entry)}")
    build_mixture(out, files)


def build_mixture(out: Path, files: dict[str, Any]) -> None:
    """Write the rows of the eight train files, in the paper's order of benchmarks, as one file."""
    trains = [parts(benchmark)[0].file for benchmark in SOURCES]
    absent = [file for file in trains if not (file in files and (out / file).is_file())]
    if absent:
        say(f"{MIXTURE}: waits for the train files of all eight; not built yet: {', '.join(absent)}")
        return
    rows = [row for file in trains for row in read_json(out / file, error=DataError, max_bytes=MAX_DATA_BYTES)]
    entry = _write(out, MIXTURE, rows, {"of": trains}, files)
    say(f"{MIXTURE}: {_counted(entry)}, a re-rendering of commonsense_170k, which has {LLM_ADAPTERS_ROWS:,}")


def read_record(out: Path) -> dict[str, Any]:
    """What sources.json says of each file that this script wrote; nothing if there is none."""
    path = out / RECORD
    if not path.exists():
        return {}
    record = read_json(path, error=DataError)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in files.values()
    ):
        raise DataError("this is not a record that this script wrote", where=path, fix="choose another --out")
    return files


def _is_there(out: Path, file: str, commit: str | None, files: Mapping[str, Any], *, update: bool) -> bool:
    """Whether the file needs no building. Raises RequestError if building it would replace something else."""
    path = out / file
    if path.exists() and file not in files:
        raise RequestError(
            f"there is a file that this script did not write: {RECORD} does not name it",
            where=path,
            fix="choose another --out, or move it away",
        )
    if update or file not in files:
        return False
    again = "build it again with --update, or choose another --out"
    if files[file].get("commit") != commit:
        raise RequestError(
            f"{file} is of commit {files[file].get('commit')}, and this script would build it from {commit}",
            where=out / RECORD,
            fix=again,
        )
    if path.exists() and sha256_file(path) != files[file]["sha256"]:
        raise RequestError("the file was changed since it was built", where=path, fix=again)
    return path.exists()


def _write(
    out: Path, file: str, rows: Sequence[Mapping[str, str]], origin: Mapping[str, Any], files: dict[str, Any]
) -> dict[str, Any]:
    """Write a file and its entry in the record, and return the entry."""
    content = spell(rows)
    entry = {
        **origin,
        "rows": len(rows),
        "distinct_rows": len({tuple(row.values()) for row in rows}),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    files[file] = entry
    write_json(out / RECORD, {"files": files})  # before the file: one that the record does not name is not ours
    write_atomic(out / file, content)
    return entry


def _counted(entry: Mapping[str, Any]) -> str:
    repeated = entry["rows"] - entry["distinct_rows"]
    return f"{entry['rows']:,} rows" + (f" ({repeated:,} of them repeats)" if repeated else "")


def _verdict(file: str, entry: Mapping[str, Any]) -> str:
    if file not in LLM_ADAPTERS:
        return ""
    same = entry["sha256"] == LLM_ADAPTERS[file]
    return "; the same rows as LLM-Adapters'" if same else "; NOT the same rows as LLM-Adapters'"


def say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build the eight commonsense benchmarks and the training mixture from the Hugging Face Hub.",
        epilog="Example: python scripts/download_commonsense.py --out data/commonsense --benchmarks piqa,ARC-Easy",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to build")
    parser.add_argument("--benchmarks", metavar="a,b", help=f"only these of {', '.join(SOURCES)}")
    parser.add_argument("--update", action="store_true", help="build again what this script built before")
    asked = parser.parse_args(arguments)
    try:
        names = (
            None if asked.benchmarks is None else [name.strip() for name in asked.benchmarks.split(",") if name.strip()]
        )
        build(asked.out, [b.folder for b in find_benchmarks(names)], update=asked.update)
    except PocLoraError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_status
    say(f"\n{asked.out / RECORD} says where each file came from. Next:")
    say(f"  poc-lora train configs/paper/llama3_8b.yaml 'data.train=[{asked.out}]'")
    say(f"  poc-lora eval runs/llama3_8b --data {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
