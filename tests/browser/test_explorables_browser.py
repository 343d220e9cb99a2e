"""Every explorable in a real JupyterLab and a real browser: each move changes what the figure's alternative text says.

For a new explorable add a line to EXPLORABLES: a cell's code, then moves, of which at least one is by mouse and one by
keys. Sliders are found by the name that a screen reader says, buttons by their text.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import write_notebook
from lab import browser_page, jupyter_lab, run_all, wait_for
from playwright.sync_api import Locator, Page

SETUP = f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2] / 'notebooks')!r})\n"
MAPS = """import torch
from checks.figures_02 import explore_causality
causal = torch.ones(6, 6).triu()
explore_causality("a b c d e f".split(), {(m, mode): causal + (mode == "training") * (m == "MoD") * torch.eye(6).roll(-1, 1)
                                          for m in ("attention", "MoD") for mode in ("evaluation", "training")})"""
DEPTHS = """import torch
from checks.figures_02 import explore_capacity
from moe_lab import build_model, load_config
from moe_lab.config import ROOT
model = build_model(load_config(ROOT / "configs/smoke.yaml").model)
explore_capacity(model, torch.arange(40)[None], [str(i) for i in range(40)])"""


class Move(NamedTuple):
    control: str  # name of a slider or text of a button
    how: str | float  # keys to press on it, "PageUp*3"; "click"; or where on the slider to click, 0 left to 1 right
    says: str  # what the alternative text then matches


EXPLORABLES = {
    "number line": (
        "from checks.explore_03 import explore_number_line\nexplore_number_line()",
        Move("up", "click", r"^1 \+ 0\.0003.*lost"),
        Move("down", "Space", r"^1 − 0\.0003.*lost"),
        Move("update", "PageUp*12", r"^1 − 0\.00[4-9].*lands on 0\.99"),
        Move("weight", "PageUp*5", r"^8 − .*lost"),
        Move("weight", 0.5, r"^0\.\d+ − "),
    ),
    "two losses": (
        "from checks.explore_01 import explore_losses\nexplore_losses()",
        Move("first loss", "Home", r"^First loss 0\.00"),
        Move("last loss", 0.99, r"last 1[45]\."),
        Move("ln V", "End", r"V = 2\d\d,\d\d\d"),
    ),
    "start": (
        "from checks.explore_01 import explore_start\nexplore_start(2048, 192, 0.02)",
        Move("width", "End", r"At width 8,192"),
        Move("init_std", 0.99, r"init_std 0\.(09\d|1)\. "),
        Move("vocabulary V", "Home", r"ln V = 4\.16"),
    ),
    "Newton–Schulz": (
        "from checks.figures_04 import explore_newton_schulz\nexplore_newton_schulz()",
        Move("iterations", "End", r"^After 10 iterations"),
        Move("smallest", 0.99, r"from 0\.(0[789]|1)\d* to 1"),
    ),
    "router": (
        "from checks.figures_02 import explore_router\nexplore_router()",
        Move("logit 1", "End", r"Load 0\.\d\d, 0\.50"),
        Move("tokens differ by", "Home", r"Load .*0\.00.*0\.00.*; mean"),
        Move("logit 2", 0.99, r"Load 0\.00, 0\.50, 0\.50, 0\.00; mean"),
    ),
    "capacity": (
        DEPTHS,
        Move("capacity", "End", r"^Capacity 1: .* computes 40 of 40 tokens"),
        Move("capacity", 0.5, r"^Capacity 0\.5\d*: .* computes 2\d of 40 tokens"),
    ),
    "weight under updates": (
        "from checks.figures_03 import explore_weight\nexplore_weight()",
        Move("all up", "click", r"^After 100 updates of 0\.0003: float32 1\.0\d+, bf16 1\.0000"),
        Move("all down", "Space", r"^After 100 updates of 0\.0003: float32 0\.9\d+, bf16 1\.0000, Kahan 0\.9"),
        Move("learning rate", "End", r"^After 100 updates of 0\.0189: .* bf16 (?!1\.0000)"),
        Move("learning rate", 0.5, r"^After 100 updates of 0\.000\d+: .* bf16 1\.0000"),
    ),
    "causality": (
        MAPS,
        Move("3 d", "click", "^attention, evaluation: token 3 changes; 2 of 2 later places .* do: none"),
        Move("training", "click", "^attention, training: token 3 .* do: none"),
        Move("MoD", "Space", "^MoD, training: token 3 .* do: 2"),
        Move("5 f", "Enter", "^MoD, training: token 5 .* do: 4"),
    ),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[Path, str, Page, list[str]]]:
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder) as address, browser_page() as (page, crashes):
        yield folder, address, page, crashes


def test_each_explorable_is_tried_by_mouse_and_by_keys() -> None:
    for name, (_, *moves) in EXPLORABLES.items():
        by_mouse = {isinstance(move.how, float) or move.how == "click" for move in moves}
        assert by_mouse == {True, False}, name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", EXPLORABLES)
def test_an_explorable_follows_mouse_and_keys(name: str, lab) -> None:
    folder, address, page, crashes = lab
    code, *moves = EXPLORABLES[name]
    file = f"{name.replace(' ', '_')}.ipynb"
    write_notebook(folder / file, SETUP + code)
    page.goto(f"{address}/doc/tree/{file}?reset")
    run_all(page)
    page.wait_for_selector(".jp-OutputArea-output figure img", timeout=60000)
    picture = page.locator(".jp-OutputArea-output figure img").last
    wait_for(lambda: page.locator("[role=slider]").count() == named(page), "a slider has no name")
    before = picture.get_attribute("src")
    for move in moves:
        make(page, move)
        try:
            wait_for(lambda move=move: bool(re.search(move.says, alt(picture), re.DOTALL)), "", 20)
        except AssertionError:
            pytest.fail(f"{name}: after {move} the figure says {alt(picture)!r}")
        assert picture.get_attribute("src") != before, f"{name}: {move} shows the same picture: {alt(picture)}"
        before = picture.get_attribute("src")
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert not crashes


def alt(picture: Locator) -> str:
    return picture.get_attribute("alt")


def named(page: Page) -> int:
    return page.locator("[role=slider][aria-label]").count()


def make(page: Page, move: Move) -> None:
    if isinstance(move.how, float):
        handle = page.get_by_role("slider", name=move.control, exact=True)
        track = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]").bounding_box()
        page.mouse.click(track["x"] + move.how * track["width"], track["y"] + track["height"] / 2)
        return
    buttons = page.get_by_role("button", name=move.control, exact=True)
    if move.how == "click":
        buttons.first.click()
        return
    control = buttons.first if buttons.count() else page.get_by_role("slider", name=move.control, exact=True)
    control.focus()
    key, _, times = move.how.partition("*")
    for _ in range(int(times or 1)):
        page.keyboard.press(key)
        page.wait_for_timeout(100)  # as a hand does: the kernel's answer to one press must not undo the next
