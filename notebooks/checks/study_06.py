"""What notebook 06 reads out of the study of the bugs (benchmarks/bug_study.py): costs, interactions, shares, a replay.

Costs are nats of validation loss on real text above the healthy arm, paired within a seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

from checks.surface import shapley
from moe_lab.failures.results import Results, Spread, spread

ALONE = (
    "B01",
    "B02",
    "B03",
    "B04",
    "B05",
    "B06",
    "B08",
    "B09",
    "B10",
    "B11",
    "B15",
    "B17",
    "B18",
    "B19",
    "B21",
    "B24",
)
FACTORS = ("precision", "rate", "shape", "mixtures")  # of the commit, B14

# Written and committed before the first run of seeds 1 to 3; nats of validation loss above the healthy arm, or as said. B08
# was to be a fifth player; its subsets were left out for want of time.
PREDICTED = {
    "alone": {
        "B01": 0.05,
        "B02": 2.0,
        "B03": 0.0,
        "B04": 0.7,
        "B05": 0.25,
        "B06": 0.3,
        "B08": 2.6,
        "B09": 0.0,
        "B10": 0.0,
        "B11": 0.75,
        "B15": 0.0,
        "B17": 0.0,
        "B18": 0.0,
        "B19": 0.0,
        "B21": 1.8,
        "B24": 0.0,
    },
    "B01 with B02, beyond their sum": 0.3,
    "MoD's five together": 0.9,
    "all of that day without B08": 2.5,
    "all of that day with B08": 2.6,
    "Shapley shares": {"B08": 1.2, "B02": 0.6, "B21": 0.5, "MoD": 0.25, "B01": 0.05},
    "the commit's gain": {"all four": 0.8, "rate": 0.45, "mixtures": 0.35, "precision": 0.1, "shape": -0.1},
    "the commit's gain with B08": 0.05,
    "after both fixes, what gains": {
        "MoD off": 0.3,
        "Mamba off": 0.0,
        "both off": 0.3,
        "a fitting rate": 1.0,
        "B21": 0.3,
    },
    "the same with B08": {"MoD off": 0.0, "Mamba off": 0.0, "both off": 0.0},
}


def subset_name(players: Sequence[str]) -> str:
    return " + ".join(players) or "healthy"


def replay_name(changed: Sequence[str]) -> str:
    return "commit: " + (", ".join(changed) or "nothing")


PLAYERS = ("B01", "B02", "MoD", "B21")  # B08 is no share: it is a gate, and stands apart
LN_V = math.log(1024)  # of the study's vocabulary
# what was tried with text and with random tokens, all else equal
WITH_AND_WITHOUT = {
    "healthy": ("healthy", "B08"),
    "both fixes": ("both fixes", "both fixes + B08"),
    "both fixes, MoD off": ("both fixes, MoD off", "both fixes + B08, MoD off"),
    "both fixes, Mamba off": ("both fixes, Mamba off", "both fixes + B08, Mamba off"),
    "both fixes, both off": ("both fixes, both off", "both fixes + B08, both off"),
    "before the commit": (replay_name(()), replay_name(()) + " + B08"),
    "after the commit": (replay_name(FACTORS), replay_name(FACTORS) + " + B08"),
}


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [chosen for n in range(len(names) + 1) for chosen in combinations(names, n)]


def cost(found: Results, arm: str, other: str = "healthy") -> Spread:
    return found.paired(arm, other)


def alone(found: Results) -> dict[str, Spread]:
    """Each bug alone, the dearest first."""
    costs = {id: cost(found, id) for id in ALONE}
    return dict(sorted(costs.items(), key=lambda item: -item[1].mean))


def noise(found: Results) -> dict[str, tuple[Spread, Spread]]:
    """Validation losses on text, by what was done: trained on text, trained on random tokens."""
    return {name: (found.losses(text), found.losses(random)) for name, (text, random) in WITH_AND_WITHOUT.items()}


def lowest_on_noise(found: Results) -> float:
    """The lowest loss on text of any run that was trained on random tokens."""
    arms = [random for _, random in WITH_AND_WITHOUT.values()]
    return min(found.loss(arm, seed) for arm in arms for seed in found.seeds(arm))


def beyond_sum(found: Results, players: Collection[str]) -> Spread:
    """What several cost together beyond the sum of each alone; below 0: they overlap."""
    together = subset_name([player for player in PLAYERS if player in players])

    def one(seed: int) -> float:
        base = found.loss("healthy", seed)
        return found.loss(together, seed) - base - sum(found.loss(player, seed) - base for player in players)

    return spread(map(one, found.seeds("healthy")))


def mod_beyond_sum(found: Results) -> Spread:
    """The same of Mixture-of-Depths' five."""

    def one(seed: int) -> float:
        base = found.loss("healthy", seed)
        parts = sum(found.loss(id, seed) - base for id in ("B03", "B04", "B05", "B06", "B17"))
        return found.loss("MoD", seed) - base - parts

    return spread(map(one, found.seeds("healthy")))


