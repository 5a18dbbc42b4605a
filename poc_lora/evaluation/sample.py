"""`sample_texts`: what the base, an adapter and the merge of a run write after one prompt."""

import contextlib
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.data.bounded import map_bounded
from poc_lora.data.limits import require_characters, require_length
from poc_lora.data.prompts import render_prompt
from poc_lora.errors import DataError, RequestError
from poc_lora.evaluation.protocols.generate import generate, generation_config
from poc_lora.evaluation.protocols.label import encode
from poc_lora.evaluation.variants import activate_variants, adapter_key, find_variants, load_base_of
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device
from poc_lora.models.vocabulary import require_embeddings


def sample_texts(
    run: str | Path,
    text: str,
    *,
    adapter: str | None = None,
    chat: bool | None = None,
    new_tokens: int = 128,
    device: torch.device | None = None,
) -> dict[str, str]:
    """Generate greedily from the base, one adapter and the merge, or the exact average where there is no merge.

    Args:
        run: The run folder.
        text: The instruction to put into the run's prompt template.
        adapter: The adapter's name, such as 03; None leaves it out.
        chat: Take `text` as the user's turn in the chat template instead; default: where most training rows were chats.
        new_tokens: The most tokens to generate.
        device: Default: the GPU, or the CPU.

    Returns:
        The new texts, by `base`, the adapter's name, and `merge`.

    Raises:
        RequestError, RunError, AdapterError, DataError, ModelError: The run or the prompt cannot be used.
    """
    run = Path(run)
    if not RunFolder(run).is_run:
        raise RequestError("not a run", where=run, fix="give a run folder, with config.yaml")
    if new_tokens < 1:
        raise RequestError(f"the number of new tokens is {new_tokens}", where="--tokens", fix="give 1 or more")
    require_length(text, "the prompt")
    require_characters(text, "the prompt")
    device = device or default_device()
    variants = find_variants([run])
    if adapter is not None and adapter not in variants.adapters:
        known = ", ".join(list(variants.adapters)[:10])
        raise RequestError(f"the run has no adapter {adapter!r}", where="--adapter", fix=f"for example: {known}")
    with without_cudnn_attention():
        model, tokenizer = load_base_of(variants, device)
        if chat is None:
            info = RunInfo.read_if_there(RunFolder(run).info)
            chat = bool(info and info.chats)
        ids = _chat(text, tokenizer) if chat else encode(tokenizer, [render_prompt(text, "", variants.prompt)])[0]
        require_embeddings(model, tokenizer, [ids], where="the prompt")
        room = context_length(model)
        if room is not None and len(ids) + new_tokens > room:
            what = f"{len(ids)} tokens of the prompt and {new_tokens} new ones do not fit the base's context of {room}"
            raise RequestError(what, where="--tokens", fix="give a shorter prompt, or ask for fewer")
        names = {"base": "base", "merged": "merge"} | ({adapter_key(adapter): adapter} if adapter is not None else {})
        settings, found = generation_config(model, tokenizer, beams=1, new_tokens=new_tokens), {}
        prompt = torch.tensor([ids], device=model.device)
        with contextlib.closing(activate_variants(model, variants, packed=False)) as steps:
            for (variant,) in steps:
                if variant in names:
                    written = generate(model, settings, prompt, torch.ones_like(prompt))
                    found[names[variant]] = str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
    return {name: found[name] for name in ("base", adapter, "merge") if name in found}


def _chat(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        fix = "leave it out; or train with the base's instruct model, or with data.chat_template"
        raise RequestError("the base has no chat template", where="--chat", fix=fix)
    turns = [{"role": "user", "content": text}]

    def render(turns: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    with contextlib.closing(map_bounded(render, [turns])) as rendered:
        found = next(rendered)
    if isinstance(found, DataError):
        raise found
    return list(tokenizer(found, add_special_tokens=False)["input_ids"])
