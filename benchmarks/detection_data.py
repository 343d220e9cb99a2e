"""Sick rows whose fault is in targets and data. How rows are written: detection_loops.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.detection_bodies import (
    Batch,
    Body,
    bert,
    cnn,
    convolved,
    gpt,
    language_model,
    pair_loss,
    pairs,
    rnn,
    t5,
    texts,
    vit,
    whisper,
)
from benchmarks.detection_twins import Loop, Row, row
from benchmarks.programs import IGNORED, Program

ROWS: list[Row] = []
DATA = "targets and data"


def changed(body: Body, sick: bool, change: Callable[[Batch], Batch]) -> Program:
    """The batches of training go through `change`; those held out do not."""
    return Loop(body._replace(batches=lambda batches=body.batches: change(batches())) if sick else body).program()


@row(ROWS, DATA, "Llama", "random_tokens", "loss_not_falling", plain=True)
def numbered_anew(seed: int, sick: bool) -> Program:
    """each worker numbers the bytes in an order of its own (a salted hash): ids mean nothing across rows"""
    noise = torch.Generator().manual_seed(seed)

    def change(batch: Batch) -> Batch:
        orders = torch.stack([torch.randperm(256, generator=noise) for _ in range(8)])
        return dict.fromkeys(batch, orders.gather(1, batch["input_ids"]))

    return changed(language_model("llama", seed), sick, change)


@row(ROWS, DATA, "GPT", "repeated_data")
def first_batches_only(seed: int, sick: bool) -> Program:
    """`next(iter(loader))` in the loop: the same four batches come over and over"""
    body = gpt(seed)
    kept = [body.batches() for _ in range(4)]
    turn = iter(range(10**6))
    return changed(body, sick, lambda batch: kept[next(turn) % 4])


@row(ROWS, DATA, "LSTM", "label_shift", plain=True)
def not_shifted(seed: int, sick: bool) -> Program:
    """labels are the inputs themselves: the model learns to copy"""
    return changed(rnn(seed), sick, lambda batch: (batch[0], batch[0]))


@row(ROWS, DATA, "convolutions", "label_shift", plain=True)
def shifted_twice(seed: int, sick: bool) -> Program:
    """the data set shifts, and the loss does once more: the second next token is asked for"""

    def change(batch: Batch) -> Batch:
        return batch[0][:, :-1], batch[1][:, 1:]

    return changed(convolved(seed), sick, change)


@row(ROWS, DATA, "Mamba", "label_shift", plain=True)
def shifted_before_the_model(seed: int, sick: bool) -> Program:
    """labels are shifted by the collator although the model shifts them itself"""

    def change(batch: Batch) -> Batch:
        return {"input_ids": batch["input_ids"][:, :-1], "labels": batch["labels"][:, 1:].contiguous()}

    return changed(language_model("mamba", seed), sick, change)


def filled(seed: int, share: float, masked: bool) -> Callable[[], Batch]:
    """Texts of different lengths, padded with zeros to 64 places, which are targets or not."""
    rows, lengths = texts(seed), torch.Generator().manual_seed(seed)

    def batch() -> Batch:
        ids = rows()["input_ids"]
        ends = torch.randint(4, max(5, int(64 * share)), (8, 1), generator=lengths)
        outside = torch.arange(64) >= ends
        ids = ids.masked_fill(outside, 0)
        return {"input_ids": ids, "labels": ids.masked_fill(outside, IGNORED) if masked else ids}

    return batch


@row(ROWS, DATA, "GPT-2", "padding_in_loss")
def padding_is_learned(seed: int, sick: bool) -> Program:
    """padding is a target: two thirds of the loss are about zeros after zeros"""
    body = language_model("gpt2", seed, partial(filled, share=0.6, masked=True))
    return Loop(body._replace(batches=filled(seed, 0.6, masked=not sick))).program()


@row(ROWS, DATA, "Whisper", "padding_in_loss", plain=True)
def padded_labels(seed: int, sick: bool) -> Program:
    """labels are padded with the padding token in place of -100"""

    def change(batch: Batch) -> Batch:
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] < 0, 0)}

    return changed(whisper(seed), sick, change)


@row(ROWS, DATA, "Mamba", "constant_tokens", "padding_in_loss", plain=True)
def nearly_empty(seed: int, sick: bool) -> Program:
    """a broken filter leaves a few letters a row, the rest is filled up, and the filling is a target"""
    body = language_model("mamba", seed)
    return Loop(body._replace(batches=filled(seed, 0.06, masked=False)) if sick else body).program()


@row(ROWS, DATA, "Llama", "never_a_target", plain=True)
def spaces_masked(seed: int, sick: bool) -> Program:
    """the end of a line doubles as padding, and the collator masks the padding: it is never asked for"""

    def change(batch: Batch) -> Batch:
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == ord("\n"), IGNORED)}

    return changed(language_model("llama", seed), sick, change)


@row(ROWS, DATA, "GPT", "token_weights", "uneven_targets")
def mean_of_means(seed: int, sick: bool) -> Program:
    """micro-batches of one row of 4 to 64 targets: their means are averaged as if they held equally many"""
    lengths = torch.Generator().manual_seed(seed)

    def cut(ids: Tensor, labels: Tensor, n: int) -> Batch:
        return ids[:, :n], labels[:, :n]

    body = gpt(seed)
    loop, rows = Loop(body), pairs(seed, batch=1)

    def backward(i: int) -> Tensor:
        ends = [4 if torch.rand((), generator=lengths) < 0.7 else 64 for _ in range(8)]
        total = 0.0
        for n in ends:
            batch = cut(*rows(), n)
            weight = 1 / 8 if sick else n / sum(ends)
            loss = pair_loss(body.model, batch) * weight
            loss.backward()
            total = total + loss.detach()
        return total

    loop.backward = backward
    return loop.program()


@row(ROWS, DATA, "ViT", "loss_not_falling", plain=True)
def labels_of_others(seed: int, sick: bool) -> Program:
    """pictures are shuffled in the collator, and their labels are not"""
    noise = torch.Generator().manual_seed(seed)
    return changed(vit(seed), sick, lambda batch: (batch[0], batch[1][torch.randperm(32, generator=noise)]))


@row(ROWS, DATA, "CNN", "loss_not_falling", trigger=40, plain=True)
def labels_lost_midway(seed: int, sick: bool) -> Program:
    """from update 40 on, at a new shard, labels belong to other pictures"""
    noise, seen = torch.Generator().manual_seed(seed), iter(range(10**6))

    def change(batch: Batch) -> Batch:
        return batch if next(seen) < 40 else (batch[0], batch[1][torch.randperm(32, generator=noise)])

    return changed(cnn(seed), sick, change)


@row(ROWS, DATA, "BERT", "label_shift", plain=True)
def nothing_hidden(seed: int, sick: bool) -> Program:
    """the places that are asked for were never replaced by the mask: the answer stands in the input"""

    def change(batch: Batch) -> Batch:
        shown = batch["labels"] >= 0
        return batch | {"input_ids": batch["labels"].where(shown, batch["input_ids"])}

    return changed(bert(seed), sick, change)


@row(ROWS, DATA, "T5", "repeated_data", trigger=30, plain=True)
def stuck_shard(seed: int, sick: bool) -> Program:
    """from update 30 on a worker gives its last four batches again and again"""
    body, seen = t5(seed), iter(range(10**6))
    kept: list[Batch] = []

    def change(batch: Batch) -> Batch:
        i = next(seen)
        kept[:] = kept if len(kept) == 4 else [*kept, batch] if i >= 26 else kept
        return kept[i % 4] if i >= 30 and len(kept) == 4 else batch

    return changed(body, sick, change)


@row(ROWS, DATA, "LSTM", "initial_loss")
def summed(seed: int, sick: bool) -> Program:
    """the loss is a sum over the tokens of a batch, under a clip and a decay that are meant for means"""
    loop = Loop(rnn(seed), clip=None)
    optimizer = torch.optim.SGD(loop.body.model.parameters(), lr=0.5, momentum=0.9)
    loop = Loop(loop.body, [optimizer], clip=None)
    if sick:
        loop.forward = lambda model, batch: summed_loss(model, batch)
    return loop.program()


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")
