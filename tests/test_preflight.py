"""What a config says before training: the case and the healthy profiles, comments, other projects' keys, bad files."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import CONFIGS

from moe_lab import load_config
from moe_lab.__main__ import HEALTH_SCHEMA, preflight_of
from moe_lab.config import Config, to_dict
from moe_lab.health.before.plan import Plan
from moe_lab.health.before.preflight import SAMPLE, entries_of_mapping, preflight, read_entries
from moe_lab.health.conventions import usual_adamw_lr
from moe_lab.model.count import count_parameters

CASE = CONFIGS / "training_1.5b_as_reported.yaml"
ALL = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def rules(findings: list, *severities: str) -> list[str]:
    return [f.rule for f in findings if f.severity in (severities or ("error", "warning"))]


# ---- the configs of this package -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "lab", "gpu", "training_1.5b"])
def test_a_healthy_profile_is_left_in_peace(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert preflight(path) == preflight(str(path)) == preflight(to_dict(load_config(path))) == []


def test_the_case_is_named_with_its_line_and_its_comment() -> None:
    findings = preflight(CASE)
    assert rules(findings) == ["bf16_parameters", "muon_convention", "lr_too_low"]
    assert findings[0].severity == "error"
    assert all("\n" not in f.message + f.advice for f in findings)
    lines = CASE.read_text().splitlines()
    of_format, *of_rates = [lines[int(f.where.removeprefix(f"{CASE}:")) - 1] for f in findings]
    assert of_format == "  parameters: bfloat16"
    assert [line.startswith("  max_lr: 0.0003") for line in of_rates] == [True, True]
    assert all("`max_lr: 0.0003 # Lower for AdamW (use 0.001 for Muon)`" in f.message for f in findings[1:])
    without_lines = [(f.rule, f.where) for f in preflight(to_dict(load_config(CASE)))]
    assert without_lines == [("bf16_parameters", "precision.parameters"), ("muon_convention", "training.max_lr")]


def estimate(config: Config) -> float:
    return Plan(entries_of_mapping(to_dict(config))).n_parameters()


# of the lab's mechanisms the general transformer has experts; without the others the counts agree
PLAIN = ["model.mod_enabled=false", "model.mamba_enabled=false", "model.mamba_layers=[]", "model.moe_router_hidden=0"]
PLAIN += ["model.n_pred_tokens=1", "model.aux_loss_weights=[1.0]"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("experts", [True, False])
def test_the_parameter_count_is_nearly_that_of_the_model(name: str, experts: bool) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", PLAIN + ([] if experts else ["model.moe_layers=[]"]))
    assert estimate(config) == pytest.approx(count_parameters(config.model).total, rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_from_the_sizes_alone_the_usual_learning_rate_is_nearly_right(name: str) -> None:
    """MoD, Mamba and more heads are not in the formula; the usual LR goes with the count to the power -0.3."""
    config = load_config(CONFIGS / f"{name}.yaml")
    exact = usual_adamw_lr(count_parameters(config.model).total)
    assert usual_adamw_lr(estimate(config)) == pytest.approx(exact, rel=0.15)


def test_experts_are_in_every_layer_unless_a_list_says_where() -> None:
    """Mixtral-like: transformers' own names."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 16, "vocab_size": 10, "num_local_experts": 3, "tie_word_embeddings": True}
    attention, feed_forward = 8 * 8 + 2 * 8 * 4 + 8 * 8, 3 * 8 * 16

    for change, expected in (
        ({}, 4 * (attention + 3 * feed_forward) + 80),
        ({"moe_layers": [1]}, 4 * attention + 6 * feed_forward + 80),
        ({"tie_word_embeddings": False}, 4 * (attention + 3 * feed_forward) + 160),
    ):
        assert Plan(entries_of_mapping(sizes | change)).n_parameters() == expected


