"""What README and the pages of docs/ show: commands, code, configurations and links. Runs are small."""

import importlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from peft import LoraConfig, get_peft_model

import poc_lora
from poc_lora import NoisyAdamW
from poc_lora.artifacts.study import Controls
from poc_lora.cli import app as cli
from poc_lora.config import RunConfig, validate
from poc_lora.config_files import all_keys, parse_yaml
from poc_lora.data.formats import parse_row
from poc_lora.data.prompts import encode_rows
from poc_lora.models.load import load_tokenizer
from poc_lora.reporting.controls import controls_tables
from poc_lora.reporting.tables import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
SMALL = ["adapters.count=2", "train.max_steps=3"]
KEYS = set(all_keys(RunConfig))
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def block(page, word):
    """The one Python block of a page that holds `word`."""
    (found,) = [text for text in blocks(page, "python") if word in text]
    return found


def prose(page):
    return re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)


def lines(page):
    """The command lines of a page's shell blocks, without their comments."""
    stripped = [line.partition("#")[0].strip() for text in blocks(page, "sh") for line in text.splitlines()]
    return [line for line in stripped if line]


def inline_commands(page):
    """Commands in running text: their words may be placeholders."""
    return re.findall(r"`(poc-lora [^`\n]+)`", prose(page))


def find_verb(words):
    """The command of the words after `poc-lora`, and the words after its name; None for options of poc-lora itself."""
    command = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_poc_lora(words):
    command, rest = find_verb(words)
    assert not hasattr(command, "commands"), f"no such command: {words}"
    command.make_context(command.name, list(rest))  # raises for an option that does not exist
    if command.name in ("demo", "check", "train", "controls"):
        assert {word.partition("=")[0] for word in rest if "=" in word} <= KEYS, words


