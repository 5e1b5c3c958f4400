"""How fast images reach the model: this pipeline, the usual one, and the limit, measured in turns in one run.

python bench/data.py            images per second of CPU and of the clock, on originals and on 256-pixel shards
python bench/data.py --resume   time to the first batch after a resume
python bench/data.py --memory   memory of the workers over three epochs
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader

from pipeline.data.augment import flip, inception_crop, rand_augment
from pipeline.data.decode import decode
from pipeline.data.index import Index, load_index, write_index
from pipeline.data.loader import DataConfig, Loader, keep_freed_memory, train_stream
from pipeline.runtime import Ranks

SIZE, BATCH, POOL = 224, 128, 2048
COPIES = 4
CROP = inception_crop.Config()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ONE_RANK = Ranks(0, 1, 0, 1)
CPU = torch.device("cpu")


# The data: ImageNet's usual size, 500x375 and 75 to 110 KB, cut from the photographs that scikit-learn carries.


def photographs(count: int) -> Iterator[Image.Image]:
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(image) for image in load_sample_images().images]  # 640x427
    rng = random.Random(0)
    for number in range(count):
        width = rng.randint(500, 560)
        left, top = rng.randint(0, 640 - width), rng.randint(0, 427 - width * 3 // 4)
        image = sources[number % len(sources)].crop((left, top, left + width, top + width * 3 // 4))
        image = ImageEnhance.Color(image.resize((500, 375), Image.Resampling.BICUBIC)).enhance(rng.uniform(0.6, 1.4))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
        yield ImageEnhance.Sharpness(image).enhance(2.5)  # as a camera gives them: enlarging made them soft


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_shards(folder: str, samples: list[dict[str, bytes]], per_shard: int) -> str:
    """Writes tars and their index; returns their brace pattern."""
    os.makedirs(folder)
    count = len(samples) // per_shard
    urls = [f"{folder}/train-{number:04d}.tar" for number in range(count)]
    for number, url in enumerate(urls):
        with webdataset.TarWriter(url, mtime=0) as writer:
            for place in range(number * per_shard, (number + 1) * per_shard):
                writer.write({"__key__": f"{place:08d}", "cls": str(place % 1000).encode(), **samples[place]})
    write_index(urls)
    return f"{folder}/train-{{0000..{count - 1:04d}}}.tar"


def write_data(folder: str, count: int) -> dict[str, str]:
    """`count` photographs, each `COPIES` times: as any real data set, more than a processor's caches hold."""
    originals, small = [], []
    for number, image in enumerate(photographs(count)):
        originals.append({"jpg": encode(image, "JPEG", quality=92 + number % 4)})
        smaller = image.resize((round(500 * 256 / 375), 256), Image.Resampling.BICUBIC)
        small.append({"jpg": encode(smaller, "JPEG", quality=90)})
    found = {}
    for name, samples in (("originals", originals), ("256 px", small)):
        print(f"{name}: {count} JPEGs of {np.mean([len(s['jpg']) for s in samples]) / 1000:.0f} KB on average")
        found[name] = write_shards(f"{folder}/{name.replace(' ', '')}", samples * COPIES, count * COPIES // 8)
    return found


# What is measured: each candidate yields batches without end.


def our_policies(augmented: bool) -> tuple[Any, ...]:
    return CROP, flip.Config(), *([rand_augment.Config()] if augmented else [])


def open_loader(urls: str, workers: int, policies: tuple[Any, ...], start_step: int = 0, **options: Any) -> Loader:
    values = {"global_batch_size": BATCH, "shuffle_pool": POOL, **options}
    config = DataConfig(train=(urls,), workers=workers, **values)
    stream = train_stream(config, load_index(config.train), policies, SIZE, 1000, 0, ONE_RANK, start_step)
    return Loader(stream, workers, CPU)


def ours(urls: str, workers: int, augmented: bool = False) -> Iterator[int]:
    loader = open_loader(urls, workers, our_policies(augmented))
    try:
        for batch in loader:
            assert batch.images.dtype == torch.uint8
            yield len(batch)
    finally:
        loader.close()


def limit(urls: str, workers: int, augmented: bool = False) -> Iterator[int]:
    """Decode, crop and flip alone, from memory, in as many processes: nothing is read, shuffled or passed on.

    The functions are those of the pipeline, with the memory settings of its workers.
    """
    samples = [sample["jpg"] for sample in webdataset.WebDataset(list_urls(urls), shardshuffle=False)]
    policies = our_policies(augmented)
    done = multiprocessing.get_context("fork").SimpleQueue()

    def work(worker: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        rng = np.random.default_rng(worker)
        pixels = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
        while True:
            for row in range(BATCH):
                image = decode(samples[rng.integers(len(samples))], "")
                for policy in policies:
                    image = policy(image, SIZE, rng)
                pixels[row] = image
            done.put(BATCH)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(n,)) for n in range(workers)]
    for process in processes:
        process.start()
    try:
        while True:
            yield done.get()
    finally:
        for process in processes:
            process.kill()
            process.join()


