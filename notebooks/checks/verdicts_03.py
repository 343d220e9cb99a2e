"""What notebook 03's numbers say about the report's claims: an outcome and a sentence."""


def C01(bf16: float, float32: float, updates: int, largest_step: float, half_gap: float) -> tuple[str, str]:
    """`bf16`, `float32`: furthest norm weight from 1; `largest_step`: what AdamW can make of the run's learning rate."""
    if bf16 > 0:
        return "does not hold", "norm weights of our re-enactment have moved"
    if float32 == 0 or largest_step >= half_gap:
        return "open", "nothing shows that an update would have moved them in float32, or that none can in bf16"
    return "holds", (
        f"over {updates} updates of our model none moves; and since each update by itself is rounded away, no number of steps "
        "would have moved a weight at that learning rate"
    )


def C02(down: float, up: float, whole: bool, median_step: float) -> tuple[str, str]:
    """`down`, `up`: the largest update that is lost from 1; `whole`: everything below is lost as well."""
    if max(down, up) < 1e-5:
        return "does not hold", "an update of 1e-5 survives at 1.0"
    if not whole or min(down, up) < 1e-5:
        return "holds only if", "it is said of one direction, or of some sizes"
    size = "larger" if median_step > 1e-5 else "no larger"
    return (
        "holds",
        f"at 1.0 everything up to 2^-9 downwards and 2^-8 upwards is lost; our run's updates were {size} than 1e-5",
    )


def C16(still_in_control: int, still_in_sick: int, together: float, updates: int) -> tuple[str, str]:
    """`together`: how far all parameters of the sick run moved, over the control's."""
    if still_in_control:
        return "does not hold", "tensors of the healthy run stand still as well"
    if not still_in_sick:
        return "open", "no tensor of the sick run stands still"
    if together < 0.5:
        return (
            "holds",
            f"every tensor of the healthy run has moved by update {updates}, the sick run as a whole has not",
        )
    return "holds only if", (
        "it is asked of each tensor: all parameters together move in the sick run nearly as far as in the healthy one"
    )