def check_line(words):
    """A line of a shell block: its program, files and options exist. It may begin with environment variables."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    first = words[0]
    if "poc_lora" in words and words[:2] == ["accelerate", "launch"]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        check_poc_lora(words[words.index("poc_lora") + 1 :])
    elif first == "poc-lora":
        check_poc_lora(words[1:])
    elif first == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert set(words[1:]) <= targets
    elif first == "python":
        source, folder = (ROOT / words[1]).read_text(), (ROOT / words[1]).parent
        neighbours = re.findall(r"^from (\w+) import", source, flags=re.MULTILINE)  # options may be defined there
        source += "".join(file.read_text() for name in neighbours if (file := folder / f"{name}.py").is_file())
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
        assert {word.partition("=")[0] for word in words if "=" in word} <= KEYS
    elif first == "sbatch":
        assert (ROOT / words[1]).is_file()
    elif first.startswith("scripts/"):
        assert os.access(ROOT / first, os.X_OK)
        assert all((ROOT / word).exists() for word in words[1:])
    else:
        assert first in ("pip", "git", "cd"), f"the test does not know {first}"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("configs", "poc_lora"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, words):
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), words


def write_own_tasks(folder):
    """A task for each row that docs/evaluation.md shows, as JSON lines."""
    (rows,) = blocks("docs/evaluation.md", "json")
    for name, row in zip(["quiz", "yesno"], rows.splitlines(), strict=True):
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text(row + "\n")
    files = {"test": str((folder / "quiz" / "test.jsonl").resolve())}
    task = {"task": "quiz_lm", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    task |= {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices"}
    (folder / "quiz_lm.yaml").write_text(json.dumps(task | {"doc_to_target": "answer"}))


@pytest.mark.slow
def test_the_commands_work_in_order(checkout, monkeypatch, capsys):
    ran, merged = [], ""
    write_own_tasks(Path("mytasks"))
    Path("held-out.jsonl").write_text(json.dumps({"instruction": "Where is it?", "output": "in the attic"}))
    rows = [{"prompt": f"The hat of person {i} is ", "completion": "red"} for i in range(40)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"question": f"Where is hat {i}?", "choices": ["here", "there"], "answer": i % 2} for i in range(40)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    paths = {"path/to/a": "runs/mine/adapters/00", "path/to/b": "runs/mine/adapters/01"}
    paths |= {"path/to/base": "poc_lora/microworld/model", "gsm8k,mmlu": "quiz_lm"}
    pages = ["README.md", *(f"docs/{name}.md" for name in ("scaling", "evaluation", "merging", "training", "own-task"))]
    others = PAGES.keys() - {*pages, "docs/evidence.md"}  # whose command takes half an hour
    assert not any(line.startswith("poc-lora ") for page in others for line in lines(page))
    for line in dict.fromkeys(line for page in pages for line in lines(page) if line.startswith("poc-lora ")):
        words = [paths.get(word, word) for word in shlex.split(line) if word != "path/to/c"]
        if words[1] == "merge" and "merged" in words:  # each its own
            merged = words[words.index("merged")] = f"merged{len(ran)}"
        if words[1] == "fold":
            words[words.index("merged")] = merged
        if "--processes" in words:
            words[-1] = "2"
        if words[1] in ("check", "train", "controls"):
            words += SMALL
        if "adapters.vary" in line:
            words += ["adapters.count=4"]  # a value each
        if words[1] in ("eval", "controls") and "--rows" not in words:
            words += ["--limit", "5"]
        if "--harness-tasks" in words and "--include-path" not in words:  # theirs are on the Hub
            words += ["--include-path", "mytasks"]
        call(monkeypatch, words)
        ran.append(words[1])
    own = ["init", "check", "train", "merge", "eval", "sample", "report", "train", "merge", "eval"]
    readme = ["check", "train", "merge", "eval", "report", "check", "merge", "merge", "fold"]
    evaluation = [*["eval"] * 5, "sample", "eval", "eval", "train", "eval", "controls"]
    assert ran == [*readme, *evaluation, "merge", "eval", "push", "check", "train", "report", "train", *own]
    assert "PoC merge" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_its_program_options_and_files(page):
    for line in lines(page):
        check_line(shlex.split(line))
    for line in inline_commands(page):
        words = line.split()[1:]
        command, rest = find_verb(words)
        assert command.name != "poc-lora" or words[0].startswith("--"), f"no such command: {line}"
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES)
def test_every_key_and_extra_that_is_named_exists(page):
    for key in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.\w+)(?:=[^`]*)?`", prose(page)):
        assert key in KEYS or key.endswith((".py", ".yaml", ".json")), key
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"poc-lora\[(\w+)\]", PAGES[page])) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_every_configuration_is_valid(page):
    for text in blocks(page, "yaml"):
        assert validate(parse_yaml(text, where=page), where=page)


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles(page):
    for text in blocks(page, "python"):
        compile(text, page, "exec")


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_image_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'<img src="([^"]+)"', prose(page))
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT).as_posix()), target
        if file.suffix == ".png":
            assert file.stat().st_size < 100_000, target


def test_every_page_of_docs_is_linked_from_the_readme():
    assert len(PAGES["README.md"].splitlines()) <= 200
    for page in PAGES:
        assert page == "README.md" or f"]({page}" in PAGES["README.md"], page


RESULTS = sorted((ROOT / "scripts" / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_measurement_is_linked_with_its_command(path):
    page = PAGES["docs/benchmarks.md"]
    assert f"](../{path.relative_to(ROOT).as_posix()})" in page
    command = json.loads(path.read_text()).get("command", f"--out {path.relative_to(ROOT).as_posix()}\n")
    assert command in page


@pytest.mark.parametrize("name", ["train_tiny", "train_tiny_compiled", "train_small", "train_smollm2"])
def test_the_speeds_of_training_are_those_of_the_json_file(name):
    found = json.loads((RESULTS[0].parent / f"{name}.json").read_text())
    (row,) = [line for line in PAGES["docs/benchmarks.md"].splitlines() if f"[`{name}`]" in line]
    cells = row.replace(",", "").split(" | ")
    speeds = [found["tokens_per_s"][side] for side in ("packed", "trainer", "loop")]
    assert list(map(float, cells[1:4])) == pytest.approx(speeds, abs=0.51)
    for cell, side in ((cells[4], "trainer"), (cells[5], "loop")):
        faster = found["packed_is_faster_by"][side]
        assert list(map(float, re.findall(r"[\d.]+", cell))) == pytest.approx(
            [faster["median"], *faster["quartiles"]], abs=0.0051
        )


def test_the_accuracies_of_the_demo_are_those_of_the_json_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    demo_seeds = importlib.import_module("demo_seeds")
    found = json.loads((RESULTS[0].parent / "demo_seeds.json").read_text())
    for row in demo_seeds.summary(found).splitlines()[2:]:
        assert row.partition(" | ")[2].replace("-", "−") in PAGES["docs/benchmarks.md"]
    average, best, *merges, ensemble = re.findall(r"\d\d\.\d\d", demo_seeds.summary(found).splitlines()[2])[:6]
    row = f"| {average} | {best} | {' | '.join(merges)} | {ensemble} |"
    assert row in PAGES["README.md"].replace("**", "")


def test_the_tables_of_controls_are_those_of_the_json_file():
    found = Controls.read(RESULTS[0].parent / "controls_demo" / "controls.json")
    figures, differences = map(markdown_table, controls_tables(found))
    shown = PAGES["docs/evidence.md"].splitlines()
    assert all(row.removesuffix(" |").rpartition(" | ")[0] + " |" in shown for row in figures)  # but for the seconds
    assert set(differences) <= set(shown)


def test_the_house_names_every_room():
    (house,) = [text for text in blocks("CONTRIBUTING.md", "") if "training/" in text]
    for path in Path(poc_lora.__file__).parent.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in house, path.name
        elif path.suffix == ".py":
            assert path.name in house, path.name


def test_the_files_that_contributing_names_are_there():
    there = [
        f"/{path.relative_to(ROOT)}"
        for folder in ("poc_lora", "scripts", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    named = set(re.findall(r"[\w/]*\w\.py\b", PAGES["CONTRIBUTING.md"]))
    assert len(named) > 50
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in there)]


SMALLER = {  # in the code of the pages, so that it runs in seconds
    '"output=runs/python"': '"output=runs/python", "adapters.count=2", "train.max_steps=2"',
    'data="poc_lora/microworld/data"': 'data="poc_lora/microworld/data", limit=2',
    "max_steps=50": "max_steps=2",
    "range(50)": "range(2)",
}


def smaller(code):
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    return code


def test_the_python_of_the_readme_runs_as_pasted_to_the_report(checkout):
    (code,) = blocks("README.md", "python")
    scope = {}
    exec(smaller(code), scope)  # noqa: S102
    assert scope["results"].merged is not None
    assert Path("runs/python/report.html").is_file()


def test_the_trainer_in_training_md_runs_as_pasted_to_the_merge(checkout):
    scope = {}
    exec(smaller(block("docs/training.md", "Trainer")), scope)  # noqa: S102
    assert isinstance(scope["trainer"].optimizer.optimizer, NoisyAdamW)
    assert poc_lora.read_adapter("merged").modules.keys() == poc_lora.read_adapter("adapters/3").modules.keys()
    learnt = [label for label in scope["rows"][0]["labels"] if label != -100]
    assert scope["tokenizer"].decode(learnt).startswith("the correct answer is")


def test_the_loop_in_training_md_runs_as_pasted_to_the_merge(checkout, capsys):
    scope = {}
    exec(smaller(block("docs/training.md", "AdapterBank")), scope)  # noqa: S102
    assert "answer format" in capsys.readouterr().out  # the prompt, and what the merge writes after it
    assert poc_lora.read_adapter("merged-loop").rank("model.layers.0.self_attn.q_proj") == 4 * 16
    for label, row in zip(scope["labels"], scope["drawn"], strict=True):
        learnt = scope["tokenizer"].decode(label[label != -100])
        assert learnt == f"{row['output']} {scope['tokenizer'].eos_token}"


def test_the_chat_template_in_own_task_md_has_a_place_for_every_answer(tiny_model_dir):
    (template,) = blocks("docs/own-task.md", "jinja")
    tokenizer = load_tokenizer(str(tiny_model_dir), chat_template=template)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    row = parse_row({"messages": turns, "system": "Be brief."}, "here")
    (example,) = encode_rows([row], tokenizer, template="clean", max_length=400, learn="assistant").examples
    learnt = [tokenizer.decode(list(example.ids[start:end])) for start, end in example.supervised]
    assert learnt == ["b<|im_end|>", "d<|im_end|></s>"]


def test_the_merged_adapter_in_merging_md_loads(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrapped = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained("runs/mine/merged")
    scope = {"base": wrapped.unload()}
    exec(block("docs/merging.md", "PeftModel"), scope)  # noqa: S102
    assert scope["model"].peft_config["default"].target_modules == {"q_proj"}


def test_the_example_in_theory_md_runs_and_the_merge_is_better(capsys):
    example = block("docs/theory.md", "poc_lora.mfnn")
    short = example.replace("steps=1000", "steps=50")
    assert short != example
    scope = {}
    exec(short, scope)  # noqa: S102
    assert scope["particles"].shape == (8, 256, 3)
    single, merged = map(float, re.findall(r"tensor\((.*?)\)", capsys.readouterr().out))
    assert merged < single  # Jensen: an average's squared error is at most the average squared error
