"""Vision models by name: from pixels to regions, features (r, F) with boxes (r, 4).

`torchvision:NAME` is one of torchvision's classifiers, cut at its last feature map, or one of its detectors; `hf:NAME`
a Transformer of the Hugging Face hub or of a folder. Shape letters: B pictures, H x W pixels, h x w cells of a feature
map, r regions, F features.
"""

import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import interpolate_embeddings

from lib.model import registry
from lib.model.layers import upload

FIRST_ANSWER = 8  # seconds that a server has


class Preprocessing(NamedTuple):
    """What a picture goes through before it is a tensor; the vision model itself applies mean and std."""

    size: tuple[int, int]  # (height, width) in pixels, aspect ratio not kept; (0, 0): kept, within the limits
    limits: tuple[int, int]  # pixels of the shorter side, and at most of the longer one; (0, 0) where size is given
    resample: str  # "bilinear" or "bicubic", antialiased
    mean: tuple[float, ...]  # of the channels R, G, B in 0..1
    std: tuple[float, ...]


class Regions(NamedTuple):
    """Regions of one picture."""

    features: Tensor  # (r, F)
    boxes: Tensor  # (r, 4): x1 y1 x2 y2 in pixels of the original picture
    objects: Tensor | None = None  # (r, 2): label, score; of detectors only


class Family(NamedTuple):
    """Where torchvision's classifiers of one kind are cut, and into what parts they are thawed."""

    cut: str = "features"  # the node, or the module whose last node, that gives the feature map (or tokens)
    body: str = "features"  # the module whose children are the blocks
    stem: int = 1  # so many of them belong to the stem
    options: dict = {}  # noqa: RUF012  (of the builder, where its weights are not torchvision's own)


FAMILIES = {  # by the beginning of their names
    "alexnet": Family(),
    "convnext": Family(),
    "densenet": Family(cut="relu", stem=2),
    "efficientnet": Family(),
    "googlenet": Family("inception5b", "", 3, {"transform_input": True, "aux_logits": True, "init_weights": False}),
    "inception": Family("Mixed_7c", "", 5, {"transform_input": True, "aux_logits": True, "init_weights": False}),
    "maxvit": Family("blocks", "blocks", 0),
    "mnasnet": Family("layers", "layers", 6),
    "mobilenet": Family(),
    "regnet": Family("trunk_output", "trunk_output", 0),
    "resnet": Family("layer4", "", 2),
    "resnext": Family("layer4", "", 2),
    "shufflenet": Family("conv5", ""),
    "squeezenet": Family(),
    "swin": Family(cut="permute"),
    "vgg": Family(),
    "vit": Family("encoder", "encoder.layers", 0),
    "wide_resnet": Family("layer4", "", 2),
}


class VisionModel(nn.Module):
    """Pixels to regions: the cells of a feature map, pooled to `regions` at most, with the whole picture before them.

    Subclasses compute the map (`feature_map`). mean and std are no part of the weights.
    """

    name: str
    width: int  # F
    regions: int  # r; 0: pictures differ
    preprocessing: Preprocessing
    categories: Sequence[str] = ()  # names of labels, of detectors
    body, stem = "", 0  # see Family
    mean: Tensor
    std: Tensor
    pool: Tensor | None

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing, weights_file: str = ""):
        super().__init__()
        self.name, self.network, self.weights_file = name, network.eval(), weights_file
        self.config: dict = {}  # for `build_vision`
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Take pictures that were made as `preprocessing` says."""
        self.preprocessing = preprocessing
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def set_regions(self, asked: int, whole: bool) -> None:
        """Pool the map of pictures of the pre-processing's size to `asked` cells at most (0: leave it as it is)."""
        self.asked, self.whole = asked, whole
        height, width = self.preprocessing.size
        try:
            with torch.no_grad():
                _, self.width, h, w = self.feature_map(torch.zeros(1, 3, height, width)).shape
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.name} does not take pictures of {height} x {width} pixels ({reason})") from None
        grid = pooled_shape(h, w, asked)
        each = adaptive_avg_pool2d(torch.eye(h * w).view(h * w, h, w), grid)  # what a cell of the map gives to each
        pool, boxes = each.flatten(1).T, pooled_cells((h, w), grid)
        if whole:
            pool = torch.cat([torch.full((1, h * w), 1 / (h * w)), pool])
            boxes = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), boxes])
        self.regions, self.boxes = len(boxes), boxes  # boxes: of a picture of height and width 1; on the CPU
        # The gradient of adaptive_avg_pool2d has no deterministic kernel on CUDA, a matrix product has
        self.register_buffer("pool", pool if len(boxes) != h * w else None, persistent=False)

    def feature_map(self, pixels: Tensor) -> Tensor:
        """The map (B, F, h, w) of normalised pixels (B, 3, H, W)."""
        raise NotImplementedError

    def normalize(self, pictures: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) as what the network takes."""
        return (pictures.to(self.mean.dtype) / 255 - self.mean) / self.std

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, r, F) of pictures, uint8 (B, 3, H, W), which went through the pre-processing."""
        cells = self.feature_map(self.normalize(pictures)).flatten(2).mT  # (B, h * w, F)
        return cells if self.pool is None else self.pool.to(cells.dtype) @ cells

    def describe(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Regions]:
        """Regions of each picture, uint8 (3, H, W) after the pre-processing. sizes: (height, width) before it."""
        features = self(upload(torch.stack(list(pictures)), self.mean.device))
        boxes = [self.boxes * torch.tensor([width, height, width, height]) for height, width in sizes]
        return [Regions(*pair) for pair in zip(features, boxes, strict=True)]

    def stages(self) -> list[nn.Module]:
        """Parts to be thawed one after the other, the top first: the blocks in four groups, then what is before them.

        Each parameter is in one of them.
        """
        body = self.network.get_submodule(self.body)
        parts = [part for part in _parts(self.network, body) if any(True for _ in part.parameters())]
        blocks = [i for i, part in enumerate(parts) if part in set(body.children())]
        first, end = blocks[self.stem], blocks[-1] + 1
        size = math.ceil((end - first) / 4)
        stages = [parts[max(first, stop - size) : stop] for stop in range(end, first, -size)]
        stages[0] += parts[end:]
        return [nn.ModuleList(stage) for stage in [*stages, parts[:first]] if stage]

    def record(self) -> dict[str, Any]:
        """What made the regions, as plain types: `load_recorded` finds the same model again."""
        preprocessing = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.preprocessing._asdict().items()
        }
        return {
            "encoder": self.name,
            "weights": fingerprint(self.network),
            "weights_file": self.weights_file,
            "preprocessing": preprocessing,
            "regions": self.asked,
            "whole": self.whole,
            "width": self.width,
        }


