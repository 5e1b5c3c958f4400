"""A training step of our model beside those of timm, torchvision and Hugging Face.

    python bench/model.py                                       # small, on a CPU
    python bench/model.py --variant B/16 --batch 1 --only hf-sdpa ours   # the published size there
    python bench/model.py --variant B/16 --batch 256 --precision bf16    # on a GPU

All have the same weights, batch, precision, loss, clipping and AdamW (the fused kernel, as in the pipeline). A round
goes through them forwards and then backwards (A B C, C B A), so that a drift of the machine's speed hits all alike.
Ratios compare within a round; given are their median and, in brackets, their quartiles. On a CPU there are two of them:
by the clock, and by the seconds that the process computed, which other processes disturb less (best with --threads 1).
A peer that can't be imported is left out with a message. Ctrl-C ends the run with the table of the rounds so far.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.build import build_model, compile_model
from pipeline.engine import EngineConfig
from pipeline.monitor.meter import peak_flops
from pipeline.weights import hf_config
from vit.model import ViT, ViTConfig, training_flops
from vit.weights import to_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ours(config: ViTConfig, state: dict[str, Tensor], fused: bool, compiled: str) -> nn.Module:
    model = ViT(config, fused=fused)
    model.load_state_dict(state)
    compile_model(model, compiled)
    return model


def timm(config: ViTConfig, state: dict[str, Tensor], compiled: str) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.heads, mlp_ratio=config.mlp_dim / config.width, num_classes=config.num_classes,
    )  # fmt: skip
    model.load_state_dict(to_layout(state, "timm", config))
    return torch.compile(model) if compiled == "model" else model


def torchvision(config: ViTConfig, state: dict[str, Tensor]) -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(config.image_size, config.patch_size, config.depth, config.heads, config.width,
                              config.mlp_dim, num_classes=config.num_classes)  # fmt: skip
    model.load_state_dict(to_layout(state, "torchvision", config))
    return model


class HuggingFace(nn.Module):
    """Its model, with logits as the result."""

    def __init__(self, config: ViTConfig, state: dict[str, Tensor], attention: str, compiled: str):
        super().__init__()
        import transformers

        transformers.logging.disable_progress_bar()
        self.model = transformers.ViTForImageClassification.from_pretrained(
            None,
            config=transformers.ViTConfig(**hf_config(config, [])),
            state_dict={name: tensor.clone() for name, tensor in to_layout(state, "hf", config).items()},
            attn_implementation=attention,
        )
        if compiled == "model":
            self.model.forward = torch.compile(self.model.forward)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


CONTENDERS: dict[str, Callable[[ViTConfig, dict[str, Tensor]], nn.Module]] = {
    "ours": lambda config, state: ours(config, state, True, "none"),
    "ours-reference": lambda config, state: ours(config, state, False, "none"),
    "ours-block": lambda config, state: ours(config, state, True, "block"),
    "ours-model": lambda config, state: ours(config, state, True, "model"),
    "timm": lambda config, state: timm(config, state, "none"),
    "timm-model": lambda config, state: timm(config, state, "model"),
    "torchvision": torchvision,
    "hf-eager": lambda config, state: HuggingFace(config, state, "eager", "none"),
    "hf-sdpa": lambda config, state: HuggingFace(config, state, "sdpa", "none"),
    "hf-model": lambda config, state: HuggingFace(config, state, "sdpa", "model"),
}


class Seconds(NamedTuple):
    """Of one step: by the clock, and computed by all threads of this process."""

    clock: float
    cpu: float


@dataclass
class Contender:
    """One model with its optimizer, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compile_seconds: float = 0.0
    peak_bytes: int = 0
    first_loss: float = 0.0
    rounds: list["Seconds"] = field(default_factory=list)  # of a step

    def step(self, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(self.model(images).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def state_bytes(self) -> int:
        moments = [t for slots in self.optimizer.state.values() for t in slots.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *moments))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: torch.device, times: int) -> Seconds:
    """Of one call, as the mean of `times`."""
    wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    wait(device)
    return Seconds((time.perf_counter() - clock) / times, (time.process_time() - cpu) / times)


def prepare(config: ViTConfig, names: list[str], batch: tuple[Tensor, Tensor, torch.dtype]) -> list[Contender]:
    """Builds the contenders and takes their first steps, which compile."""
    device = batch[0].device
    fresh = build_model(config, EngineConfig(), 0)
    nn.init.normal_(fresh.head.weight, std=0.02)
    state = fresh.state_dict()
    found = []
    for name in names:
        try:
            model = CONTENDERS[name](config, state).to(device).train()
        except (ImportError, RuntimeError) as error:  # torchvision's operators raise RuntimeError where they don't fit
            print(f"{name}: left out: {str(error).splitlines()[0]}")
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        contender = Contender(name, model, optimizer)
        losses = []
        first = seconds(lambda c=contender, found=losses: found.append(c.step(*batch)), device, 1)
        contender.first_loss = float(losses[0])
        contender.compile_seconds = first.clock - seconds(lambda c=contender: c.step(*batch), device, 1).clock
        if device.type == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            contender.step(*batch)
            contender.peak_bytes = torch.cuda.max_memory_allocated() - held + contender.state_bytes()
        found.append(contender)
        print(f"{name}: ready, first loss {contender.first_loss:.6f}", flush=True)
    return found


