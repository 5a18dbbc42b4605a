"""What depends on the kind of device."""

import torch

from poc_lora.devices import grouped_sums


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


def test_sums_by_group_on_either_kind_of_device():
    torch.manual_seed(0)
    groups = torch.randint(0, 7, (1000,))
    groups[groups == 3] = 4  # one that no value belongs to
    onehot = torch.nn.functional.one_hot(groups, 7).double()
    for shape in ((1000,), (5, 1000)):
        values = torch.randn(shape)
        expected = values.double() @ onehot
        on_cpu = grouped_sums(values, groups, 7)
        on_gpu = grouped_sums(values.as_subclass(Elsewhere), groups, 7).as_subclass(torch.Tensor)
        assert on_cpu.shape == on_gpu.shape == expected.shape
        assert on_cpu.dtype == on_gpu.dtype == torch.float32
        torch.testing.assert_close(on_cpu.double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(on_gpu.double(), expected, rtol=0, atol=1e-4)


def test_a_group_of_nan_does_not_reach_the_others():
    values = torch.tensor([1.0, float("nan"), 2.0])
    for given in (values, values.as_subclass(Elsewhere)):
        sums = grouped_sums(given, torch.tensor([0, 1, 0]), 2)
        assert sums[0] == 3
        assert sums[1].isnan()
