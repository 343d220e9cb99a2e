"""The ward of notebook 10: what is drawn, what is planted, what a note is worth, and two readers who sit the exam by script."""

import json
from collections import Counter
from pathlib import Path

import pytest
from checks import exercises_10, ward, ward_desk, ward_notes, ward_plans, ward_readers
from helpers import solved

from benchmarks import ward as maker
from benchmarks.ward_measures import MEASURES
from moe_lab.config import ConfigError

COMMITTED = (0, 1)  # 1 was there while the measurements were written; 0 judges
FILES = sorted(ward.COMMITTED.rglob("*.json"))


# ---- the exam --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", COMMITTED)
def test_the_checklist_is_enough_and_the_curve_is_not(seed: int) -> None:
    right, minutes = ward_readers.judged(ward.open_ward(seed), "checklist")
    assert right >= 10 and minutes > 0
    right, minutes = ward_readers.judged(ward.open_ward(seed), "curve")
    assert right <= 4 and minutes == 0


def test_even_labelled_curves_of_another_ward_do_not_replace_a_measurement() -> None:
    opened = [ward.open_ward(seed) for seed in COMMITTED]
    assert all(ward_readers.studied(one, other) <= 6 for one, other in (opened, opened[::-1]))
    assert ward_readers.studied(opened[0], opened[0]) == 12