def load_vision(
    name: str, regions: int = 36, weights: str = "", image_size: int = 0, whole: bool = True
) -> VisionModel:
    """A pretrained vision model in evaluation mode, on the CPU.

    regions: cells of the map at most, or boxes of a detector; 0 = all. weights: a file (state dict or safetensors)
    instead of the library's own weights, which are fetched once. image_size: pixels of each side, 0 = the model's own.
    whole: classifiers add a region of the whole picture. Raises ValueError.
    """
    return _make(name, regions=regions, image_size=image_size, whole=whole, weights=weights)


def build_vision(
    name: str, config: dict | None = None, regions: int = 36, image_size: int = 0, whole: bool = False
) -> VisionModel:
    """A vision model of random weights, for a checkpoint's; nothing is fetched. config: `VisionModel.config`."""
    return _make(name, regions=regions, image_size=image_size, whole=whole, weights=None, config=config)


def load_recorded(record: dict[str, Any], weights: str = "") -> VisionModel:
    """The vision model that a `record` is of. weights: where they are now. Raises ValueError where they are others."""
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in record["preprocessing"].items()
    }
    preprocessing, weights = Preprocessing(**fields), weights or record["weights_file"]
    size = preprocessing.size[0]
    model = load_vision(record["encoder"], record["regions"], weights, size, record["whole"])
    if (found := fingerprint(model.network)) != record["weights"]:
        where = weights or "those of the library"
        raise ValueError(
            f"{model.name}: the regions were made with weights of fingerprint {record['weights']}, but {where} have "
            f"{found}; give the file of those weights"
        )
    model.set_preprocessing(preprocessing)
    return model


def _make(name: str, **options: Any) -> VisionModel:
    family, _, rest = name.partition(":")
    if family not in registry.VISION or (family == "torchvision" and rest not in torchvision_names()):
        known = [f"torchvision:{one}" for one in torchvision_names()]
        known += [one for one in registry.VISION if one not in ("torchvision", "hf")]
        nearest = difflib.get_close_matches(name if rest else f"torchvision:{name}", known, 3, cutoff=0)
        raise ValueError(f"no vision model is named {name}; the nearest are {', '.join(nearest)} (or hf:NAME)")
    return registry.find("vision", family)(name, **options)


class TorchvisionGrid(VisionModel):
    """A classifier of torchvision without pooling and classifier: the cells of its last feature map."""

    def __init__(
        self,
        name: str,
        regions: int,
        image_size: int = 0,
        whole: bool = True,
        weights: str | None = "",
        config: dict | None = None,
    ):
        kind = name.partition(":")[2]
        family = FAMILIES[next(prefix for prefix in FAMILIES if kind.startswith(prefix))]
        preset = get_model_weights(kind).DEFAULT.transforms()
        size = image_size or preset.crop_size[0]
        options = dict(family.options)
        if kind.startswith("vit"):
            options["image_size"] = size
        if kind.startswith("maxvit"):
            options["input_size"] = (size, size)
        try:
            classifier = get_model(kind, weights=None, **options)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{name} does not take pictures of {size} x {size} pixels ({error})") from None
        network = create_feature_extractor(classifier, {family.cut: "map"})
        if weights is not None:
            state = read_weights(weights) if weights else torchvision_weights(kind)
            if kind.startswith("vit"):
                state = interpolate_embeddings(size, classifier.patch_size, state)
            fit_weights(network, state, name, weights or kind, set(classifier.state_dict()))
        resample = preset.interpolation.value
        preprocessing = Preprocessing((size, size), (0, 0), resample, tuple(preset.mean), tuple(preset.std))
        super().__init__(name, network, preprocessing, weights or "")
        self.body, self.stem = family.body, family.stem
        self.set_regions(regions, whole)

    def feature_map(self, pixels: Tensor) -> Tensor:
        features = self.network(pixels)["map"]
        return features if features.dim() == 4 else tokens_to_map(features[:, 1:], pixels.shape)  # no class token


