"""What a watch does when something of its own fails, and how findings are written."""

import json

import torch
from torch.optim import AdamW
from toy import finding, said, toy, train

from moe_lab.health import Watch
from moe_lab.health.during.bank import Bank
from moe_lab.health.during.rule import Rule


def test_a_broken_rule_is_named_once_and_asked_again() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    asked = []

    def broken(state):
        asked.append(state.step)
        if state.step != 20:
            raise ZeroDivisionError("division by zero")
        return {"loss": {}}

    with Watch(model, optimizer) as watch:
        watch.rules = (Rule("reach", "info", broken, "said at last", ""), *watch.rules)
        losses = train(watch, model, [optimizer], 30)
    assert len(losses) == 30 and watch.state.last_read == 30 and asked == [10, 20, 30, 30]
    assert said(watch) == ["not_measured"] and "ZeroDivisionError" in finding(watch, "not_measured").message
    assert finding(watch, "reach").message == "said at last" and finding(watch, "reach").step == 20


def test_a_watch_that_fails_stops_and_the_training_goes_on(monkeypatch, tmp_path) -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    watch = Watch(model, optimizer, log=tmp_path / "log.jsonl")
    monkeypatch.setattr(Bank, "read", lambda self, step: [][0])
    losses = train(watch, model, [optimizer], 30)
    assert len(losses) == 30 and watch.step == 10 and watch.handles == []
    assert said(watch) == ["not_measured"] and "IndexError" in watch.findings[-1].message
    assert "IndexError" in (tmp_path / "log.jsonl").read_text()


def test_a_log_that_vanishes_does_not_end_the_training(tmp_path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    model = toy()
    optimizer = AdamW(model.parameters(), lr=1e-6)  # a finding
    watch = Watch(model, optimizer, log=folder / "log.jsonl")
    (folder / "log.jsonl").unlink()
    folder.rmdir()
    assert len(train(watch, model, [optimizer], 30)) == 30
    assert "not_measured" in said(watch)


def test_findings_are_written_at_once_a_line_each(tmp_path) -> None:
    log = tmp_path / "findings.jsonl"
    model = toy(dtype=torch.bfloat16)
    optimizer = AdamW([p for p in model.parameters() if p is not model.head.weight], lr=1e-4)
    watch = Watch(model, optimizer, log=log)
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()]  # noqa: E731
    assert [f["rule"] for f in read()][:1] == ["not_in_optimizer"]
    for _ in range(60):
        train(watch, model, [optimizer], 1)
        assert read() == [f.to_dict() for f in watch.findings]
    assert {"lost_updates", "not_in_optimizer"} <= {f["rule"] for f in read()}
    assert all(f["severity"] in ("error", "warning", "info") and f["advice"] for f in read())
    assert len({(f["rule"], f["severity"], f["where"]) for f in read()}) == len(read())  # each once
