"""Figures and explorables of notebook 02. Each `draw` returns the figure, its alt text and its caption."""

# Shapes: B batch, T time, S sublayers with MoD, E experts, N tokens.

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from checks.explorables import Choice, Slider, explore
from moe_lab.model.depth import Depth
from moe_lab.model.moe import Routing, load_balancing_loss
from moe_lab.show import style
from moe_lab.show.style import label_right, new_axes, new_figure, show

CHANGES = LogNorm(1e-5, 3.0)  # of a logit: what the blues of the causality maps mean


def shown(word: str) -> str:
    """A token as a figure writes it: a dot for a space, an arrow for the end of a line."""
    return word.replace("\n", "↵").replace(" ", "·")[:9]


def show_forgetting(left: Mapping[str, Tensor]) -> None:
    """What is left of a token n tokens later, `left[name][n]`, for two starts of Mamba."""
    axes = new_axes(
        new_figure(8, 3), (0.1, 0.19, 0.64, 0.68), "What is left of a token", "tokens later", "share, log scale"
    )
    for curve, (colour, line, marker) in zip(left.values(), style.SERIES, strict=False):
        axes.plot(curve, color=colour, linestyle=line, marker=marker, markersize=4)
    axes.set_yscale("log")
    axes.set_ylim(min(float(curve[-1]) for curve in left.values()) / 3, 2)
    labels = [
        (math.log10(curve[-1]), name, colour)
        for (name, curve), (colour, *_) in zip(left.items(), style.SERIES, strict=False)
    ]
    for value, name, colour in labels:
        axes.text(len(curve) - 0.3, 10**value, name, color=style.LETTERS.get(colour, colour), fontsize=8.5, va="center")
    told = [f"{name}: {curve[1]:.2f} after 1 token, {curve[20]:.1g} after 20" for name, curve in left.items()]
    alt = f"Two lines over 30 tokens, share on a log scale. {'; '.join(told)}."
    show(
        axes.figure,
        alt,
        "The slowest state of the median channel. On a log scale a constant factor is a straight line.",
    )


def depth_names(model: nn.Module) -> list[str]:
    """Of the sublayers with MoD, in the order of the reports."""
    kinds = [(i, type(part).__name__) for i, block in enumerate(model.layers) for part in (block.seq_layer, block.ffn)]
    return [f"{i} {kind}" for i, kind in kinds]


def draw_depth(
    chosen: np.ndarray, names: Sequence[str], words: Sequence[str], capacity: float
) -> tuple[Figure, str, str]:
    """Who is computed, `chosen` (S, T) bool."""
    n_sublayers, n_words = chosen.shape
    figure = new_figure(10, 1.6 + 0.26 * n_sublayers)
    axes = new_axes(
        figure, (0.13, 0.33, 0.85, 0.56), f"Capacity {capacity:g}: tokens computed (blue), skipped (×)", "", ""
    )
    axes.grid(False)
    axes.pcolormesh(np.where(chosen, 1.0, np.nan), cmap=ListedColormap(["#9CC4E4"]), edgecolors="white", linewidth=1.5)
    rows, columns = np.nonzero(~chosen)
    axes.scatter(columns + 0.5, rows + 0.5, marker="x", color=style.VERMILION, s=22, linewidth=1.4)
    axes.set(xlim=(0, n_words), ylim=(n_sublayers, 0))
    axes.set_xticks(np.arange(n_words) + 0.5, [shown(word) for word in words], rotation=90, family="monospace")
    axes.set_yticks(np.arange(n_sublayers) + 0.5, names)
    axes.tick_params(labelsize=9.5, colors=style.INK, length=0)
    computed = chosen.sum(axis=0)
    alt = f"Capacity {capacity:g}: each of {n_sublayers} sublayers computes {chosen[0].sum()} of {n_words} tokens; "
    alt += f"{(computed == n_sublayers).sum()} tokens are computed by all, {(computed == 0).sum()} by none."
    pairs = chosen[0].sum() * (chosen[0].sum() + 1) // 2
    every = n_words * (n_words + 1) // 2
    return figure, alt, f"A sequence sublayer of attention compares {pairs} of {every} pairs of tokens."


@torch.no_grad()
def choices(model: nn.Module, ids: Tensor, capacity: float | None = None) -> np.ndarray:
    """(S, T) bool: which tokens of ids[0] each sublayer computes in training."""
    for module in model.modules():
        if isinstance(module, Depth) and capacity is not None:
            module.capacity = capacity
    return torch.stack([report.chosen[0] for report in model.trunk(ids).depth]).cpu().numpy()


