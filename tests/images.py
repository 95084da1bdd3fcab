"""Tiny image classifiers of every kind that can be audited, with random weights, and images to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

KINDS = ("vit", "deit", "swin", "resnet", "convnext")
CLASSES = ("zero", "one", "two", "three")
SIDE = 16


def tiny_classifier(kind: str, seed: int = 0) -> Any:
    """A model of two to four blocks for images of 16 by 16 pixels and four classes."""
    import transformers as t

    names = {"num_labels": 4, "id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
    flat = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    flat |= {"image_size": SIDE, "patch_size": 4}
    torch.manual_seed(seed)
    return {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**flat, **names)),
        "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**flat, **names)),
        "swin": lambda: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2, **names
            )
        ),
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", **names)
        ),
        "convnext": lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2, **names)
        ),
    }[kind]().eval()


def save_classifier(folder: Path, kind: str, seed: int = 0) -> Path:
    """The model's folder, with an image processor."""
    from transformers import ViTImageProcessor

    tiny_classifier(kind, seed).save_pretrained(folder)
    half = [0.5] * 3
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


def save_images(path: Path, n: int = 12, seed: int = 0) -> Path:
    """An .npz of grey images of the four classes in turn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)
    np.savez(path, X=pixels, y=np.arange(n) % 4, classes=np.array(CLASSES))
    return path
