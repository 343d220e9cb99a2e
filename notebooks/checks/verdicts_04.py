"""What notebook 04's numbers make of the report's claims, one function each: an outcome and its sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def C09(equal_step_ratio: Mapping[str, float], case_width: str, claimed: Sequence[float]) -> tuple[str, str]:
    low, high = claimed
    if not low <= equal_step_ratio[case_width] <= high:
        return "does not hold", "at the case's width equal steps ask for another ratio, in either convention"
    return (
        "holds only if",
        "the convention is `original` and the fan-in 225 to 2500, where equal steps ask for it; in match_rms_adamw equal "
        "steps have equal numbers. What trains best is another question",
    )


def C10(optimum: Mapping[str, float], claimed: Sequence[float]) -> tuple[str, str]:
    low, high = claimed
    inside = {name: low <= lr <= high for name, lr in optimum.items()}
    scope = "at widths 96 and 192, 200 updates, three seeds"
    if all(inside.values()):
        return "holds", f"{scope}, both conventions have their optimum there"
    if all(ok for name, ok in inside.items() if name.startswith("match")):
        return (
            "holds only if",
            f"the convention is match_rms_adamw ({scope}); in `original`, the case's, the optimum lies higher, in a valley "
            "so flat that the range costs little",
        )
    return "does not hold", f"{scope}, the optima do not all lie there, and the valley is flat"
