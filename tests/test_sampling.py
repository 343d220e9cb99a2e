"""Which elements a sample sees: rows and columns counted, and elements taken in any layout."""

import pytest
import torch
from torch import nn

from moe_lab import health
from moe_lab.health.sampling import SAMPLE, WHOLE, elements, fetched, sample_positions, tensor_kind

SHAPES = {
    "a vector": (100_000,),
    "one row": (1, 5000),
    "one column": (5000, 1),
    "tall": (40_000, 3),
    "wide": (3, 40_000),
    "a table": (50_257, 1536),
    "square": (256, 256),
    "just above whole": (171, 3),
    "rows of a Fibonacci number": (28_657, 192),
    "a stack": (8, 256, 192),
    "a convolution": (512, 256, 3, 3),
    "a depthwise one": (3072, 1, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_sample_sees_the_rows_and_columns_that_there_are(shape: tuple[int, ...]) -> None:
    found = sample_positions(shape)
    assert found.dtype == torch.int64 and found.device.type == "cpu"
    assert found.min() >= 0 and found.max() < torch.Size(shape).numel()
    assert len(found.unique()) == len(found) == SAMPLE
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    assert len((found // columns).unique()) == min(rows, SAMPLE)
    assert len((found % columns).unique()) >= 0.86 * min(columns, SAMPLE)
    quarters = (found % columns * 4 // columns).bincount(minlength=4) if columns > 3 else torch.tensor([64])
    assert quarters.min() >= 0.23 * SAMPLE  # and no part of the columns is left out


def test_every_axis_of_a_stack_is_seen() -> None:
    expert, row, column = torch.unravel_index(sample_positions((8, 256, 192)), (8, 256, 192))
    assert expert.bincount().tolist() == [32] * 8
    assert len(row.unique()) > 128 and len(column.unique()) > 160


def test_a_small_tensor_is_taken_whole() -> None:
    assert sample_positions((WHOLE,)).tolist() == sample_positions((2, WHOLE // 2)).tolist() == list(range(WHOLE))
    assert sample_positions(()).tolist() == [0] and sample_positions((0, 4)).tolist() == []


def test_elements_are_those_of_the_flat_tensor_in_any_layout() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    index = torch.tensor([0, 7, 119, 60])
    for same in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert torch.equal(elements(same, index), index.float())
    assert elements(torch.tensor(3.0), torch.tensor([0])).tolist() == [3.0]


def test_the_start_sample_holds_each_parameters_values_on_the_cpu() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(1000, 64), "norm": nn.LayerNorm(8)}).bfloat16()
    sample = health.start_sample(model)
    assert sample.keys() == dict(model.named_parameters()).keys()
    kept = {name: (part["index"].clone(), part["value"].clone()) for name, part in sample.items()}
    with torch.no_grad():
        for p in model.parameters():
            before = p.detach().clone()
            p.add_(1)
            (name,) = [n for n, q in model.named_parameters() if q is p]
            index, value = kept[name]
            assert value.dtype == torch.bfloat16 and torch.equal(value, before.flatten()[index])
            assert torch.equal(sample[name]["value"], value)  # a copy: training does not change it
    assert len(sample["norm.bias"]["index"]) == 8 and len(sample["table.weight"]["index"]) == SAMPLE


def test_kinds_of_tensors() -> None:
    assert tensor_kind("layers.12.ffn.3.conv1d.weight") == "layers.*.ffn.*.conv1d.weight"
    assert tensor_kind("0.weight") == tensor_kind("17.weight") == "*.weight"


def test_numbers_are_fetched_in_their_order_and_as_they_are() -> None:
    given = [
        torch.tensor(2**53 + 1),
        torch.tensor(0.1),
        torch.tensor(True),
        torch.tensor([-3]),
        torch.tensor(0.1).double(),
        torch.tensor([5, 6]),
        0.25,
    ]
    assert fetched(given) == [t.tolist() if isinstance(t, torch.Tensor) else t for t in given]
    assert fetched([]) == []
