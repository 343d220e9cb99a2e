import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import refused
from tiny_run import CONFIGS

from moe_lab import ConfigError, load_config
from moe_lab.config import ROOT, SECTIONS, Config, OptimizerConfig, differences, from_dict, root_of, to_dict, to_yaml
from moe_lab.sections import Loader

PACKAGE = Path(__file__).parents[1] / "moe_lab"

# Every field once, never with its default: what a round trip loses, or a reader mixes up, shows.
EVERY_FIELD = """
model: {vocab_size: 300, d_model: 24, n_layers: 5, n_heads: 4, n_kv_heads: 4, head_dim: 10, d_ff: 40, max_seq_len: 9,
  rope_theta: 500.0, norm_eps: 0.01, dropout: 0.3, init_std: 0.5, zero_init_output: true, moe_layers: [4, 1],
  n_experts: 3, moe_top_k: 1,
  d_ff_expert: 16, moe_router_hidden: 0, moe_balance_weight: 0.2, moe_z_weight: 0.3,
  mod_enabled: true, mod_capacity_factor: 0.4, mod_router_hidden: 6, mod_predictor_weight: 0.6, mamba_enabled: true,
  mamba_layers: [0], ssm_state_dim: 3, mamba_expand: 4, mamba_d_conv: 5, mamba_dt_rank: 6,
  n_pred_tokens: 3, aux_loss_weights: [1, 0.25, 0]}
training: {steps: 7, total_tokens: 70, batch_size: 3, gradient_accumulation_steps: 2, max_lr: 0.5, min_lr_ratio: 0.2,
  warmup_steps: 4, max_grad_norm: 2.0, log_interval: 3, eval_interval: 5, save_interval: 6, keep_checkpoints: 9,
  activation_checkpointing: true, compile: true, device: cpu, seed: 11}
optimizer: {type: adamw, momentum: 0.8, nesterov: false, ns_steps: 4, adjust_lr: match_rms_adamw, adamw_lr_ratio: 0.7,
  embedding_lr_ratio: 0.6,
  betas: [0.8, 0.99], eps: 1.0e-6, weight_decay: 0.2}
precision: {parameters: bfloat16, compute: float32}
data: {source: "hf:a/b", subset: c, data_files: d, text_field: e, max_bytes: 5}
"""


def test_every_field_arrives_and_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(EVERY_FIELD)
    given, config, default = yaml.safe_load(EVERY_FIELD), load_config(path), Config()
    for name, kind in SECTIONS.items():
        assert set(given[name]) == {f.name for f in fields(kind)}
        for key, value in given[name].items():
            read = getattr(getattr(config, name), key)
            assert read == (tuple(value) if isinstance(value, list) else value)
            assert read != getattr(getattr(default, name), key), f"{name}.{key} is at its default here"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert from_dict(to_dict(config)) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config) == given


def test_a_stored_config_may_hold_a_field_that_is_gone_at_what_is_done_now(tmp_path: Path) -> None:
    assert from_dict({"model": {"mamba_kernel": "torch", "moe_capacity_factor": None}}) == Config()
    with refused(ConfigError, match="unknown key model.mamba_kernel"):
        from_dict({"model": {"mamba_kernel": "mamba_ssm"}})


