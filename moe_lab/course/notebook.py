"""What the first cells of every notebook call: check the parameters, say what will run, and keep claims honest.

papermill turns `-p flag false` into the text "false" and injects a misspelt name with no more than a warning: not here.
"""

import itertools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from moe_lab.config import ROOT, Config, load_config
from moe_lab.failures.results import plain, provenance
from moe_lab.sections import ConfigError, check_value, parse_word, suggestion
from moe_lab.show.front import is_interactive
from moe_lab.train.device import choose_threads, pick_device
from moe_lab.train.record import append_jsonl

PROFILES = ("smoke", "lab", "gpu")
# JupyterLab breaks a printed line wherever its cell ends
WHOLE_WORDS = "<style>.jp-RenderedText pre {word-break: normal; overflow-wrap: anywhere}</style>"
# the parameters that every notebook may have; a value of None or '' means: not given
KINDS = {"profile": str, "config": str, "overrides": list, "run_dir": str, "seed": int, "device": str, "resume": bool}


@dataclass(frozen=True)
class Lab:
    """What `begin` resolved."""

    config: Config
    profile: str  # smoke, lab, gpu, or the name of the config file that was given
    run_dir: Path
    run_dir_given: bool
    resume: bool
    root: Path = ROOT

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.training.device)

    def fresh_run_dir(self) -> Path:
        """`run_dir`, or, when it was named automatically and exists, a new one: so a cell may be run again."""
        return self.run_dir if self.run_dir_given else first_free(self.run_dir)

    def provenance(self) -> None:
        """Print one line that says what made the outputs of this notebook."""
        made = provenance()
        versions = f"commit {made['commit'] or 'unknown'} · Python {made['python']} · torch {made['torch']}"
        machine = f"{self.device.type}: {os.cpu_count()} cores, {made['machine']}"
        print(f"{versions} · {machine} · profile {self.profile} · seed {self.config.training.seed}")


def begin(**parameters: Any) -> Lab:
    """Validate a notebook's parameters, resolve its config, and print it. Raises ConfigError (one line).

    Known: `profile` (it wins over MOE_LAB_PROFILE, which wins over lab), `config` (a YAML file in place of the
    profile's), `overrides` (a list, or one text: "training.steps=20 model.d_model=64"), `run_dir` (default: a new dated
    directory under runs/), `seed`, `device`, `resume`. Paths are from the repository's root.
    """
    refuse_injected()
    lab = resolve(**parameters)
    if is_interactive():
        from IPython.display import HTML, display

        display(HTML(WHOLE_WORDS))
    config, model = lab.config, lab.config.model
    mixture = f", {len(model.moe_layers)} with {model.n_experts} experts" if model.moe_layers else ""
    tokens = f"{config.n_steps} steps of {config.tokens_per_step:,} tokens"
    of_text = "" if lab.profile == "lab" else "; the numbers in the text are those of profile lab"
    print(f"profile {lab.profile}: {tokens}, seed {config.training.seed}{of_text}")
    print(f"model: d_model {model.d_model}, {model.n_layers} layers{mixture}, vocabulary {model.vocab_size:,}")
    if "run_dir" in parameters:
        shown = lab.run_dir.relative_to(ROOT) if lab.run_dir.is_relative_to(ROOT) else lab.run_dir
        print(f"run directory: {shown}{' (resume)' if lab.resume else ''}")
    if busy := choose_threads(config):
        print(busy)
    return lab


def resolve(**parameters: Any) -> Lab:
    """`begin` without printing."""
    refuse_unknown(parameters, KINDS)
    values = {name: cast(name, value, KINDS[name]) for name, value in parameters.items() if value not in (None, "")}
    profile = values.get("profile") or os.environ.get("MOE_LAB_PROFILE") or "lab"
    check_value("profile" if "profile" in values else "MOE_LAB_PROFILE", profile, Literal[PROFILES])
    path = ROOT / values.get("config", f"configs/{profile}.yaml")
    if "config" in values:
        profile = path.stem
    overrides = list(values.get("overrides", ()))
    overrides += [f"training.{name}={values[name]}" for name in ("seed", "device") if name in values]
    config = load_config(path, overrides)
    source, files = config.data.source, config.data.data_files
    if source != "stdlib" and not source.startswith("hf:"):
        source = str(ROOT / Path(source).expanduser())
    if files and "://" not in files:
        files = str(ROOT / files)
    config = config.with_(data={"source": source, "data_files": files})
    is_given, resume = "run_dir" in values, values.get("resume", False)
    if resume and not is_given:
        raise ConfigError("resume=True needs run_dir: the directory of the run to go on with")
    run_dir = ROOT / values["run_dir"] if is_given else new_run_dir(profile)
    return Lab(config, profile, run_dir, is_given, resume)


def new_run_dir(name: str) -> Path:
    """A dated directory under runs/ that does not exist yet. It is not made here."""
    return first_free(ROOT / "runs" / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}")


def first_free(directory: Path) -> Path:
    """The first of NAME, NAME_2, NAME_3 … that does not exist."""
    later = (directory.with_name(f"{directory.name}_{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([directory], later) if not path.exists())


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raise ConfigError for the first of `names` that is no parameter; papermill only warns of it."""
    for name in names:
        if name not in known:
            near = suggestion(name, known) or f"; known are {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}unknown parameter {name!r}{near}")


def refuse_injected() -> None:
    """Raise ConfigError for a parameter that plain papermill put into a cell below a notebook's own, and that no cell
    before it has."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = shell.user_ns.get("In", []) if shell else []
    place = next((n for n, source in enumerate(cells) if source.startswith("# Parameters\n")), 0)
    names = re.compile(r"^(\w+)\b[^=\n]*=", re.MULTILINE)
    if place:
        refuse_unknown(names.findall(cells[place]), names.findall("\n".join(cells[:place])))


def cast(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind` (bool, int, float, str or list); a text is read as on a command line. Raises ConfigError."""
    where = f"parameter {name}"
    if kind is list:
        # split between settings, not within [1, 2]
        settings = re.split(r"[,\s]+(?=\w+\.\w+\s*=)", value.strip()) if isinstance(value, str) else value
        check_value(where, tuple(settings) if isinstance(settings, list) else settings, tuple[str, ...])
        return [setting for setting in settings if setting]
    if isinstance(value, (str, Path)):
        value = parse_word(str(value).strip(), kind, where)
    check_value(where, value, kind)
    return kind(value)


def claim(id: str, holds: Any, statement: str, /, **numbers: Any) -> None:
    """Assert a claim and print its verdict: one line without raw numbers, so that it is the same in every run.
    `numbers` are what it rests on, finite numbers, truth values, or lists and mappings of them. Where the environment
    variable MOE_LAB_CLAIMS names a file, it gets a line of JSON: from there they go into the prose."""
    kept = {name: plain(f"{id}: {name}", value) for name, value in numbers.items()}
    if not bool(holds):
        raise AssertionError(f"{id} does not hold: {statement}")
    print(f"{id} holds: {statement}")
    if path := os.environ.get("MOE_LAB_CLAIMS"):
        line = {"id": id, "statement": statement, "numbers": kept, "profile": os.environ.get("MOE_LAB_PROFILE", "lab")}
        append_jsonl(Path(path), [line])
