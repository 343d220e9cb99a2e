"""What notebook 09's numbers make of the report's claims, one function each: an outcome and its sentence."""

from __future__ import annotations


def C21(updates_cured: int, updates_needed: int, days: float) -> tuple[str, str]:
    if updates_cured < updates_needed:
        return (
            "open",
            f"at its own size the cured model has made {updates_cured} updates here; {updates_needed:,} updates on real text, with the "
            "validation loss below the trigram table and the bugs that the report missed repaired, would decide it",
        )
    return "holds only if", f"the bugs that the report missed are repaired as well ({updates_cured:,} updates)"