def list_urls(pattern: str) -> list[str]:
    return [shard.url for shard in load_index(pattern).shards]


class PeerCrop:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, step by step, on PIL and torch."""

    def __init__(self, filter: Image.Resampling, augmented: bool):
        self.filter, self.augmented = filter, augmented

    def __call__(self, image: Image.Image) -> torch.Tensor:
        width, height = image.size
        for _ in range(10):
            area = width * height * random.uniform(CROP.min_area, CROP.max_area)
            aspect = CROP.max_aspect ** random.uniform(-1, 1)
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                image = image.crop((left, top, left + w, top + h))
                break
        image = image.resize((SIZE, SIZE), self.filter)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augmented:
            image = pil_rand_augment(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # (3, S, S)
        return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def pil_rand_augment(image: Image.Image) -> Image.Image:
    """RandAugment(2, 15) by PIL's operations, as timm and torchvision do it."""
    size, strength = image.size[0], 0.5 * random.choice((-1, 1))

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)

    operations: list[Callable[[], Image.Image]] = [
        lambda: image,
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: image.rotate(30 * strength, Image.Resampling.BICUBIC),
        lambda: ImageOps.posterize(image, 6),
        lambda: ImageOps.solarize(image, 128),
        lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
        lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
        lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
        lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
        lambda: affine(1, 0.3 * strength, 0, 0, 1, 0),
        lambda: affine(1, 0, 0, 0.3 * strength, 1, 0),
        lambda: affine(1, 0, 0.45 * size * strength, 0, 1, 0),
        lambda: affine(1, 0, 0, 0, 1, 0.45 * size * strength),
    ]
    for _ in range(2):
        image = random.choice(operations)()
    return image


def torchvision_crop(filter: Image.Resampling, augmented: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The peer's transform: torchvision's own where it can be imported."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError):
        return PeerCrop(filter, augmented)
    mode = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}[filter]
    crop = transforms.RandomResizedCrop(
        SIZE, (CROP.min_area, CROP.max_area), interpolation=transforms.InterpolationMode(mode)
    )
    steps = [crop, transforms.RandomHorizontalFlip(), *([transforms.RandAugment(2, 15)] if augmented else [])]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def peer(
    urls: str, workers: int, augmented: bool = False, filter: Image.Resampling = Image.Resampling.BICUBIC
) -> Iterator[int]:
    transform = torchvision_crop(filter, augmented)
    data = (
        webdataset.WebDataset(list_urls(urls), resampled=True, shardshuffle=False)
        .shuffle(POOL)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH)
    )
    for images, _ in DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4):
        assert images.dtype == torch.float32
        yield len(images)


def peer_bilinear(urls: str, workers: int) -> Iterator[int]:
    return peer(urls, workers, filter=Image.Resampling.BILINEAR)


