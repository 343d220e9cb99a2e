"""check_data against batches whose fault was put there, beside the same text without it."""

import pytest
import torch
from torch import Tensor

from moe_lab.health import check_data

WORDS = ["the", "model", "reads", "a", "line", "of", "text", "and", "then", "it", "learns", "nothing", "much"]
PAD = 255
PAD_RUN = 8


def text(rows: int = 16, length: int = 64, seed: int = 0) -> Tensor:
    """Bytes of made-up sentences, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (rows * length,), generator=generator)
    data = bytearray(" ".join(WORDS[i] for i in picks).encode()[: rows * length])
    return torch.frombuffer(data, dtype=torch.uint8).long().view(rows, length)


def said(batches: list, **options) -> list[str]:
    return [finding.rule for finding in check_data(batches, **options)]


def batches(n: int = 8) -> list[Tensor]:
    return [text(seed=seed) for seed in range(n)]


def test_text_is_fine_in_every_form() -> None:
    ids = batches()
    assert said(ids) == said(ids, vocab_size=256) == []
    assert said([(x[:, :-1], x[:, 1:]) for x in ids]) == []
    assert said([{"input_ids": x, "labels": x} for x in ids]) == []


@pytest.mark.parametrize("vocab_size", [64, 1024, 50257])
def test_uniform_tokens_look_random_and_so_does_text_in_another_order(vocab_size: int) -> None:
    uniform = [torch.randint(vocab_size, (16, 64)) for _ in range(8)]
    assert said(uniform, vocab_size=vocab_size) == ["random_tokens"]
    (finding,) = check_data(uniform, vocab_size)
    assert finding.value == pytest.approx(1, abs=0.3)  # two uniform tokens are equal once in vocab_size
    for shuffled in (x.flatten()[torch.randperm(x.numel())].view_as(x) for x in [torch.cat(batches())]):
        (finding,) = check_data([shuffled], vocab_size=256)
        assert finding.rule == "random_tokens" and "in another order" in finding.message
    by_row = [torch.stack([row[torch.randperm(len(row))] for row in x]) for x in batches()]
    assert said(by_row, vocab_size=256) == ["random_tokens"]  # the frequencies are those of text, row by row


def test_text_whose_time_comes_first_is_text() -> None:
    assert said([x.T for x in batches()]) == []


@pytest.mark.parametrize("classes", [True, False])
def test_rows_that_are_asked_for_a_class_need_no_order(classes: bool) -> None:
    """Things that were bought, say. With targets that are tokens it is a fault."""
    uniform = [torch.randint(64, (16, 64)) for _ in range(8)]
    given = [(x, torch.randint(3, (16,)) if classes else x) for x in uniform]
    found = [(f.rule, f.severity) for f in check_data(given)]
    assert found == [("random_tokens", "info" if classes else "warning")]


def test_one_token_alone() -> None:
    assert said([torch.full((2, 64), 7)]) == ["constant_tokens"]


def test_rows_that_come_again() -> None:
    workers = [text(seed=seed) for seed in range(4) for _ in range(4)]  # four workers, one generator
    assert said(workers) == ["repeated_data"]
    assert check_data(workers)[0].value == 0.75
    assert said([*batches(8), text(seed=0)]) == []  # an epoch that begins again


def test_short_texts_may_come_again_beside_other_pictures() -> None:
    ids = torch.randint(9, (32, 1)).expand(32, 4)
    batches = [{"input_ids": ids, "pixel_values": torch.randn(32, 1, 6, 6)} for _ in range(2)]
    assert said(batches) == []
    assert said(batches[:1] * 2) == ["repeated_data"]


def test_labels_shifted_twice_or_backwards() -> None:
    for shift, pairs in {2: (slice(0, -2), slice(2, None)), -1: (slice(1, None), slice(0, -1))}.items():
        (finding,) = check_data([(x[:, pairs[0]], x[:, pairs[1]]) for x in batches()])
        assert (finding.rule, finding.severity, finding.value) == ("label_shift", "error", shift)


def masked_lm(x: Tensor) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.15
    return torch.where(chosen, 0, x), torch.where(chosen, x, -100)


def test_a_masked_language_model_is_no_shift() -> None:
    assert said([masked_lm(x) for x in batches()]) == []


def padded(mask_end: bool, mask_padding: bool = True) -> list[dict]:
    """Rows of 20 to 63 tokens, an end token, and padding of the same id."""
    result = []
    for seed, ids in enumerate(batches()):
        ids, generator = ids.clone(), torch.Generator().manual_seed(seed)
        ends = torch.randint(20, 50, (len(ids), 1), generator=generator)
        at = torch.arange(ids.shape[1])
        ids = torch.where(at >= ends, PAD, ids)
        hidden = (at > ends) | (mask_end & (at == ends))
        result.append({"input_ids": ids, "labels": torch.where(hidden & mask_padding, -100, ids)})
    return result


def test_an_end_token_that_is_never_a_target() -> None:
    assert said(padded(mask_end=False)) == []
    (finding,) = check_data(padded(mask_end=True))
    assert finding.rule == "never_a_target" and f"token {PAD} " in finding.message


def test_padding_of_its_own_and_the_next_prompt_are_no_targets_and_no_fault() -> None:
    end, prompt = 254, 253
    own = []
    for batch in padded(mask_end=False):
        ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
        first = (ids == PAD) & (labels == PAD)  # the end token
        labels[first], ids[first] = end, end
        ids[:, 0], labels[:, 0] = prompt, -100  # and a next prompt after it, in the padding
        ids[torch.arange(len(ids)), first.long().argmax(1) + 1] = prompt
        own.append({"input_ids": ids, "labels": labels})
    assert said(own) == []


def test_padding_that_is_a_target() -> None:
    assert said(padded(mask_end=False, mask_padding=False)) == ["padding_in_loss"]


def test_a_mask_beside_the_tokens_is_no_label() -> None:
    """Of a classifier's three tensors; of a language model's the labels are the third, or come before it."""
    whole = padded(mask_end=False, mask_padding=False)
    classes = torch.arange(len(whole[0]["input_ids"])) % 3
    for mask in (lambda ids: ids != PAD, lambda ids: (ids != PAD).long(), lambda ids: (ids != PAD).float()):
        assert said([(b["input_ids"], mask(b["input_ids"]), classes) for b in whole]) == []
        for order in ((0, 1, 2), (0, 2, 1)):
            given = [(b["input_ids"], mask(b["input_ids"]), b["labels"]) for b in whole]
            assert said([tuple(batch[i] for i in order) for batch in given]) == ["padding_in_loss"]


def test_batches_with_very_different_numbers_of_targets() -> None:
    one, other = text(seed=0), text(seed=1)
    few = torch.where(torch.arange(64) < 54, -100, other)
    (finding,) = check_data([{"input_ids": one, "labels": one}, {"input_ids": other, "labels": few}])
    assert (finding.rule, finding.severity, finding.value) == ("uneven_targets", "info", 6.4)


def test_validation_text_that_stands_in_training() -> None:
    assert said(batches(), validation=[text(seed=100)]) == []
    assert said(batches(), validation=[text(seed=3)]) == ["split_overlap"]


def test_little_validation_text_in_training_counts_unless_training_text_stands_there_as_often() -> None:
    seen, held_out = batches(), [text(seed=100 + seed) for seed in range(8)]
    line = seen[0][0].clone()  # 2 windows of 256 in the validation text, under 1 %
    held_out[0][0] = line
    assert said(seen, validation=held_out) == []
    held_out[1][0] = seen[1][3]
    held_out[2][0] = seen[2][5]  # 2.3 %
    assert said(seen, validation=held_out) == ["split_overlap"]
    for row in (
        seen[3][1],
        seen[4][2],
        seen[5][7],
    ):  # a line that many texts share: of training's windows 3 % stand twice
        row.copy_(line)
    assert said(seen, validation=held_out) == []


@pytest.mark.parametrize("bad", [[], [torch.rand(3)], ["text"], [torch.arange(3)]])
def test_what_is_no_batch_of_tokens_is_refused_in_one_line(bad: list) -> None:
    with pytest.raises(ValueError, match="batch") as error:
        check_data(bad)
    assert "\n" not in str(error.value)


def code(seed: int, rows: int = 8, length: int = 64) -> tuple[Tensor, Tensor]:
    """Windows of indented lines, of which some end in blanks."""
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (rows * length,), generator=generator)]
    depth = torch.randint(4, 20, (len(words),), generator=generator).tolist()
    lines = "\n".join(" " * n + word for n, word in zip(depth, words, strict=True)).encode()
    ids = torch.frombuffer(bytearray(lines[: rows * (length + 1)]), dtype=torch.uint8).long().view(rows, -1)
    return ids[:, :-1], ids[:, 1:]


def test_indented_text_that_ends_in_blanks_is_not_padded() -> None:
    ends = [ids[:, -PAD_RUN:].eq(32).all(1).float().mean() for ids, _ in map(code, range(20))]
    assert max(ends) >= 0.25  # the look-alike looks alike
    assert [said([code(seed)]) for seed in range(20)] == [[]] * 20
    ids, labels = (x.clone() for x in code(0))
    ids[::2, 16:], labels[::2, 15:] = 32, 32  # padded with blanks: longer than any indentation
    assert said([(ids, labels)]) == ["padding_in_loss"]


def answered(
    n: int = 8, turned: bool = False, template: int = 0, asked: str = "answers"
) -> list[tuple[Tensor, Tensor]]:
    """Padded rows of a prompt and its answer, the prompt's first tokens the same in all; `asked`: what is a target."""
    made = []
    for seed in range(n):
        ids, generator = text(seed=seed), torch.Generator().manual_seed(seed)
        ids[:, :template] = text(seed=1000)[0, :template]
        ends = torch.randint(24, 33, (len(ids), 1), generator=generator)
        is_answer = torch.arange(64) >= ends
        is_target = torch.ones_like(is_answer) if asked == "all" else ~is_answer if turned else is_answer
        length = torch.randint(48, 64, (len(ids), 1), generator=generator)
        ids.scatter_(1, length - 1, 254)  # the end
        ids[torch.arange(64) >= length] = PAD
        made.append((ids, torch.where(is_target & (torch.arange(64) < length), ids, -100)))
    return made


