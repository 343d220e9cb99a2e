"""What notebook 06's numbers make of the report's claim C20: an outcome and its sentence."""

from __future__ import annotations

from collections.abc import Mapping

from moe_lab.failures.results import Spread

CLEAR = 0.05  # nats that a switch must gain to be called a help


def C20(on_text: Mapping[str, Spread], on_noise: Mapping[str, Spread]) -> tuple[str, str]:
    """`on_text`: what each remedy gains in a run of that day with both fixes; `on_noise`: the three switches with random tokens."""
    switches = {name: on_text[name].mean for name in on_noise}
    others = {name: gain.mean for name, gain in on_text.items() if name not in on_noise}
    staged = "in our re-enactment (width 64, 150 updates, three seeds)"
    if max(gain.mean for gain in on_noise.values()) > CLEAR:
        return (
            "open",
            f"switching them off lowered the loss even with random tokens {staged}, which nothing here explains",
        )
    noise = "with random tokens, the likeliest state of that run, switching them off gains nothing"
    if max(switches.values()) < CLEAR:
        return "does not hold", f"{staged} {noise}, and with text it gains nothing either"
    best = max(others, key=others.__getitem__)
    if others[best] > max(switches.values()):
        rest = "it gains something, for the bugs of Mixture-of-Depths go with it; a fitting learning rate gains more"
        return "does not hold", f"{staged} {noise}; with text {rest}, so neither is the first thing to do"
    return "holds only if", f"the tokens are text: {noise}; {staged} with text no other remedy gains as much"