def explore_capacity(model: nn.Module, ids: Tensor, words: Sequence[str]) -> None:
    """Who is computed at which capacity, in training mode."""
    model, names = copy.deepcopy(model).train(), depth_names(model)

    def draw(capacity: float) -> tuple[Figure, str, str]:
        return draw_depth(choices(model, ids, capacity), names, words, capacity)

    explore(draw, capacity=Slider("capacity", model.config.mod_capacity_factor, 0.05, 1, 0.05))


def draw_router(differ: float, **logits: float) -> tuple[Figure, str, str]:
    """Loads and probabilities of four experts, K = 2, over 400 tokens whose logits scatter around `logits` by `differ`."""
    n_experts, n_tokens = len(logits), 400
    noise = torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor(list(logits.values())) + differ * noise  # (N, E)
    routing = Routing(torch.full((n_tokens, 2), 0.5), scores.topk(2).indices, scores)
    load, prob = routing.load(), scores.softmax(dim=-1).mean(dim=0)
    balance = load_balancing_loss(routing).item()
    figure = new_figure(8, 3)
    title = f"Balance loss {balance:.2f} (1: even, E/K = {n_experts // 2}: a sure router, always the same experts)"
    axes = new_axes(figure, (0.08, 0.18, 0.7, 0.68), title, "expert", "share")
    places = np.arange(n_experts)
    axes.bar(places - 0.2, load, 0.38, color=style.BLUE)
    axes.bar(places + 0.2, prob, 0.38, color="white", edgecolor=style.VERMILION, hatch="///")
    axes.set(xticks=places, ylim=(0, 0.55), xlim=(-0.6, n_experts - 0.4))
    axes.axhline(1 / n_experts, color=style.GREY, linestyle="--", linewidth=1)
    ends = [
        (0.45, "■ load", style.BLUE),
        (0.4, "▨ mean probability", style.VERMILION),
        (1 / n_experts, "even", style.GREY),
    ]
    label_right(axes, ends)
    alt = f"Balance loss {balance:.2f}. Load {', '.join(f'{v:.2f}' for v in load)}; "
    alt += f"mean probability {', '.join(f'{v:.2f}' for v in prob)}."
    return figure, alt, "The loss multiplies the two bars of each expert: E · Σ load · mean probability."


def explore_router() -> None:
    """Move the experts' logits and how much tokens differ; see the loads and the balance loss."""
    experts = {f"expert_{i}": Slider(f"logit {i}", 0.0, -4, 4, 0.1) for i in range(4)}
    explore(draw_router, differ=Slider("tokens differ by", 1.0, 0, 4, 0.1), **experts)


def show_causality(maps: Mapping[tuple[str, str], Tensor]) -> None:
    """Change of each place's logits (T, T), a row for each changed token, by (model, mode)."""
    models = list(dict.fromkeys(name for name, _ in maps))
    modes = list(dict.fromkeys(mode for _, mode in maps))
    figure = new_figure(10, 4.8)
    for (name, mode), change in maps.items():
        column, row = models.index(name), modes.index(mode)
        box = (0.1 + 0.134 * column, 0.56 - 0.45 * row, 0.112, 0.34)
        axes = new_axes(figure, box, "" if row else name, "logits at place", "" if column else "changed token")
        axes.grid(False)
        values = change.numpy()
        axes.imshow(np.where(values > 0, values, np.nan), cmap="Blues", norm=CHANGES)
        leaks = np.where(np.tril(values, -1) > 0, 1.0, np.nan)
        axes.imshow(leaks, cmap=ListedColormap([style.VERMILION]))
        axes.set(xticks=[0, 10, 20], yticks=[] if column else [0, 10, 20])
        axes.title.set_fontsize(8.5)
        if not column:
            figure.text(0.012, box[1] + 0.17, mode, rotation=90, va="center", fontweight="bold", fontsize=10)
    bar = figure.colorbar(ScalarMappable(CHANGES, "Blues"), cax=figure.add_axes((0.905, 0.2, 0.012, 0.6)))
    bar.set_label("change of a later logit", fontsize=9, color=style.INK)
    bar.ax.tick_params(labelsize=8)
    told = {key: int((change.tril(-1) > 0).sum()) for key, change in maps.items()}
    leaking = [f"{name} in {mode} ({n} cells)" for (name, mode), n in told.items() if n]
    alt = (
        f"{len(maps)} maps of {len(change)} × {len(change)} cells. Vermilion cells, changes before the changed token, "
    )
    alt += f"in: {', '.join(leaking) or 'none'}. All others are white left of the diagonal."
    show(
        figure,
        alt,
        "Row: the token that changes. Column: where logits change. Vermilion: an earlier place hears of it.",
    )