def test_a_file_may_hold_one_section_and_numbers_need_no_point(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("optimizer: {momentum: 5e-1, betas: [1.e-1, +.5E+0], weight_decay: 1E2}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.optimizer == OptimizerConfig(momentum=0.5, betas=(0.1, 0.5), weight_decay=100.0)
    assert config.model == Config().model


def test_a_text_that_looks_like_a_number_survives_a_round_trip() -> None:
    config = Config().with_(data={"source": "1e3"})
    assert from_dict(yaml.load(to_yaml(config), Loader)) == config


def test_the_table_of_fields_is_in_the_docs() -> None:
    rows = ["    d_model: Count = 192  # width of the residual stream\n"]
    rows += ["    betas: tuple[ShareBelow1, ...] = (0.9, 0.95)  # AdamW's two betas\n"]
    assert all(sum(row in section.__doc__ for section in SECTIONS.values()) == 1 for row in rows)
    for section in SECTIONS.values():
        table = re.findall(r"^    (\w+): .+ = .+  # \S.+$", section.__doc__, re.MULTILINE)
        assert table == [f.name for f in fields(section)]


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_the_source_is_read_when_help_asks_and_may_be_missing(monkeypatch, error: type) -> None:
    monkeypatch.setattr(inspect, "getsource", lambda section: (_ for _ in ()).throw(error))
    assert SECTIONS["precision"].__doc__ == "Number formats of the weights and of matrix products."


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {steps: 5, seed: 1}\n")
    words = ["training.steps=7", "training.max_lr=1e-3", "model.moe_layers=[0, 2]", "model.mamba_enabled=true"]
    config = load_config(tmp_path / "c.yaml", [*words, "data.source=a=b", "model.head_dim=null", "training.steps=8"])
    assert (config.training.steps, config.training.seed, config.training.max_lr) == (8, 1, 0.001)
    assert config.model.moe_layers == (0, 2) and config.model.mamba_enabled is True and config.model.head_dim is None
    assert config.data.source == "a=b"
    assert load_config(CONFIGS / "smoke.yaml", ["model.aux_loss_weights=[1, 5e-1]"]).model.aux_loss_weights == (1, 0.5)


@pytest.mark.parametrize(
    "word", ["2024", "1e3", "true", "2024-01-02", "*.txt", "[a]", "a: b", "@x", "a # b", "null.txt"]
)
@pytest.mark.parametrize("key", ["data.source", "data.subset"])
def test_an_override_of_a_text_field_is_text_whatever_yaml_makes_of_it(key: str, word: str) -> None:
    def value(text: str) -> str:
        return to_dict(load_config(CONFIGS / "smoke.yaml", [f"{key}={text}"]))["data"][key.split(".")[1]]

    assert value(word) == value(f" {word} ") == word
    assert value(f"'{word}'") == word  # YAML's quotes, for whoever writes them


@pytest.mark.parametrize("word", ["", "null", "~"])
def test_a_text_field_that_may_be_absent_is_emptied_by_null(word: str) -> None:
    assert load_config(CONFIGS / "smoke.yaml", ["data.subset=a", f"data.subset={word}"]).data.subset is None


def test_the_root_is_a_checkout_or_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    assert (ROOT / "configs" / "lab.yaml").exists() and root_of(PACKAGE) == ROOT
    site, away = tmp_path / "site-packages", tmp_path / "away"
    (site / "moe_lab").mkdir(parents=True)
    away.mkdir()
    monkeypatch.chdir(away)
    assert root_of(site / "moe_lab") == away
    (site / "pyproject.toml").touch()  # of somebody else
    assert root_of(site / "moe_lab") == away
    (site / "configs").mkdir()
    assert root_of(site / "moe_lab") == site


def test_steps_follow_from_the_tokens() -> None:
    training = {"batch_size": 3, "gradient_accumulation_steps": 2, "total_tokens": 61}
    config = Config().with_(model={"max_seq_len": 10}, training=training)
    assert config.tokens_per_step == 60 and config.n_steps == 2  # the last step may go past the budget
    assert config.with_(training={"total_tokens": 60}).n_steps == 1
    assert config.with_(training={"steps": 9}).n_steps == 9
    assert Config().n_steps == 1000


def test_a_variation_is_validated() -> None:
    with pytest.raises(ConfigError, match=r"^model.dropout=1 must be less than 1$"):
        Config().with_(model={"dropout": 1})


def test_differences_name_both_values() -> None:
    new = Config().with_(training={"max_lr": 0.5}, model={"moe_layers": (1,)})
    assert differences(Config(), new) == ["model.moe_layers: [] → [1]", "training.max_lr: 0.01 → 0.5"]
    assert differences(new, new) == []


# ---- wrong input ----------------------------------------------------------------------------------------------------

IN_A_FILE = {
    "bad YAML": ("model:\n  d_model: [1, 2\ntraining:\n", r", line 3: not valid YAML: expected ',' or '\]', but got ':'"),
    "a tab": ("model:\n\td_model: 3\n", r", line 2: not valid YAML: .*'\\t'.*"),
    "an object": ("a: !!python/object:os.system x", r", line 1: not valid YAML: could not determine a constructor.*"),
    "a section twice": ("data: {}\nmodel: {}\ndata: {}", r", line 3: .* the key 'data' stands here and in line 1"),
    "a key twice": ("model:\n  d_ff: 1\n  d_ff: 2", r", line 3: .* the key 'd_ff' stands here and in line 2"),
    "a list for a key": ("[a, b]: 1", r", line 1: not valid YAML: a key must be a word"),
    "a mapping for a key": ("model:\n  ? {a: 1}\n  : 2", r", line 2: not valid YAML: a key must be a word"),
    "a key of two lines": ('model: {"a\\nb": 1}', r", line 1: not valid YAML: a key must be a word"),
    "an unknown key": ("training: {warmup: 3}", r": unknown key training.warmup; did you mean warmup_steps\?"),
    "a key of nowhere": ("training: {xyzzy: 3}", ": unknown key training.xyzzy"),
    "an unknown section": ("trainign: {steps: 3}", r": unknown section 'trainign'; did you mean training\?"),
    "a number for a section": ("training: 3", ": section training must hold keys and values, got 3"),
    "a list of sections": ("- model", r": expected sections such as `model:`, got \['model'\]"),
    "an empty file": ("", ": the file is empty; a config holds sections such as `model:`"),
    "bytes": (b"\xff\xfe\x00", ": cannot be read as UTF-8 text: 'utf-8' codec.*"),
    "text for a number": ("training: {steps: many}", ": training.steps='many' must be a whole number"),
    "a number in quotes": ("training: {max_lr: '1e-3'}", ": training.max_lr='1e-3' must be a number"),
    "a fraction": ("training: {steps: 1.5}", ": training.steps=1.5 must be a whole number"),
    "true for a number": ("training: {steps: true}", ": training.steps=True must be a whole number"),
    "true in a list": ("model: {moe_layers: [true]}", r": model.moe_layers\[0\]=True must be a whole number"),
    "a number for true": ("model: {mod_enabled: 1}", ": model.mod_enabled=1 must be true or false"),
    "a number for text": ("data: {source: 3}", ": data.source=3 must be text"),
    "a number for a list": ("model: {moe_layers: 1}", r": model.moe_layers=1 must be a list, such as \[1, 2\]"),
    "not a number": ("training: {max_lr: .nan}", ": training.max_lr=nan must be a number"),
    "too low": ("training: {steps: 0}", ": training.steps=0 must be more than 0"),
    "too low by a bit": ("model: {n_experts: 1}", ": model.n_experts=1 must be at least 2"),
    "too high": ("model: {dropout: 1.0}", ": model.dropout=1.0 must be less than 1"),
    "too high by a bit": ("training: {min_lr_ratio: 1.1}", ": training.min_lr_ratio=1.1 must be at most 1"),
    "too low in a list": ("optimizer: {betas: [0.9, -1]}", r": optimizer.betas\[1\]=-1 must be at least 0"),
    "no such choice": ("optimizer: {type: muno}", r": optimizer.type='muno' is not one of .*; did you mean muon\?"),
    "heads that do not divide": ("model: {n_heads: 6, n_kv_heads: 4}", ": model.n_kv_heads=4 must divide model.n_heads=6"),
    "a layer that is not there": ("model: {mamba_layers: [0, 4]}", ": model.mamba_layers: layer 4 does not exist; .* 0 to 3"),
    "a layer below 0": ("model: {moe_layers: [-1]}", ": model.moe_layers: layer -1 does not exist; .* 0 to 3"),
    "experts of an odd width": ("model: {moe_layers: [0], d_ff_expert: 12}", ": model.d_ff_expert=12 must be a multiple of 8 .*"),
    "more experts than there are": ("model: {n_experts: 2, moe_top_k: 3}", ": model.moe_top_k=3 is more than .*=2"),
    "a weight missing": ("model: {n_pred_tokens: 3}", ": model.aux_loss_weights has 2 values for .*n_pred_tokens=3.*"),
    "a layer twice": ("model: {moe_layers: [1, 1]}", r": model.moe_layers=\[1, 1\] names a layer twice; name each once"),
    "no weight for the next token": ("model: {aux_loss_weights: [0, 1]}", r": model.aux_loss_weights\[0\]=0: .*"),
    "no name of a data set": ("data: {source: 'hf:'}", ": data.source=hf: names no text; write stdlib, a path, or hf:NAME"),
    "an endless stream": ("data: {source: 'hf:a/b'}", ": data.max_bytes is needed with data.source=hf:a/b: .*"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_wrong_file(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(ConfigError, match=f"^{re.escape(str(path))}{expected}$"):
        load_config(path)


def test_no_such_file(tmp_path: Path) -> None:
    with refused(ConfigError, match=r"/smok\.yaml: no such file$"):
        load_config(tmp_path / "smok.yaml")
    with refused(ConfigError, match=r"/smok\.yaml: no such file; did you mean smoke\.yaml\?$"):
        load_config(CONFIGS / "smok.yaml")
    with refused(ConfigError, match="/configs: cannot be read as UTF-8 text: .*directory"):
        load_config(CONFIGS)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.steps"], "override 'training.steps' must read section.key=value, such as training.steps=200"),
        (["steps=3"], "override 'steps=3' must read section.key=value, such as training.steps=200"),
        (["train.steps=3"], "override: unknown section 'train'; did you mean training?"),
        (["training.steps=1e-3"], "override: training.steps=0.001 must be a whole number"),
        (["training.max_lr="], "override: training.max_lr=None must be a number"),
        (["training.max_lr=[1"], "override 'training.max_lr=[1', line 1: not valid YAML: expected ',' or ']', but got"),
        (["model.n_kv_heads=3"], "override: model.n_kv_heads=3 must divide model.n_heads=4"),
        (["data.source=null"], "override: data.source=None must be text"),
        ("training.steps=7", "overrides='training.steps=7' must be a list of texts: ['training.steps=7']"),
    ],
)
def test_a_wrong_override(overrides, expected: str) -> None:
    with refused(ConfigError, match=f"^{re.escape(expected)}"):
        load_config(CONFIGS / "smoke.yaml", overrides)


# ---- the files of configs/ ------------------------------------------------------------------------------------------


def test_the_five_files_are_there() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"smoke", "lab", "gpu", "training_1.5b", "training_1.5b_as_reported"}
    for path in CONFIGS.glob("*.yaml"):
        assert from_dict(yaml.safe_load(to_yaml(load_config(path)))) == load_config(path)


@pytest.mark.parametrize("name", ["smoke", "lab"])
def test_the_profiles_hold_every_mechanism(name: str) -> None:
    model = load_config(CONFIGS / f"{name}.yaml").model
    kinds = [(layer in model.moe_layers, model.is_mamba(layer)) for layer in range(model.n_layers)]
    assert (True, False) in kinds, "no layer with a mixture of feed-forward experts"
    assert any(is_mamba for _, is_mamba in kinds) and any(not is_mamba for _, is_mamba in kinds)
    assert model.mod_enabled and model.mod_capacity_factor < 1
    assert model.n_pred_tokens == 2 and all(weight > 0 for weight in model.aux_loss_weights)
    assert model.moe_balance_weight > 0


def test_the_case_as_reported_differs_in_what_the_report_names() -> None:
    cured, reported = (load_config(CONFIGS / f"training_1.5b{end}.yaml") for end in ("", "_as_reported"))
    assert differences(cured, reported) == [
        "training.max_lr: 0.001 → 0.0003",
        "precision.parameters: float32 → bfloat16",
    ]


# ---- no key that nothing reads (B20) --------------------------------------------------------------------------------

# By what name the rooms that make a run call a section: `config` is the model's in model/, the optimizer's in optim/.
SPOKEN = {name: name for name in SECTIONS} | {"config": "config", "model_config": "model"}
ROOMS = {"data": {}, "model": {"config": "model"}, "optim": {"config": "optimizer"}, "train": {}}


def attributes(tree: ast.AST) -> set[tuple[str, str]]:
    """(last name before the dot, name after it) of every attribute that is read."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {(getattr(node.value, "id", getattr(node.value, "attr", "")), node.attr) for node in nodes}


def unread(sources: dict[str, str]) -> set[str]:
    """`section.key` for each field that no room reads, directly or by a property of config.py; `sources` by path."""
    read = set()
    for path, source in sources.items():
        spoken = SPOKEN | ROOMS[path.split("/")[0]]
        read |= {(spoken[base], name) for base, name in attributes(ast.parse(source)) if base in spoken}
    classes = [node for node in ast.parse((PACKAGE / "config.py").read_text()).body if isinstance(node, ast.ClassDef)]
    properties = [(c.name.removesuffix("Config").lower() or "config", m) for c in classes for m in c.body]
    # to check a value is not to use it
    properties = [(section, m) for section, m in properties if getattr(m, "name", "conflicts") != "conflicts"]
    for _ in properties:  # one may read another
        for section, method in properties:
            if (section, method.name) in read:
                read |= {(section if base == "self" else base, name) for base, name in attributes(method)}
    return {f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in fields(kind) if (name, f.name) not in read}


def package_sources() -> dict[str, str]:
    files = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in files}


def test_every_key_is_read() -> None:
    assert unread(package_sources()) == set()


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("training.max_grad_norm", "training.max_grad_norm", "1.0"),
        ("model.dropout", "config.dropout", "0.1"),  # Block reads self.dropout, which is a module
        ("precision.parameters", "precision.parameters", "'float32'"),  # beside model.parameters()
        ("training.total_tokens", "config.n_steps", "config.tokens_per_step"),  # only a property reads it
        ("model.head_dim", "config.width_of_head", "16"),
        ("optimizer.nesterov", "config.nesterov", "True"),
    ],
)
def test_an_unplugged_key_is_found(key: str, old: str, new: str) -> None:
    sources = package_sources()
    unplugged = {path: source.replace(old, new) for path, source in sources.items()}
    assert unplugged != sources
    assert key in unread(unplugged)