def dali(urls: str, workers: int) -> Iterator[int]:
    """NVIDIA DALI on the CPU: decoding of the crop's region alone, antialiased cubic, uint8 out."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def plan() -> Any:
        jpg, _ = fn.readers.webdataset(paths=list_urls(urls), ext=["jpg", "cls"], random_shuffle=True)
        images = fn.decoders.image_random_crop(
            jpg,
            device="cpu",
            random_area=[CROP.min_area, CROP.max_area],
            random_aspect_ratio=[1 / CROP.max_aspect, CROP.max_aspect],
        )
        images = fn.resize(
            images, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
        )
        return fn.flip(images, horizontal=fn.random.coin_flip())

    built = plan()
    built.build()
    while True:
        (images,) = built.run()
        yield len(np.asarray(images.as_array()))


# Measuring.


class Runner:
    """One candidate with its worker processes, which run while it is measured, and stand still while others are."""

    def __init__(self, batches: Iterator[int], warm_up: int):
        others = set(psutil.Process().children(recursive=True))
        self.batches = batches
        for _ in range(warm_up):
            next(batches)
        self.workers = [p for p in psutil.Process().children(recursive=True) if p not in others]
        self.stop()

    def stop(self) -> None:
        for worker in self.workers:
            worker.suspend()

    def measure(self, seconds: float) -> tuple[float, float]:
        """Images per second of CPU and of the clock, over so many seconds of CPU."""
        for worker in self.workers:
            worker.resume()
        images, cpu, clock, spent = 0, self.cpu_seconds(), time.perf_counter(), 0.0
        while spent < seconds:
            images += next(self.batches)
            spent = self.cpu_seconds() - cpu
        result = images / spent, images / (time.perf_counter() - clock)
        self.stop()
        return result

    def cpu_seconds(self) -> float:
        """Of this process and the workers, by their own clocks: /proc counts in hundredths of a second."""
        return time.process_time() + sum(time.clock_gettime(cpu_clock(worker.pid)) for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.resume()
        self.batches.close()  # type: ignore[attr-defined]


def cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, as clock_getcpuclockid(3) names it on Linux."""
    return (~pid << 3) | 2


RATIOS = (
    ("(a) ours", "(b) usual"),
    ("(a) ours", "(c) limit"),
    ("(a) ours + RandAugment", "(b) usual + RandAugment"),
    ("(a) ours + RandAugment", "(c) limit + RandAugment"),
    ("(a) ours + RandAugment", "(a) ours"),
)


