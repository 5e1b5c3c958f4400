"""Files of weights: read from any layout, written in a chosen one. What the layouts are stands in vit/weights.py."""

import json
import math
import mmap
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline import checkpoint
from pipeline.engine import check_weights
from pipeline.errors import UserError, shorten
from pipeline.parsing import check_safetensors, open_regular
from vit.model import ViT, ViTConfig
from vit.weights import from_layout, to_layout

NPZ_MODELS = 4  # an .npz may unpack to so many times the model's size, and MORE_NPZ_BYTES: for fp64, or a larger head
MORE_NPZ_BYTES = 256 << 20
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder of Hugging Face's


def find_checkpoint(path: str) -> str:
    """A checkpoint's folder: `path` itself, or the newest whole one of the run in it."""
    inside = os.path.join(path, "checkpoints")
    return (checkpoint.latest(inside)[0] or path) if os.path.isdir(inside) else path


def read_weights(path: str, model_nbytes: int = 1 << 32) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, .npz, a PyTorch file, a run, or a folder of ours or Hugging Face's.

    They take no more memory than the file has bytes; those of a compressed .npz, than a few models of `model_nbytes`.

    Raises:
        UserError: no such file, or none that can be read.
    """
    path = find_checkpoint(path)
    if os.path.exists(os.path.join(path, "manifest.json")):
        checkpoint.require(path)
        return dict(checkpoint.load_weights(path))
    if os.path.isdir(path):
        names = [name for name in FOLDER_FILES if os.path.exists(os.path.join(path, name))]
        if not names:
            raise UserError(f"{path}: holds none of {', '.join(FOLDER_FILES)}; name a file of weights")
        path = os.path.join(path, names[0])
    try:
        if path.endswith(".safetensors"):
            check_safetensors(path)
            return load_file(path)
        if path.endswith(".npz"):
            with open_regular(path) as file:
                _check_npz(file, NPZ_MODELS * model_nbytes + MORE_NPZ_BYTES)
                with np.load(file, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with open_regular(path) as file:
            _check_torch(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of weights") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors, and code in it is not run; save its state dict alone"
        ) from None
    except Exception as error:  # the readers raise almost anything on damaged files
        reason = shorten(str(error).partition("\n")[0] or type(error).__name__, 200, quote=False)
        raise UserError(f"{path}: can't be read as weights: {reason}") from None
    for key in ("state_dict", "model"):  # what training scripts wrap them in
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path}: expected a dictionary of tensors by name")
    for name, tensor in loaded.items():
        if not _is_stored(tensor):
            raise UserError(f"{path}: {shorten(name)} is no plain tensor whose values are in the file; save it as such")
    return loaded


def _is_stored(tensor: Tensor) -> bool:
    """A view of a few values may claim any shape, and take that memory when it is copied."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_npz(file: BinaryIO, most: int) -> None:
    """Raises ValueError where arrays would take more than `most` bytes, or other memory than their members have."""
    with zipfile.ZipFile(file) as archive:
        nbytes = sum(member.file_size for member in archive.infolist())
        if nbytes > most:
            raise ValueError(
                f"its arrays take {nbytes} bytes unpacked, expected at most {most}: it is of another model"
            )
        for member in archive.infolist():
            with archive.open(member) as content:
                version = np.lib.format.read_magic(content)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(content)
                unsound = dtype.hasobject or min(shape, default=0) < 0
                if unsound or dtype.itemsize * math.prod(shape) != member.file_size - content.tell():
                    raise ValueError(
                        f"{shorten(member.filename)}: its header does not fit its {member.file_size} bytes"
                    )
    file.seek(0)


def _check_torch(file: BinaryIO) -> None:
    """Raises ValueError where a file of torch.save's would unpack to more than itself; it never compresses."""
    nbytes = os.fstat(file.fileno()).st_size
    pickled: Any
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (
                any(m.compress_type != zipfile.ZIP_STORED for m in members)
                or sum(m.file_size for m in members) > nbytes
            ):
                raise ValueError("its members are compressed or overlap, which torch.save never does")
            pickled = [archive.read(m) for m in members if m.filename.endswith(".pkl")]
    else:
        pickled = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)] if nbytes else []
    # torch.load lets a pickle call bytearray(size), whatever the size.
    if any(content.find(b"bytearray") >= 0 for content in pickled):
        raise ValueError("it holds more than tensors; save its state dict alone")
    file.seek(0)


def fit_weights(model: ViT, path: str, new_head: bool) -> dict[str, Tensor]:
    """A state dict for `model` from a file of any layout; positions of another grid are resized.

    Raises:
        UserError: not readable, or of another model; lists every tensor that does not fit.
    """
    own = model.state_dict()
    state = read_weights(path, sum(tensor.numel() * tensor.element_size() for tensor in own.values()))
    try:
        return from_layout(state, own, model.config, new_head=new_head)
    except ValueError as error:
        raise UserError(f"model.init_from={path}: {error}") from None


def check_model(config: ViTConfig, weights: Mapping[str, Tensor]) -> None:
    """Compares a checkpoint's model with its weights, before anything of the model's size is allocated.

    Raises:
        UserError: they don't belong together.
    """
    if config.depth > len(weights):
        raise UserError(f"the checkpoint is of another model: model.depth={config.depth}, but {len(weights)} tensors")
    try:
        with torch.device("meta"):
            model = ViT(config)
    except RuntimeError as error:  # sizes that overflow
        raise UserError(f"the checkpoint's model can't be built: {str(error).splitlines()[0]}") from None
    check_weights(model, weights)


def write_weights(weights: dict[str, Tensor], config: ViTConfig, layout: str, out: str, class_names: list[str]) -> None:
    """Writes our weights in a layout: a .safetensors file, an .npz for jax, a folder for hf.

    Raises:
        UserError: the layout can't hold this model, or `out` can't be written.
    """
    if layout == "hf" and config.representation_size is not None:
        raise UserError("--layout hf: ViTForImageClassification has no representation layer; use torchvision or native")
    suffix = {"hf": "", "jax": ".npz"}.get(layout, ".safetensors")
    if os.path.splitext(out)[1] != suffix:
        raise UserError(f"--out {out}: for the layout {layout} name {'a folder' if not suffix else f'a {suffix} file'}")
    try:
        state = to_layout(weights, layout, config)
        os.makedirs(out if layout == "hf" else os.path.dirname(out) or ".", exist_ok=True)
        if layout == "jax":
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in state.items()}
            np.savez(out, **arrays)
        elif layout == "hf":
            _save(state, os.path.join(out, "model.safetensors"))
            for name, values in (
                ("config", hf_config(config, class_names)),
                ("preprocessor_config", hf_images(config)),
            ):
                with open(os.path.join(out, f"{name}.json"), "w") as file:
                    json.dump(values, file, indent=2)
        else:
            _save(state, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: can't be written: {error}; choose another path") from None
    except ValueError as error:
        raise UserError(f"--layout {layout}: {error}") from None


def _save(state: dict[str, Tensor], path: str) -> None:
    with open(path, "wb") as file:  # safetensors' own writing makes a file that only its owner can read
        file.write(save(state, {"format": "pt"}))


def hf_config(config: ViTConfig, class_names: list[str]) -> dict[str, Any]:
    """Hugging Face's description of this model."""
    names = [*class_names, *(f"LABEL_{number}" for number in range(len(class_names), config.num_classes))]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def hf_images(config: ViTConfig) -> dict[str, Any]:
    """How Hugging Face's image processor makes the pixels that the model was trained on."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.channels,
        "image_std": [0.5] * config.channels,
    }
