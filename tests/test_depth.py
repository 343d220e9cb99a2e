"""Mixture-of-Depths: who is computed, in which order, at which position, and with what weight; who passes unchanged."""

import math

import pytest
import torch
from helpers import normal, perturb, random_ids, seeded, tiny
from torch import Tensor

from moe_lab import build_model
from moe_lab.model.attention import Attention
from moe_lab.model.depth import Depth, DepthReport, agreement, predictor_loss
from moe_lab.model.mamba import Mamba


def new_depth(**changes) -> Depth:
    return perturb(seeded(Depth, tiny(mod_enabled=True, **changes)), std=0.5)


class Recorder:
    """A sublayer that writes down what it is given, and answers with three times its input."""

    def __call__(self, x: Tensor, positions: Tensor, keep: Tensor | None):
        self.x, self.positions, self.keep = x, positions, keep
        return 3 * x, None


def through(depth: Depth, x: Tensor, sublayer, causal: bool) -> tuple[Tensor, DepthReport]:
    """What `Block.forward` does with a sublayer."""
    rows = depth.choose(x, causal)
    y, _ = sublayer(rows.x, rows.positions, rows.keep)
    return depth.put_back(x, y, rows), rows.report


def naive_chosen(depth: Depth, x: Tensor) -> list[list[int]]:
    """Each sequence's C positions with the highest scores, in order of time."""
    count = math.ceil(depth.capacity * x.shape[1])
    scores = [[depth.router(token).item() for token in sequence] for sequence in x]
    return [sorted(sorted(range(len(row)), key=lambda t: -row[t])[:count]) for row in scores]


@torch.no_grad()
@pytest.mark.parametrize(("capacity", "length"), [(0.75, 12), (0.5, 9), (0.1, 7), (1.0, 5), (0.3, 1)])
def test_training_computes_the_best_c_of_each_sequence(capacity: float, length: int) -> None:
    depth, recorder, x = new_depth(mod_capacity_factor=capacity), Recorder(), normal(3, length, 16)
    y, report = through(depth, x, recorder, causal=False)
    expected = naive_chosen(depth, x)
    assert recorder.positions.tolist() == expected  # sorted: in order of time, and places in the sequence, not ranks
    assert recorder.keep is None
    for row, chosen in enumerate(expected):
        assert torch.equal(recorder.x[row], x[row, chosen])
        assert report.chosen[row].nonzero().flatten().tolist() == chosen
        for t in range(length):
            if t in chosen:
                weight = torch.sigmoid(depth.router(x[row, t]))
                torch.testing.assert_close(y[row, t], x[row, t] + weight * 3 * x[row, t])
            else:
                assert torch.equal(y[row, t], x[row, t])  # passes by, bit for bit


