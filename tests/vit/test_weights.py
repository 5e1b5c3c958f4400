"""Weights of other projects come in and go out bit by bit, and what does not fit is named."""

from pathlib import Path

import pytest
import torch

from tests.vit.test_model import assert_same_logits, build, randomize
from vit.model import ViT, ViTConfig
from vit.weights import LAYOUTS, from_layout, recognise, resize_positions, to_layout

OTHERS = [layout for layout in LAYOUTS if layout != "native"]


def meta(**fields):
    with torch.device("meta"):
        return ViT(ViTConfig(**fields))


def listed(name):
    """Names and shapes as the other project has them, for ViT-B/16."""
    lines = (Path(__file__).parent / f"layouts/{name}.txt").read_text().splitlines()[1:]
    return {line.split()[0]: tuple(map(int, line.split()[1].split("x"))) for line in lines}


@pytest.mark.parametrize("layout", OTHERS)
def test_b16_has_the_names_and_shapes_of(layout):
    model = meta()
    state = to_layout(model.state_dict(), layout, model.config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == listed(layout)


@pytest.mark.parametrize("name", [*OTHERS, "hf_state_dict"])
def test_b16_is_filled_by_the_names_and_shapes_of(name):
    model = meta()
    given = {key: torch.empty(shape, device="meta") for key, shape in listed(name).items()}
    assert recognise(given)[0] == name.removesuffix("_state_dict")
    filled = from_layout(given, model.state_dict(), model.config)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in filled.items()} == expected


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        *[(layout, {}) for layout in LAYOUTS],
        *[(layout, {"position_embedding": "sincos"}) for layout in LAYOUTS],
        *[(layout, {"representation_size": 24}) for layout in ("native", "hf", "torchvision", "jax")],
        *[(layout, {"pool": "avg"}) for layout in ("native", "timm", "jax")],
        *[(layout, {"qkv_bias": False}) for layout in ("native", "timm", "hf")],
        *[(layout, {"registers": 4, "layer_scale": 0.1}) for layout in ("native", "timm")],
    ],
)
def test_a_round_trip_is_bit_exact(layout, fields):
    model, fresh = randomize(build(**fields)), build(**fields)
    there = to_layout(model.state_dict(), layout, model.config)
    back = from_layout(there, fresh.state_dict(), model.config)
    assert list(back) == list(model.state_dict())
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
    again = to_layout(back, layout, model.config)
    assert all(torch.equal(tensor, again[name]) for name, tensor in there.items())


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("hf", {"registers": 1}, "the hf layout has no place for registers"),
        ("torchvision", {"layer_scale": 1.0}, "the torchvision layout has no place for blocks.0.attention_scale"),
        ("timm", {"representation_size": 8}, "the timm layout has no place for representation.weight"),
        ("hf", {"pool": "avg"}, "the hf layout needs class_token, which this model lacks"),
        ("jax", {"qkv_bias": False}, "the jax layout needs qkv.bias, which this model lacks"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout, fields, message):
    model = build(**fields)
    with pytest.raises(ValueError, match=message):
        to_layout(model.state_dict(), layout, model.config)


def test_all_that_does_not_fit_is_listed_with_the_nearest_names():
    model = build()
    state = to_layout(model.state_dict(), "timm", model.config)
    state["blocks.1.attn.qkvs.weight"] = state.pop("blocks.1.attn.qkv.weight")
    state["head.weight"] = torch.zeros(7, 48)
    state["fc_norm.bias"] = torch.zeros(48)
    with pytest.raises(ValueError, match="layout timm") as caught:
        from_layout(state, model.state_dict(), model.config)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing blocks.1.attn.qkv.weight 144x48; nearest there: blocks.1.attn.qkvs.weight",
        "unexpected blocks.1.attn.qkvs.weight 144x48; nearest there: blocks.1.attn.qkv.weight",
        "unexpected fc_norm.bias 48",
        "head.weight: the file has 7x48, the model 10x48; model.new_head=true starts with a fresh head",
    ]


