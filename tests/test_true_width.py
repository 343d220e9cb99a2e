"""The rounding shadow against naive arithmetic, the prediction against closed forms, and both phases on tiny models."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch
from helpers import random_ids, seeded
from tiny_run import write_text
from torch import nn

from benchmarks.true_width import one_block, true_width
from benchmarks.true_width.one_block import Cell, start_values
from benchmarks.true_width.shadow import Displacement, Shadow, kept, kind_of, share
from benchmarks.true_width.true_width import line_at, main, matching_factor, result_path
from moe_lab.config import ConfigError, OptimizerConfig
from moe_lab.failures import results
from moe_lab.failures.results import load_true_width
from moe_lab.health.measures import predict_lost
from moe_lab.optim import build_optimizers
from moe_lab.train import Trainer


def bf16(x: float) -> float:
    """The nearest bfloat16, ties to even, by the bits of the nearest float32."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def test_what_is_kept_equals_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.randn(200, generator=generator) * 0.02, torch.ones(9), torch.zeros(1)])
    direction = torch.randn(210, generator=generator)
    lrs = torch.tensor([1e-4, 1e-3, 0.05])
    realised, intended, lost = kept(weight, direction, lrs)
    for i, lr in enumerate(lrs):
        for j, (w, u) in enumerate(zip(weight.tolist(), direction.tolist(), strict=True)):
            step = np.float32(lr.item()) * np.float32(u)
            moved = bf16(float(np.float32(bf16(w)) + step)) - bf16(w)
            assert realised[i, j].item() == pytest.approx(moved, abs=1e-12)
            assert intended[i, j].item() == pytest.approx(float(step), rel=1e-6)
            assert lost[i, j].item() == (moved == 0 and u != 0)
    assert 0.1 < lost[0].float().mean() < 0.9


