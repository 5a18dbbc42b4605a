"""Runs a model on tensors that have shapes but no data, and counts the bytes that would be alive."""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poc_lora.models.forward import one_sequence_per_row


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within the block tensors have shapes but no data."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True  # what fails is raised as well
    try:
        with one_sequence_per_row(), FakeTensorMode(allow_non_fake_inputs=True):  # or transformers would read positions
            yield
    finally:
        log.disabled = silent


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within the block that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: dict[int, int] = {}  # storage -> its bytes, 0 for one made before the block

    def restart(self) -> int:
        """The peak so far, which is forgotten."""
        peak, self.peak = self.peak, self._now
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._meet(tensor, 0)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor, tensor.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = nbytes
            self._now += nbytes
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)
