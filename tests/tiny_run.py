"""A run of every mechanism that takes a second: what the tests of the trainer share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from moe_lab import Trainer, load_config
from moe_lab.config import Config
from moe_lab.train import read_record

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"vocab_size": 300, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "d_ff_expert": 16}
SMALL |= {"max_seq_len": 16, "moe_router_hidden": 8, "mod_router_hidden": 8, "ssm_state_dim": 4}
SHORT = {"steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 3, "device": "cpu"}
SHORT |= {"log_interval": 2, "eval_interval": 4, "save_interval": 3, "max_lr": 0.02, "min_lr_ratio": 0.1}
RATIOS = {"adamw_lr_ratio": 0.08, "embedding_lr_ratio": 0.3}  # here, so that the tests outlive a better profile
TIMES = {"seconds", "tokens_per_s"}  # the fields in which identical records may differ


def write_text(folder: Path, n_words: int = 2000) -> Path:
    """A file of made-up words, the same every time, so that its tokens are made once and then cached."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefgh", k=choose.randint(1, 6))) for _ in range(50)]
    path = folder / "text.txt"
    path.write_text("".join(choose.choice(words) + choose.choice("   \n") for _ in range(n_words)))
    return path


def tiny(folder: Path, n_words: int = 2000, **changes: dict) -> Config:
    """configs/smoke.yaml, made smaller, on a text in `folder`; `changes` are by section."""
    base = load_config(CONFIGS / "smoke.yaml")
    data = {"source": str(write_text(folder, n_words)), "max_bytes": None}
    base = base.with_(model=SMALL, training=SHORT, optimizer=RATIOS, data=data)
    return base.with_(**changes)


def train(config: Config, run_dir: Path, **options) -> Trainer:
    """A finished trainer; its summary is in `run_dir`."""
    trainer = Trainer(config, run_dir, **options)
    trainer.fit()
    return trainer


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def steps_of(run_dir: Path) -> list[dict]:
    return [row for row in read_record(run_dir) if "loss" in row]


def evaluations_of(run_dir: Path) -> list[dict]:
    return [row for row in read_record(run_dir) if row.get("event") == "eval"]


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file in it: what must not change."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