def test_the_size_that_is_handed_in_counts() -> None:
    config = {"d_model": 64, "n_layers": 2, "learning_rate": 1e-9, "optimizer": "adamw"}
    (finding,) = preflight(config, n_parameters=1.3e9)
    assert "a transformer of 1.3e+09 parameters usually starts at about 0.0002" in finding.message
    assert preflight({"learning_rate": 1e-9, "optimizer": "adamw"}, n_parameters=1.3e9)[0].severity == "warning"


@pytest.mark.parametrize("name", ALL)
def test_the_command_hands_in_what_the_lab_knows(name: str) -> None:
    alone, told = preflight(CONFIGS / f"{name}.yaml"), preflight_of(str(CONFIGS / f"{name}.yaml"))
    assert [(f.rule, f.severity, f.where) for f in told] == [(f.rule, f.severity, f.where) for f in alone]
    exact = f"a transformer of {count_parameters(load_config(CONFIGS / f'{name}.yaml').model).total:.2g} parameters"
    assert all(exact in f.message for f in told if f.rule == "muon_convention")


def test_a_schema_names_a_projects_own_keys() -> None:
    config = {"width": 768, "depth": 12, "vocab": 50257, "peak_lr": 6e-6, "optimizer": "adamw"}
    assert rules(preflight(config)) == [] and rules(preflight(config), "info") == ["lr_too_low"]  # not judged
    names = {"d_model": ["width"], "n_layers": ["depth"], "vocab_size": ["vocab"]}
    assert rules(preflight(config, schema={"aliases": names})) == ["lr_too_low"]
    assert rules(preflight(config, schema={"dead_keys": {"depth": "layers"}})) == ["unread_key"]
    with pytest.raises(ValueError, match=r"^schema has names; it takes aliases, sections, dead_keys$"):
        preflight(config, schema={"names": names})


def test_the_labs_schema_is_of_the_labs_keys() -> None:
    values = to_dict(load_config(CONFIGS / "lab.yaml"))
    assert set(HEALTH_SCHEMA["sections"]) == set(values)
    instead = {name for text in HEALTH_SCHEMA["dead_keys"].values() for name in text.split(" and ")}
    known = {f"{section}.{key}" for section, keys in values.items() for key in keys}
    assert instead <= known and not known & set(HEALTH_SCHEMA["dead_keys"])


# ---- bf16 parameters -------------------------------------------------------------------------------------------------


def test_the_predicted_share_of_lost_updates_is_the_closed_form() -> None:
    """Σ over binades of P(weight there) · P(update under half its spacing), both normal."""
    step, std = 3e-4 / math.sqrt(1536), 0.02

    def below(x: float, deviation: float) -> float:
        return math.erf(x / deviation / math.sqrt(2))

    share = sum((below(2.0 ** (e + 1), std) - below(2.0**e, std)) * below(2.0 ** (e - 8), step) for e in range(-40, 0))
    message = next(f.message for f in preflight(CASE) if f.rule == "bf16_parameters")
    predicted = int(re.search(r"lose (\d+)% of their updates", message).group(1)) / 100
    assert predicted == pytest.approx(share, abs=0.005 + 3 * math.sqrt(share * (1 - share) / SAMPLE))
    assert "a norm weight at 1.0 loses every update (at most 1.0e-04" in message


@pytest.mark.parametrize(
    ("lr", "expected", "moves"),
    [(1e-3, "loses every update", (False, False)), (3e-3, "can only shrink", (True, False)), (1e-2, "", (True, True))],
)
def test_what_becomes_of_norms_depends_on_adamws_lr(lr: float, expected: str, moves: tuple[bool, bool]) -> None:
    config = {"precision": {"parameters": "bfloat16"}, "training": {"max_lr": lr}, "optimizer": {"type": "adamw"}}
    message = preflight(config)[0].message
    assert ("a norm weight" in message) == bool(expected) and expected in message
    largest = torch.tensor(1.1649647 * lr)  # the largest step that AdamW can make, down and up from a real weight of 1
    assert tuple(bool((1 + step).bfloat16() != 1) for step in (-largest, largest)) == moves


