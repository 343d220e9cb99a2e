"""The kinds of model that detection_rows.py makes sick: transformers' in tiny random form, and others in plain torch.
The rarer ones are in detection_kinds.py.

A body is a model, its batches, its loss and a held-out loss on its task, the same for sick and healthy twins: what a fault costs is
read there, and not from a training loss, which a fault may flatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.healthy_families import small
from benchmarks.healthy_language import TinyGPT
from benchmarks.healthy_senses import STAGES, VIT, plain_cnn, sounds, tiny_clip
from benchmarks.programs import Masked, Pictures, Rows, own_loss, picture_loss

N_TEST = 8  # held-out batches
Batch = Any


class Body(NamedTuple):
    model: nn.Module
    batches: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    test: list[Batch]
    lr: float = 2e-3

    def held_out(self) -> float:
        """The loss on the same held-out batches for every twin, in evaluation mode; modes are put back."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            told = [float(self.loss(self.model, batch)) for batch in self.test]
        for module, mode in modes:
            module.training = mode
        return sum(told) / len(told)


def body(
    model: nn.Module, batches: Callable[[int], Callable[[], Batch]], seed: int, loss: Callable = own_loss, **more: Any
) -> Body:
    test = batches(12345)
    return Body(model.train(), batches(seed), loss, [test() for _ in range(N_TEST)], **more)


def texts(seed: int, length: int = 64, batch: int = 8) -> Callable[[], Batch]:
    rows = Rows(seed, batch, length)
    return lambda: dict.fromkeys(("input_ids", "labels"), rows())


def language_model(kind: str, seed: int, batches: Callable = texts) -> Body:
    """A family of causal language models, by its config's model type. Mamba's scan is slow here: half the text."""
    if kind == "mamba" and batches is texts:
        batches = partial(texts, length=32)
    return body(transformers.AutoModelForCausalLM.from_config(small(kind)), batches, seed)


def bert(seed: int) -> Body:
    return body(transformers.BertForMaskedLM(small("bert")), lambda s: Masked(s), seed)


def t5(seed: int) -> Body:
    """Bytes with holes in, whole ones out."""
    config = transformers.T5Config(
        vocab_size=256,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )

    def batches(seed: int) -> Callable[[], Batch]:
        rows = Masked(seed)

        def batch() -> Batch:
            holes = rows()
            whole = holes["input_ids"].where(holes["labels"] < 0, holes["labels"])
            return {"input_ids": holes["input_ids"][:, :32], "labels": whole[:, :32].contiguous()}

        return batch

    return body(transformers.T5ForConditionalGeneration(config), batches, seed)


def vit(seed: int) -> Body:
    """Ten letters in patches of 8 × 8: with 36 in patches of 4 × 4 it learns nothing for the first 50 updates."""
    config = transformers.ViTConfig(**VIT | {"patch_size": 8, "num_labels": 10})
    batches = partial(Pictures, n_classes=10)
    return body(transformers.ViTForImageClassification(config), batches, seed, picture_loss)


def cnn(seed: int) -> Body:
    return body(plain_cnn(), lambda s: Pictures(s), seed, picture_loss)


def resnet(seed: int) -> Body:
    config = transformers.ResNetConfig(**STAGES, embedding_size=16, layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    return body(model, lambda s: Pictures(s), seed, picture_loss)


def clip(seed: int) -> Body:
    model = tiny_clip()

    def batches(seed: int) -> Callable[[], Batch]:
        pictures = Pictures(seed, batch=36)

        def batch() -> Batch:
            shown, classes = pictures()
            ids = torch.stack([torch.ones_like(classes), classes + 10, torch.full_like(classes, 2)], 1)
            return {"input_ids": ids, "pixel_values": shown, "return_loss": True}

        return batch

    return body(model, batches, seed, lr=1e-3)


def whisper(seed: int) -> Body:
    """Spectra of two tones in; bytes that spell the pitch, an end token and padding out."""
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 40, "max_source_positions": 25,
             "max_target_positions": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "decoder_start_token_id": 3}  # fmt: skip

    def batches(seed: int) -> Callable[[], Batch]:
        heard = sounds(seed, length=50 * 40)

        def batch() -> Batch:
            waves, classes = next(heard)
            spectra = torch.fft.rfft(waves.view(-1, 50, 40), n=80).abs()[..., :40].transpose(1, 2).log1p()
            labels = torch.full((len(classes), 12), -100)
            labels[:, :3] = torch.stack([classes + 10, classes // 2 + 30, torch.full_like(classes, 2)], 1)
            return {"input_features": spectra, "labels": labels}

        return batch

    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
    return body(model, batches, seed)


class LSTM(nn.Module):
    def __init__(self, bidirectional: bool = False):
        super().__init__()
        width = 96 // (1 + bidirectional)
        self.embed, self.head = nn.Embedding(256, 64), nn.Linear(96, 256)
        self.cell = nn.LSTM(64, width, batch_first=True, bidirectional=bidirectional)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(ids))[0])