@torch.no_grad()
def test_evaluation_asks_the_predictor() -> None:
    depth, recorder, x = new_depth(), Recorder(), normal(3, 20, 16)
    y, report = through(depth, x, recorder, causal=True)
    wanted = torch.tensor([[depth.predictor(token).item() > 0 for token in sequence] for sequence in x])
    assert wanted.any() and not wanted.all()
    assert torch.equal(report.predicted > 0, wanted)
    for row in range(3):
        kept = wanted[row].nonzero().flatten().tolist()
        assert recorder.positions[row, : len(kept)].tolist() == kept  # first and in order of time
        assert sorted(recorder.positions[row].tolist()) == list(range(20))  # fixed shapes: all rows are there
        assert recorder.keep[row].tolist() == [True] * len(kept) + [False] * (20 - len(kept))
        for t in range(20):
            weight = torch.sigmoid(depth.router(x[row, t]))
            expected = x[row, t] + weight * 3 * x[row, t] if t in kept else x[row, t]
            tolerance = 1e-6 if t in kept else 0
            torch.testing.assert_close(y[row, t], expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_what_a_sublayer_says_of_rows_that_do_not_count_is_not_heard(training: bool) -> None:
    depth, x = new_depth(), normal(2, 20, 16)

    def garbage(rows, positions, keep):
        return rows if keep is None else rows.masked_fill(~keep.unsqueeze(-1), torch.nan), None

    assert through(depth, x, garbage, causal=not training)[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("layer", [Attention, Mamba])
@pytest.mark.parametrize("training", [True, False])
def test_a_skipped_token_is_neither_key_nor_state(training: bool, layer: type) -> None:
    """The same, sequence by sequence, on a sequence that holds only the computed tokens."""
    config = tiny(mod_enabled=True)
    sublayer = seeded(layer, config)
    if layer is Mamba:
        seeded(sublayer.reset_state_space)
    perturb(sublayer)
    depth, x = new_depth(), normal(3, 20, 16)
    y, report = through(depth, x, sublayer, causal=not training)
    for row in range(3):
        mine = report.chosen[row] if training else report.predicted[row] > 0
        positions = mine.nonzero().flatten()
        computed = sublayer(x[row, positions].unsqueeze(0), positions.unsqueeze(0), None)[0][0]
        weights = torch.sigmoid(depth.router(x[row, positions]))
        expected = x[row].clone()
        expected[positions] += weights * computed
        assert 0 < len(positions) < 20
        torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_one_token_a_step_follows_the_same_rule_in_either_mode(training: bool) -> None:
    block, x = perturb(build_model(tiny(mod_enabled=True, n_layers=1, dropout=0.5))).layers[0], normal(8, 1, 16)
    expected, _, reports = block.eval()(x)
    asked = [report.predicted.flatten() > 0 for report in reports]
    cache = block.seq_layer.new_cache(8, 1, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(block.train(training).step(x, cache), expected)
    assert torch.equal(cache.kept[:, 0], asked[0]) and asked[0].any() and not asked[0].all()


def test_router_and_predictor_learn_and_the_predictor_leaves_the_stream_alone() -> None:
    depth, x = new_depth(), normal(2, 12, 16).requires_grad_()
    y, report = through(depth, x, lambda rows, positions, keep: (rows.sin(), None), causal=False)
    router, predictor = list(depth.router.parameters()), list(depth.predictor.parameters())
    (y * normal(2, 12, 16, seed=1)).sum().backward(retain_graph=True)
    assert all(p.grad.any() for p in router)  # the weight on the output is how the choice is learned
    assert all(p.grad is None for p in predictor)
    stream = x.grad.clone()
    for p in router:
        p.grad = None
    predictor_loss(report).backward()
    assert all(p.grad.any() for p in predictor)
    assert all(p.grad is None for p in router)
    assert torch.equal(x.grad, stream)


def test_predictor_loss_and_agreement_against_a_loop() -> None:
    report = DepthReport(normal(3, 7) > 0.3, normal(3, 7, seed=1) * 2)
    pairs = list(zip(report.predicted.flatten().tolist(), report.chosen.flatten().tolist(), strict=True))
    nats = [-math.log(1 / (1 + math.exp(-logit if chosen else logit))) for logit, chosen in pairs]
    assert predictor_loss(report) == pytest.approx(sum(nats) / 21)
    assert agreement(report) == pytest.approx(sum((logit > 0) == chosen for logit, chosen in pairs) / 21)


@torch.no_grad()
def test_the_model_reads_the_agreement_of_every_router() -> None:
    model, calls = perturb(build_model(tiny(mod_enabled=True))).eval(), []
    for block in model.layers:
        for depth in (block.seq_depth, block.ffn_depth):
            depth.predictor.register_forward_hook(lambda _, args, out, depth=depth: calls.append((depth, args[0], out)))
    reading = model.depth_agreement(random_ids(2, 20))
    assert len(reading) == len(calls) == 4
    for value, (depth, x, predicted) in zip(reading, calls, strict=True):
        best = naive_chosen(depth, x)
        agreed = sum((predicted[row, t] > 0).item() == (t in best[row]) for row in range(2) for t in range(20))
        assert value == pytest.approx(agreed / 40)


def test_predictors_learn_the_choice() -> None:
    """Trained on its own loss, the causal rule comes to agree with the training-time choice."""
    depth, x = new_depth(mod_capacity_factor=0.5), normal(8, 32, 16)
    optimizer = torch.optim.Adam(depth.predictor.parameters(), lr=0.05)
    before = agreement(depth.choose(x, causal=False).report)
    for _ in range(60):
        optimizer.zero_grad()
        predictor_loss(depth.choose(x, causal=False).report).backward()
        optimizer.step()
    assert agreement(depth.choose(x, causal=False).report) > max(0.9, before)
