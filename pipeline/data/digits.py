"""The embedded data set: scikit-learn's 1,797 scans of handwritten digits, written as WebDataset shards."""

import io
import json
import os

import numpy as np
from PIL import Image

from pipeline.data.index import write_file, write_index
from pipeline.errors import UserError

TRAIN = "train-{000..003}.tar"
VAL = "val-{000..001}.tar"


def write_digits(folder: str) -> None:
    """Writes 1,437 training and 360 validation scans, 8x8 PNG with their class, and the index and class names.

    Raises:
        UserError: scikit-learn is missing, or the folder can't be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.prepare: digits needs scikit-learn; run: pip install 'vit-pretrain[digits]'") from None
    import webdataset

    scans, labels = load_digits(return_X_y=True)
    shuffled = np.random.RandomState(0).permutation(len(labels))
    splits = {"val": np.array_split(shuffled[:360], 2), "train": np.array_split(shuffled[360:], 4)}
    try:
        os.makedirs(folder, exist_ok=True)
        urls = []
        for split, shards in splits.items():
            for number, members in enumerate(shards):
                url = f"{folder}/{split}-{number:03d}.tar"
                shard = io.BytesIO()
                with webdataset.TarWriter(shard, mtime=0) as writer:
                    for member in members:
                        png = io.BytesIO()
                        Image.fromarray((scans[member].reshape(8, 8) * 255 / 16).round().astype(np.uint8)).save(
                            png, "PNG"
                        )
                        label = str(labels[member]).encode()
                        writer.write({"__key__": f"{member:04d}", "png": png.getvalue(), "cls": label})
                write_file(url, shard.getvalue())
                urls.append(url)
        write_file(f"{folder}/classes.json", json.dumps([str(digit) for digit in range(10)]).encode())
        write_index(urls)
    except OSError as error:
        raise UserError(f"{folder}: can't write the embedded data set: {error}") from None
