import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import refused
from tiny_run import evaluations_of, parameters, steps_of, summary_of, tiny, train, without_times

from moe_lab import RunError, Trainer, build_model
from moe_lab.config import from_dict
from moe_lab.data import Batches
from moe_lab.train import read_record
from moe_lab.train.checkpoint import load_checkpoint, step_path
from moe_lab.train.controls import Controls
from moe_lab.train.evaluate import evaluate

# ---- the update -----------------------------------------------------------------------------------------------------


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    """With plain gradient descent the parameters are the sum of the gradients, unamplified."""
    ends = []
    for batch_size, n_micro in ((8, 1), (2, 4)):
        training = {"steps": 2, "batch_size": batch_size, "gradient_accumulation_steps": n_micro, "warmup_steps": 0}
        # the balance loss is a product of two means over a micro-batch, and dropout draws one mask a micro-batch
        config = tiny(tmp_path, training=training, model={"moe_balance_weight": 0.0, "dropout": 0.0})
        model = build_model(config.model)
        descent = [torch.optim.SGD(model.parameters(), lr=0.1)]
        trainer = train(config, tmp_path / f"{n_micro}", model=model, optimizers=descent)
        ends.append((parameters(trainer), steps_of(trainer.run_dir)))
    start = dict(build_model(config.model).named_parameters())
    (big, big_rows), (small, small_rows) = ends
    for name in start:
        torch.testing.assert_close(small[name], big[name], rtol=1e-6, atol=1e-6)
    assert max((big[name] - start[name]).abs().max() for name in start) > 1e-3
    for one, other in zip(big_rows, small_rows, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5) and other["tokens"] == one["tokens"]