def throughput(folder: str, words: argparse.Namespace) -> dict[str, Any]:
    quick = words.quick
    data = write_data(folder, 128 if quick else 1024)
    # Warm: all lanes have read their second window, and memory has been freed and used again.
    warm_up, seconds, rounds = (1, 0.3, 2) if quick else (2 * POOL // BATCH, words.seconds, words.rounds)
    candidates: dict[str, Callable[..., Iterator[int]]] = {
        "(a) ours": ours, "(b) usual": peer, "(b) bilinear": peer_bilinear, "(c) limit": limit,
        "(a) ours + RandAugment": partial(ours, augmented=True),
        "(b) usual + RandAugment": partial(peer, augmented=True),
        "(c) limit + RandAugment": partial(limit, augmented=True),
    }  # fmt: skip
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        candidates["(d) DALI, CPU"] = dali
    else:
        print("DALI is not installed")
    candidates = {name: run for name, run in candidates.items() if words.only is None or name in words.only}
    source = "own steps on PIL" if isinstance(torchvision_crop(Image.BICUBIC, False), PeerCrop) else "torchvision"
    print(f"the usual pipeline's transforms: {source}")

    found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for shards, urls in data.items():
        for workers in (1,) if quick else words.workers:
            runners = {name: Runner(run(urls, workers), warm_up) for name, run in candidates.items()}
            rates = found[shards, workers] = {name: [] for name in runners}
            for number in range(rounds):  # in turns, so that a slow minute of the machine meets all of them
                for name in runners if number % 2 else reversed(runners):
                    rates[name].append(runners[name].measure(seconds))
            for runner in runners.values():
                runner.close()
    return {"transforms": source, "rows": table(found), "ratios": ratios(found)}


def table(found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    rows = []
    print(f"\n{'shards':10}{'workers':>8}  {'':26}{'img/CPU-s':>10}{'img/s':>8}")
    for (shards, workers), rates in found.items():
        for name, turns in rates.items():
            per_cpu, per_second = (statistics.median(column) for column in zip(*turns, strict=True))
            rows.append({"shards": shards, "workers": workers, "name": name, "images_per_cpu_second": per_cpu,
                         "images_per_second": per_second, "turns": turns})  # fmt: skip
            print(f"{shards:10}{workers:8}  {name:26}{per_cpu:10.0f}{per_second:8.0f}")
    return rows


def ratios(found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """Of images per CPU second: the median over the rounds, each of which compares neighbours in time."""
    rows = []
    print(f"\n{'shards':10}{'workers':>8}  {'':51}{'median':>6}   quartiles")
    for (shards, workers), rates in found.items():
        for first, second in RATIOS:
            if first in rates and second in rates:
                each = [a / b for (a, _), (b, _) in zip(rates[first], rates[second], strict=True)]
                low, middle, high = statistics.quantiles(each, n=4)
                rows.append({"shards": shards, "workers": workers, "of": first, "to": second, "ratio": middle,
                             "quartiles": [low, high], "rounds": each})  # fmt: skip
                print(f"{shards:10}{workers:8}  {first:23} / {second:25}{middle:6.2f}   {low:.2f} to {high:.2f}")
    return rows


def resume(folder: str, quick: bool) -> dict[str, Any]:
    """Seconds from opening the index to the first batch, as a start at that step of an epoch has them."""
    samples, batch = (2_000, 100) if quick else (100_000, 250)
    tiny = [encode(Image.new("RGB", (16, 16), (n, 255 - n, n // 2)), "PNG") for n in range(256)]
    urls = write_shards(f"{folder}/tiny", [{"png": tiny[n % 256]} for n in range(samples)], samples // 100)
    found: dict[int, list[float]] = {0: [], 10: [], 50: [], 90: []}
    for _ in range(1 if quick else 5):
        for percent, seconds in found.items():
            begin = time.perf_counter()
            loader = open_loader(
                urls, 2, our_policies(False), samples // batch * percent // 100,
                global_batch_size=batch, shuffle_pool=16384,
            )  # fmt: skip
            with contextlib.closing(loader):
                next(iter(loader))
                seconds.append(time.perf_counter() - begin)
    print(f"\nfirst batch of {batch} at a step of an epoch of {samples:,} samples, pool of 16,384, 2 workers")
    for percent, seconds in found.items():
        print(f"  at {percent:2} %: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    return {"samples": samples, "seconds_at_percent": found}


def memory(folder: str, quick: bool) -> dict[str, Any]:
    """Resident size of all worker processes at the end of each epoch."""
    urls = write_data(folder, 128 if quick else 1024)["originals"]
    index: Index = load_index(urls)
    loader = open_loader(urls, 2, our_policies(False))
    found: list[float] = []
    epoch_steps = index.samples // BATCH
    with contextlib.closing(loader):
        for step, _ in enumerate(loader, 1):
            if step % epoch_steps == 0:
                workers = psutil.Process().children(recursive=True)
                found.append(sum(worker.memory_info().rss for worker in workers) / 2**20)
                print(f"after epoch {len(found)}: {found[-1]:.0f} MiB in {len(workers)} workers")
            if len(found) == 3:
                break
    return {"resident_mib": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="time to the first batch after a resume")
    parser.add_argument("--memory", action="store_true", help="memory of the workers over three epochs")
    parser.add_argument("--quick", action="store_true", help="little data, one round: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='of the throughput, such as "(a) ours" "(c) limit"')
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of workers (1 2)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each candidate (9)")
    parser.add_argument("--seconds", type=float, default=1.5, help="CPU seconds of a turn (1.5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if words.resume or words.memory:
            measured = (resume if words.resume else memory)(folder, words.quick)
        else:
            measured = throughput(folder, words)
    found = {"cores": os.cpu_count(), "torch": torch.__version__, **measured}
    if words.json:
        with open(words.json, "w") as file:
            json.dump(found, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
