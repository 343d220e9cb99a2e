"""What notebook 03a's numbers say about the report's claims: an outcome and a sentence."""

from collections.abc import Sequence

from checks.ledger import mean_of
from moe_lab.failures.results import Spread


def C03(norms: float, others: int, matrix_at_1536: float) -> tuple[str, str]:
    """`norms`: share of their way that arrived; `others`: tensors beside them that never moved; `matrix_at_1536`: share of
    Muon's first step that a fresh matrix of that width realises."""
    if norms > 0.5:
        return "open", "the norms of our re-enactment are not frozen"
    if others == 0 and matrix_at_1536 > 0.95:
        return "holds", "beside the norms every tensor moves, and nearly all of a wide matrix's step arrives"
    if matrix_at_1536 > 0.95:
        return "holds only if", "the model has no tensors such as Mamba's vectors, some of which stand still as well"
    return "does not hold", (
        "a large part of a matrix's step is lost as well at width 1536, with start values of 0.02; and in our model some of "
        "Mamba's vectors stand still, which the case's run did not have"
    )


def C04(recovered: bool, share: float | Spread, widths: Sequence[int], at_1536: float) -> tuple[str, str]:
    """`share`: the number format's largest share of the way from the failing run in bf16 to the centre in float32, at
    `widths`; `at_1536`: what bf16 costs at the cure's learning rates at that width, in nats."""
    if not recovered:
        return "open", "lost updates cost nothing that can be resolved, or float32 copies do not bring it back"
    if mean_of(share) > 0.5:
        return "holds", "float32 parameters bring back most of what the run lacks"
    there = " and ".join(map(str, widths))
    return "holds only if", (
        f"the learning rates are mended as well: it cures the lost updates, and at widths {there}, after 200 updates, over 3 seeds, "
        f"these are {mean_of(share):.0%} or less of what the run lacks; the cost grows with width, and at 1536 the shares were not measured"
    )