def test_an_unknown_layout_says_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no known layout.*patch_embed.proj.weight.*; found stem.0.weight"):
        recognise({"stem.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("layout", OTHERS)
def test_a_new_head_is_fresh_and_the_rest_is_the_files(layout):
    big, small = randomize(build(num_classes=12)), build()
    state = to_layout(big.state_dict(), layout, big.config)
    with pytest.raises(ValueError, match="starts with a fresh head"):
        from_layout(state, small.state_dict(), small.config)
    filled = from_layout(state, small.state_dict(), small.config, new_head=True)
    for name, tensor in filled.items():
        source = small if name.startswith("head.") else big
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_new_head_leaves_an_unused_representation_layer_aside():
    big, small = randomize(build(representation_size=48)), build()
    state = to_layout(big.state_dict(), "hf", big.config)
    with pytest.raises(ValueError, match=r"unexpected vit.pooler.dense.weight"):
        from_layout(state, small.state_dict(), small.config)
    filled = from_layout(state, small.state_dict(), small.config, new_head=True)
    assert torch.equal(filled["blocks.2.mlp.expand.weight"], big.blocks[2].mlp.expand.weight)


def test_prefixes_and_old_spellings_are_known():
    model = randomize(build())
    wrapped = {f"module.{n}": t for n, t in to_layout(model.state_dict(), "timm", model.config).items()}
    old = {
        n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t
        for n, t in to_layout(model.state_dict(), "torchvision", model.config).items()
    }
    assert any(".mlp.linear_2." in name for name in old)
    for state in (wrapped, old):
        filled = from_layout(state, build().state_dict(), model.config)
        assert all(torch.equal(tensor, filled[name]) for name, tensor in model.state_dict().items())


def test_learned_positions_do_not_enter_a_model_with_fixed_ones():
    learned, fixed = randomize(build()), build(position_embedding="sincos")
    with pytest.raises(ValueError, match="learned positions"):
        from_layout(to_layout(learned.state_dict(), "timm", learned.config), fixed.state_dict(), fixed.config)


def test_resized_positions_are_those_of_timm():
    """Numbers of timm 1.0.31: layers.resample_abs_pos_embed(positions, [3, 3] and [6, 6], num_prefix_tokens=1)."""
    positions = (torch.arange(34).float() * 0.37).sin().reshape(1, 17, 2)
    smaller = [0.0, 0.36161544919, 0.35263693333, 0.39736256003, 0.35167136788, 0.26403647661, 0.05859069154,
               -0.08861082792, -0.09293696284, -0.06271096319, 0.00076413713, 0.04125881195, 0.09383042157,
               0.11095704138, -0.06398385018, -0.20258830488, -0.35404497385, -0.392182827, -0.35001924634,
               -0.2560113966]  # fmt: skip
    larger = [0.0, 0.36161544919, 0.72908174992, 1.00186121464, 0.94098389149, 1.07488822937, 1.1281270981,
              1.0453943014, 0.97816026211, 0.7086278796, 0.5286566019, 0.14896288514]  # fmt: skip
    assert resize_positions(positions, 3, 1).flatten().tolist() == pytest.approx(smaller, abs=1e-6)
    assert resize_positions(positions, 6, 1).flatten()[:12].tolist() == pytest.approx(larger, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fields", [{"image_size": 48}, {"image_size": 16}])
def test_positions_are_resized_to_the_models_grid(layout, fields):
    model, other = randomize(build()), build(**fields)
    filled = from_layout(to_layout(model.state_dict(), layout, model.config), other.state_dict(), other.config)
    assert torch.equal(filled["positions"][:, 0], model.positions[:, 0])
    assert torch.equal(filled["positions"], resize_positions(model.positions, fields["image_size"] // 8, 1))


def test_positions_without_one_for_the_class_token_get_zeros():
    model = randomize(build(registers=2))
    state = to_layout(model.state_dict(), "timm", model.config)
    state["pos_embed"] = state["pos_embed"][:, 3:]  # as timm's no_embed_class=True has them
    filled = from_layout(state, build(registers=2).state_dict(), model.config)
    assert filled["positions"][:, 0].abs().max() == 0
    assert torch.equal(filled["positions"][:, 1:], model.positions[:, 1:])
    assert torch.equal(filled["registers"], model.registers)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"pool": "avg"}, {"registers": 4, "layer_scale": 0.5}])
def test_logits_equal_timm(fields):
    timm = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    model = randomize(build(**fields))
    c = model.config
    reference = timm.VisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width, depth=c.depth, num_heads=c.heads,
        mlp_ratio=c.mlp_dim / c.width, num_classes=c.num_classes, class_token=c.pool == "cls",
        global_pool="token" if c.pool == "cls" else "avg", fc_norm=False, reg_tokens=c.registers,
        init_values=c.layer_scale,
    ).eval()  # fmt: skip
    reference.load_state_dict(to_layout(model.state_dict(), "timm", c))
    images = torch.randn(3, 3, 32, 32)
    assert_same_logits(model(images), reference(images))


@torch.no_grad()
@pytest.mark.parametrize("representation_size", [None, 24])
def test_logits_equal_torchvision(representation_size):
    torchvision = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    model = randomize(build(representation_size=representation_size))
    c = model.config
    reference = torchvision.VisionTransformer(
        c.image_size, c.patch_size, c.depth, c.heads, c.width, c.mlp_dim, num_classes=c.num_classes,
        representation_size=c.representation_size,
    ).eval()  # fmt: skip
    reference.load_state_dict(to_layout(model.state_dict(), "torchvision", c))
    images = torch.randn(3, 3, 32, 32)
    assert_same_logits(model(images), reference(images))
