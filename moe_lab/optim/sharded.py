"""Matrices whose rows are spread over ranks (FSDP2's `fully_shard`), and how ranks share out what needs them whole."""

# Shapes: W ranks, A rows and B columns of a matrix; a rank holds consecutive rows, the last ones perhaps fewer or none.

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank: a view, or the tensor itself if it is an ordinary one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(p: Tensor) -> bool:
    """Whether its first dimension is spread over ranks. Raises ValueError for a layout of another kind."""
    if not hasattr(p, "placements"):
        return False
    spread = [
        place for place, n in zip(p.placements, p.device_mesh.shape, strict=True) if n > 1 and not place.is_replicate()
    ]
    if len(spread) > 1 or any(not place.is_shard(0) for place in spread):
        raise ValueError(f"Muon takes tensors that are whole, or cut along their first dimension; got {p.placements}")
    return bool(spread)


def shared_out(params: Sequence[Tensor], parts: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """This rank's rows of `compute(matrix)` for each matrix, from its rows of them, `parts` (a, B) of one dtype.

    Every matrix is whole on one rank alone, the one with the least to do. `compute` maps (A, B) to (A, B). Two exchanges in all.
    """
    mesh = params[0].device_mesh
    axis = next(i for i, place in enumerate(params[0].placements) if place.is_shard())
    group, n_ranks, me = mesh.get_group(axis), mesh.size(axis), mesh.get_local_rank(axis)
    owners, load = {}, [0] * n_ranks
    for i in sorted(range(len(params)), key=lambda i: (-params[i].numel() * min(params[i].shape), i)):
        owners[i] = min(range(n_ranks), key=load.__getitem__)
        load[owners[i]] += params[i].numel() * min(params[i].shape)
    of_owner = [[i for i in range(len(params)) if owners[i] == rank] for rank in range(n_ranks)]
    mine = of_owner[me]
    rows = {i: [n_rows(params[i].shape[0], n_ranks, rank) for rank in range(n_ranks)] for i in range(len(params))}
    nothing = parts[0].new_empty(0)

    sent = [torch.cat([nothing, *(parts[i].flatten() for i in theirs)]) for theirs in of_owner]
    of_rank = [[rows[i][rank] * params[i].shape[1] for i in mine] for rank in range(n_ranks)]  # elements of my matrices
    received = exchange(sent, [sum(sizes) for sizes in of_rank], group)
    pieces = [part.split(sizes) for part, sizes in zip(received, of_rank, strict=True)]
    done = []
    for i, shares in zip(mine, zip(*pieces, strict=True), strict=True):
        done.append(compute(torch.cat(shares).view(params[i].shape)).split(rows[i]))
    back = [torch.cat([nothing, *(shares[rank].flatten() for shares in done)]) for rank in range(n_ranks)]
    results: dict[int, Tensor] = {}
    for theirs, part in zip(of_owner, exchange(back, [part.numel() for part in sent], group), strict=True):
        shares = part.split([parts[i].numel() for i in theirs])
        results |= {i: share.view(parts[i].shape) for i, share in zip(theirs, shares, strict=True)}
    return [results[i] for i in range(len(params))]


def n_rows(total: int, n_ranks: int, rank: int) -> int:
    """Rows on a rank, as `torch.chunk` and with it DTensor deal them out."""
    each = -(-total // n_ranks)
    return max(0, min(each, total - rank * each))


def exchange(sent: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> Sequence[Tensor]:
    """One flat tensor to each rank, one of a known size from each."""
    out = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(out, torch.cat(list(sent)), list(sizes), [t.numel() for t in sent], group=group)
    return out.split(list(sizes))