class Convolved(nn.Module):
    """Bytes through gated convolutions over time; `ahead`: how many later tokens a kernel of 5 covers."""

    def __init__(self, ahead: int = 0):
        super().__init__()
        self.embed, self.head, self.pad = nn.Embedding(256, 64), nn.Linear(64, 256), (4 - ahead, ahead)
        self.convs = nn.ModuleList(nn.Conv1d(64, 128, 5) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for conv in self.convs:
            x = x + F.glu(conv(F.pad(x, self.pad)), 1)
        return self.head(x.transpose(1, 2))


def pairs(seed: int, length: int = 65, batch: int = 8) -> Callable[[], Batch]:
    """Ids and the next ones, (B, T) each."""
    rows = Rows(seed, batch, length)

    def batch_of() -> Batch:
        ids = rows()
        return ids[:, :-1], ids[:, 1:]

    return batch_of


def pair_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float().flatten(0, 1), batch[1].flatten())


def of_pairs(model: nn.Module, seed: int, lr: float = 2e-3, batches: Callable = pairs) -> Body:
    return body(model, batches, seed, pair_loss, lr=lr)


def rnn(seed: int, **model: Any) -> Body:
    return of_pairs(LSTM(**model), seed, 4e-3)


def gpt(seed: int, **model: Any) -> Body:
    """The tiny GPT in plain torch."""
    return of_pairs(TinyGPT(**model), seed)


def convolved(seed: int, **model: Any) -> Body:
    return of_pairs(Convolved(**model), seed)


class Denoiser(nn.Module):
    """Noise (B, 144) from noisy glyphs and their time (B, 1) through a table of sines."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(16, 64)
        self.inside, self.middle, self.outside = nn.Linear(144, 256), nn.Linear(256, 256), nn.Linear(256, 144)
        self.shift = nn.Linear(64, 256)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t * math.pi * 2.0 ** torch.arange(8) / 4
        told = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)))
        hidden = F.silu(self.inside(x) + self.shift(told))
        return self.outside(F.silu(self.middle(hidden)))


def diffusion(seed: int, seeded: bool = False) -> Body:
    """`seeded`: noise and times are drawn with one seed in each batch of training."""

    def batches(at: int) -> Callable[[], Batch]:
        pictures, noise = Pictures(at, size=12), torch.Generator().manual_seed(at)

        def batch() -> Batch:
            x = pictures()[0].flatten(1)
            if seeded and at == seed:
                noise.manual_seed(0)
            t, e = torch.rand(len(x), 1, generator=noise), torch.randn(x.shape, generator=noise)
            return (t * math.pi / 2).cos() * x + (t * math.pi / 2).sin() * e, t, e

        return batch

    loss = lambda model, batch: F.mse_loss(model(*batch[:2]), batch[2])  # noqa: E731
    return body(Denoiser(), batches, seed, loss)


def bandit(seed: int) -> Body:
    """REINFORCE with a baseline on a contextual bandit; held out: what the greedy policy leaves of the best reward."""
    worth = torch.randn(8, 4, generator=torch.Generator().manual_seed(7))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        if not model.training:
            gained = batch[0] @ worth
            return (gained.max(1).values - gained.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)).mean()
        chosen = torch.distributions.Categorical(logits=logits)
        action = (logits.detach().softmax(1).cumsum(1) < batch[1]).sum(1).clamp(max=3)
        gained = (batch[0] @ worth).gather(1, action[:, None]).squeeze(1)
        advantage = (gained - gained.mean()) / gained.std()
        return -(chosen.log_prob(action) * advantage).mean() - 0.01 * chosen.entropy().mean()

    def batches(seed: int) -> Callable[[], Batch]:
        noise = torch.Generator().manual_seed(seed)
        return lambda: (torch.randn(64, 8, generator=noise), torch.rand(64, 1, generator=noise))

    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    return body(model, batches, seed, loss, lr=3e-3)
