"""The rounding shadow against naive arithmetic, the prediction against closed forms, and both phases on tiny models."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from checks.true_width import load_true_width
from helpers import refused, seeded
from tiny_run import write_text
from torch import nn

from benchmarks.true_width import one_block, true_width
from benchmarks.true_width.one_block import OneBlock, rows_of, scale
from benchmarks.true_width.shadow import Shadow, part_of, share
from benchmarks.true_width.true_width import command, line_at, matching_factor, result_path
from moe_lab.config import ConfigError
from moe_lab.failures import experiments
from moe_lab.health.measures import predict_lost
from moe_lab.model import build_model
from moe_lab.train.command import exit_code


def bf16(x: float) -> float:
    """The nearest bfloat16, ties to even, by the bits of the nearest float32."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def sgd_run(lrs: list[float]) -> tuple[Shadow, list[tuple]]:
    """Three updates of an embedding and a matrix, and each update's (name, weight before, gradient)."""
    model = seeded(lambda: nn.ModuleDict({"embedding": nn.Embedding(8, 4), "gate_proj": nn.Linear(4, 6, bias=False)}))
    # decay moves rows without a gradient too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    shadow, seen = Shadow(model, [optimizer], lrs), []
    for ids in ([0, 1, 2], [1, 2, 5], [0, 5, 5]):
        optimizer.zero_grad()
        model["gate_proj"](model["embedding"](torch.tensor(ids))).square().sum().backward()
        seen += [(name, p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()]
        optimizer.step()
    return shadow, seen


def test_the_shadow_equals_a_naive_sum_over_updates_and_elements():
    lrs = [1e-4, 3e-3]
    shadow, seen = sgd_run(lrs)
    table = shadow.read()
    for name in ("embedding.weight", "gate_proj.weight"):
        for lr in lrs:
            ru = uu = 0.0
            touched = set()
            for _, weight, grad in (entry for entry in seen if entry[0] == name):
                for i, (w, g) in enumerate(zip(weight.flatten().tolist(), grad.flatten().tolist(), strict=True)):
                    touched |= {i} if g else set()
                    if i not in touched:
                        continue
                    u = -lr * (g + 0.1 * w)
                    r = bf16(bf16(w) + u) - bf16(w)
                    ru, uu = ru + r * u, uu + u * u
            # SGD's float32 step rounds its direction
            assert share([table[name][f"{lr:.6g}"]]) == pytest.approx(ru / uu, rel=1e-3)


def test_a_sample_stands_for_the_whole_tensor():
    model = nn.Sequential(seeded(nn.Linear, 200, 100, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shadow = Shadow(model, [optimizer], [1e-3])
    seeded(lambda: model[0](torch.randn(50, 200)).square().sum().backward())
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    start, intended = weight.bfloat16().float(), -1e-3 * grad
    realised = (start + intended).bfloat16().float() - start
    rho = ((realised * intended).sum() / intended.square().sum()).item()
    row = shadow.read()["0.weight"]["0.001"]
    assert row[1] == pytest.approx(intended.square().sum().item(), rel=0.1)
    assert share([row]) == pytest.approx(rho, abs=0.02)


def test_a_line_is_read_off_at_the_width():
    # one octave apart: the slope is half of last minus first, and 1536 lies two octaves past the middle
    expected = (0.9 + 0.75 + 0.7) / 3 + 2 * (0.7 - 0.9) / 2
    assert line_at(1536, [(192, 0.9), (384, 0.75), (768, 0.7)]) == pytest.approx(expected)


@pytest.mark.parametrize("std", ["0.02", "fan_in"])
def test_matching_lrs_give_the_share_of_the_true_width(std: str):
    """On drawn matrices, a quarter as wide: with ratio 4 the square roots are powers of two, so rounding is the same."""
    ratio, width, lr = 4.0, 1024, 1e-3
    sizes = {"0.02": (0.02, 0.02), "fan_in": (width**-0.5, (width / ratio) ** -0.5)}
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(7))
    wide, narrow = (drawn * size for size in sizes[std])
    name, p = "layers.0.ffn.up_proj.weight", torch.empty(4, 4)
    factor = matching_factor(name, p, std, ratio)
    expected = predict_lost(wide, lr * width**-0.5)
    assert predict_lost(narrow, lr * factor * (width / ratio) ** -0.5) == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected < 0.95
    assert matching_factor("embedding.weight", p, std, ratio) == 1
    assert matching_factor("layers.0.ffn_norm.weight", p[0], std, ratio) == 1
    assert matching_factor("lm_heads.0.weight", p, std, ratio) == {"0.02": 1, "fan_in": 2}[std]


def test_start_values_have_the_stated_deviation():
    config = OneBlock(block="moe", d_model=192).config().model
    plain, scaled = build_model(config), build_model(config)
    scale(scaled, "fan_in", config.init_std)
    for (name, p), (_, q) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        if part_of(name) in ("embedding", "norms"):
            assert torch.equal(p, q)
        else:
            assert q.std().item() == pytest.approx(q.shape[-1] ** -0.5, rel=0.05), name


def those(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if row.items() >= wanted.items()]


# ---- both phases, on models of width 24 to 192 -----------------------------------------------------------------------

STEPS = 6


def main(*argv: str) -> int:
    return exit_code(command, argv)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """A folder with the runs that predict width 192, made once, and the prediction."""
    folder = tmp_path_factory.mktemp("predicted")
    with pytest.MonkeyPatch.context() as context:
        made = make_small(context, folder, write_text(folder))
        assert main("predict", "--width", "192") == 0
    assert {run.d_model for run in made} == {24, 48, 96}
    return folder


def make_small(monkeypatch, folder, text) -> list[OneBlock]:
    """Both phases, short: width 192 from 24, 48 and 96, on a text of made-up words. Returns the runs that were made."""
    original, probe = OneBlock.config, one_block.rounding
    model = {"vocab_size": 300, "max_seq_len": 16, "moe_router_hidden": 8}
    data = {"source": str(text), "max_bytes": None}
    made = []

    def small(run: OneBlock):
        return original(run).with_(data=data, model=model, training={"batch_size": 2})

    def noted(trainer, one_block):
        made.append(OneBlock(**one_block))
        return probe(trainer, one_block)

    monkeypatch.setattr(OneBlock, "config", small)
    monkeypatch.setattr(one_block, "rounding", noted)
    for module in (one_block, true_width):
        monkeypatch.setattr(module, "MARKS", (4, STEPS))
    for module in (experiments, true_width):
        monkeypatch.setattr(module, "CACHE", folder)
    monkeypatch.setattr(true_width, "PAIR", {"dense": STEPS, "moe": STEPS})
    monkeypatch.setattr(true_width, "WINDOW", 2)
    return made


@pytest.fixture
def tiny(tmp_path, monkeypatch, predicted):
    """Both phases, before the first run."""
    return make_small(monkeypatch, tmp_path, predicted / "text.txt")


@pytest.fixture
def after_prediction(tiny, tmp_path, predicted):
    """Both phases, after the first."""
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    return tiny


def test_a_prediction_comes_first(tiny, capsys):
    assert main("measure", "--width", "192") == 2
    assert "no prediction yet" in capsys.readouterr().err


def test_a_prediction_then_a_measurement(after_prediction, tmp_path, capsys):
    with refused(ConfigError, match="no measurement yet"):
        load_true_width(result_path(192))
    assert main("measure", "--width", "192") == 0
    assert {run.d_model for run in after_prediction} == {192}
    found = load_true_width(result_path(192))
    keys = {(row["block"], row["std"]) for row in found.shares}
    assert keys == {("dense", "0.02"), ("dense", "fan_in"), ("moe", "0.02")}
    muon = {row["lr"]: row for row in those(found.shares, block="dense", std="0.02", kind="Muon")}
    assert muon[1e-4]["measured"] < muon[1e-3]["measured"] < 1.1
    assert all(abs(row["predicted"] - row["measured"]) < 0.2 for row in muon.values())
    assert {(row["block"], row["mark"]) for row in found.nats} == {(b, m) for b in ("dense", "moe") for m in (4, STEPS)}
    at_1e3 = {row["d_model"]: row["rho"] for row in those(found.widths, block="moe", std="0.02", lr=1e-3)}
    assert set(at_1e3) == {24, 48, 96, 192} and at_1e3[24] > at_1e3[192]  # Muon's step is lr / sqrt(fan_in)
    stored = json.loads((tmp_path / "true_width" / "result_192.json").read_text())
    assert stored["prediction"]["written"] <= stored["measured"]["begun"]
    assert {row["kind"] for row in those(found.shares, block="moe")} >= {"q_proj", "down_proj", "embedding", "head"}
    assert main("predict", "--width", "192") == 2
    assert "must precede" in capsys.readouterr().err


def test_a_run_older_than_the_prediction_is_refused(after_prediction, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(true_width, "true_runs", lambda width: [OneBlock(block="moe", d_model=width, steps=STEPS)])
    path = tmp_path / "true_width" / "result_192.json"
    path.write_text(path.read_text().replace('"written": "20', '"written": "21'))
    assert main("measure", "--width", "192") == 2
    assert "younger than a run" in capsys.readouterr().err


def test_float32_in_bf16s_place_costs_no_nats(tiny, monkeypatch):
    small = OneBlock.config
    runs = [OneBlock(block="dense", d_model=48, steps=STEPS, parameters=p) for p in ("float32", "bfloat16")]
    sick = true_width.nats(48, "dense", rows_of(runs))
    monkeypatch.setattr(OneBlock, "config", lambda run: small(run).with_(precision={"parameters": "float32"}))
    sound = true_width.nats(48, "dense", rows_of(runs))
    assert [sound[mark][loss] for mark in sound for loss in ("training", "validation")] == [0.0] * 4
    assert any(sick[mark][loss] != 0 for mark in sick for loss in ("training", "validation"))


def test_a_wrong_width_is_a_line(capsys):
    assert main("predict", "--width", "100") == 2
    assert capsys.readouterr().err == (
        "error: --width=100 must be a multiple of 192: an eighth of it has 12 heads of even width\n"
    )


def test_the_committed_result_was_predicted_first():
    found = load_true_width()
    stored = json.loads(true_width.result_path(1536).read_text())
    assert stored["prediction"]["written"] <= stored["measured"]["begun"]
    assert all(d != 1536 for _, d, *_ in stored["prediction"]["runs"])
    dense = {row["d_model"]: row["rho"] for row in those(found.widths, block="dense", std="0.02", lr=1e-3)}
    shares = [dense[d] for d in (192, 384, 768, 1536)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.6
    assert max(row["updates"] for row in those(stored["measured"]["shares"], block="dense")) >= 150