def sgd_run(dtype: torch.dtype, lrs: list[float]) -> tuple[Shadow, list[tuple]]:
    """Three updates of an embedding and a matrix, and each update's (name, weight before, gradient)."""
    model = seeded(lambda: nn.ModuleDict({"embedding": nn.Embedding(8, 4), "gate_proj": nn.Linear(4, 6, bias=False)}))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, weight_decay=0.1
    )  # decay moves rows without a gradient too
    shadow, seen = Shadow(model, [optimizer], lrs, dtype), []
    for ids in ([0, 1, 2], [1, 2, 5], [0, 5, 5]):
        optimizer.zero_grad()
        model["gate_proj"](model["embedding"](torch.tensor(ids))).square().sum().backward()
        seen += [(name, p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()]
        optimizer.step()
    return shadow, seen


def test_the_shadow_equals_a_naive_sum_over_updates_and_elements():
    lrs = [1e-4, 3e-3]
    shadow, seen = sgd_run(torch.bfloat16, lrs)
    table = shadow.read()
    for name in ("embedding.weight", "gate_proj.weight"):
        for lr in lrs:
            ru = uu = lost = n = 0.0
            touched = set()
            for _, weight, grad in (entry for entry in seen if entry[0] == name):
                for i, (w, g) in enumerate(zip(weight.flatten().tolist(), grad.flatten().tolist(), strict=True)):
                    touched |= {i} if g else set()
                    if i not in touched:
                        continue
                    u = -lr * (g + 0.1 * w)
                    r = bf16(bf16(w) + u) - bf16(w)
                    ru, uu, lost, n = ru + r * u, uu + u * u, lost + (r == 0 and u != 0), n + (u != 0)
            found = share([table[name][f"{lr:.6g}"]])
            assert found["rho"] == pytest.approx(ru / uu, rel=1e-3)  # SGD's float32 step rounds its direction
            assert found["lost"] == pytest.approx(lost / n, abs=0.02)
    assert share([table["embedding.weight"]["0.0001"]])["lost"] > 0.1


def test_a_sample_stands_for_the_whole_tensor():
    model = nn.Sequential(seeded(nn.Linear, 200, 100, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shadow = Shadow(model, [optimizer], [1e-3])
    seeded(lambda: model[0](torch.randn(50, 200)).square().sum().backward())
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    realised, intended, _ = kept(weight.flatten(), -grad.flatten(), torch.tensor([1e-3]))
    rho = ((realised * intended).sum() / intended.square().sum()).item()
    row = shadow.read()["0.weight"]["0.001"]
    assert row[1] == pytest.approx(intended.square().sum().item(), rel=0.1)
    assert row[6] == pytest.approx(weight.numel(), rel=1e-6)
    assert abs(share([row])["rho"] - rho) < 4 * share([row])["error"] + 1e-6


def test_float32_in_bf16s_place_keeps_everything():
    shadow, _ = sgd_run(torch.float32, [1e-3])
    for table in shadow.read().values():
        assert share([table["0.001"]])["rho"] == pytest.approx(1, abs=1e-3)
        assert share([table["0.001"]])["lost"] == 0


def test_shares_of_several_tensors_add_up_with_their_standard_error():
    generator = np.random.default_rng(0)
    ru, uu = generator.normal(size=50), generator.random(50)
    row = lambda a, b: [a.sum(), b.sum(), (a**2).sum(), (a * b).sum(), (b**2).sum(), 3, 10]  # noqa: E731
    whole = share([row(ru, uu)])
    parts = share([row(ru[:20], uu[:20]), row(ru[20:], uu[20:])])
    assert parts["rho"] == pytest.approx(whole["rho"]) and parts["error"] == pytest.approx(whole["error"])
    rho = ru.sum() / uu.sum()
    assert whole["error"] == pytest.approx(math.sqrt(((ru - rho * uu) ** 2).sum()) / uu.sum())
    assert math.isnan(share([[0.0] * 7])["rho"])


def test_a_line_is_read_off_at_the_width():
    points = [(192, 0.9), (384, 0.75), (768, 0.7)]
    slope, offset = np.polyfit(np.log2([w for w, _ in points]), [v for _, v in points], 1)
    assert line_at(1536, points) == pytest.approx(slope * math.log2(1536) + offset)


@pytest.mark.parametrize("std", ["0.02", "fan_in"])
def test_matching_lrs_give_the_share_of_the_true_width(std: str):
    """On drawn matrices, a quarter as wide: with ratio 4 the square roots are powers of two, so rounding is the same."""
    ratio, width, lr = 4.0, 1024, 1e-3
    sizes = {"0.02": (0.02, 0.02), "fan_in": (width**-0.5, (width / ratio) ** -0.5)}
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(7))
    wide, narrow = (drawn * size for size in sizes[std])
    name, p = "layers.0.ffn.up_proj.weight", torch.empty(4, 4)
    factor = matching_factor(name, p, std, ratio)
    expected = predict_lost(wide, lr * width**-0.5).realised
    assert predict_lost(narrow, lr * factor * (width / ratio) ** -0.5).realised == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected < 0.95
    assert matching_factor("embedding.weight", p, std, ratio) == 1
    assert matching_factor("layers.0.ffn_norm.weight", p[0], std, ratio) == 1
    assert matching_factor("lm_heads.0.weight", p, std, ratio) == {"0.02": 1, "fan_in": 2}[std]


def test_start_values_have_the_stated_deviation():
    config = Cell(block="moe", d_model=192).config().model
    plain, scaled = start_values(config, "0.02"), start_values(config, "fan_in")
    for (name, p), (_, q) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        wanted = q.shape[-1] ** -0.5 if kind_of(name) not in ("embedding", "norms") else None
        if wanted is None:
            assert torch.equal(p, q)
        else:
            assert q.std().item() == pytest.approx(wanted, rel=0.05), name
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


# ---- both phases, on models of width 24 to 192 -----------------------------------------------------------------------

STEPS = 6


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Both phases, short: width 192 from 24, 48 and 96, on a text of made-up words. Returns the cells that were run."""
    write_text(tmp_path)
    original, run = Cell.config, one_block.run_cell
    model = {"vocab_size": 300, "max_seq_len": 16, "moe_router_hidden": 8}
    data = {"source": str(tmp_path / "text.txt"), "max_bytes": None}
    small = lambda cell: original(cell).with_(data=data, model=model, training={"batch_size": 2})  # noqa: E731
    ran = []
    monkeypatch.setattr(Cell, "config", small)
    monkeypatch.setattr(one_block, "run_cell", lambda cell, *a: ran.append(cell) or run(cell, *a, progress=False))
    for module in (one_block, true_width, results):
        monkeypatch.setattr(module, "MARKS", (4, STEPS))
    for module in (one_block, true_width):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(true_width, "PAIR", {"dense": STEPS, "moe": STEPS})
    monkeypatch.setattr(true_width, "WINDOW", 2)
    return ran


def test_a_prediction_then_a_measurement(tiny, tmp_path, capsys):
    assert main(["measure", "--width", "192"]) == 2
    assert "no prediction yet" in capsys.readouterr().err
    assert main(["predict", "--width", "192"]) == 0
    assert {c.d_model for c in tiny} == {24, 48, 96}
    with pytest.raises(ConfigError, match="no measurement yet"):
        load_true_width(result_path(192))
    n_before = len(tiny)
    assert main(["measure", "--width", "192"]) == 0
    assert {c.d_model for c in tiny[n_before:]} == {192}
    found = load_true_width(result_path(192))
    keys = {(row["block"], row["std"]) for row in found.shares}
    assert keys == {("dense", "0.02"), ("dense", "fan_in"), ("moe", "0.02")}
    muon = {
        row["lr"]: row for row in found.shares if (row["block"], row["std"], row["kind"]) == ("dense", "0.02", "Muon")
    }
    assert muon[1e-4]["measured"] < muon[1e-3]["measured"] < 1.1
    assert all(abs(row["predicted"] - row["measured"]) < 0.2 for row in muon.values())
    assert {(row["block"], row["mark"]) for row in found.nats} == {(b, m) for b in ("dense", "moe") for m in (4, STEPS)}
    assert found.displacement["dense"]["kinds"]["norms"]["rho"] == 0  # 3e-4 beside 1
    assert set(found.displacement["moe"]["kinds"]) >= {"q_proj", "down_proj", "embedding", "head"}
    at_1e3 = {
        row["d_model"]: row for row in found.widths if (row["block"], row["std"], row["lr"]) == ("moe", "0.02", 1e-3)
    }
    assert (
        set(at_1e3) == {24, 48, 96, 192} and at_1e3[24]["rho"] > at_1e3[192]["rho"]
    )  # Muon's step is lr / sqrt(fan_in)
    stored = json.loads((tmp_path / "true_width" / "result_192.json").read_text())
    assert stored["prediction"]["written"] <= stored["measured"]["begun"]
    assert main(["predict", "--width", "192"]) == 2
    assert "must precede" in capsys.readouterr().err


def test_the_experts_pair_alone_gives_back_what_the_measurement_had(tiny, tmp_path, capsys):
    """On a machine that has none of the runs: the same numbers again, and a provenance of their own."""
    main(["predict", "--width", "192"])
    assert main(["experts", "--width", "192"]) == 2
    assert "no measurement to add to" in capsys.readouterr().err
    main(["measure", "--width", "192"])
    whole, path = load_true_width(result_path(192)), tmp_path / "true_width" / "result_192.json"
    stored = json.loads(path.read_text())
    stored["measured"]["nats"]["moe"], stored["measured"]["displacement"]["moe"] = {}, {}
    path.write_text(json.dumps(stored))
    assert load_true_width(result_path(192)).nats != whole.nats
    for run in path.parent.glob("[!r]*.json"):
        run.unlink()
    assert main(["experts", "--width", "192"]) == 0
    again = load_true_width(result_path(192))
    assert again[:4] == whole[:4]
    assert whole.provenance in again.provenance and "the experts' pair from" in again.provenance
    shares = {f"{r['lr']:g}": r["measured"] for r in whole.shares if (r["block"], r["kind"]) == ("moe", "Muon")}
    assert json.loads(path.read_text())["measured"]["experts"]["rho_again"] == pytest.approx(shares, rel=1e-4)


def test_a_run_older_than_the_prediction_is_refused(tiny, tmp_path, capsys):
    one_block.compute(true_width.true_cells(192)[:1])
    main(["predict", "--width", "192"])
    path = tmp_path / "true_width" / "result_192.json"
    path.write_text(path.read_text().replace('"written": "20', '"written": "21'))
    assert main(["measure", "--width", "192"]) == 2
    assert "younger than a run" in capsys.readouterr().err


def test_ctrl_c_leaves_what_is_finished(tiny, monkeypatch):
    inner, calls = one_block.run_cell, []

    def interrupted(cell, *args):
        calls.append(cell)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(cell, *args)

    monkeypatch.setattr(one_block, "run_cell", interrupted)
    assert main(["predict", "--width", "192"]) == 130
    assert main(["predict", "--width", "192"]) == 0
    assert len(calls) == len(true_width.narrow_cells(192)) + 1


def test_an_unfinished_run_counts_with_what_it_has(tiny, monkeypatch):
    main(["predict", "--width", "192"])
    whole = Trainer.update

    def update(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        whole(trainer)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "update", update)
        assert main(["measure", "--width", "192"]) == 130
    rows = load_true_width(result_path(192)).shares
    assert {(row["block"], row["std"], row["updates"]) for row in rows} == {("dense", "0.02", 4)}
    assert main(["measure", "--width", "192"]) == 0
    assert {(row["block"], row["std"]) for row in load_true_width(result_path(192)).shares} > {("dense", "0.02")}


def test_float32_in_bf16s_place_costs_no_nats(tiny, monkeypatch):
    small = Cell.config
    cells = [Cell(block="dense", d_model=48, steps=STEPS, parameters=p) for p in ("float32", "bfloat16")]
    one_block.compute(cells)
    sick = true_width.nats(48, "dense", cells)
    monkeypatch.setattr(Cell, "config", lambda cell: small(cell).with_(precision={"parameters": "float32"}))
    monkeypatch.setattr(one_block, "FORMAT", -1)  # other runs than those above
    one_block.compute(cells)
    sound = true_width.nats(48, "dense", cells)
    assert [sound[mark][loss] for mark in sound for loss in ("training", "validation")] == [0.0] * 4
    assert any(sick[mark][loss] != 0 for mark in sick for loss in ("training", "validation"))


def test_a_wrong_width_is_a_line(capsys):
    assert main(["predict", "--width", "100"]) == 2
    assert capsys.readouterr().err == (
        "error: --width=100 must be a multiple of 192: an eighth of it has 12 heads of even width\n"
    )


# ---- realised against intended in a bf16 run -------------------------------------------------------------------------


def test_displacement_equals_a_naive_sum_of_intended_steps():
    """SGD: the step that was meant is -lr · (gradient + decay · weight), of what bf16 holds. Decay alone does not count."""
    model = seeded(lambda: nn.ModuleDict({"embedding": nn.Embedding(6, 4), "norm": nn.RMSNorm(4)})).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, weight_decay=0.1)
    displacement = Displacement(model, [optimizer], ())
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    meant = {name: torch.zeros_like(p) for name, p in start.items()}
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in start.items()}
    for ids in ([0, 1, 2], [1, 2, 3], [0, 3, 3]):
        optimizer.zero_grad()
        model["norm"](model["embedding"](torch.tensor(ids))).float().exp().sum().backward()
        for name, p in model.named_parameters():
            meant[name] -= 2e-3 * (p.grad.float() + 0.1 * p.detach().float())
            touched[name] |= p.grad != 0
        optimizer.step()
    for name, p in model.named_parameters():
        gone, u = (p.detach().float() - start[name]).double(), (meant[name] * touched[name]).double()
        found = share([displacement.read()[name]])
        assert found["rho"] == pytest.approx(((gone * u).sum() / (u * u).sum()).item(), rel=1e-3)
        assert found["lost"] == pytest.approx(((gone == 0) & (u != 0)).sum().item() / (u != 0).sum().item())
    assert displacement.read()["embedding.weight"][6] == 4 * 4  # rows 4 and 5 never had a gradient


def test_float32_weights_go_where_they_were_meant_to():
    """Every kind of tensor of both optimizers, and of a stack the first expert."""
    config = Cell(block="moe", d_model=24).config().model
    model = start_values(config, "0.02")
    optimizers = build_optimizers(model, OptimizerConfig(), 1e-3)
    displacement = Displacement(model, optimizers, ("q_proj", "down_proj"))
    for seed in range(3):
        sum(model.losses(random_ids(2, 9, seed=seed)).values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    table = {kind_of(name): share([sums]) for name, sums in displacement.read().items()}
    assert set(table) == {"embedding", "norms", "q_proj", "down_proj", "hidden_proj", "gate", "head"}
    for kind, found in table.items():
        assert found["rho"] == pytest.approx(1, abs=1e-3), kind
        assert found["lost"] == 0, kind


def test_the_committed_result_was_predicted_first():
    found = load_true_width()
    stored = json.loads(true_width.result_path(1536).read_text())
    assert stored["prediction"]["written"] <= stored["measured"]["begun"]
    assert all(d != 1536 for _, d, *_ in stored["prediction"]["runs"])
    share_at = {(r["block"], r["std"], r["d_model"]): r["rho"] for r in found.widths if r["lr"] == 1e-3}
    dense = [share_at["dense", "0.02", d] for d in (192, 384, 768, 1536)]
    assert dense == sorted(dense, reverse=True) and dense[-1] < 0.6
    assert max(n["updates"] for n in found.shares if n["block"] == "dense") >= 150
