"""The trained model in libraries built on timm and PyTorch. Nothing here imports the plugin to register it."""
import copy
from typing import Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf
from timm.utils.model import reparameterize_model

from interpreter import Interpreter
from support import assert_close
from timm_convmixer import ConvMixer
from timm_convmixer.digits import load_digits

pytestmark = pytest.mark.filterwarnings('ignore')


def create(**kwargs) -> ConvMixer:
    return timm.create_model('test_convmixer.digits', pretrained=True, **kwargs).eval()


@pytest.fixture(scope='module')
def digits() -> dict:
    """Images ``(N, 3, 32, 32)`` and labels ``(N,)`` by split, and the Pillow images."""
    pytest.importorskip('sklearn')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(create()))
    splits = {}
    for split, examples in load_digits().items():
        images, labels = zip(*examples[:355])
        images = [image.convert('RGB') for image in images]
        splits[split] = torch.stack([transform(image) for image in images]), torch.tensor(labels), images
    return splits


def correct(logits: torch.Tensor, labels: torch.Tensor) -> int:
    return (logits.argmax(dim=1) == labels).sum().item()


# Hugging Face transformers.

@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> str:
    pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('saved')
    save_for_hf(create(), folder, model_config=dict(label_names=list('0123456789')), safe_serialization=True)
    return str(folder)


@torch.no_grad()
def test_transformers_reads_what_timm_saves(saved, digits):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    images, labels, pictures = digits['validation']
    # For every model, timm 1.0.31 saves num_classes in model_args, and transformers passes it a second time.
    model = AutoModelForImageClassification.from_pretrained(saved, model_args={}).eval()
    processor = AutoImageProcessor.from_pretrained(saved)
    assert type(model.timm_model) is ConvMixer
    pixels = processor(pictures, return_tensors='pt')['pixel_values']
    assert_close(pixels, images)
    assert_close(model(pixels).logits, create()(images))
    classify = pipeline('image-classification', model=model, image_processor=processor)
    answers = classify(pictures[:50], top_k=1)
    assert sum(answer[0]['label'] == str(label.item()) for answer, label in zip(answers, labels)) >= 48


@pytest.mark.slow
def test_transformers_needs_no_import_of_the_plugin(saved, tmp_path):
    with Interpreter({'HF_HUB_OFFLINE': '1'}, tmp_path / 'log') as python:
        assert python.run(f"""
            import sys
            from transformers import AutoModelForImageClassification
            model = AutoModelForImageClassification.from_pretrained({saved!r}, model_args={{}})
            result = type(model.timm_model).__module__
        """) == 'timm_convmixer.convmixer'


@torch.no_grad()
def test_there_and_back(saved, digits, tmp_path):
    """Weights fine-tuned and saved by transformers load in timm."""
    from transformers import AutoModelForImageClassification

    images = digits['validation'][0][:8]
    model = AutoModelForImageClassification.from_pretrained(saved, model_args={}).eval()
    model.timm_model.head.bias.add_(torch.arange(10.))
    model.save_pretrained(tmp_path)
    loaded = timm.create_model('test_convmixer', checkpoint_path=str(tmp_path / 'model.safetensors')).eval()
    assert_close(loaded(images), model(images).logits)


def test_uper_net(digits):
    """A segmentation model of transformers with a ``features_only`` backbone."""
    pytest.importorskip('transformers')
    from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

    images, masks = strokes(digits)
    config = UperNetConfig(
        backbone_config=TimmBackboneConfig(
            backbone='test_convmixer', features_only=True, out_indices=(0, 1, 2, 3), use_pretrained_backbone=False),
        hidden_size=16,
        pool_scales=[1, 2],
        num_labels=2,
        auxiliary_channels=16,
        auxiliary_in_channels=64,
    )
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    features = model.backbone._backbone
    assert features.feature_info.reduction() == [4, 4, 4, 4]
    features.model.load_state_dict(create(num_classes=0).state_dict())
    losses = train(model, lambda: model(pixel_values=images, labels=masks[:, 0].long()).loss, steps=6)
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in features.model.blocks.parameters())


# Dense prediction: the pixels of a digit.

def strokes(digits) -> Tuple[torch.Tensor, torch.Tensor]:
    images = digits['train'][0][:32]
    return images, (images[:, :1] > 0).float()


def train(model: nn.Module, loss_fn, steps: int, lr: float = 1e-2) -> list:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_dpt(digits):
    smp = pytest.importorskip('segmentation_models_pytorch')
    images, masks = strokes(digits)
    torch.manual_seed(0)
    model = smp.DPT(
        'tu-test_convmixer.digits',
        decoder_readout='ignore',
        decoder_intermediate_channels=(16, 16, 32, 32),
        decoder_fusion_channels=16,
    )
    assert type(model.encoder.model) is ConvMixer and model.encoder.output_strides == [4, 4, 4, 4]
    assert torch.equal(model.encoder.model.blocks[3][1].weight, create().blocks[3][1].weight)
    criterion = smp.losses.DiceLoss('binary')
    losses = train(model, lambda: criterion(model(images), masks), steps=12)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.model.blocks.parameters())
    # The decoder's smallest feature map is 1/32 of the image.
    assert model.eval()(images[:2].repeat(1, 1, 2, 3)).shape == (2, 1, 64, 96)


def test_unet_refuses_a_single_stride():
    """The reason why the docs use another decoder."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
        smp.Unet('tu-test_convmixer', encoder_weights=None)


# PEFT.

def test_lora_on_the_pointwise_convolutions(digits):
    peft = pytest.importorskip('peft')
    images, labels = digits['train'][0][:64], (digits['train'][1][:64] + 1) % 10  # new task: the next digit
    model = create()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=r'blocks\.\d+\.1'))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all('.1.lora_' in name for name in trained)
    # Evaluation mode keeps the running statistics of the base model.
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(adapted(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        expected = adapted(images)
        with adapted.disable_adapter():
            assert_close(adapted(images), create()(images))
    held = {name.replace('.base_layer', ''): value for name, value in model.state_dict().items() if 'lora_' not in name}
    assert held.keys() == before.keys() and all(torch.equal(held[name], before[name]) for name in before)

    merged = adapted.merge_and_unload()
    assert type(merged) is ConvMixer and merged.state_dict().keys() == before.keys()
    changed = [name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f'blocks.{index}.1.weight' for index in range(4)]
    with torch.no_grad():
        assert_close(merged(images), expected)
        assert_close(reparameterize_model(merged)(images), expected, 1e-4)
