"""The fused path, the compiled one and activation checkpointing compute what the reference path computes."""

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.build import compile_model
from tests.vit.test_model import SMALL, randomize
from vit.model import ViT, ViTConfig

OPTIONS = [
    {},
    {"pool": "avg"},
    {"position_embedding": "sincos"},
    {"registers": 3},
    {"registers": 2, "pool": "avg", "position_embedding": "sincos"},
    {"representation_size": 20},
    {"layer_scale": 0.5},
    {"qkv_bias": False},
    {"dropout": 0.2, "drop_path": 0.3},
    {"image_size": 35, "patch_size": 5, "width": 36, "heads": 3, "mlp_dim": 50, "num_classes": 7},
    {"image_size": 21, "patch_size": 7, "channels": 1, "width": 28, "heads": 4, "depth": 1},
    {"image_size": 8, "patch_size": 8, "channels": 5, "heads": 1, "num_classes": 1, "layer_norm_eps": 1e-3},
]
every_option = pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: ",".join(map(str, fields)) or "default")


def pair(fields, dtype, device="cpu", **execution):
    """A model on the reference path, and one with the same weights to compare with it."""
    config = ViTConfig(**{**SMALL, **fields})
    reference = randomize(ViT(config, fused=False)).train().to(device, dtype)
    other = ViT(config, **execution).to(device, dtype)
    other.load_state_dict(reference.state_dict())
    return reference, other


def step(model, dtype, rows=3, autocast=None):
    """Logits and every gradient of a loss that weighs all logits differently."""
    c, device = model.config, model.head.weight.device
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(rows, c.channels, c.image_size, c.image_size, generator=generator).to(device, dtype)
    weights = torch.randn(rows, c.num_classes, generator=generator).to(device)
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(images)
    (logits * weights).mean().backward()
    logits = logits.detach().to(dtype)  # autocast: fp32 from the reference path, half precision from the fused one
    return {"logits": logits, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_equal(ours, theirs, tolerance):
    """Within `tolerance` of the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# bf16 holds 8 bits: the paths round at other places, and three blocks of large random weights add that up.
@every_option
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_both_paths_are_equal(fields, dtype, tolerance):
    reference, fused = pair(fields, dtype)
    assert_equal(step(fused, dtype), step(reference, dtype), tolerance)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_paths_are_equal_for_any_batch(rows, dtype):
    reference, fused = pair({}, dtype)
    assert_equal(step(fused, dtype, rows), step(reference, dtype, rows), 1e-10 if dtype == torch.float64 else 1e-5)


def test_both_paths_are_equal_with_attention_dropout():
    reference, fused = pair({"attention_dropout": 0.3}, torch.float64)
    assert_equal(step(fused, torch.float64), step(reference, torch.float64), 1e-10)
    without, _ = pair({}, torch.float64)
    assert not torch.allclose(step(without, torch.float64)["logits"], step(fused, torch.float64)["logits"])


@pytest.mark.parametrize("fused", [True, False])
def test_activation_checkpointing_changes_no_bit(fused):
    fields = {"dropout": 0.2, "drop_path": 0.3, "attention_dropout": 0.1}
    _, plain = pair(fields, torch.float32, fused=fused)
    _, checkpointed = pair(fields, torch.float32, fused=fused, activation_checkpointing=True)
    assert_equal(step(checkpointed, torch.float32), step(plain, torch.float32), 0.0)


# torch's tracer looks at the gradient of each block's input, and hides its warning only while warnings aren't errors.
tracer_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@tracer_warns
@pytest.mark.parametrize(("what", "depth"), [("block", 12), ("model", 3)])
def test_fifty_steps_compile_once_without_a_graph_break(what, depth):
    """By the tracer alone, which is what breaks graphs and compiles again; the compiled numbers: the next test."""
    torch._dynamo.reset()
    counters.clear()
    config = ViTConfig(**{**SMALL, "depth": depth, "drop_path": 0.2, "registers": 2, "layer_scale": 0.1})
    model = randomize(ViT(config)).train()
    compile_model(model, what, backend="eager")
    names = list(model.state_dict())
    for _ in range(2):
        step(model, torch.float32)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (2 if what == "block" else 1)  # the first block drops no path
    for _ in range(48):
        step(model, torch.float32)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert names == list(model.state_dict())


@tracer_warns
@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["block", "model"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_compiled_model_equals_the_reference_path(what, activation_checkpointing):
    torch._dynamo.reset()
    fields = {"registers": 2, "layer_scale": 0.5, "representation_size": 20}
    reference, compiled = pair(fields, torch.float32, activation_checkpointing=activation_checkpointing)
    compile_model(compiled, what)
    assert_equal(step(compiled, torch.float32), step(reference, torch.float32), 1e-5)


@tracer_warns
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        pytest.param("cuda", torch.bfloat16, 0.05, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, 0.01, marks=pytest.mark.gpu),
        pytest.param("cpu", torch.bfloat16, 0.05, marks=pytest.mark.integration),
    ],
)
@pytest.mark.parametrize("what", ["none", "block", "model"])
def test_a_mixed_precision_step_equals_the_reference_path(device, dtype, tolerance, what):
    torch._dynamo.reset()
    fields = {"width": 256, "heads": 4, "mlp_dim": 512}
    reference, fused = pair(fields, torch.float32, device)
    for model in (reference, fused):
        model.init_weights(torch.Generator(device).manual_seed(0))
        torch.nn.init.normal_(model.head.weight, std=0.02, generator=torch.Generator(device).manual_seed(1))
    compile_model(fused, what)
    assert_equal(step(fused, torch.float32, 8, dtype), step(reference, torch.float32, 8, dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu_takes_a_flash_kernel(dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, fused = pair({"width": 256, "heads": 4}, torch.float32, "cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):  # raises where neither can be used
        assert step(fused, torch.float32, 8, dtype)["logits"].isfinite().all()


@pytest.mark.gpu
def test_memory_on_a_gpu_falls_by_fusing_and_by_checkpointing():
    def peak(**execution):
        fields = {"width": 256, "heads": 4, "mlp_dim": 1024, "depth": 12, "image_size": 128}
        _, model = pair(fields, torch.float32, "cuda", **execution)
        torch.cuda.reset_peak_memory_stats()
        step(model, torch.float32, 32, torch.bfloat16)
        return torch.cuda.max_memory_allocated()

    reference, fused = peak(fused=False), peak()
    assert fused < 0.7 * reference
    assert peak(activation_checkpointing=True) < 0.6 * fused
