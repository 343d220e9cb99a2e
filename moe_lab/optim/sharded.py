"""Matrices whose rows are spread over ranks (FSDP2's `fully_shard`), and how ranks share out what needs them whole."""

# Shapes: M matrices of A rows and B columns; a rank holds `a` consecutive rows of each, the last ones perhaps fewer or none.

from collections.abc import Callable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank: a view, or the tensor itself if it is an ordinary one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(p: Tensor) -> bool:
    """Whether its first dimension is spread over ranks. Raises ValueError for a layout of another kind."""
    if not hasattr(p, "placements"):
        return False
    there = zip(p.placements, p.device_mesh.shape, strict=True)
    spread = [place for place, n in there if n > 1 and not place.is_replicate()]
    if len(spread) > 1 or any(not place.is_shard(0) for place in spread):
        raise ValueError(f"Muon takes tensors that are whole, or cut along their first dimension; got {p.placements}")
    return bool(spread)


def on_whole(compute: Callable[[Tensor], Tensor], rows: Tensor, p: Tensor) -> Tensor:
    """This rank's rows of `compute(matrices)`, (M, a, B), from its rows of M matrices spread as the parameter `p` is.
    The matrices are dealt out whole, as many to each rank, by DTensor's own exchange, and so are the results. `compute`
    maps (M, A, B) to (M, A, B), M from 0."""
    from torch.distributed.tensor import DTensor, Shard  # a second; who has such parameters has loaded it

    by_rows, by_matrix = ([Shard(dim) if s.is_shard() else s for s in p.placements] for dim in (1, 0))
    layout = {"shape": torch.Size((len(rows), *p.shape)), "stride": (p.numel(), p.shape[1], 1)}
    spread = DTensor.from_local(rows, p.device_mesh, by_rows, **layout)
    mine = compute(spread.redistribute(placements=by_matrix).to_local())
    return DTensor.from_local(mine, p.device_mesh, by_matrix, **layout).redistribute(placements=by_rows).to_local()
