"""The usage section of the model card. Readers copy its code, so every text in it is quoted."""

import json
import re
import shlex

from poc_lora.adapters.peft_config import TASKS
from poc_lora.adapters.serving import VLLM_RANKS, vllm_command
from poc_lora.hub.collect import Subject

UNKNOWN_TASK = ("AutoModel", None)


def usage(subject: Subject, repo_id: str, revision: str | None) -> str:
    """Returns the section as Markdown. revision: the adapter's branch; None for the main one."""
    at = f", revision={_quoted(revision)}" if revision else ""
    # transformers' load_adapter knows no `revision` itself.
    kwargs_at = f', adapter_kwargs={{"revision": {_quoted(revision)}}}' if revision else ""
    base_at = f", revision={_quoted(subject.base_revision)}" if subject.base_revision else ""
    kind, _ = TASKS.get(subject.task or "", UNKNOWN_TASK)
    base, repo = _quoted(subject.base_model), _quoted(repo_id)
    text = f"""\
## How to use it

With PEFT:

```python
from peft import PeftModel
from transformers import {kind}, AutoTokenizer

base = {kind}.from_pretrained({base}{base_at}{_labels(subject)})
tokenizer = AutoTokenizer.from_pretrained({base}{base_at})
model = PeftModel.from_pretrained(base, {repo}{at})
```

"""
    if subject.task not in TASKS:
        text += "The adapter does not name its task: replace `AutoModel` by the class that it was trained with.\n\n"
    text += f"With transformers alone: `base.load_adapter({repo}{kwargs_at})`."
    if subject.members:
        where = f"subfolder={_quoted(f'adapters/{subject.members[0]}')}"
        text += f" A single adapter: `PeftModel.from_pretrained(base, {repo}, {where}{at})`."
    return text + (f"\n\n{_serving(subject, repo_id)}" if subject.task == "CAUSAL_LM" else "")


def _serving(subject: Subject, repo_id: str) -> str:
    """The command for vLLM, or the reason why vLLM cannot serve the adapter."""
    if len(subject.ranks) > 1 or subject.modules_to_save:
        return "vLLM cannot serve this adapter: it takes adapters of one rank without modules_to_save."
    rank, served = subject.ranks[-1], f"{repo_id.rpartition('/')[2]}={repo_id}"
    command = vllm_command(shlex.quote(subject.base_model), rank)
    if command is None:
        return f"vLLM cannot serve this adapter of rank {rank}: it takes ranks up to {VLLM_RANKS[-1]}."
    return f"With vLLM:\n\n```sh\n{command} --lora-modules {shlex.quote(served)}\n```"


def _labels(subject: Subject) -> str:
    """The number of classes, from the shape of the classifier in the adapter; the base model does not have it."""
    if subject.task not in ("SEQ_CLS", "TOKEN_CLS"):
        return ""
    heads = [
        shape[0]
        for name, shape in subject.modules_to_save.items()
        if re.search(r"(^|\.)(score|classifier(\.out_proj)?)\.weight$", name)
    ]
    return f", num_labels={heads[0]}" if len(heads) == 1 else ""


def _quoted(text: str) -> str:
    """The text as a Python literal on one line in ASCII."""
    return json.dumps(text)
