"""How a command trains, and how it ends: errors are one line on stderr."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from moe_lab.config import ConfigError
from moe_lab.train.checkpoint import RunError
from moe_lab.train.device import is_out_of_memory
from moe_lab.train.loop import Trainer
from moe_lab.train.record import FINDINGS


def fit_watched(trainer: Trainer, watch_by: Callable[..., Any], speaks: bool = True) -> tuple[str, list]:
    """`trainer.fit()` under a watch that `watch_by`, health's Watch, makes of it: how it ended, what was found. If it `speaks`,
    a progress bar, evaluations and findings are on stderr. Raises RunError for what cannot be watched."""
    plan = {"budget": trainer.n_steps, "start_step": trainer.step, "log": trainer.run_dir / FINDINGS, "quiet": True}
    try:
        watch = watch_by(trainer.model, trainer.optimizers, **plan)
    except ValueError as error:
        raise RunError(str(error)) from error
    told = 0
    with watch, tqdm(total=trainer.n_steps, initial=trainer.step, unit="step", disable=not speaks) as bar:

        def show(row: dict) -> None:
            nonlocal told
            news, told = watch.findings[told:], len(watch.findings)
            if "loss" in row:
                watch.observe(loss=row["loss"])
                bar.update(row["step"] - bar.n)
                bar.set_postfix_str(f"loss {row['loss']:.3f}")
            else:
                news.append(f"step {row['step']}: validation loss {row['validation_loss']:.4f}")
            for line in news if speaks else ():
                bar.write(str(line), file=sys.stderr)

        trainer.listeners.append(show)
        return trainer.fit()["status"], watch.findings


def exit_code(body: Callable[..., int | None], *arguments: Any) -> int:
    """Call a command's body. Its own code, or 0; 2: wrong input, or a run that cannot start or go on; 130: Ctrl-C."""
    try:
        return body(*arguments) or 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory before the first step: lower model.d_model or model.n_layers", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2
