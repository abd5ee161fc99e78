"""Tiny networks whose convolutions can be shared, dense or compressed, and images for them."""

import torch
from tiny_models import IMAGE, RESNET, VIT, tiny

from hf_rps import RPSConfig, get_rps_model

RESNETS = [
    tiny("resnet", "ResNetForImageClassification", "image", **RESNET, num_labels=5),
    tiny("resnet, bottlenecks", "ResNetForImageClassification", "image",
         **RESNET | {"layer_type": "bottleneck", "hidden_sizes": [16, 32]}, num_labels=5),
    tiny("mobilenet_v2", "MobileNetV2ForImageClassification", "image", num_labels=5, depth_multiplier=0.25,
         image_size=IMAGE, classifier_dropout_prob=0.0),
    tiny("regnet", "RegNetForImageClassification", "image", num_labels=5, embedding_size=8, hidden_sizes=[8, 16],
         depths=[1, 1], groups_width=4),
]  # fmt: skip


def resnet(index=0, **options):
    model = RESNETS[index].build()
    return get_rps_model(model, RPSConfig(**options)) if options else model


def pixels(dtype=torch.float32):
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0)).to(dtype)


def vit():
    return tiny("vit", "ViTForImageClassification", "image", "classifier", **VIT).build()
