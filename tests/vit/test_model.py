"""The model is the published ViT: its parameter count, its function beside Hugging Face's, its initialisation."""

import math

import pytest
import torch

from pipeline.weights import hf_config
from vit.layers import GELU, Dropout, DropPath, LayerNorm, Linear, attention
from vit.model import VARIANTS, ViT, ViTConfig, count_parameters, forward_flops, training_flops
from vit.weights import from_layout, to_layout

SMALL = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 4, "mlp_dim": 96, "num_classes": 10}


def build(**fields):
    model = ViT(ViTConfig(**{**SMALL, **fields}))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def randomize(model, deviation=0.2):
    """Fills even what starts at zero, so that no layer hides behind another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, deviation, generator=generator)
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

    state = {name: t.clone() for name, t in to_layout(model.state_dict(), "hf", model.config).items()}
    reference = ViTForImageClassification.from_pretrained(
        None, config=HFConfig(**hf_config(model.config, [])), state_dict=state
    ).eval()
    filled = from_layout(reference.state_dict(), model.state_dict(), model.config)
    assert all(torch.equal(tensor, filled[name]) for name, tensor in model.state_dict().items())
    return reference


def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def sizes(*quick):
    """All variants at 224 and 384; those not named run as integration tests."""
    cases = [(variant, size) for variant in ("Ti/16", "S/16", "B/16", "L/16") for size in (224, 384)]
    marks = {case: [] if case in quick else [pytest.mark.integration, pytest.mark.timeout(1200)] for case in cases}
    return pytest.mark.parametrize(("variant", "size"), [pytest.param(*c, marks=m) for c, m in marks.items()])


@torch.no_grad()
@sizes(("Ti/16", 224), ("B/16", 224))
def test_logits_equal_hugging_face(variant, size):
    fields = ViTConfig.expand({"variant": variant, "image_size": size})
    model = randomize(ViT(ViTConfig(**fields)), 0.03)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    expected = hugging_face(model)(images).logits
    assert_same_logits(model(images), expected)
    reference_path = ViT(ViTConfig(**fields), fused=False).eval()
    reference_path.load_state_dict(model.state_dict(), assign=True)
    assert_same_logits(reference_path(images), expected)


@torch.no_grad()
@sizes(("Ti/16", 224))
def test_average_pooled_logits_equal_hugging_face(variant, size):
    """Its layers without its class token: what it has no option for."""
    fields = ViTConfig.expand({"variant": variant, "image_size": size})
    with_token = randomize(ViT(ViTConfig(**fields)), 0.03)
    model = ViT(ViTConfig(**fields, pool="avg")).eval()
    state = {name: tensor for name, tensor in with_token.state_dict().items() if name != "class_token"}
    model.load_state_dict({**state, "positions": state["positions"][:, 1:]})
    reference = hugging_face(with_token)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    embeddings = reference.vit.embeddings
    x = embeddings.patch_embeddings(images) + embeddings.position_embeddings[:, 1:]
    for layer in reference.vit.layers:
        x = layer(x)
    assert_same_logits(model(images), reference.classifier(reference.vit.layernorm(x).mean(dim=1)))


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_representation_layer_equals_hugging_faces_pooler(qkv_bias):
    from transformers import ViTConfig as HFConfig
    from transformers import ViTModel

    model = randomize(build(qkv_bias=qkv_bias, representation_size=48))
    state = to_layout(model.state_dict(), "hf", model.config)
    state = {name.removeprefix("vit."): tensor for name, tensor in state.items() if name.startswith("vit.")}
    config = HFConfig(**hf_config(model.config, []))
    reference = ViTModel.from_pretrained(None, config=config, state_dict=state).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert_same_logits(model.pool(model.encode(model.embed(images))), reference(images).pooler_output)


@pytest.mark.integration
@pytest.mark.timeout(1800)  # two minutes on two free cores
def test_a_hundred_training_steps_have_the_losses_of_hugging_face():
    model = ViT(ViTConfig(**ViTConfig.expand({"variant": "Ti/16"})))
    model.init_weights(torch.Generator().manual_seed(0))
    reference = hugging_face(model).train()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 8, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (4, 8), generator=generator)

    def losses(network, logits):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05)
        found = []
        for step in range(100):
            loss = torch.nn.functional.cross_entropy(logits(images[step % 4]), labels[step % 4])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    ours = losses(model.train(), model)
    theirs = losses(reference, lambda batch: reference(batch).logits)
    assert ours[-1] < ours[0] - 1
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"losses from {ours[0]:.3f} to {ours[-1]:.3f}, largest difference {difference:.1e}")
    assert difference < 1e-4


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


ALL_OPTIONS = {"registers": 4, "representation_size": 24, "layer_scale": 1e-4}


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_init_reaches_every_parameter(pool, position_embedding):
    with torch.device("meta"):
        model = ViT(ViTConfig(**SMALL, **ALL_OPTIONS, pool=pool, position_embedding=position_embedding))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.constant_(tensor, math.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


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


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 32, 32\), found \(" + str(shape[0])):
        build()(torch.randn(shape))


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"variant: unknown 'B/15'; known are Ti/8, .*B/16"):
        ViTConfig.expand({"variant": "B/15"})
