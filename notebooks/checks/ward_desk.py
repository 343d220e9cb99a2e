"""The desk of the ward: the same calls as buttons, where somebody can press them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from checks.ward import CAUSES, PRICES, Note, Ward, all_cures
from moe_lab.sections import ConfigError
from moe_lab.show.front import is_interactive

NONE = "–"


def show_desk(ward: Ward) -> None:
    """Buttons that order and notes that are written down; where nobody can press, the calls that do the same."""
    for what, (minutes, does) in PRICES.items():
        print(textwrap.fill(f"{what:13} {minutes:2} min  {does}", 98, subsequent_indent=" " * 22))
    if not is_interactive():
        print(
            'ward.order("run 1", "preflight")   ward.config("run 1")   ward.diagnose("run 1", causes, evidence, cure)'
        )
        return
    from IPython.display import display

    display(desk(ward))


def desk(ward: Ward):
    """The widgets: a run, a button for each measurement, what it says, and the note."""
    import ipywidgets as w

    wide = w.Layout(width="34em")
    style = {"description_width": "6em"}
    run = w.Dropdown(options=list(ward.patients), description="run", layout=wide, style=style)
    # a long config pushes no note away; the second one keeps a reading to compare with
    says, kept = (w.Output(layout=w.Layout(max_height="26em", overflow="auto", flex="1 1 62em")) for _ in range(2))
    causes = [choice(w, name, [*sorted(CAUSES)], wide, style) for name in ("cause", "2nd cause")]
    cures = [choice(w, name, [*sorted(all_cures())], wide, style) for name in ("cure", "2nd cure")]
    evidence = w.SelectMultiple(
        options=list(PRICES), description="evidence", rows=len(PRICES), layout=wide, style=style
    )

    def button(label: str, does: Callable[[], None], hint: str) -> w.Button:
        made = w.Button(description=label, tooltip=hint, layout=w.Layout(width="auto"))
        made.on_click(lambda _: (tell(says, does), label_paid()))
        return made

    def label_paid() -> None:
        """What was ordered of this run can be read again for nothing, and says so."""
        for made, (what, (minutes, _)) in zip(orders, PRICES.items(), strict=True):
            made.description = f"{what} · {'paid' if what in ward.ordered.get(run.value, ()) else f'{minutes} min'}"

    orders = [
        button(f"{what} · {minutes} min", lambda what=what: ward.order(run.value, what), does)
        for what, (minutes, does) in PRICES.items()
    ]
    config = button("config · free", lambda: ward.config(run.value), "the file that the run was started with")
    keep = w.Button(
        description="keep this reading in view", tooltip="until this is pressed again", layout=config.layout
    )
    kept.layout.display = "none"  # until then the other one has the whole width

    def keep_it(_: object) -> None:
        kept.outputs, kept.layout.display = says.outputs, None

    keep.on_click(keep_it)

    def note() -> None:
        values = [[one.value for one in both if one.value != NONE] for both in (causes, cures)]
        ward.diagnose(run.value, values[0], evidence.value, values[1])

    write = button("write it down", note, "cause, evidence and cure of this run")
    score = button("score", ward.score, "what is written down so far; it tells the answers of those runs")
    several = w.HTML("<i>evidence: Ctrl or ⌘ and a click takes several</i>")
    notes = w.VBox([*causes, evidence, several, *cures, w.HBox([write, score])])

    def begin(_: object) -> None:
        """Another run: its note, and what was ordered and written down of it so far."""
        noted = ward.notes.get(run.value, Note(frozenset(), (), frozenset()))
        for both, names in ((causes, noted.causes), (cures, noted.cures)):
            for one, name in zip(both, [*sorted(names), NONE, NONE], strict=False):
                one.value = name
        evidence.value = noted.evidence
        label_paid()
        tell(says, lambda: print(so_far(ward, run.value)))

    begin(None)
    run.observe(begin, "value")
    wrapped = w.Layout(flex_flow="row wrap")
    return w.VBox([run, w.HBox([config, *orders, keep], layout=wrapped), w.HBox([says, kept], layout=wrapped), notes])


def so_far(ward: Ward, run: str) -> str:
    ordered, note = ward.ordered.get(run, ()), ward.notes.get(run)
    parts = (sorted(note.causes), note.evidence, sorted(note.cures)) if note else ()
    written = (
        f"written down: {'; '.join(', '.join(part) or NONE for part in parts)}" if note else "nothing is written down"
    )
    spent = f"{ward.minutes(run)} min so far, for {', '.join(ordered)}" if ordered else "nothing is ordered"
    return f"{run}: {spent}; {written}"


def choice(w, name: str, options: list[str], layout, style):
    return w.Dropdown(options=[NONE, *options], description=name, layout=layout, style=style)


def tell(says, does: Callable[[], None]) -> None:
    """Do it, with what it prints and shows below the buttons; an error is one line."""
    says.clear_output(wait=True)
    with says:
        try:
            does()
        except ConfigError as error:
            print(error)
