import pytest

from poc_lora.adapters.adapter import Adapter
from tests.merging.samples import random_adapter


@pytest.fixture
def mixed() -> list[Adapter]:
    return [random_adapter(1, 2, 0.5), random_adapter(2, 5, 2.0), random_adapter(3, 3, -1.5)]
