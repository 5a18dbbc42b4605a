"""A checkpoint's names of tensors, and older names of modules, as names in the model that transformers builds."""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def names_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Each parameter name as transformers' own loading maps it into `model`.

    A name of no parameter, or of a part of one (an expert that the model stacks with others), stays as it is.
    """
    there = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in names:
        found[name] = name
        for known in ((renamings, converters), ([], [])):
            # Without a prefix, transformers would match an empty one.
            prefix = model.base_model_prefix or None
            renamed, converted = rename_source_key(name, *known, prefix, there if prefix else None)
            if converted is None and renamed in there:
                found[name] = renamed
                break
    return found
