"""What a frozen vision tower makes of images, kept on disk, so that each image is encoded once in all epochs and runs.

A recipe asks for it by `data.feature_cache: DIR`. An image is found by what the tower reads, its pixels after all
preprocessing, in a folder that stands for the tower: its weights, its config, and the dtype that it computes in. If any
of that changes, new features are made. The outputs of all layers are kept, since their mixture trains.
"""

import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


LAYOUT = 1  # of the files
# What does not change the features: names and versions.
IGNORED_SETTINGS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")


class FeatureCache:
    """Tower states of images on disk. Processes may share a folder: a file is written elsewhere and then moved there.

    Args:
        folder: where the features of all towers are.
        model: a `PerceptionGPTModel` whose tower is frozen.
        computed_in: the dtype that the tower computes in.

    Raises:
        ValueError: the tower trains.
    """

    def __init__(self, folder: str | Path, model, computed_in: str):
        if any(weight.requires_grad for weight in model.vision_tower.parameters()):
            raise ValueError("data.feature_cache keeps what a frozen vision tower puts out, and this one trains")
        self.folder = Path(folder, tower_fingerprint(model, computed_in))
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def keys(pixel_values: torch.Tensor) -> torch.Tensor:
        """The keys of images `(images, 3, S, S)`: int64 `(images, 2)`."""
        digests = [blake2b(repr(image.shape).encode(), digest_size=16) for image in pixel_values]
        for digest, image in zip(digests, pixel_values, strict=True):
            digest.update(image.contiguous().numpy())
        return torch.from_numpy(np.stack([np.frombuffer(digest.digest(), dtype=np.int64) for digest in digests]))

    def path(self, key: torch.Tensor) -> Path:
        """Where the states of the image with a key are, or will be."""
        name = key.cpu().numpy().tobytes().hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, keys: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """What `encode_tower` made of the images; None unless all are there."""
        images = []
        for key in keys:
            try:
                images.append(load_file(self.path(key)))
            except (FileNotFoundError, SafetensorError):  # the latter: cut off where the machine stopped
                return None
        return tuple(torch.stack([image[str(layer)] for image in images]) for layer in range(len(images[0])))

    def write(self, keys: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """Keep what `encode_tower` made of images."""
        states = [layer.cpu() for layer in states]
        for index, key in enumerate(keys):
            path = self.path(key)
            path.parent.mkdir(exist_ok=True)
            image = {str(layer): values[index].contiguous() for layer, values in enumerate(states)}
            unfinished = path.with_name(f"{path.stem}.{os.getpid()}.new")
            save_file(image, unfinished)
            os.replace(unfinished, path)


def tower_fingerprint(model, computed_in: str) -> str:
    """What stands for the tower of a `PerceptionGPTModel`: the same for towers that make the same of an image."""
    config = model.config.vision_config
    settings = {key: value for key, value in config.to_dict().items() if key not in IGNORED_SETTINGS}
    stages = model.config.vision_stages
    digest = blake2b(digest_size=8)
    for part in (LAYOUT, settings, config._attn_implementation, stages, computed_in):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.vision_tower.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
