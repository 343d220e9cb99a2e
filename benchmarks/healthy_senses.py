"""Healthy trainings on pictures and sounds: plain networks, and transformers' in tiny random form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.programs import Make, Pictures, Program, own_loss, picture_loss, plain


def classified(
    seed: int, model: Callable[[], nn.Module], optimizer: Callable[[Any], Optimizer], **shape: int
) -> Program:
    net, pictures = model().train(), Pictures(seed, **shape)
    return plain(net, optimizer(net.parameters()), pictures, picture_loss)


def plain_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 36))


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 36))


VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 36}
VIT |= {"image_size": 24, "patch_size": 4, "num_channels": 1}
STAGES = {"num_channels": 1, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 36}
SWIN = {"image_size": 24, "patch_size": 2, "num_channels": 1, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters", "ViTMSN", "IJepa", "Data2VecVision"), VIT),
    "ResNet": {**STAGES, "embedding_size": 16, "layer_type": "basic"},
    "RegNet": {**STAGES, "embedding_size": 16, "groups_width": 8},
    "ConvNext": STAGES | {"num_stages": 2},
    "ConvNextV2": STAGES | {"num_stages": 2},
    "PoolFormer": {"num_channels": 1, "num_labels": 36, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "Swin": {**SWIN, "window_size": 3, "num_labels": 36},
    "FocalNet": {
        "image_size": 24,
        "patch_size": 2,
        "num_channels": 1,
        "embed_dim": 16,
        "num_labels": 36,
        "depths": [1, 1, 1, 1],
    },
}


def seeing(name: str, seed: int) -> Program:
    config, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForImageClassification")
    return classified(seed, lambda: kind(config(**SEEING[name])), partial(AdamW, lr=2e-3))


def sounds(seed: int, batch: int = 16, length: int = 1600) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tones over noise, at 16 kHz; the class (0 … 9) is the lower one's pitch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        classes = torch.randint(10, (batch,), generator=generator)
        pitch = 220 * 2 ** (classes[:, None] / 6)
        time = torch.arange(length) / 16000 + torch.rand(batch, 1, generator=generator)
        wave = (2 * math.pi * pitch * time).sin() + 0.5 * (4 * math.pi * pitch * time).sin()
        yield wave + 0.1 * torch.randn(batch, length, generator=generator), classes


HEARING = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "conv_dim": (32, 32),
    "conv_kernel": (16, 8), "conv_stride": (8, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_labels": 10, "classifier_proj_size": 32, "mask_time_prob": 0.0,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "final_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip


HEARERS = ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "Data2VecAudio")


def hearing(name: str, seed: int) -> Program:
    """Wav2Vec2 and its kind: sequences to classes."""
    config, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForSequenceClassification")
    model, heard = kind(config(**HEARING)).train(), sounds(seed)

    def batches() -> dict[str, Tensor]:
        waves, classes = next(heard)
        return {"input_values": waves, "labels": classes}

    return plain(model, AdamW(model.parameters(), lr=1e-3), batches, own_loss)


def whisper(seed: int) -> Program:
    """Spectra in, three bytes that spell the class out."""
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 40, "max_source_positions": 25,
             "max_target_positions": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "decoder_start_token_id": 3}  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)).train()
    heard = sounds(seed, length=50 * 40)

    def batches() -> dict[str, Tensor]:
        waves, classes = next(heard)
        spectra = torch.fft.rfft(waves.view(-1, 50, 40), n=80).abs()[..., :40].transpose(1, 2).log1p()
        labels = torch.stack([classes + 10, classes // 2 + 30, torch.full_like(classes, 2)], 1)
        return {"input_features": spectra, "labels": labels}

    return plain(model, AdamW(model.parameters(), lr=2e-3), batches, own_loss)


def tiny_clip() -> transformers.CLIPModel:
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    text |= {"max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {key: value for key, value in VIT.items() if key != "num_labels"}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def clip(seed: int) -> Program:
    """Glyphs and the letters that they show."""
    model, pictures = tiny_clip().train(), Pictures(seed, batch=36)

    def batches() -> dict[str, Any]:
        shown, classes = pictures()
        ids = torch.stack([torch.ones_like(classes), classes + 10, torch.full_like(classes, 2)], 1)
        return {"input_ids": ids, "pixel_values": shown, "return_loss": True}

    return plain(model, AdamW(model.parameters(), lr=1e-3), batches, own_loss)


OTHERS: dict[str, Make] = {
    "cnn by sgd": partial(
        classified, model=plain_cnn, optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    ),
    "cnn by adam": partial(classified, model=plain_cnn, optimizer=partial(Adam, lr=1e-3)),
    "mlp on pictures": partial(classified, model=plain_mlp, optimizer=partial(Adam, lr=1e-3)),
    "hearing Whisper": whisper,
    "clip": clip,
}


def programs() -> Iterator[tuple[str, Make]]:
    yield from ((f"seeing {name}", partial(seeing, name)) for name in SEEING)
    yield from ((f"hearing {name}", partial(hearing, name)) for name in HEARERS)
    yield from OTHERS.items()
