"""Write docs/configuration.md: every key of a run, from the schema in poc_lora/config.py.

python scripts/generate_configuration.py
"""

from pathlib import Path
from typing import Any

from poc_lora.config import RunConfig
from poc_lora.config_files import one_line, values_in_words

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
COMMAND = "python scripts/generate_configuration.py"

INTRODUCTION = f"""<!-- Written by `{COMMAND}` from poc_lora/config.py: edit the schema, not this file. -->

# Configuration

A run is one YAML file. Every key of it can be replaced on the command line: `poc-lora train RUN.yaml KEY=VALUE ...`. An
override wins over the file, and the file over the default. An unknown key is an error that names the nearest known one.
Where a list is wanted, one text is a list of one: `data.train=rows.jsonl`. Paths are relative to the current folder.
`poc-lora check RUN.yaml` validates a file without training. `poc-lora init RUN.yaml --model BASE --data FILE` writes
one with every key of this page. Only `model.name`, `data.train` and `output` are required:

```yaml
model: {{name: meta-llama/Meta-Llama-3-8B}}
data: {{train: [my/train.jsonl]}}
output: runs/mine
```
"""

# One example a key, as an override on the command line.
EXAMPLES = """
model.name=meta-llama/Meta-Llama-3-8B
model.revision=main
model.dtype=bfloat16
model.quantization=nf4
model.shard=true
lora.rank=16
lora.alpha=32
lora.dropout=0.05
lora.targets=[q_proj,v_proj]
adapters.count=12
adapters.per_device=4
adapters.seed=1
adapters.vary={optim.lr: [1e-4, 2e-4]}
data.train=[my/train.jsonl]
data.columns={question: instruction, hints: null}
data.skip_bad_rows=true
data.prompt=llm-adapters
data.max_length=512
data.learn=last
data.chat_template=my/chat.jinja
data.group_by_length=false
data.validation=0
data.validation_files=[my/held-out.jsonl]
optim.lr=2e-4
optim.temperature=1e-4
optim.betas=[0.9,0.95]
optim.eps=1e-6
optim.weight_decay=0.01
optim.schedule=constant
optim.warmup_steps=10
optim.max_grad_norm=0.5
train.epochs=1
train.max_steps=150
train.batch_size=8
train.tokens_per_microbatch=4096
train.gradient_checkpointing=true
train.compile=true
train.validate_every=100
train.keep=best
checkpoint.every_steps=50
checkpoint.keep=3
track=[tensorboard]
output=runs/mine
""".strip().splitlines()


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    schema = RunConfig.model_json_schema()
    examples = {example.partition("=")[0]: example for example in EXAMPLES}
    sections, own = [], []
    for name, field in schema["properties"].items():
        if "$ref" not in field:
            own.append(_row(name, field, schema, examples))
            continue
        section = schema["$defs"][field["$ref"].rpartition("/")[2]]
        rows = [_row(f"{name}.{key}", inner, section, examples) for key, inner in section["properties"].items()]
        sections.append(_part(f"`{name}`", section["description"], rows))
    sections.append(_part("Keys without a section", "", own))
    return "\n".join([INTRODUCTION, *sections])


def _part(title: str, text: str, rows: list[str]) -> str:
    head = ["| key | meaning | values | default | example |", "|---|---|---|---|---|"]
    return "\n".join([f"## {title}", *(["", " ".join(text.split())] if text else []), "", *head, *rows, ""])


def _row(key: str, field: dict[str, Any], section: dict[str, Any], examples: dict[str, str]) -> str:
    default = "required" if key.rpartition(".")[2] in section.get("required", ()) else _code(field["default"])
    meaning = " ".join(field["description"].split())
    return f"| `{key}` | {meaning} | {values_in_words(field)} | {default} | `{examples[key]}` |"


def _code(value: Any) -> str:
    """Return a value as YAML in one line, as code."""
    return f"`{one_line(value)}`"


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
    print(PAGE)
