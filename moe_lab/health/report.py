"""A watch's readings as a table of text, one line a kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_lab.health.measures import Reading, share_of


def table(readings: Sequence[Reading], step: int) -> str:
    """What the last reading says: tensors of a kind, their number format, whether gradients arrive, how much has moved.

    `moved` is the root mean square displacement over the weight's; `unchanged` the share of sampled elements, with a
    gradient so far, that are bit-identical to the start; `arrived` is realised over intended displacement, known for 16-bit
    weights under optimizers whose step can be replayed.
    """
    kinds: dict[str, list[Reading]] = {}
    for r in readings:
        kinds.setdefault(r.kind, []).append(r)
    width = max([len(kind) for kind in kinds] + [6])
    lines = [
        f"after {step} updates",
        f"{'tensor':{width}} {'n':>3} {'format':>8} {'gradient':>9} {'moved':>8} {'unchanged':>9} {'arrived':>8}",
    ]
    for kind, mine in kinds.items():
        touched = sum(r.n_touched for r in mine)
        weight = math.sqrt(sum(r.weight_square for r in mine) / sum(r.n_elements for r in mine))
        moved = math.sqrt(sum(r.moved_square for r in mine) / touched) if touched else 0.0
        relative = f"{moved / weight:.1e}" if weight else f"{moved:.1e}"
        unchanged = f"{sum(r.unchanged for r in mine) / touched:.0%}" if touched else "-"
        share = share_of(mine)
        arrived = f"{share.rho:.0%}" if share else "-"
        dtype = str(mine[0].dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        lines.append(
            f"{kind:{width}} {len(mine):3} {dtype:>8} {gradient(mine):>9} {relative:>8} {unchanged:>9} {arrived:>8}"
        )
    return "\n".join(lines)


def gradient(readings: Sequence[Reading]) -> str:
    """`yes`, `zero`, `none`, or `some` where tensors of one kind differ."""
    states = {
        "yes" if r.with_gradient else "zero" if r.zero_gradient else "none" if r.no_gradient else "-" for r in readings
    }
    return states.pop() if len(states) == 1 else "some"