def test_row_1_holds_what_was_measured_before_update_1(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 2}, model={"dropout": 0.0})
    trainer = train(config, tmp_path / "run")
    model = build_model(trainer.config.model, config.training.seed)
    batches = Batches(trainer.dataset.train, 16, 2, config.training.seed)
    terms = [model.losses(ids) for ids in (batches.next_batch(), batches.next_batch())]
    sum(sum(term.values()) / 2 for term in terms).backward()
    row = steps_of(trainer.run_dir)[0]
    assert row["step"] == 1
    assert row["losses"] == pytest.approx({name: sum(t[name].item() for t in terms) / 2 for name in terms[0]}, rel=1e-6)
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    assert row["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert row["norm_deviation"] == 0.0  # before the first update every norm is at 1.0


def test_the_first_update_runs_at_the_first_share_of_the_warmup(tmp_path: Path) -> None:
    """Adam's first move is its LR, whatever the gradient: the norms, which start at 1.0, show it."""
    training = {"steps": 6, "warmup_steps": 4, "max_lr": 0.02, "min_lr_ratio": 0.1, "log_interval": 1}
    optimizer = {"adamw_lr_ratio": 0.1, "embedding_lr_ratio": 0.4}
    trainer = train(tiny(tmp_path, training=training, optimizer=optimizer), tmp_path / "run")
    rows = steps_of(trainer.run_dir)
    assert rows[1]["norm_deviation"] == pytest.approx(0.1 * 0.02 / 4, rel=1e-3)
    assert set(rows[0]["lr"]) == {"muon", "adamw_decayed", "adamw"}
    halfway = 0.1 + 0.9 * 0.5  # of the cosine, which runs over two updates
    for row, share in zip(rows, [0.25, 0.5, 0.75, 1.0, halfway, 0.1], strict=True):
        assert row["lr"]["muon"] == pytest.approx(0.02 * share)
        assert row["lr"]["adamw"] == pytest.approx(0.1 * 0.02 * share)
        assert row["lr"]["adamw_decayed"] == pytest.approx(0.4 * 0.02 * share)


def test_gradients_are_clipped_after_accumulation(tmp_path: Path) -> None:
    training = {"steps": 1, "warmup_steps": 0, "max_grad_norm": 1e-3, "min_lr_ratio": 1.0}
    config = tiny(tmp_path, training=training)
    model = build_model(config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(config, tmp_path / "run", model=model, optimizers=[torch.optim.SGD(model.parameters(), lr=10.0)])
    moved = sum((p - before[name]).double().square().sum() for name, p in model.named_parameters()).sqrt().item()
    assert steps_of(trainer.run_dir)[0]["grad_norm"] > 0.1  # the record says what it was before clipping
    assert moved == pytest.approx(10.0 * 1e-3, rel=1e-3)


def test_intervals_count_updates(tmp_path: Path, monkeypatch) -> None:
    """B07: with 4 micro-batches and an interval of 2, counting micro-batches would log, evaluate and save every time."""
    training = {"steps": 4, "batch_size": 1, "gradient_accumulation_steps": 4, "keep_checkpoints": 9}
    training |= {"log_interval": 2, "eval_interval": 2, "save_interval": 2}
    n_forward, told = [], []
    trainer = Trainer(tiny(tmp_path, training=training), tmp_path / "run")
    trainer.listeners.append(lambda row: told.append((trainer.step, row)))
    report = trainer.model.report
    counted = lambda ids, generator: n_forward.append(1) or report(ids, generator=generator)  # noqa: E731
    monkeypatch.setattr(trainer.model, "report", counted)
    trainer.fit()
    assert len(n_forward) == 16
    assert [step for step, _ in told] == [0, 2, 2, 2, 4, 4, 4]
    assert [row for _, row in told] == read_record(trainer.run_dir)
    assert [row["step"] for row in steps_of(trainer.run_dir)] == [1, 2, 3, 4]
    assert [row["step"] for row in evaluations_of(trainer.run_dir)] == [0, 2, 4]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000002.pt", "step_000004.pt"]


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_steps_make_the_updates_of_fit(run: Trainer, tmp_path: Path) -> None:
    """In two calls, with an evaluation-like pause between; the reports hold what the record holds."""
    trainer = Trainer(run.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    reports = list(trainer.steps(until=2))
    assert (trainer.step, [report.step for report in reports]) == (2, [1, 2])
    trainer.model.eval()  # a caller may look at the model between two calls
    reports += trainer.steps()
    rows, of_fit = (without_times(steps_of(folder)) for folder in (tmp_path / "run", run.run_dir))
    assert rows == of_fit and evaluations_of(tmp_path / "run") == []
    assert all(p.equal(parameters(trainer)[name]) for name, p in parameters(run).items())
    for report, row in zip(reports, rows, strict=True):
        assert (report.step, report.tokens, report.lr) == (row["step"], row["tokens"], row["lr"])
        assert {name: term.item() for name, term in report.losses.items()} == pytest.approx(row["losses"])
        assert report.grad_norm.item() == pytest.approx(row["grad_norm"])
    assert list(trainer.steps()) == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "tokenizer.json", "record.jsonl", "checkpoints"}
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_compiled_losses_are_the_same_run(run: Trainer, tmp_path: Path, monkeypatch) -> None:
    """Through torch.compile, with a backend that compiles nothing: building the real one takes minutes."""
    compile, compiled = torch.compile, []

    def with_eager(function):
        compiled.append(function.__name__)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", with_eager)
    train(run.config.with_(training={"compile": True}), tmp_path / "run")
    assert compiled == ["report"]
    rows, of_fit = (without_times(steps_of(folder)) for folder in (tmp_path / "run", run.run_dir))
    for row, expected in zip(rows, of_fit, strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_the_record_reaches_as_far_as_the_steps(run: Trainer, tmp_path: Path) -> None:
    """Written each `log_interval` updates, at `until`, when the loop is left early, and when something is raised in it."""
    trainer = Trainer(run.config.with_(training={"log_interval": 3}), tmp_path / "run")
    seen = [(report.step, len(steps_of(tmp_path / "run"))) for report in trainer.steps(until=4)]
    assert seen == [(1, 0), (2, 0), (3, 3), (4, 3)] and len(steps_of(tmp_path / "run")) == 4
    for report in trainer.steps():
        assert report.step == 5
        break
    with pytest.raises(ZeroDivisionError):
        for report in trainer.steps():
            report.step // 0
    assert trainer.step == len(steps_of(tmp_path / "run")) == 6
    once, whole = (without_times(steps_of(folder)) for folder in (tmp_path / "run", run.run_dir))
    assert once == whole  # nothing lost, or done twice


def test_steps_obey_the_controls(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path), tmp_path / "run")
    for report in trainer.steps():
        if report.step == 3:
            trainer.stop()
    assert trainer.step == 3
    with pytest.raises(ValueError, match=r"^until=7 is beyond the run's 6 steps; raise training.steps$"):
        next(trainer.steps(until=7))


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_rows_of_the_record(run: Trainer) -> None:
    rows = steps_of(run.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [2 * 2 * 16 * n for n in range(1, 7)]
    for row in rows:
        documented = {"step", "tokens", "loss", "losses", "lr", "grad_norm", "expert_load", "seconds", "tokens_per_s"}
        assert set(row) == documented | {"norm_deviation"}
        assert set(row["losses"]) == {"next_token", "future_2", "moe_balance", "router_z", "mod_predictor"}
        assert row["loss"] == pytest.approx(sum(row["losses"].values()), rel=1e-6)
        assert [len(load) for load in row["expert_load"]] == [4, 4]
        assert [sum(load) for load in row["expert_load"]] == pytest.approx([1, 1], abs=1e-6)
        assert row["tokens_per_s"] > 0
    assert rows[0]["seconds"] <= rows[-1]["seconds"]
    assert [row["step"] for row in evaluations_of(run.run_dir)] == [0, 4, 6]
    assert all(len(row["mod_agreement"]) == 6 for row in evaluations_of(run.run_dir))
    # the start: ln V + var(logits) / 2 for the next token, which has two thirds of the weight
    config = run.config.model
    start = math.log(config.vocab_size) + config.d_model * config.init_std**2 / 2
    assert rows[0]["losses"]["next_token"] == pytest.approx(start * 2 / 3, rel=0.01)


def test_validation_loss_is_the_mean_over_every_target(run: Trainer) -> None:
    tokens = torch.from_numpy(np.asarray(run.dataset.validation, dtype=np.int64))
    model = run.model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            total += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    measured = evaluations_of(run.run_dir)[-1]["validation_loss"]
    assert (len(tokens) - 1) % 16, "the last window should be a short one"
    assert measured == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def test_the_summary_and_the_files_beside_it(run: Trainer) -> None:
    summary = summary_of(run.run_dir)
    documented = {"status", "train_loss", "validation_loss", "trigram_loss", "bits_per_byte", "steps", "tokens"}
    assert documented | {"wall_s", "tokens_per_s", "seed", "commit", "findings"} <= set(summary)
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 6, 384)
    assert (summary["seed"], summary["findings"]) == (0, None)
    validation = evaluations_of(run.run_dir)[-1]["validation_loss"]
    assert summary["validation_loss"] == validation
    ids = [int(i) for i in run.dataset.validation[1:]]
    n_bytes = len(run.dataset.tokenizer.decode(ids, skip_special_tokens=True).encode())
    assert summary["bits_per_byte"] == pytest.approx(validation * len(ids) / math.log(2) / n_bytes, rel=1e-9)
    assert summary["train_loss"] == pytest.approx(sum(row["loss"] for row in steps_of(run.run_dir)[-2:]) / 2)
    names = {path.name for path in run.run_dir.iterdir()} - {".lock"}
    assert names == {"config.yaml", "tokenizer.json", "record.jsonl", "checkpoints", "summary.json"}
    assert from_dict(yaml.safe_load((run.run_dir / "config.yaml").read_text())) == run.config


# ---- what a caller hands in -----------------------------------------------------------------------------------------


def test_a_model_and_optimizers_of_the_users_own(tmp_path: Path) -> None:
    """The optimizers as anyone makes them: without names, each at an LR of its own, to which it warms up."""
    config = tiny(tmp_path, training={"steps": 2, "warmup_steps": 2})
    model = build_model(config.model, seed=7)
    heads, rest = [*model.lm_heads.parameters()], [p for n, p in model.named_parameters() if "lm_heads" not in n]
    before = heads[0].detach().clone()
    own = [torch.optim.SGD(heads, lr=0.5), torch.optim.SGD(rest, lr=0.1)]
    trainer = train(config, tmp_path / "run", model=model, optimizers=own)
    assert trainer.model is model and trainer.optimizers == own
    assert [sorted(row["lr"].values()) for row in steps_of(tmp_path / "run")] == [[0.05, 0.25], [0.1, 0.5]]
    stored = load_checkpoint(step_path(tmp_path / "run", 2))["model_state_dict"]
    assert all(stored[name].equal(p) for name, p in model.named_parameters())
    assert not heads[0].equal(before)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_an_evaluation_puts_each_modules_mode_back(run: Trainer) -> None:
    model = build_model(run.config.model)
    model.layers[0].eval()  # a part that somebody froze
    before = [module.training for module in model.modules()]
    evaluate(model, run.dataset.validation[:50], 2, contextlib.nullcontext)
    assert [module.training for module in model.modules()] == before and 0 < sum(before) < len(before)


def test_an_evaluation_says_how_far_it_is(run: Trainer) -> None:
    model, controls, shares = build_model(run.config.model), Controls(), []
    model.final_norm.register_forward_hook(lambda *_: shares.append(controls.evaluated))
    length = model.config.max_seq_len
    evaluate(model, run.dataset.validation[: 8 * length + 1], 2, contextlib.nullcontext, controls)
    assert shares == [0.0, 0.25, 0.5, 0.75]
    assert controls.evaluated == 1.0


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite(tmp_path: Path, monkeypatch) -> None:
    config = tiny(tmp_path, training={"steps": 5, "log_interval": 5, "save_interval": 1, "keep_checkpoints": 9})
    trainer = Trainer(config, tmp_path / "run")
    report = trainer.model.report

    def from_step_3_on(ids: torch.Tensor, generator: torch.Generator):
        found = report(ids, generator=generator)
        factor = math.nan if trainer.step >= 3 else 1.0
        return found._replace(terms=found.terms | {"next_token": found.terms["next_token"] * factor})

    monkeypatch.setattr(trainer.model, "report", from_step_3_on)
    with refused(RunError, match=r"^step 3: the gradient norm is nan, .* lower training.max_lr, or resume"):
        trainer.fit()
    assert summary_of(tmp_path / "run")["status"] == "failed"
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step_000001.pt", "step_000002.pt"]
    for path in saved:
        assert all(p.isfinite().all() for p in load_checkpoint(path)["model_state_dict"].values())
    assert train(config, tmp_path / "run", resume=True).step == 5