def test_prompts_that_are_learned_in_place_of_answers() -> None:
    assert said(answered()) == said(answered(template=20)) == []
    (finding,) = check_data(answered(turned=True))
    assert (finding.rule, finding.value) == ("prompt_in_loss", 128)
    # an encoder is given other tokens than those that are asked for, and longer ones
    other = [(ids.flip(1), labels) for ids, labels in answered(turned=True)]
    assert said(other) == []
    ids, labels = (torch.cat(side).flatten() for side in zip(*answered(), strict=True))
    packed = [x[ids != PAD][:4096].view(64, 64) for x in (ids, labels)]  # one after the other, cut anywhere
    assert said([tuple(packed)]) == []


def test_windows_of_which_each_batch_asks_for_as_many_tokens_are_no_prompts() -> None:
    """They are cut anywhere, and their targets at one place of each batch."""
    cut = [
        (ids, torch.where(torch.arange(64) < length, ids, -100))
        for ids, length in zip(batches(), range(10, 50, 5), strict=True)
    ]
    assert set(said(cut)) <= {"uneven_targets"}


def test_a_beginning_that_all_rows_share() -> None:
    assert said(answered(asked="all")) == said(answered(template=10, asked="all")) == []
    (finding,) = check_data(answered(template=20, asked="all"))
    assert finding.rule == "prompt_in_loss" and "first 20 tokens" in finding.message