def shares(found: Results) -> dict[str, Spread]:
    """Shapley shares of the four in what they cost together."""
    values = [
        {frozenset(chosen): found.loss(subset_name(chosen), seed) for chosen in subsets(PLAYERS)}
        for seed in found.seeds("healthy")
    ]
    by_seed = [shapley(value, PLAYERS) for value in values]
    return {player: spread(one[player] for one in by_seed) for player in PLAYERS}


def left_over(found: Results) -> Spread:
    """What all bugs of that day cost beyond those four (and without B08)."""
    return cost(found, "all of that day", subset_name(PLAYERS))


def gaps(found: Results, arm: str) -> dict[int, float]:
    """Validation minus training loss (the mean of its last three readings), by seed."""
    rows = [row for row in found.rows if row["arm"] == arm]
    ends = {row["seed"]: statistics.fmean(list(row["training"].values())[-3:]) for row in rows}
    return {row["seed"]: row["validation"][str(row["steps"])] - ends[row["seed"]] for row in rows}


def gap(found: Results, arm: str) -> Spread:
    return spread(gaps(found, arm).values())


def gap_of(found: Results, arm: str) -> Spread:
    """By how much it is wider than in the healthy arm, seed by seed."""
    healthy = gaps(found, "healthy")
    return spread(width - healthy[seed] for seed, width in gaps(found, arm).items())


# ---- the commit, B14 ------------------------------------------------------------------------------------------------------


def gain(found: Results, changed: Sequence[str], more: str = "") -> Spread:
    return found.paired(replay_name(()) + more, replay_name(changed) + more)


def commit_factors(found: Results) -> dict[str, tuple[Spread, Spread]]:
    """By factor: its gain as the first change, and as the last one."""
    told = {}
    for factor in FACTORS:
        others = tuple(other for other in FACTORS if other != factor)
        told[factor] = gain(found, (factor,)), found.paired(replay_name(others), replay_name(FACTORS))
    return told


def training_fall(found: Results, arm: str) -> Spread:
    """How far the training loss, of whatever the run was fed, fell from its first reading to its last."""
    runs = [list(row["training"].values()) for row in found.rows if row["arm"] == arm]
    return spread(run[0] - run[-1] for run in runs)


# ---- after both fixes ------------------------------------------------------------------------------------------------------

REMEDIES = {
    "MoD off": "both fixes, MoD off",
    "Mamba off": "both fixes, Mamba off",
    "both off": "both fixes, both off",
    "a fitting rate": "both fixes, a fitting rate",
    "B21 mended": "both fixes, B21 mended",
}


def remedies(found: Results) -> dict[str, Spread]:
    """What each gains in a run of that day with the report's two fixes, on text."""
    return {name: found.paired("both fixes", arm) for name, arm in REMEDIES.items()}


def remedies_under_noise(found: Results) -> dict[str, Spread]:
    """The same three in a run that reads random tokens."""
    names = ("MoD off", "Mamba off", "both off")
    return {name: found.paired("both fixes + B08", f"both fixes + B08, {name}") for name in names}


def predicted_alone() -> Mapping[str, float]:
    return PREDICTED["alone"]
