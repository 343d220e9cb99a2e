"""What notebook 08's numbers make of the report's claims, one function each: an outcome and its sentence."""

from __future__ import annotations


def C18(
    tensors: int, narrow_by_default: int, narrow_when_asked: int, still_norms: int, updates: int
) -> tuple[str, str]:
    """Tensors in bfloat16 during a run with `bf16=True`, of a checkpoint that was loaded by default and as float32."""
    if narrow_when_asked:
        return "does not hold", "even weights that come in float32 are trained in bfloat16"
    if not narrow_by_default:
        return "holds", "weights that come in bfloat16 are trained in float32"
    if not still_norms:
        return "open", "weights that come in bfloat16 stay in it, and yet no norm stood still in our run"
    return (
        "does not hold",
        "the flag casts no weight: a bfloat16 checkpoint is loaded in bfloat16 unless one asks for float32, is trained in it, and "
        f"the norms of a two-layer GPT-2 of width 64 stood at exactly 1 for {updates} updates at 2.5e-4, one seed; weights that come "
        "in float32 are safe. By its source accelerate makes them float32 under FSDP, which nobody ran here",
    )


def C19(
    report_runs: bool, takes_bare_model: bool, loss_apart: float, weights_apart: float, updates: int
) -> tuple[str, str]:
    """Whether the report's own `compute_loss` runs and Trainer takes the bare model; how far our run in it is from our own."""
    if report_runs and takes_bare_model:
        return "holds", "the report's method runs, and the model needs no wrapper"
    if max(loss_apart, weights_apart) > 1e-3:
        return "does not hold", f"with every hook used, the run differs from ours within {updates} updates"
    return (
        "holds only if",
        "the model is wrapped so that it takes labels and returns a loss, compute_loss takes num_items_in_batch, and both optimizers "
        f"come as one object, by a factory: then {updates} updates with every loss term are ours (one seed, the profile's model, "
        "float32). As the report wrote it, the first step ends in a TypeError",
    )