def measure_product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: a @ b, device, 5).clock


def ratio(first: list[float], own: list[float]) -> str:
    """How much faster than the first, round by round: median [lower quartile, upper quartile]."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(first, own, strict=True)], n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def table(config: ViTConfig, contenders: list[Contender], rows: int, product: float, device: torch.device) -> str:
    flops = training_flops(config)
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    by_cpu = device.type == "cpu"
    lines = [
        f"| | images/s | ratio to the first |{' by CPU seconds |' if by_cpu else ''} of the product | MFU | peak memory"
        " | compile time |",
        "|---" * (8 if by_cpu else 7) + "|",
    ]
    for c in contenders:
        (clock, cpu), (first_clock, first_cpu) = zip(*c.rounds, strict=True), zip(*contenders[0].rounds, strict=True)
        speed = rows / statistics.median(clock)
        cells = [
            c.name,
            f"{speed:.2f}",
            ratio(first_clock, clock),
            *([ratio(first_cpu, cpu)] if by_cpu else []),
            f"{speed * flops / product:.1%}",
            f"{speed * flops / peak:.1%}" if peak else "-",
            f"{c.peak_bytes / 2**30:.2f} GiB" if c.peak_bytes else "-",
            f"{c.compile_seconds:.0f} s" if c.name.endswith(("-block", "-model")) else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def profile(contender: Contender, batch: tuple[Tensor, Tensor, torch.dtype]) -> str:
    """The operators or kernels that took longest in three steps."""
    on_gpu = batch[0].device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorder:
        for _ in range(3):
            contender.step(*batch)
        wait(batch[0].device)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return recorder.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/16", help="shape of the model (Ti/16)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (224)")
    parser.add_argument("--batch", type=int, default=4, help="images in a step (4)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="autocast, or fp32 (fp32)")
    parser.add_argument("--rounds", type=int, default=5, help="times forwards and backwards through all (5; from 2 on)")
    parser.add_argument("--steps", type=int, default=1, help="steps of one visit (1)")
    parser.add_argument("--threads", type=int, help="of a CPU (one per core)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help="who takes part, the first as the measure: " + ", ".join(CONTENDERS))  # fmt: skip
    parser.add_argument("--profile", choices=CONTENDERS, metavar="NAME", help="list this one's longest kernels, only")
    parsed = parser.parse_args()
    if min(parsed.batch, parsed.rounds - 1, parsed.steps) < 1:
        parser.error("--batch and --steps: at least 1; --rounds: at least 2")

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ViTConfig(**ViTConfig.expand({"variant": parsed.variant, "image_size": parsed.image_size}))
    dtype = DTYPES[parsed.precision]
    torch.manual_seed(0)
    images = torch.randn(parsed.batch, 3, config.image_size, config.image_size, device=device)
    batch = (images, torch.randint(0, config.num_classes, (parsed.batch,), device=device), dtype)
    if parsed.profile:
        [contender] = prepare(config, [parsed.profile], batch)
        print(profile(contender, batch))
        return
    contenders = prepare(config, parsed.only, batch)
    side = 8192 if device.type == "cuda" else 2048
    products: list[float] = []
    try:
        for _ in range(parsed.rounds):
            product = measure_product(side, dtype, device)
            spent = [seconds(lambda c=c: c.step(*batch), device, parsed.steps) for c in contenders]
            back = [seconds(lambda c=c: c.step(*batch), device, parsed.steps) for c in reversed(contenders)]
            for contender, there, again in zip(contenders, spent, reversed(back), strict=True):
                contender.rounds.append(Seconds(*((a + b) / 2 for a, b in zip(there, again, strict=True))))
            products.append(product)
    except KeyboardInterrupt:  # what was measured until then is worth printing
        if len(products) < 2:
            raise
    product = statistics.median(products)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    gflop = training_flops(config) / 1e9
    print(f"\n{parsed.variant} at {config.image_size} pixels, batch {parsed.batch}, {parsed.precision}, {where},"
          f" torch {torch.__version__}; {gflop:.2f} GFLOP an image;\n{side} x {side} product: {product / 1e12:.3g}"
          f" TFLOP/s; medians of {len(products)} rounds, {2 * parsed.steps} steps each\n")  # fmt: skip
    print(table(config, contenders, parsed.batch, product, device))


if __name__ == "__main__":
    main()
