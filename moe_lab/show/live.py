"""A training run that you watch and steer from a notebook.

    run = LiveRun(trainer, watch=watch).start()   # the cell under which the controls and the figure stand
    summary = await run.finished()                # a later cell; buttons work meanwhile (ipykernel >= 7.4)
    run.show()                                    # anywhere: the same once more, after a reload of the page for instance

The trainer runs in a worker thread, and buttons only set its locked controls. Headless there are no widgets, one figure
at the end, and a line for each tenth of the run and each finding; in a plain script those lines alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moe_lab.health.during.watch import Watch
from moe_lab.health.measures import share_of
from moe_lab.show.dashboard import RED, Live
from moe_lab.show.plots import Mark, next_token_weight, training_figure
from moe_lab.show.style import GREY, INK, VERMILION
from moe_lab.train.record import read_jsonl, read_record


def observing(watch: Watch, every: int, last: int) -> Callable[[dict], None]:
    """A listener that hands the losses over at multiples of `every` steps and at the last one, however often somebody looks:
    so that a watch finds the same at the same step."""
    losses: list[float] = []

    def listen(row: dict) -> None:
        if "loss" not in row:
            return
        losses.append(row["loss"])
        if row["step"] % every == 0 or row["step"] == last:
            for loss in losses:
                watch.observe(loss=loss)
            losses.clear()

    return listen


class LiveRun(Live):
    """Runs `trainer.fit()` in a thread, shows it, and hands its summary to the cell that waits.

    `floors` are lines for the loss panel (nats per token by name; None: the trainer's). A `watch` is told the losses,
    and what it finds is shown. `acts` are buttons, functions of this run that are called between two updates and
    written to controls.jsonl; headless they come when `trainer.controls.scheduled` says so. `rows` are the record's.
    """

    caption = "Look first for what does not move, then for a loss that stays above the unigram table."

    def __init__(
        self,
        trainer: Any,
        floors: Mapping[str, float] | None = None,
        watch: Watch | None = None,
        acts: Mapping[str, Callable[["LiveRun"], None]] | None = None,
    ):
        super().__init__([trainer], {"": watch} if watch else {}, acts)
        self.trainer, self.floors = trainer, floors or trainer.floors
        self.rows: list[dict[str, Any]] = []
        trainer.controls.acts |= {name: lambda act=act: act(self) for name, act in self.acts.items()}

    def start(self) -> "LiveRun":
        self.rows += [row for row in read_record(self.trainer.run_dir) if row["step"] <= self.trainer.step]
        self.trainer.listeners.append(self.rows.append)
        for name, watch in self.watches.items():
            self.add_watch(name, watch)
        return super().start()

    def add_watch(self, name: str, watch: Watch) -> None:
        """Tell it the losses from here on, and show what it finds, under this name."""
        self.watches[name] = watch
        self.trainer.listeners.append(observing(watch, self.trainer.config.training.log_interval, self.trainer.n_steps))

    def work(self) -> dict[str, Any]:
        return self.trainer.fit()

    def figure(self) -> tuple[Figure, str]:
        arrived = arrived_of(self.watches[""]) if self.watches else {}
        return training_figure(list(self.rows), self.floors, self.trainer.config, self.marks(), arrived)

    def marks(self) -> list[Mark]:
        """What happened at which step: LR changes and other acts, checkpoints that are there, findings."""
        actions = read_jsonl(Path(self.trainer.run_dir) / "controls.jsonl")
        marks = [(row["step"], f"LR × {row['value']:.3g}", INK) for row in actions if row["action"] == "lr_scale"]
        marks += [(row["step"], row["action"], VERMILION) for row in actions if row["action"] in self.acts]
        saved = sorted(Path(self.trainer.run_dir).glob("checkpoints/step_*.pt"))
        marks += [(int(path.stem.removeprefix("step_")), "saved", GREY) for path in saved]
        return marks + [mark for watch in self.watches.values() for mark in found_by(watch)]

    def status(self) -> str:
        """One line: state, progress, the last batch's loss, speed, time left, the first group's learning rate, the last checkpoint."""
        controls, n_steps, step = self.trainer.controls, self.trainer.n_steps, self.trainer.step
        text = f"{self.state()} · step {step}/{n_steps}"
        if row := last_with_loss(self.rows):
            text += f" · last batch {loss_of(row, self.trainer.config):.3f}"
            speed = row.get("tokens_per_s")
            if speed and not self.training.done():
                left_s = row["tokens"] * (n_steps - step) / row["step"] / speed
                text += f" · {speed:,.0f} tokens/s{left(left_s)}"
            text += "".join(f" · LR of {name} {lr:.3g}" for name, lr in [*row.get("lr", {}).items()][:1])
        text += "" if controls.lr_scale == 1 else f" · LR × {controls.lr_scale:.3g}"
        return f"{text} · saved {controls.saved}" if controls.saved else text


def left(seconds: float) -> str:
    return f" · {seconds // 60:.0f} min {seconds % 60:02.0f} s left"


def last_with_loss(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if "losses" in row), None)


def loss_of(row: Mapping[str, Any], config: Any) -> float:
    """The next token's, nats per token."""
    return row["losses"]["next_token"] / next_token_weight(config)


def found_by(watch: Watch) -> list[Mark]:
    """Errors and warnings, each once, with its first step."""
    found = [finding for finding in list(watch.findings) if finding.severity != "info" and finding.step]
    first = {f"{finding.severity}: {finding.rule}": finding.step for finding in reversed(found)}
    return [(step, words, RED) for words, step in first.items()]


def arrived_of(watch: Watch) -> dict[str, float]:
    """Share of the intended updates that 16-bit weights have taken since the watch's window began; empty without such weights."""
    narrow = [tracked for tracked in list(watch.readings) if tracked.is_narrow]
    kinds = {"the norms'": [t for t in narrow if t.name.endswith("norm.weight")], "all": narrow}
    return {name: share.rho for name, some in kinds.items() if (share := share_of(some))}