def torchvision_model(name: str, **options: Any) -> VisionModel:
    """torchvision's classifier or detector of a name."""
    return TorchvisionGrid(name, **options)


def torchvision_names() -> list[str]:
    """torchvision's classifiers."""
    return [name for name in list_models(module=torchvision.models) if name.startswith(tuple(FAMILIES))]


def torchvision_weights(kind: str) -> dict[str, Tensor]:
    """torchvision's best weights of a model, from its cache or fetched. Raises ValueError where no server answers."""
    weights = get_model_weights(kind).DEFAULT
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        if not os.path.exists(cached):
            print(f"{kind}: the weights are not in the cache, fetching {weights.url}", flush=True)
            with ThreadPool(1) as thread:  # the name server, too, has its time limit
                request = Request(weights.url, method="HEAD")
                thread.apply_async(urlopen, (request,), {"timeout": FIRST_ANSWER}).get(FIRST_ANSWER).close()
        return _clean(weights.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError, TimeoutError) as error:
        reason = str(error) or f"no answer within {FIRST_ANSWER} seconds"
        raise ValueError(f"{weights.url} cannot be fetched ({reason}); give a file of weights") from None


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or a state dict that torch.save wrote, alone or within a checkpoint.

    Raises ValueError.
    """
    try:
        if path.endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file of weights") from None
    except Exception as error:  # of zipfile, pickle, safetensors, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as weights ({reason})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = _clean(state) if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no state dict")
    return tensors


def _clean(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name as models have them now: without DistributedDataParallel's prefix and DenseNet's old points."""
    names = {key: key.removeprefix("module.") for key, value in state.items() if isinstance(value, Tensor)}
    return {re.sub(r"(denselayer\d+\.(norm|conv))\.(\d)", r"\1\3", new): state[old] for old, new in names.items()}


def fit_weights(network: nn.Module, state: dict[str, Tensor], name: str, path: str, others: Iterable[str]) -> None:
    """Give weights to a network. others: names that may be among them, too. Raises ValueError where they do not fit."""
    wanted = {key: value.shape for key, value in network.state_dict().items() if not key.endswith(COUNTER)}
    known = {*wanted, *others}
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unknown": [key for key in state if key not in known and not key.endswith(COUNTER)],
        "of another shape": [key for key, shape in wanted.items() if key in state and state[key].shape != shape],
    }
    if any(faults.values()):
        text = "; ".join(f"{fault}: {_first(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{path}: not the weights of {name}; {text}")
    network.load_state_dict({key: state[key] for key in wanted}, strict=False)


COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fingerprint(network: nn.Module) -> str:
    """16 hex digits of SHA-256 over names, shapes and bytes of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith(COUNTER):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def pooled_shape(h: int, w: int, regions: int) -> tuple[int, int]:
    """The largest grid of at most `regions` cells with a map's aspect ratio; the map's own where that has no more."""
    if not regions or h * w <= regions:
        return h, w
    shapes = [(rows, max(1, round(rows * w / h))) for rows in range(1, h + 1)]
    return max([shape for shape in shapes if math.prod(shape) <= regions], key=math.prod, default=(1, regions))


def pooled_cells(shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Boxes (cells, 4) of adaptive_avg_pool2d's windows, which may overlap, in fractions of width and height."""
    rows, columns = ([_window(i, size, n) for i in range(n)] for size, n in zip(shape, grid, strict=True))
    return torch.tensor([[left, top, right, bottom] for top, bottom in rows for left, right in columns])


def _window(i: int, size: int, n: int) -> tuple[float, float]:
    """Where the i-th of n windows over `size` cells begins and ends, in fractions."""
    return i * size // n / size, -(-(i + 1) * size // n) / size


def tokens_to_map(tokens: Tensor, pixels: Sequence[int]) -> Tensor:
    """Patch tokens (B, h * w, F) as a map (B, F, h, w). pixels: the pictures' shape (B, 3, H, W)."""
    patch = math.sqrt(pixels[2] * pixels[3] / tokens.shape[1])
    return tokens.mT.unflatten(2, (round(pixels[2] / patch), -1))


def _parts(module: nn.Module, body: nn.Module) -> Iterator[nn.Module]:
    """The children of `body`, and the largest modules and single parameters around it, in their order."""
    if own := list(module.parameters(recurse=False)):
        yield nn.ParameterList(own)
    for child in module.children():
        if any(one is body for one in child.modules()):
            yield from _parts(child, body)
        else:
            yield child
