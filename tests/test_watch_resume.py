"""A resumed run's watch goes on where the first one ended."""

import copy
import json

import pytest
import torch
from torch.optim import AdamW
from toy import said, toy, train

from moe_lab.health import Watch


def rows(log) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def run(log, until: int, start: int = 0, model=None, optimizer=None, **options):
    """Updates `start` … `until` of one and the same training under a watch of their own."""
    model = model or toy(dtype=torch.bfloat16)
    optimizer = optimizer or AdamW(model.parameters(), lr=2e-4)
    watch = Watch(model, optimizer, budget=100, start_step=start, log=log, **options)
    train(watch, model, [optimizer], until - start, start=start)
    return watch, model, optimizer


def test_steps_are_the_runs_own_and_checks_fall_on_the_same_ones(tmp_path, monkeypatch) -> None:
    checks = []
    check = Watch.check
    monkeypatch.setattr(Watch, "check", lambda self: checks.append(self.step) or check(self))
    watch, model, optimizer = run(tmp_path / "log", 24)
    watch.close()
    watch, *_ = run(tmp_path / "log", 48, 24, model, optimizer)
    assert checks == [10, 20, 30, 40]
    assert (watch.step, watch.state.n_seen, watch.state.last_read) == (48, 24, 40)
    assert {r.with_gradient for r in watch.readings} == {3}  # updates 26, 31, 36
    assert watch.state.step == 48


def test_what_was_found_before_is_not_found_again(tmp_path) -> None:
    """Static findings, a rule that speaks once, and the kinds that lose updates: the file of the whole run has them once."""
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(whole, 60)
    watch, model, optimizer = run(resumed, 24)
    watch.close()
    before = rows(resumed)
    assert {"lost_updates", "weight_decay_on_norms"} <= {row["rule"] for row in before}
    watch, *_ = run(resumed, 60, 24, model, optimizer)
    after = rows(resumed)
    assert after[: len(before)] == before and [f.to_dict() for f in watch.findings] == after
    assert len({(row["rule"], row["severity"], row["where"]) for row in after}) == len(after)
    assert [row for row in rows(whole) if row["step"] <= 24] == before


def test_findings_beyond_the_checkpoint_are_taken_out(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    watch, model, optimizer = run(log, 15)
    saved = copy.deepcopy((model, optimizer.state_dict()))
    train(watch, model, [optimizer], 20, start=15)
    watch.close()  # killed at 35; the checkpoint holds 15
    assert max(row["step"] for row in rows(log)) > 15
    log.write_text(log.read_text() + '{"rule": "lost_up', encoding="utf-8")  # in the middle of a line
    resumed = saved[0]
    optimizer = AdamW(resumed.parameters(), lr=2e-4)
    optimizer.load_state_dict(saved[1])
    watch, *_ = run(log, 15, 15, resumed, optimizer)
    assert max(row["step"] for row in rows(log)) <= 15 and [f.to_dict() for f in watch.findings] == rows(log)
    train(watch, resumed, [optimizer], 25, start=15)
    assert "lost_updates" in said(watch) and rows(log) == [f.to_dict() for f in watch.findings]


def test_a_log_of_something_else_is_refused(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    for text in ("hello\n", '{"step": 3}\n', "[1]\n"):
        log.write_text(text)
        with pytest.raises(ValueError, match="holds no findings") as caught:
            run(log, 20, 20)
        assert "\n" not in str(caught.value) and log.read_text() == text


def test_a_resumed_model_is_not_taken_for_a_new_one(tmp_path) -> None:
    """Neither its first loss under this watch nor its logits are those of a start, also where no norm shows it."""
    model = toy()
    del model.norm
    model.norm = torch.nn.Identity()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    train(None, model, [optimizer], 100)
    watch = Watch(model, optimizer, start_step=100)
    train(watch, model, [optimizer], 40, start=100, reported=lambda loss: 0 * loss + 2.0)  # converged: it stands still
    watch.check()
    assert watch.state.forward.logit_variance is None and not watch.state.is_fresh
    assert said(watch) == []
