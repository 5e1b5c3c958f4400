"""The model is the published ViT: its parameter count, its function beside Hugging Face's, its initialisation."""

import math

import pytest
import torch

from vit.layers import GELU, Dropout, DropPath, LayerNorm, Linear, attention
from vit.model import VARIANTS, ViT, ViTConfig, count_parameters, forward_flops, training_flops

SMALL = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4, "mlp_dim": 96, "num_classes": 10}


def build(**fields):
    model = ViT(ViTConfig(**{**SMALL, **fields}))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def randomize(model):
    """Fills even what starts at zero, so that no layer hides behind another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def test_vit_b16_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = ViT(ViTConfig())
    assert count_parameters(model.parameters()) == 86_567_656


@pytest.mark.parametrize(("variant", "expected"), [("Ti/16", 5_717_416), ("S/16", 22_050_664), ("L/16", 304_326_632)])
def test_other_variants_have_the_published_number_of_parameters(variant, expected):
    with torch.device("meta"):
        model = ViT(ViTConfig(**ViTConfig.expand({"variant": variant})))
    assert count_parameters(model.parameters()) == expected


def test_every_variant_has_its_name():
    for variant in VARIANTS:
        config = ViTConfig(**ViTConfig.expand({"variant": variant, "image_size": 224}))
        assert config.variant == variant


def test_training_flops_of_b16_are_those_of_the_formula():
    assert round(training_flops(ViTConfig()) / 1e9, 2) == 105.15
    assert round(forward_flops(ViTConfig()) / 1e9, 2) == 35.13


def hugging_face(model):
    """Hugging Face's ViT with the weights of ours, as an independent reference of the function."""
    from transformers import ViTConfig as HFConfig
    from transformers import ViTForImageClassification

    c = model.config
    reference = ViTForImageClassification(
        HFConfig(
            image_size=c.image_size,
            patch_size=c.patch_size,
            hidden_size=c.width,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            intermediate_size=c.mlp_dim,
            layer_norm_eps=c.layer_norm_eps,
            num_labels=c.num_classes,
            qkv_bias=c.qkv_bias,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()
    ours, theirs = model.state_dict(), {}
    theirs["vit.embeddings.cls_token"] = ours["class_token"]
    theirs["vit.embeddings.position_embeddings"] = ours["positions"]
    for kind in ("weight", "bias"):
        theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"] = ours[f"patch.projection.{kind}"]
        theirs[f"vit.layernorm.{kind}"] = ours[f"norm.{kind}"]
        theirs[f"classifier.{kind}"] = ours[f"head.{kind}"]
        for index in range(c.depth):
            block = f"blocks.{index}."
            if f"{block}attention.qkv.{kind}" in ours:
                for part, tensor in zip("qkv", ours[f"{block}attention.qkv.{kind}"].chunk(3), strict=True):
                    theirs[f"{index}.{part}.{kind}"] = tensor
            theirs[f"{index}.out.{kind}"] = ours[f"{block}attention.projection.{kind}"]
            theirs[f"{index}.norm1.{kind}"] = ours[f"{block}attention_norm.{kind}"]
            theirs[f"{index}.norm2.{kind}"] = ours[f"{block}mlp_norm.{kind}"]
            theirs[f"{index}.fc1.{kind}"] = ours[f"{block}mlp.expand.{kind}"]
            theirs[f"{index}.fc2.{kind}"] = ours[f"{block}mlp.contract.{kind}"]
    load_by_role(reference, theirs)
    return reference


ROLES = {
    "q": ("query", "q_proj"),
    "k": ("key", "k_proj"),
    "v": ("value", "v_proj"),
    "out": ("attention.output.dense", "o_proj", "attention.out_proj"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "fc1": ("intermediate.dense", "mlp.fc1"),
    "fc2": ("output.dense", "mlp.fc2"),
}


def load_by_role(reference, tensors):
    """Copies by role: releases of transformers name the layers inside of a block differently."""
    target = dict(reference.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in target:
                index, role, kind = name.split(".")
                names = [
                    n
                    for n in target
                    if f".{index}." in n
                    and any(n.endswith(f".{r}.{kind}") for r in ROLES[role])
                    and (role != "fc2" or "attention" not in n)
                ]
                assert len(names) == 1, (name, names)
                name = names[0]
            target.pop(name).copy_(tensor)
    assert not target, f"not set: {list(target)}"


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_equal_hugging_face(qkv_bias):
    model = randomize(build(qkv_bias=qkv_bias))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(images), hugging_face(model)(images).logits, rtol=1e-5, atol=1e-5)


def test_vit_b16_logits_equal_hugging_face():
    model = ViT(ViTConfig())
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(1))
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
        model.eval()
        torch.testing.assert_close(model(images), hugging_face(model)(images).logits, rtol=1e-5, atol=1e-5)


def test_layers_equal_torch_in_fp64():
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    linear, norm = Linear(16, 8).double(), LayerNorm(16).double()
    for parameter in [*linear.parameters(), *norm.parameters()]:
        torch.nn.init.normal_(parameter)
    f = torch.nn.functional
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(linear(x), f.linear(x, linear.weight, linear.bias), **close)
    torch.testing.assert_close(norm(x), f.layer_norm(x, (16,), norm.weight, norm.bias, 1e-6), **close)
    torch.testing.assert_close(GELU()(x), f.gelu(x), **close)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v), f.scaled_dot_product_attention(q, k, v), **close)


def test_layer_norm_takes_statistics_in_fp32():
    x = (torch.randn(4, 256) + 100).bfloat16()
    norm = LayerNorm(256)
    torch.nn.init.ones_(norm.weight), torch.nn.init.zeros_(norm.bias)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x.float(), (256,), eps=1e-6).bfloat16())


@pytest.mark.parametrize("layer", [Dropout(0.25), DropPath(0.25)])
def test_dropout_keeps_the_mean_and_vanishes_in_evaluation(layer):
    x = torch.ones(20_000, 2)
    torch.manual_seed(0)
    assert abs(layer(x).mean().item() - 1.0) < 0.02
    assert layer(x).unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(layer.eval()(x), x)
    layer.train()


def test_drop_path_drops_whole_images():
    torch.manual_seed(0)
    y = DropPath(0.5)(torch.ones(64, 3, 5))
    assert {tuple(image.unique().tolist()) for image in y} == {(0.0,), (2.0,)}


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_init_reaches_every_parameter(pool):
    model = ViT(ViTConfig(**SMALL, pool=pool))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_init_has_the_published_statistics():
    model = build(width=256, heads=4, mlp_dim=512)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch.projection.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 8 * 8), rel=0.05)
    qkv = model.blocks[0].attention.qkv.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=0.01)
    assert model.head.weight.abs().max() == 0


def test_class_token_stands_at_position_zero():
    model = randomize(build())
    tokens = model.embed(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(tokens[:, 0], (model.class_token + model.positions[:, :1])[:, 0].expand(2, -1))


def test_average_pooling_has_no_class_token():
    model = randomize(build(pool="avg"))
    assert model.class_token is None
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 30}, "image_size: 30 is no multiple of patch_size 8; the nearest that are: 24, 32"),
        ({"heads": 5}, "heads: 5 does not divide width 48; the nearest that does: 4"),
        ({"dropout": 1.0}, r"dropout: must lie in \[0, 1\)"),
        ({"depth": 0}, "depth: must be at least 1"),
    ],
)
def test_impossible_configs_name_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SMALL, **fields})


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"variant: unknown 'B/15'; known are Ti/8, .*B/16"):
        ViTConfig.expand({"variant": "B/15"})