BF16 = {"param_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"precision": {"parameters": "bf16"}}, ["error"]),
        ({"precision": {"parameters": "float32", "compute": "bfloat16"}}, []),
        ({"dtype": "bfloat16"}, []),  # nanoGPT's key for autocast
        ({"bf16": True}, []),  # autocast of transformers' Trainer
        ({"model": {"torch_dtype": "torch.bfloat16"}}, ["warning"]),
        *((BF16 | {key: True}, []) for key in ("master_weights", "kahan_sum", "use_stochastic_rounding")),
        (BF16 | {"kahan_sum": False}, ["warning"]),
        (BF16 | {"remedy": "none"}, ["warning"]),
    ],
)
def test_where_parameters_are_16_bits(config: dict, expected: list[str]) -> None:
    assert [f.severity for f in preflight(config) if f.rule == "bf16_parameters"] == expected


# ---- other projects, schedules, dead keys ----------------------------------------------------------------------------

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**GPT2, "learning_rate": 6e-4, "beta1": 0.9, "min_lr": 6e-5}, []),  # nanoGPT
        ({**GPT2, "learning_rate": "6e-4", "optimizer": "adamw"}, []),  # YAML reads it as text
        ({**GPT2, "learning_rate": 6e-6, "optimizer": "adamw"}, ["lr_too_low"]),
        ({**GPT2, "learning_rate": 6e-6, "optimizer": "adamw", "init_from": "gpt2"}, []),  # fine-tuning
        ({**GPT2, "learning_rate": 6e-6, "optimizer": "adamw", "init_from": "scratch"}, ["lr_too_low"]),
        ({**GPT2, "learning_rate": 0.1, "optimizer": "sgd"}, []),
        ({**GPT2, "learning_rate": 0.1}, []),
        ({**GPT2, "optimizer": {"name": "torch.optim.AdamW", "lr": 0.1}}, ["lr_too_high"]),
        ({**GPT2, "optim": [{"muon_lr": 0.02}, {"adam_lr": 3e-4}]}, []),
        ({**GPT2, "muon_lr": 3e-4, "adam_lr": 3e-4}, ["muon_convention"]),
        ({**GPT2, "muon_lr": 3e-4, "adam_lr": 3e-4, "adjust_lr_fn": "match_rms_adamw"}, []),
        ({**GPT2, "matrix_lr": 0.02, "embedding_lr": 0.3, "optimizer": "muon"}, []),
        ({"depth": 20, "lr": 1e-9, "optimizer": "adamw"}, []),  # no transformer: not judged
        ({"training": None, "model": [1, 2], "lr": "fast", "n_layers": "many", "d_model": -3}, []),
        ({}, []),
    ],
)
def test_other_projects(config: dict, expected: list) -> None:
    assert rules(preflight(config)) == expected


def test_dead_keys_of_the_case(tmp_path: Path) -> None:
    values = yaml.safe_load((CONFIGS / "lab.yaml").read_text())
    values["training"]["weight_decay"] = 0.1
    values["optimizer"]["newton_iters"] = 5
    values["model"]["moe"] = {"capacity_factor": 1.25}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    found = preflight(values, schema=HEALTH_SCHEMA)
    assert [f.where for f in found] == ["model.moe.capacity_factor", "training.weight_decay", "optimizer.newton_iters"]
    assert {(f.rule, f.severity) for f in found} == {("unread_key", "warning")}
    assert "optimizer.ns_steps" in found[2].advice
    assert {f.message for f in preflight_of(str(path))} == {f.message for f in found}
    values["extra"] = {"another": "project"}  # which may read other keys than this one's
    found = preflight(values, schema=HEALTH_SCHEMA)
    assert [f.rule for f in found] == ["unread_key"] * 3
    assert "unless the code is another's, as extra may say" in found[2].message and "may not be" in found[2].advice
    assert not any(f.advice.startswith("set ") for f in found)
    assert preflight({"training": values["training"], "extra": {}}, schema=HEALTH_SCHEMA) == []  # mostly another's