def draw_hearers(words: Sequence[str], maps: Mapping, model: str, mode: str, token: int) -> tuple[Figure, str, str]:
    """Who hears of a changed token: a box for each place."""
    change, per_row = maps[model, mode][token], 12
    n_rows = math.ceil(len(words) / per_row)
    axes = new_axes(
        new_figure(10, 0.6 + 0.62 * n_rows), (0.01, 0.02, 0.98, 0.98 - 0.4 / (0.6 + 0.62 * n_rows)), "", "", ""
    )
    axes.set_title(f"{model}, {mode}: token {token} changes", loc="left", fontsize=10, fontweight="bold")
    axes.axis("off")
    axes.set(xlim=(0, per_row), ylim=(n_rows, 0))
    blues = ScalarMappable(CHANGES, "Blues")
    for place, word in enumerate(words):
        heard, earlier = change[place] > 0, place < token
        colour = style.VERMILION if heard and earlier else blues.to_rgba(change[place]) if heard else "white"
        dark = heard and (earlier or change[place] > 0.1)
        edge, width = (style.INK, 3) if place == token else (style.PALE, 1)
        x, y = place % per_row, place // per_row
        axes.add_patch(axes_box(x, y, colour, edge, width))
        text = f"{place}\n{'× ' if heard and earlier else ''}{shown(word)}"
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color="white" if dark else style.INK)
    before = [place for place in range(token) if change[place] > 0]
    after = [place for place in range(token + 1, len(words)) if change[place] > 0]
    alt = f"{model}, {mode}: token {token} changes; {len(after)} of {len(words) - token - 1} later places hear of it; "
    alt += f"earlier places that do: {', '.join(map(str, before)) or 'none'}."
    return axes.figure, alt, "Blue: logits change (darker: more). White: not at all. Vermilion, ×: an earlier place."


def axes_box(x: float, y: float, colour, edge: str, width: float):
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=colour, edgecolor=edge, linewidth=width)


def explore_causality(words: Sequence[str], maps: Mapping[tuple[str, str], Tensor]) -> None:
    """Click a token and see who hears of its change, in either mode and in any of the models."""

    def draw(model: str, mode: str, token: int) -> tuple[Figure, str, str]:
        return draw_hearers(words, maps, model, mode, token)

    models, modes = (list(dict.fromkeys(names)) for names in zip(*maps, strict=True))
    explore(
        draw,
        model=Choice("model", {name: name for name in models}),
        mode=Choice("mode", {name: name for name in modes}),
        token=Choice("token", {f"{place} {shown(word)}": place for place, word in enumerate(words)}),
    )


def show_memorised(runs: Mapping[tuple[str, int], tuple]) -> None:
    """Runs of (kind, seed): (network, loss before each update, loss afterwards in training mode, and in evaluation)."""
    axes = new_axes(
        new_figure(10, 3.6), (0.07, 0.15, 0.7, 0.75), "One batch, learned by heart", "update", "nats, log scale"
    )
    axes.set_yscale("log")
    kinds = list(dict.fromkeys(kind for kind, _ in runs))
    told = []
    for kind, (colour, line, marker) in zip(kinds, style.SERIES, strict=False):
        mine = [run[1:] for (of, _), run in runs.items() if of == kind]
        for history, _, evaluated in mine:
            axes.plot(range(1, len(history) + 1), history, color=colour, linestyle=line, linewidth=1.2)
            axes.plot(len(history) + 3, evaluated, color=colour, marker=marker, markersize=7, fillstyle="none")
        ends = [f"{training:.2g} and {evaluated:.2g}" for _, training, evaluated in mine]
        told.append(f"{kind[0].upper()}{kind[1:]}, training and evaluation mode at the end: {'; '.join(ends)}")
    legend = [(0.62, "— with MoD", style.SERIES[0][0]), (0.54, "- - without MoD", style.SERIES[1][0])]
    legend += [(0.42, "○ □ evaluation mode,", style.INK), (0.35, "after the last update", style.INK)]
    for y, text, colour in legend:
        axes.text(1.02, y, text, color=style.LETTERS.get(colour, colour), fontsize=9, transform=axes.transAxes)
    alt = f"Six lines fall from {max(run[1][0] for run in runs.values()):.1f}. {'. '.join(told)}."
    show(axes.figure, alt, "Next token's loss on the same 64 tokens, three seeds each; nothing differs but MoD.")
