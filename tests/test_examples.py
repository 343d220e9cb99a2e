"""check_data of numbers with targets: each fault beside the same examples without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from moe_lab.health import check_data, examine

Batch = tuple[Tensor, Tensor]


def pictures(seed: int = 0, rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.randint(10, (rows,), generator=generator)


def batches(n: int = 8, first: int = 0) -> list[Batch]:
    return [pictures(first + seed) for seed in range(n)]


def said(given: list, validation: list | None = None) -> list[str]:
    return [finding.rule for finding in check_data(given, validation=validation)]


def test_examples_are_fine_in_every_form() -> None:
    whole = [(255 * torch.rand(8, 8, 8, 3)).to(torch.uint8) for _ in range(4)]
    assert said(batches()) == said([x for x, _ in batches()]) == said(whole) == []
    assert said([{"pixel_values": x, "labels": y} for x, y in batches()]) == []
    assert said([(x.flatten(1), 2 * x.flatten(1)[:, :2]) for x, _ in batches()]) == []
    assert said(batches(), batches(first=100)) == []


def changed(change: Callable[[Tensor, Tensor], Batch]) -> list[Batch]:
    return [change(x.clone(), y.clone()) for x, y in batches(16)]


def with_nan(x: Tensor, y: Tensor) -> Batch:
    x[3, 0, 2, 2] = torch.nan
    return x, y


def by_class() -> list[Batch]:
    """As a folder of pictures gives them."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    order = y.argsort(stable=True)
    return list(zip(x[order].split(32), y[order].split(32), strict=True))


def in_eights() -> list[Batch]:
    """Four of each of eight classes in a batch, as for distances between them."""
    return [(x, torch.randperm(10)[:8].repeat_interleave(4)) for x, _ in batches()]


FAULTS = {
    "a missing value": (lambda: changed(with_nan), ["nonfinite_values"]),
    "an infinite target": (lambda: changed(lambda x, y: (x, (y / 0 * (y == 1)).nan_to_num(0, torch.inf))), ["nonfinite_values"]),
    "one picture in all rows": (lambda: changed(lambda x, y: (x[:1].expand_as(x), y)), ["repeated_data"]),
    "a batch from a small set": (lambda: [(x[torch.arange(32) % 22], y) for x, y in batches(1)], []),
    "such batches": (lambda: [(x[torch.arange(32) % 22], y) for x, y in batches(4)], ["repeated_data"]),
    "a batch of four pictures": (lambda: [(x[torch.arange(32) % 4], y) for x, y in batches(1)], ["repeated_data"]),
    "each batch twice": (lambda: [batch for batch in batches() for _ in range(2)], ["repeated_data"]),
    "one label": (lambda: changed(lambda x, y: (x, torch.zeros_like(y))), ["constant_targets"]),
    "one number": (lambda: changed(lambda x, y: (x, torch.full((32, 2), 1.5))), ["constant_targets"]),
    "empty masks": (lambda: [(x, torch.zeros(32, 8, 8).long()) for x, _ in batches(3)], ["constant_targets"]),
    "a batch of empty masks": (lambda: [(x, torch.zeros(32, 8, 8).long()) for x, _ in batches(1)], []),
    "sorted": (by_class, ["sorted_data"]),
    "boards that come again": (lambda: changed(lambda x, y: ((x[:1] > 0).float().expand_as(x), y)), []),
    "a second epoch": (lambda: batches(4) + batches(4), []),
    "a mask of ones": (lambda: [{"pixel_values": x, "pixel_mask": torch.ones_like(x), "labels": y} for x, y in batches(16)], []),
    "points that ought to give 0": (lambda: changed(lambda x, y: (x, torch.zeros(32, 1))), []),
    "lengths in order": (lambda: changed(lambda x, y: (x, y.float(), y.sort().values)), []),
    "nothing to see": (lambda: [(x, torch.zeros(32, 0)) for x, _ in batches()], []),
    "groups of many": (lambda: [(x, torch.tensor([i % 2, 1 - i % 2]).repeat_interleave(16)) for i, (x, _) in enumerate(batches(9))], []),
    "a rare class": (lambda: changed(lambda x, y: (x, (y == 0).long())), []),
    "groups of a class": (in_eights, []),
    "series": (lambda: changed(lambda x, y: (x, y / 7)), []),
    "a target before the window's end": (lambda: changed(lambda x, y: (x.flatten(1), x.flatten(1)[:, 77])), ["label_shift"]),
    "two of them": (lambda: changed(lambda x, y: (x.flatten(1), x.flatten(1)[:, 7:9])), ["label_shift"]),
    "one of two": (lambda: changed(lambda x, y: (x.flatten(1), x.flatten(1)[:, 7:9] * torch.tensor([1, 2]))), []),
    "a column that is the class": (lambda: changed(lambda x, y: (torch.cat([x.flatten(1), y[:, None] / 1], 1), y)), ["label_shift"]),
    "few classes, few examples": (lambda: changed(lambda x, y: ((x > 9).float(), (y > 10).long()))[:1], []),
    "what is to be made again": (lambda: changed(lambda x, y: (x[:, 0, 0, :4], x[:, 0, 0, :4])), []),
    "the value after the window": (lambda: changed(lambda x, y: (x.flatten(1)[:, :100], x.flatten(1)[:, 100])), []),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_wrong_with_examples_is_told_and_what_looks_like_it_is_not(kind: str) -> None:
    make, wanted = FAULTS[kind]
    assert said(make()) == wanted


def test_validation_is_held_against_training() -> None:
    mine = batches()
    leaked = [pictures(100), mine[0]]
    assert said(mine, leaked) == ["split_overlap"]
    scaled = [(255 * x + 100, y) for x, y in batches(first=100)]
    assert said(mine, scaled) == ["input_scale"]
    assert said(mine, [(x / 4, y) for x, y in batches(first=100)]) == ["input_scale"]
    assert said(mine, [(1.5 * x + 0.5, y) for x, y in batches(first=100)]) == []
    few = [((x > 2).float(), y) for x, y in batches()]  # of which many are alike in training, too
    assert said([(x[:, :1, :2, :2], y) for x, y in few], [(x[:, :1, :2, :2], y) for x, y in few[:1]]) == []


def test_what_is_neither_tokens_nor_numbers_is_refused_in_one_line() -> None:
    for batch in ("text", [], (torch.randn(4), 3), {"x": None}):
        with pytest.raises(ValueError, match=r"^a batch must be ids \(B, T\), numbers"):
            check_data([batch])


def test_examine_looks_at_the_batch_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    x, y = pictures(rows=300)
    x[0, 0] = torch.nan
    examination = examine(
        model, (x, y), lambda m, batch: cross_entropy(m(batch[0]), batch[1]), AdamW(model.parameters())
    )
    assert "nonfinite_values" in [f.rule for f in examination.findings] and "data" not in examination.not_checked


def test_a_loader_that_shuffles_is_looked_at_and_the_run_stays_as_it_was() -> None:
    data = torch.utils.data.TensorDataset(*pictures(rows=64))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    before = torch.get_rng_state()
    assert check_data(loader, validation=loader)[0].rule == "split_overlap"
    assert torch.equal(torch.get_rng_state(), before)
