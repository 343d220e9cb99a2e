"""The case as data: its figures must agree with each other, and with the config that the repository keeps of it."""

import re

import pytest
import yaml
from helpers import refused

from moe_lab.config import ROOT, ConfigError, load_config
from moe_lab.course import case


def test_every_claim_and_bug_has_its_sentence() -> None:
    claims, bugs = list(case.case()["claims"]), list(case.case()["bugs"])
    assert claims == [f"C{n:02d}" for n in range(1, 22)]
    assert bugs == [f"B{n:02d}" for n in range(1, 27)]
    texts = [case.claim(id).sentence for id in claims]
    for id in bugs:
        texts += [case.bug(id).sentence, case.bug(id).symptom]
    assert all(type(text) is str and text == text.strip() and len(text) > 15 and "\n" not in text for text in texts)
    assert len(set(texts)) == len(texts)
    assert "0.004 at step 411" in case.claim("C05").sentence
    assert [id for id in bugs if case.bug(id).ran] == [
        "B03",
        "B04",
        "B05",
        "B06",
        "B08",
        "B11",
        "B12",
        "B17",
        "B18",
        "B20",
        "B24",
    ]


@pytest.mark.parametrize(
    ("call", "id", "message"),
    [
        (case.claim, "C5", "'C5' is no claim of the case; did you mean C05?"),
        (case.claim, "c05", "'c05' is no claim of the case; did you mean C05?"),
        (case.claim, "C22", "'C22' is no claim of the case; did you mean C21?"),
        (case.claim, "B01", "'B01' is no claim of the case; did you mean C01?"),
        (case.bug, "B27", "'B27' is no bug of the case; did you mean B26?"),
        (case.observed_run, "frist", "'frist' is no run of the case; did you mean first?"),
        (case.observed_run, "third", "'third' is no run of the case; known are first, second"),
        (case.facts, "sibling", "'sibling' is no group of facts of the case; did you mean sibling_3b?"),
        (case.facts, "zzz", "known are training_1.5b, sibling_3b, training, optimizer, report"),
        (case.claim, 5, "5 is no claim of the case; did you mean C05?"),
    ],
)
def test_an_unknown_id_is_one_line_with_the_nearest(call, id, message) -> None:
    with refused(ConfigError, match=re.escape(message)):
        call(id)


def test_the_observed_runs_add_up() -> None:
    first, second = case.observed_run("first"), case.observed_run("second")
    sibling, training = case.facts("sibling_3b"), case.facts("training")
    assert first.steps * training["batch_size"] * sibling["seq_len"] == first.tokens == 1_544_192
    for run in (first, second):
        assert run.updates == run.steps // training["gradient_accumulation_steps"]
        assert run.adamw_lr == pytest.approx(case.facts("optimizer")["adamw_lr_ratio"] * run.muon_lr, rel=1e-12)
    assert (first.parameters, first.norm_deviation) == ("bfloat16", 0.0)
    assert (second.parameters, second.norm_deviation, second.tokens) == ("float32", 0.004, None)


def test_the_siblings_tensors_add_up() -> None:
    sibling = case.facts(case.observed_run("first").checkpoint_of)
    assert sibling["n_muon"] + sibling["n_adamw"] == sibling["n_tensors"]
    assert sibling["n_norms"] == 2 * sibling["n_layers"] + 1  # two in a layer and the last one
    assert round(100 * sibling["n_norms"] / sibling["n_tensors"]) == 6  # "6 % of the tensors, 0.003 % of the elements"
    assert round(100 * sibling["n_norms"] * sibling["d_model"] / sibling["parameters"], 3) == 0.003


def test_the_models_figures_are_those_of_the_config_file() -> None:
    config = load_config(ROOT / "configs" / "training_1.5b.yaml")
    figures = dict(case.facts("training_1.5b"))
    assert round(figures.pop("parameters"), -7) == 1_490_000_000
    assert figures.pop("head_dim") == config.model.d_model // config.model.n_heads
    groups = {"model": figures} | {name: case.facts(name) for name in ("training", "optimizer")}
    for section, group in groups.items():
        for key, value in group.items():
            theirs = getattr(getattr(config, section), key)
            assert value == (list(theirs) if isinstance(theirs, tuple) else theirs), key


def test_every_number_of_the_file_is_a_number() -> None:
    """YAML reads 1e-3 as a text."""

    def leaves(node):
        if isinstance(node, (dict, list)):
            return [leaf for inner in (node.values() if isinstance(node, dict) else node) for leaf in leaves(inner)]
        return [node]

    stored = yaml.safe_load(case.CASE.read_text(encoding="utf-8"))
    assert all(type(leaf) in (int, float) for leaf in leaves(stored["facts"]))
    texts = {leaf for leaf in leaves(stored["runs"]) if isinstance(leaf, str)}
    assert texts == {"bfloat16", "float32", "sibling_3b"}


def test_facts_cannot_be_changed_by_a_reader() -> None:
    with pytest.raises(TypeError):
        case.facts("training")["warmup_steps"] = 0
    assert case.facts("training")["warmup_steps"] == 100


def test_the_file_is_installed_with_the_package() -> None:
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert case.CASE.name in setup["package-data"]["moe_lab.course"]
