"""Which elements of a tensor are looked at, how their numbers come from a device, and what a tensor is called: one answer for
files and for live trainings."""

import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .findings import grouped

SAMPLE = 256  # elements of a tensor; a tensor of up to WHOLE elements is taken whole
WHOLE = 512
GOLDEN, SILVER = 0.6180339887498949, 0.41421356237309515  # fractions that no count can fall into step with


def sample_positions(shape: Sequence[int]) -> Tensor:
    """Flat positions of the sample of a tensor of this shape, int64 on the CPU: all of a small one, else SAMPLE of them.

    Rows (all dimensions but the last) go through the tensor evenly, a different one each time if there are as many; columns
    follow the golden ratio. Evenly spaced flat positions may all hit one column, and so may the golden ratio of a flat
    position: with 28,657 rows (a Fibonacci number) it sees one column of 192.
    """
    n_elements = torch.Size(shape).numel()
    if n_elements <= WHOLE:
        return torch.arange(n_elements)
    columns = shape[-1]
    order = torch.arange(SAMPLE, dtype=torch.float64)
    stretch = n_elements // columns / SAMPLE  # rows
    row = (order * stretch + order * SILVER % 1 * max(0.0, stretch - 1)).long()
    return row * columns + (order * GOLDEN % 1 * columns).long()


def elements(tensor: Tensor, positions: Tensor) -> Tensor:
    """The elements at flat positions on the tensor's device. Not `take`, which Apple's GPUs have no kernel for."""
    return tensor.flatten().index_select(0, positions)


def fetched(tensors: Sequence[Tensor | float]) -> list:
    """Their numbers, in their order, a list for each vector: one transfer for all of a device and a format."""
    numbers = list(tensors)
    on_devices = [i for i, t in enumerate(tensors) if isinstance(t, Tensor)]
    for places in grouped(on_devices, lambda i: (tensors[i].device, tensors[i].dtype)).values():
        values = iter(torch.cat([tensors[i].flatten() for i in places]).tolist())
        for i in places:
            numbers[i] = list(islice(values, tensors[i].numel())) if tensors[i].ndim else next(values)
    return numbers


EARLY = 100  # updates that tell most, and are looked at most
LOOK_EVERY, SELDOM = 5, 20  # updates between looks at the passes of one, early and later
HEARD, OF = 20, 60  # later updates in a row of whose gradients the order is heard, and from one such row to the next


class Waiting:
    """What is heard between two checks stays on its device, each number or vector with the function that takes it from there."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor | float, Callable[[Any], object]]] = []
        self.update = 1  # of those seen, the one that comes next

    @property
    def is_look(self) -> bool:
        """Whether the next update's passes are looked at: a long training should not pay for its beginning."""
        return self.update % (LOOK_EVERY if self.update <= EARLY else SELDOM) == 1

    @property
    def is_heard(self) -> bool:
        """Whether what happens to gradients is heard, in rows of updates: one by itself does not tell what is usual."""
        return self.update <= EARLY or self.update % OF < HEARD

    def add(self, numbers: Tensor | float, take: Callable[[Any], object]) -> None:
        self.pairs.append((numbers, take))

    def fetch(self) -> None:
        """Hand over all of it, in the order in which it came."""
        pairs, self.pairs = self.pairs, []
        for (_, take), numbers in zip(pairs, fetched([numbers for numbers, _ in pairs]), strict=True):
            take(numbers)


def number_of(value: Tensor | float) -> Tensor | float:
    """A loss or a learning rate as it is now, where it is."""
    return value.detach().float().mean() if isinstance(value, Tensor) else float(value)


def start_sample(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Of each parameter the sampled flat positions (`index`, int64) and the values there now (`value`), on the CPU.

    For a checkpoint, under the key `initial_sample`: `inspect_checkpoint` can then tell from the file alone what never moved.
    """
    sample = {}
    for name, p in model.named_parameters():
        index = sample_positions(p.shape)
        sample[name] = {"index": index, "value": elements(p.detach(), index.to(p.device)).cpu()}
    return sample


def plain(tensor: Tensor) -> Tensor:
    """The numbers behind a tensor, as a view: a sharded one's own part, a complex one's real and imaginary parts."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # DTensor
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def tensor_kind(name: str) -> str:
    """The name with its numbers replaced: `layers.3.up.weight` and `layers.12.up.weight` are both `layers.*.up.weight`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