@pytest.mark.parametrize(("n", "is_known"), [(1e6, False), (124e6, False), (125e6, True), (175e9, True), (1e12, False)])
def test_beyond_its_table_the_usual_learning_rate_is_no_fact(n: float, is_known: bool) -> None:
    (finding,) = preflight({"learning_rate": 1e-9, "optimizer": "adamw"}, n_parameters=n)
    assert ("usually starts at" in finding.message) == is_known
    assert ("a table of 1.25e+08 to 1.75e+11, continued, gives" in finding.message) == (not is_known)


# ---- schedules -------------------------------------------------------------------------------------------------------

TOKENS = {
    "total_tokens": 10_000 * 4 * 512 * 8,
    "seq_len": 512,
    "batch_size": 8,
    "grad_accum_steps": 4,
}  # 10,000 updates


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_steps": 1000, "warmup_steps": 1000}, "the peak LR is never reached"),
        (
            {"max_iters": 5000, "lr_decay_iters": 20000, "grad_accum_steps": 4},
            "0.25 of the way down; they are apart by",
        ),
        ({"max_iters": 5000, "lr_decay_iters": 1250}, "at its end after 0.25 of the run"),
        ({"max_steps": 200, "logging_steps": 500}, "logging_steps: 500 is beyond the 200 steps planned"),
        ({**TOKENS, "max_steps": 40_000}, "40000 steps are micro-batches by total_tokens: 10000 updates"),
        (
            {**TOKENS, "max_steps": 40_000, "log_interval": 10, "save_interval": 25},
            "`(step + 1) % 4 == 0`, log_interval never",
        ),
        ({"epochs": 10, "schedule": {"warmup_epochs": 12}}, "warm-up of 12 epochs is not over within the 10 planned"),
        ({"max_steps": 100, "learning_rate": 3e-4, "min_lr": 3e-3}, "ends at 0.003, above the 0.0003"),
        ({"lr": 3e-4, "min_lr_ratio": 10}, "min_lr_ratio: the LR ends at 10, above the 1"),
        # healthy look-alikes
        ({"lr": {"muon_lr": 0.02, "adam_lr": 3e-4}, "eta_min": 3e-4, "min_lr_ratio": 0.1}, None),
        ({"min_lr": 0.1, "final_lr": 0.1}, None),
        ({"num_epochs": 90, "warmup_epochs": 5, "decay_epochs": 30, "steps": 4}, None),  # of steps none is a warm-up
        ({"epochs": 0, "warmup_epochs": 5}, None),  # until somebody stops it
        ({**TOKENS, "max_steps": 10_000, "log_interval": 10, "eval_steps": 1000, "warmup_steps": 100}, None),
        ({"max_iters": 600_000, "lr_decay_iters": 600_000, "warmup_iters": 2000, "grad_accum_steps": 40}, None),
        ({"max_iters": 5000, "lr_decay_iters": 4000, "log_interval": 10}, None),  # a tail at the least LR
        ({"max_steps": -1, "warmup_steps": 500, "logging_steps": 500, "save_steps": 500}, None),  # epochs decide
        ({"max_steps": 100, "warmup_steps": 0, "eval_steps": 500, "save_steps": 500, "logging_steps": 10}, None),
        ({"steps": 1000, "decay_steps": None, "warmup_steps": 0.1}, None),
        ({"max_steps": 5000, "warmup_ratio": 100}, "the warm-up of 100 runs is not over within the 1 planned"),
        ({"max_steps": 5000, "warmup_ratio": 0.1}, None),
        ({"max_steps": 2000, "scheduler": {"params": {"warmup_num_steps": 20, "total_num_steps": 250}}}, "250"),
        ({"max_steps": 2000, "scheduler": {"params": {"warmup_num_steps": 20, "total_num_steps": 2000}}}, None),
        ({"epochs": 100, "scheduler": {"T_max": 50}}, "by epoch 50 of 100 at the latest, and rises again"),
        ({"epochs": 100, "warmup_epochs": 10, "T_max": 90}, None),
        ({"epochs": 10, "T_max": 3000}, None),  # updates
        (
            {"epochs": 12, "scheduler": {"milestones": [16, 22]}},
            "falls at 16 at the earliest, and 12 epochs are planned",
        ),
        ({"epochs": 12, "milestones": [8, 22]}, None),
        ({"epochs": 12, "milestones": [60000, 80000]}, None),  # updates
        ({"max_steps": 50000, "milestones": [60000, 80000]}, "and 50000 steps are planned: it never does"),
        ({"max_steps": 50000, "milestones": ["half", "end"]}, None),
        ({"epochs": 100, "swa": {"swa_start": 161}}, "swa.swa_start: 161 is beyond the 100 epochs planned"),
        ({"epochs": 100, "swa": {"swa_start": 75}}, None),
        ({"epochs": 100, "ema_start": 5000}, None),  # updates
        ({"epochs": 10, "max_steps": 5000, "ema_start": 4000}, None),
        ({"epochs": 30, "decay_start_epoch": 80}, "80 is beyond the 30 epochs planned: what begins there never does"),
        ({"max_steps": 5000, "decay_start_step": 8000}, "8000 is beyond the 5000 steps planned"),
        ({"epochs": 10, "max_steps": 5000, "unfreeze_epoch": 12}, "12 is beyond the 10 epochs planned"),
        ({"epochs": 30, "start_epoch": 40}, None),  # what comes after it may be counted
        ({"epochs": 30, "unfreeze_at": 10**6}, None),  # meant
        ({"max_steps": 5000, "start_date": 20240101, "window_start": 6000, "restart": 6000}, None),
    ],
)
def test_schedules_on_paper(config: dict, words: str | None) -> None:
    found = [f for f in preflight(config) if f.severity == "warning"]
    assert [f.rule for f in found] == ["schedule"] * bool(words)
    assert words is None or words in found[0].message


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "not closed": ("model:\n  d: [1, 2\ntraining:\n", r", line 3: not valid YAML: .*; correct it"),
    "an alias of itself": ("a: &x\n  b: *x\n", r": a is nested more than 50 deep, or holds itself"),
    "a NUL": ("a: \x00\n", r": not valid YAML: unacceptable character.*; correct it"),
    "two documents": ("--- {}\n--- {}\n", r", line 2: not valid YAML: .*; correct it"),
    "deep": ("a: " + "[" * 3000, r": not valid YAML: .*"),
    "a list": ("# here\n- a\n", r": no keys and values; a config holds sections such as `model:`"),
    "empty": ("", r": no keys and values; a config holds sections such as `model:`"),
    "too many": ("".join(f"k{i}: 1\n" for i in range(10_001)), r": more than 10000 keys; is this a config\?"),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        preflight(path)
    assert re.fullmatch(re.escape(str(path)) + expected, str(caught.value))


def test_what_is_no_file_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml: no such file$"):
        preflight(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r": cannot be read as UTF-8 text: "):
        preflight(tmp_path)
    with pytest.raises(ValueError, match=r"^preflight takes a YAML file or a mapping, got Config; try a dict of it$"):
        preflight(load_config(CASE))
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(ValueError, match=r"^config: a is nested more than 50 deep, or holds itself$"):
        preflight(loop)


def test_nothing_that_a_file_names_is_constructed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    assert preflight(path) == [] and not (tmp_path / "made").exists()


def test_entries_keep_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# top\na:\n  # above\n  b: [1, 2]  # beside\n  c:\nd: {e: 1.5} # last")
    entries = {entry.name: entry for entry in read_entries(path)}
    assert {name: entry.value for name, entry in entries.items()} == {"a.b": ["1", "2"], "a.c": "", "d.e": "1.5"}
    assert (entries["a.b"].where, entries["a.b"].comments) == (f"{path}:4", ("above", "beside"))
    assert entries["d.e"].comments == ("last",)