def documents(seed: int) -> list[Tensor]:
    """64 rows in order: eight documents of eight windows, each with words of its own beside the common ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for document in range(8):
        own = 100 + 20 * document + torch.randint(20, (8, 64), generator=generator)
        common = torch.randint(100, (8, 64), generator=generator).square() // 100
        words = torch.where(torch.rand(8, 64, generator=generator) < 0.2, own, common)
        rows += torch.stack([words, words + 300], 2).flatten(1)  # words of two tokens
    return rows


def test_neighbours_that_are_of_one_text() -> None:
    rows = documents(0)
    assert said([torch.stack(rows[i : i + 4]) for i in range(0, 64, 4)]) == ["one_text"]
    for seed in range(5):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
        assert said([torch.stack([rows[i] for i in order[j : j + 4]]) for j in range(0, 64, 4)]) == []
    assert said(batches(), vocab_size=256) == []  # one text, all of whose words come everywhere
    few = torch.rand(32, 8, generator=torch.Generator().manual_seed(0)) ** 3 * 400  # are by chance alike by a fifth
    assert said([few.long()]) == []


def test_validation_of_random_tokens() -> None:
    (finding,) = check_data(batches(), 1024, validation=[torch.randint(1024, (16, 64)) for _ in range(4)])
    assert (finding.rule, finding.where) == ("random_tokens", "validation")


def padded_labels() -> tuple[Tensor, Tensor, Tensor]:
    """Texts that end in padding, which is a target, how long they are, and the targets."""
    ids, lengths = text(), torch.arange(16) + 8
    ids[torch.arange(64) >= lengths[:, None]] = 0
    return ids, lengths, ids.clone()


def test_labels_are_found_in_every_form() -> None:
    """Beside lengths, in tuples within tuples, and under whatever names."""
    ids, lengths, labels = padded_labels()
    forms = [(ids, labels), (ids, lengths, labels), ((ids, lengths), labels), [[ids], labels]]
    forms += [{"input_ids": ids, "labels": labels}, {"x": ids, "lengths": lengths, "y": labels}]
    for form in forms:
        assert said([form]) == ["padding_in_loss"], type(form)
    assert said([{"x": ids, "lengths": lengths}]) == []


def test_short_texts_that_stand_in_both() -> None:
    """A row that is shorter than a window is one; what is padding but for a few tokens is none."""
    short = [x[:, :12] for x in batches(4)]
    assert said(short, validation=short) == ["split_overlap"]
    assert said(short[:2], validation=short[2:]) == []
    few = [torch.where(torch.arange(64) < 4, x, 0) for x in batches(4)]
    assert "split_overlap" not in said(few[:2], validation=few[:2])


def test_labels_of_other_rows() -> None:
    """Sorted by length, and the labels not: the rows' lengths tell. That padding is asked for says nothing more."""
    ids, lengths, labels = padded_labels()
    labels[torch.arange(64) >= lengths[:, None]] = -100
    tags = torch.where(labels == -100, labels, labels % 5)
    assert said([(ids, tags)]) == said([(ids.flip(0), tags.flip(0))]) == []
    (finding,) = check_data([(ids, tags.flip(0))])
    assert (finding.rule, finding.severity, finding.value) == ("label_shift", "error", 16)
    same = torch.where(torch.arange(64) < 8, tags, -100)  # a task that asks for as many of each
    assert said([(ids, same.flip(0))]) == []