def test_the_reader_uses_what_the_checklist_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a page of lines without signs it calls every run healthy."""
    blank = {id: line | {"see": []} for id, line in ward.LINES.items()}
    monkeypatch.setattr(ward_readers, "LINES", blank)
    assert ward_readers.judged(ward.open_ward(0), "checklist")[0] == 2


def test_the_dearest_look_is_ordered_only_where_a_line_sends_there() -> None:
    opened = ward.open_ward(0)
    ward_readers.judged(opened, "checklist")
    probed = [run for run, orders in opened.ordered.items() if ward.DEAREST in orders]
    warned = [run for run in opened.patients if "lr_too_low" in opened.patients[run].results["preflight"].rules]
    assert set(warned) <= set(probed) != set(opened.patients)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_every_ward_has_what_it_must(seed: int) -> None:
    plans = ward.draw(seed)
    assert list(plans) == [f"run {n}" for n in range(1, 13)]
    single = Counter(next(iter(plan.causes)) for plan in plans.values() if len(plan.causes) == 1)
    assert all(sum(single[cause] for cause in known) == n for n, known in ward_plans.SOME.items())
    assert sorted(len(plan.causes) for plan in plans.values()) == [1] * 10 + [2] * 2
    assert single["healthy"] == 2
    assert [single[cause] for cause in ("random tokens", "sees the future", "experts collapsed")] == [1, 1, 1]
    kinds = [plan.faults for plan in plans.values() if plan.causes == {"healthy"}]
    assert len(set(kinds)) == 2
    assert all(fault in maker.PLANTS for plan in plans.values() for fault in plan.faults)
    assert plans == ward.draw(seed)


def test_seeds_are_different_wards() -> None:
    first = [ward.draw(seed)["run 1"] for seed in range(30)]
    assert len(set(first)) > 20 and len({plan.causes for plan in first}) > 5


def test_every_variant_can_be_planted_and_is_drawn() -> None:
    variants = {(cause, kind) for cause, known in ward.CAUSES.items() for kind in known.variants}
    drawn = {fault for seed in range(200) for plan in ward.draw(seed).values() for fault in plan.faults}
    assert drawn == variants and drawn <= set(maker.PLANTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_hold_measurements_and_no_label(path) -> None:
    text = path.read_text(encoding="utf-8")
    held = json.loads(text)
    assert set(held) == {"config", "origin", "record", "measured"}
    assert set(held["measured"]) == set(ward.PRICES) == set(MEASURES)
    made = {name: value for name, value in vars(maker).items() if isinstance(value, type)}
    classes = [name for name, value in made.items() if value.__module__ == maker.__name__]
    kinds = [kind for known in ward.CAUSES.values() for kind in known.variants if " " in kind]
    assert not [word for word in (*classes, *kinds, "planted") if word in text]


def test_the_committed_files_are_small_and_whole() -> None:
    assert len(FILES) == 2 * 12 + len(ward.EXAMPLE)
    assert sum(path.stat().st_size for path in FILES) < 2_000_000


# ---- what a note is worth --------------------------------------------------------------------------------------------


@pytest.fixture
def opened() -> ward.Ward:
    return ward.open_ward(1)


def of(opened: ward.Ward, n_causes: int) -> str:
    """A run that is not healthy and has so many causes."""
    return next(run for run, plan in opened.plans.items() if len(plan.causes - {"healthy"}) == n_causes)


def noted(opened: ward.Ward, run: str, causes=None, way=None, evidence=None, cure=None) -> ward.Mark:
    truth = sorted(opened.plans[run].causes)
    way = way or ward.shortest(opened.patients[run], truth)
    for what in way:
        opened.look(run, what)
    cure = cure or [ward.CAUSES[cause].cure for cause in truth]
    opened.diagnose(run, causes or truth, evidence=evidence or way, cure=cure)
    return opened.marks()[run]


@pytest.mark.parametrize("n_causes", [0, 1, 2])
def test_the_shortest_way_to_the_right_answer_is_worth_ten(opened: ward.Ward, n_causes: int, capsys) -> None:
    run = of(opened, n_causes)
    made = noted(opened, run)
    assert made.right and made.points == 10 and opened.minutes(run) == made.par
    opened.score()
    assert f"✓ {run}: 10 points." in capsys.readouterr().out


def test_minutes_evidence_and_cure_cost_points(opened: ward.Ward) -> None:
    run = of(opened, 1)
    everything = list(ward.PRICES)
    assert noted(opened, run, way=everything).points == 5
    assert noted(opened, run, way=everything, cure=ward.OTHER_CURES[0]).points == 4
    cause = next(iter(opened.plans[run].causes))
    blind = next(what for what, found in opened.patients[run].results.items() if not ward.shows(found, cause))
    assert noted(opened, run, way=everything, evidence=[blind]).points == 4


def test_half_an_answer_and_a_false_one(opened: ward.Ward) -> None:
    run = of(opened, 2)
    one = sorted(opened.plans[run].causes)[0]
    half = noted(opened, run, causes=[one])
    assert (half.right, half.points) == (False, 3.0) and half.why.startswith("One of two: ")
    lines = [ward.LINES[id] for cause in opened.plans[run].causes for id in ward.CAUSES[cause].lines]
    assert any(f"shows {line['id']}: {line['sign']}" in half.why for line in lines)
    false = noted(opened, run, causes=[one, "warm-up off by one"])
    assert (false.right, false.points) == (False, 0.0) and false.why.startswith("No: ")
    assert not noted(opened, of(opened, 0), causes=["learning rate too low"]).right


def test_an_order_is_paid_for_once_and_mistakes_are_told(opened: ward.Ward) -> None:
    for _ in range(2):
        opened.look("run 1", "tokens")
    assert opened.minutes() == ward.PRICES["tokens"][0]
    for words, mistake in {
        "did you mean run 1": lambda: opened.look("run1", "tokens"),
        "did you mean tokens": lambda: opened.look("run 1", "token"),
        "watch was not ordered": lambda: opened.diagnose("run 1", "healthy", "watch", "leave it as it is"),
        "name a cause": lambda: opened.diagnose("run 1", [], [], []),
        "make ward SEED=": lambda: ward.open_ward(987654),
    }.items():
        with pytest.raises(ConfigError, match=words):
            mistake()


def test_every_line_of_the_checklist_is_backed_by_a_bug() -> None:
    """One of the case, or one that can be planted."""
    planted = {line for cause, _ in maker.PLANTS for line in ward.CAUSES[cause].lines}
    assert [id for id, line in ward.LINES.items() if not line["bugs"] and id not in planted] == []


@pytest.fixture
def person(monkeypatch, tmp_path) -> Path:
    """Somebody sits at the desk, whose notes are kept in this folder."""
    monkeypatch.setattr(ward_notes, "NOTES", tmp_path / "ward")
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    return tmp_path / "ward"


def test_a_reader_by_script_leaves_a_persons_notes_alone(person: Path, capsys) -> None:
    ward.open_ward(1).look("run 1", "tokens")
    before = (person / "notes_1.json").read_text()
    ward_readers.judged(ward.open_ward(1, kept=False), "checklist")
    assert (person / "notes_1.json").read_text() == before and "going on" not in capsys.readouterr().out


def test_every_planted_cause_is_shown_by_what_was_measured() -> None:
    """Of the committed runs: the shortest way exists for each cause. A run for which it does not is no fair question."""
    for seed in COMMITTED:
        opened = ward.open_ward(seed)
        for run, plan in opened.plans.items():
            for cause in plan.causes - {"healthy"}:
                assert ward.shortest(opened.patients[run], [cause]), (seed, run, cause)


# ---- the desk and the exercises --------------------------------------------------------------------------------------


def test_buttons_do_what_calls_do(opened: ward.Ward) -> None:
    run, orders, _, notes = ward_desk.desk(opened).children
    run.value = "run 2"
    press = {button.description.split(" · ")[0]: button for button in orders.children}
    press["tokens"].click()
    assert opened.ordered == {"run 2": ["tokens"]}
    assert [press[what].description for what in ("tokens", "floors")] == ["tokens · paid", "floors · 1 min"]
    cause, _, evidence, _, cure, _, last = notes.children
    cause.value, evidence.value, cure.value = "random tokens", ("tokens",), "mend the loader, and let it raise"
    last.children[0].click()
    assert opened.notes["run 2"].causes == {"random tokens"}
    run.value = "run 3"
    assert press["tokens"].description == "tokens · 1 min"
    assert (cause.value, evidence.value, cure.value) == (ward_desk.NONE, (), ward_desk.NONE)
    assert ward_desk.so_far(opened, "run 3") == "run 3: nothing is ordered; nothing is written down"
    told = "run 2: 1 min so far, for tokens; written down: random tokens; tokens; mend the loader, and let it raise"
    assert ward_desk.so_far(opened, "run 2") == told
    run.value = "run 2"
    assert (cause.value, evidence.value, cure.value) == (
        "random tokens",
        ("tokens",),
        "mend the loader, and let it raise",
    )


def test_a_look_is_paid_for_once_and_a_note_says_what_it_lacks(opened: ward.Ward, capsys) -> None:
    for _ in range(2):
        opened.order("run 2", "tokens")
    opened.diagnose("run 2", "random tokens", (), ())
    opened.diagnose("run 2", "healthy", (), "leave it as it is")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run 2")]
    assert told == [
        "run 2, tokens: 1 min, 1 min on this run so far",
        "run 2, tokens: paid already, 1 min on this run so far",
        "run 2: random tokens; 1 minutes; no evidence yet; no cure yet",
        "run 2: healthy; 1 minutes",
    ]


def test_an_exam_goes_on_in_another_kernel(person: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ward.open_ward(1)
    noted(first, of(first, 2))
    first.look("run 1", "tokens")
    capsys.readouterr()
    again = ward.open_ward(1)
    assert (again.notes, again.ordered, again.marks()) == (first.notes, first.ordered, first.marks())
    assert capsys.readouterr().out.startswith(f"going on with 1 diagnoses and {first.minutes()} minutes")
    assert not ward.open_ward(0).ordered
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    assert not ward.open_ward(1).ordered


def test_without_a_person_the_desk_prints_the_calls(opened: ward.Ward, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    ward_desk.show_desk(opened)
    opened.score()
    printed = capsys.readouterr().out
    assert "ward.order(" in printed and "branch_probe" in printed and "nothing is written down yet" in printed


def test_a_patient_is_named_by_a_watch_and_not_otherwise(capsys) -> None:
    rule = solved("10")["rule"]
    assert exercises_10.check_patient(rule, 3)
    for wrong in ("lr_too_low", "weight_decay_on_norms", "no such rule", 7):
        assert not exercises_10.check_patient(wrong, 3)
    assert {exercises_10.drawn(seed) for seed in range(40)} == set(exercises_10.PLANTED)


def test_a_config_is_mended_by_its_rates_alone() -> None:
    starved, mended = exercises_10.starved_config(), solved("10")["mended"]
    assert exercises_10.check_mended(mended)
    for wrong in (starved, mended.with_(model={"mod_enabled": False}), starved.with_(training={"max_lr": 0.001})):
        assert not exercises_10.check_mended(wrong)
