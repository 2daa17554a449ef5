"""Vision models by name: from pixels to regions, features (r, F) with boxes (r, 4).

`torchvision:NAME` is one of torchvision's classifiers, cut at its last feature map, or one of its detectors; `hf:NAME`
a Transformer of the Hugging Face hub or of a folder. Shape letters: B pictures, H x W pixels, h x w cells of a feature
map, r regions, F features.
"""

import difflib
import hashlib
import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple, cast
from urllib.request import Request, urlopen

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.passes.split_module import split_module
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import MultiScaleRoIAlign
from transformers import AutoImageProcessor

from lib.model import registry
from lib.model.backbone import (
    IMAGE_PROCESSORS,
    build_backbone,
    checkpoint_activations,
    fetch,
    load_backbone,
    read_config,
)
from lib.model.layers import upload

CHECKPOINTED_PARTS = 8  # of a network whose activations are computed again
FIRST_ANSWER = 8  # seconds that a server has


class Preprocessing(NamedTuple):
    """What a picture goes through before it is a tensor; the vision model itself applies mean and std."""

    size: tuple[int, int]  # (height, width) in pixels, aspect ratio not kept; (0, 0): kept, within the limits
    limits: tuple[int, int]  # pixels of the shorter side, and at most of the longer one; (0, 0) where size is given
    resample: str  # "bilinear" or "bicubic", antialiased
    mean: tuple[float, ...]  # of the channels R, G, B in 0..1
    std: tuple[float, ...]


def to_plain(preprocessing: Preprocessing) -> dict[str, Any]:
    """As JSON has it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in preprocessing._asdict().items()}


def to_preprocessing(plain: dict[str, Any]) -> Preprocessing:
    """From `to_plain`."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    return Preprocessing(**fields)


class Regions(NamedTuple):
    """Regions of one picture."""

    features: Tensor  # (r, F)
    boxes: Tensor  # (r, 4): x1 y1 x2 y2 in pixels of the original picture
    objects: Tensor | None = None  # (r, 2): label, score; of detectors only


class Family(NamedTuple):
    """Where torchvision's classifiers of one kind are cut, and into what parts they are thawed."""

    cut: str = "features"  # nodes, or modules whose last nodes, that give the feature map (or tokens)
    body: str = "features"  # the module whose children are the blocks
    stem: int = 1  # so many of them belong to the stem


FAMILIES = {  # by the beginning of their names
    "alexnet": Family(),
    "convnext": Family(),
    "densenet": Family(cut="relu", stem=2),
    "efficientnet": Family(),
    "googlenet": Family("inception5b", "", 3),
    "inception": Family("Mixed_7c", "", 5),
    "maxvit": Family("blocks", "blocks", 0),
    "mnasnet": Family("layers", "layers", 6),
    "mobilenet": Family(),
    "regnet": Family("trunk_output", "trunk_output", 0),
    "resnet": Family("layer4", "", 2),
    "resnext": Family("layer4", "", 2),
    "shufflenet": Family("conv5", ""),
    "squeezenet": Family("features classifier.2"),  # its classifier is a convolution: maps of ImageNet's classes
    "swin": Family(cut="permute"),
    "vgg": Family(),
    "vit": Family("encoder", "encoder.layers", 0),
    "wide_resnet": Family("layer4", "", 2),
}
DETECTORS = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet")  # the maps of SSD have no common width
# Their weights are from a BatchNorm that adds nothing to the variance, as torchvision's builders know
WITHOUT_EPSILON = [f"{kind}_resnet50_fpn" for kind in ("fasterrcnn", "keypointrcnn", "maskrcnn", "retinanet")]


class VisionModel(nn.Module):
    """Pixels to regions: the cells of a feature map, pooled to `regions` at most, with the whole picture before them.

    Subclasses compute the map (`feature_map`). mean and std are no part of the weights.
    """

    trains = True  # whether it can be trained along with a model
    name: str
    width: int  # F
    regions: int  # r; 0: pictures differ
    preprocessing: Preprocessing
    categories: Sequence[str] = ()  # names of labels, of detectors
    body, stem = "", 0  # see Family
    network: Any
    mean: Tensor
    std: Tensor
    pool: Tensor | None

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing, weights_file: str = ""):
        super().__init__()
        self.name, self.network, self.weights_file = name, network, weights_file
        self.config: dict = {}  # for `build_vision`
        self.set_preprocessing(preprocessing)
        self.eval().to(memory_format=torch.channels_last)  # of convolutions; see `forward`

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
            sides = f"{height} x {width} pixels"
            raise ValueError(f"{self.name} does not take pictures of {sides} ({_reason(error)})") from None
        grid = pooled_shape(h, w, asked)
        each = adaptive_avg_pool2d(torch.eye(h * w).view(h * w, h, w), grid)  # what a cell of the map gives to each
        pool, boxes = each.flatten(1).T, pooled_cells((h, w), grid)
        if whole:
            pool = torch.cat([torch.full((1, h * w), 1 / (h * w)), pool])
            boxes = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), boxes])
        self.regions, self.boxes = len(boxes), boxes  # boxes: of a picture of height and width 1; on the CPU
        # The gradient of adaptive_avg_pool2d has no deterministic kernel on CUDA, a matrix product has
        self.register_buffer("pool", None if grid == (h, w) and not whole else pool, persistent=False)

    def feature_map(self, pixels: Tensor) -> Tensor:
        """The map (B, F, h, w) of normalised pixels (B, 3, H, W)."""
        raise NotImplementedError

    def refuse_training(self) -> None:
        """Raises ValueError where a model cannot train it along."""
        if not self.trains:
            raise ValueError(f"{self.name} cannot be trained along, only give regions to prepare images")

    def checkpoint_activations(self) -> None:
        """In training, keep only some activations and compute the others again. Raises ValueError where it cannot."""
        raise ValueError(f"{self.name} has no parts to compute again")

    def normalize(self, pictures: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) as what the network takes."""
        return (pictures.to(self.mean.dtype) / 255 - self.mean) / self.std

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, r, F) of pictures, uint8 (B, 3, H, W), which went through the pre-processing."""
        # Channels last: on one thread SqueezeNet takes a half to two thirds of the time, ResNet-18 nine tenths
        pixels = self.normalize(pictures).contiguous(memory_format=torch.channels_last)
        cells = self.feature_map(pixels).flatten(2).mT  # (B, h * w, F)
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
        return {
            "encoder": self.name,
            "weights": fingerprint(self.network),
            "weights_file": self.weights_file and os.path.abspath(self.weights_file),
            "preprocessing": to_plain(self.preprocessing),
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
    if regions < 0:
        raise ValueError(f"regions={regions}: expected 0 or more")
    return _make(name, regions, image_size, whole, weights, None)


def build_vision(
    name: str, config: dict | None = None, regions: int = 36, image_size: int = 0, whole: bool = False
) -> VisionModel:
    """A vision model of random weights, for a checkpoint's; nothing is fetched. config: `VisionModel.config`."""
    return _make(name, regions, image_size, whole, None, config)


def load_recorded(record: dict[str, Any], weights: str = "") -> VisionModel:
    """The vision model that a `record` is of. weights: where they are now, of an hf: model perhaps its folder.

    Raises ValueError where they are others.
    """
    preprocessing, name = to_preprocessing(record["preprocessing"]), record["encoder"]
    weights = weights or record["weights_file"]
    if name.startswith("hf:") and os.path.isdir(weights):
        name, weights = f"hf:{weights}", ""
    height, width = preprocessing.size
    size = (height or preprocessing.limits[0]) if height == width else 0
    model = load_vision(name, record["regions"], weights, size, record["whole"])
    if (found := fingerprint(model.network)) != record["weights"]:
        where = weights or "its library's"
        raise ValueError(f"weights {found} are not those that the regions were made with, {record['weights']}: {where}")
    model.set_preprocessing(preprocessing)
    return model


def _make(name: str, *options: Any) -> VisionModel:
    family, _, rest = name.partition(":")
    if family not in registry.VISION or (family == "torchvision" and rest not in torchvision_names()):
        known = [f"torchvision:{one}" for one in torchvision_names()]
        known += [one for one in registry.VISION if one not in ("torchvision", "hf")]
        nearest = difflib.get_close_matches(name if ":" in name else f"torchvision:{name}", known, 3, cutoff=0)
        raise ValueError(f"no vision model is named {name}; the nearest are {', '.join(nearest)} (or hf:NAME)")
    return registry.find("vision", family)(name, *options)


class TorchvisionGrid(VisionModel):
    """A classifier of torchvision without pooling and classifier: the cells of its last feature map."""

    def __init__(self, name: str, regions: int, image_size: int, whole: bool, weights: str | None, config: dict | None):
        kind = name.partition(":")[2]
        family = FAMILIES[next(prefix for prefix in FAMILIES if kind.startswith(prefix))]
        preset = get_model_weights(kind).DEFAULT.transforms()
        size = image_size or preset.crop_size[0]
        options: dict[str, Any] = {}
        if kind.startswith("vit"):
            options = {"image_size": size}
        elif kind.startswith("maxvit"):
            options = {"input_size": (size, size)}
        elif kind.startswith(("googlenet", "inception")):
            options = {"transform_input": True, "aux_logits": True, "init_weights": False}  # as with its own weights
        try:
            classifier = get_model(kind, weights=None, **options)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{name} does not take pictures of {size} x {size} pixels ({_reason(error)})") from None
        network = create_feature_extractor(classifier, family.cut.split())
        for dropout in (module for module in network.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0  # of SqueezeNet's classifier: regions lose cells instead
        if weights is not None:
            state = read_weights(weights) if weights else torchvision_weights(kind)
            if kind.startswith("vit"):
                state = interpolate_embeddings(size, classifier.patch_size, state)
            fit_weights(network, state, name, weights or kind, set(classifier.state_dict()))
        resample = preset.interpolation.value
        preprocessing = Preprocessing((size, size), (0, 0), resample, tuple(preset.mean), tuple(preset.std))
        super().__init__(name, network, preprocessing, weights or "")
        self.body, self.stem, self.checkpointed = family.body, family.stem, []
        self.set_regions(regions, whole)

    def checkpoint_activations(self) -> None:
        network = cast(torch.fx.GraphModule, self.network.train())
        steps = [node for node in network.graph.nodes if node.op not in ("placeholder", "output")]
        for each in [*steps, *network.modules()]:  # what is computed again must find its inputs as they were
            if isinstance(each, torch.fx.Node):
                each.kwargs = {**each.kwargs, "inplace": False} if "inplace" in each.kwargs else each.kwargs
            elif hasattr(each, "inplace"):
                each.inplace = False
        part_of = {node: number * CHECKPOINTED_PARTS // len(steps) for number, node in enumerate(steps)}
        split = split_module(network, network, part_of.__getitem__)
        for part in split.children():
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, context_fn=self._compute_again)
        self.checkpointed = [split]  # the same layers; in a list, where they do not count as other ones

    def _compute_again(self) -> tuple[Any, Any]:
        """Contexts of a forward pass and of its repetition, in which BatchNorm's averages must not move again."""
        return nullcontext(), _keeping_averages(self.modules())

    def feature_map(self, pixels: Tensor) -> Tensor:
        network = self.checkpointed[0] if self.checkpointed and self.network.training else self.network
        features = torch.cat([*network(pixels).values()], dim=1)
        if features.dim() == 4:
            return features
        patches = features[:, 1:].mT  # (B, F, h * w), without the class token
        return patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))


class TorchvisionDetector(VisionModel):
    """A detector of torchvision: its best boxes after its own NMS, whatever their scores.

    Features are pooled by RoIAlign from its own maps: of R-CNNs what the box head makes of a box, of RetinaNet and FCOS
    the mean over the box.
    """

    trains = False

    def __init__(self, name: str, regions: int, image_size: int, whole: bool, weights: str | None, config: dict | None):
        kind = name.partition(":")[2]
        network = get_model(kind, weights=None, weights_backbone=None)
        if weights is not None:
            state = read_weights(weights) if weights else torchvision_weights(kind)
            fit_weights(network, state, name, weights or kind)
        if kind in WITHOUT_EPSILON:
            for norm in network.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eps = 0.0
        own = network.transform
        shorter = image_size or own.min_size[-1]
        limits = (shorter, round(own.max_size * shorter / own.min_size[-1]))
        preprocessing = Preprocessing((0, 0), limits, "bilinear", tuple(own.image_mean), tuple(own.image_std))
        super().__init__(name, network, preprocessing, weights or "")
        network.transform = _Padding(*limits, own.image_mean, own.image_std, own.size_divisible)
        self.asked, self.whole, self.regions = regions, False, 0
        self.categories = get_model_weights(kind).DEFAULT.meta["categories"]
        chooser = network
        if hasattr(network, "roi_heads"):
            chooser = network.roi_heads
            for kind in ("mask", "keypoint"):
                for part in ("roi_pool", "head", "predictor"):
                    setattr(chooser, f"{kind}_{part}", None)
            self.roi_pool = chooser.box_roi_pool
        else:
            self.roi_pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2)
        chooser.score_thresh = 0.0
        chooser.detections_per_img = regions or chooser.detections_per_img
        with torch.no_grad():  # RoIAlign takes the maps' scales from the first pictures that it sees
            maps = network.backbone(torch.zeros(1, 3, 256, 256))
            self.width = self.box_features(maps, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], [(256, 256)]).shape[1]

    def box_features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Features (all boxes, F)."""
        pooled = self.roi_pool(maps, boxes, sizes)
        return self.network.roi_heads.box_head(pooled) if hasattr(self.network, "roi_heads") else pooled.mean((2, 3))

    def describe(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Regions]:
        # One after the other: padding to a common size would change what the convolutions see
        return [self._describe(*pair) for pair in zip(pictures, sizes, strict=True)]

    def _describe(self, picture: Tensor, size: tuple[int, int]) -> Regions:
        maps: dict[str, Tensor] = {}
        with self.network.backbone.register_forward_hook(lambda module, given, output: maps.update(output)):
            (found,) = self.network([self.normalize(upload(picture, self.mean.device))])
        boxes, labels, scores = found["boxes"], found["labels"], found["scores"]
        height, width = picture.shape[1:]
        if not len(boxes):
            boxes = self.mean.new_tensor([[0, 0, width, height]])
            labels = scores = self.mean.new_zeros(1)
        features = self.box_features(maps, [boxes], [(height, width)])
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        return Regions(features, boxes * upload(scale, boxes.device), torch.stack([labels, scores], 1))


class _Padding(GeneralizedRCNNTransform):
    """A detector's transformation for pictures that have their size and are normalised."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target


class HuggingFacePatches(VisionModel):
    """A Transformer of the transformers library, of two towers the vision tower: the last states of its patches."""

    def __init__(self, name: str, regions: int, image_size: int, whole: bool, weights: str | None, config: dict | None):
        source = name.partition(":")[2]
        state = read_weights(weights) if weights else None
        try:
            config = config or _read_vision_config(source)
            preprocessing, tower = to_preprocessing(config["preprocessing"]), dict(config)
            tower.pop("preprocessing")
            if tower["model_type"] == "siglip2_vision_model":
                raise ValueError("a NaFlex model's pictures differ in size; take one of a fixed size")
            network = build_backbone(tower) if weights is None else load_backbone(source, tower, state)
        except Exception as error:  # of transformers, huggingface_hub, safetensors, ...
            what = f"{name} with {weights}" if weights else name
            raise ValueError(f"{what} cannot be loaded: {_reason(error)}") from None
        if image_size:
            preprocessing = preprocessing._replace(size=(image_size, image_size))
        if os.path.isdir(source):
            name = f"hf:{os.path.abspath(source)}"
        super().__init__(name, network, preprocessing, weights or "")
        self.config, self.patch = config, tower.get("patch_size")
        lists = {path: one for path, one in network.named_modules() if isinstance(one, nn.ModuleList)}
        self.body = max(lists, key=lambda path: sum(one.numel() for one in lists[path].parameters()))
        self.options = {}
        takes = inspect.signature(network.forward).parameters
        if preprocessing.size != _pair(tower.get("image_size", 0)) and "interpolate_pos_encoding" in takes:
            self.options = {"interpolate_pos_encoding": True}
        self.set_regions(regions, whole=False)

    def checkpoint_activations(self) -> None:
        checkpoint_activations(self.network)

    def feature_map(self, pixels: Tensor) -> Tensor:
        states = self.network(pixel_values=pixels, **self.options).last_hidden_state
        if states.dim() == 4:
            return states
        h, w = (side // size for side, size in zip(pixels.shape[2:], _pair(self.patch), strict=True))
        if states.shape[1] < h * w:
            raise ValueError("its states are not those of patches")
        return states[:, -h * w :].mT.unflatten(2, (h, w))  # without the class and register tokens before them


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _read_vision_config(source: str) -> dict:
    """The configuration of a vision model, its image processor's under "preprocessing"."""
    config = read_config(source, "vision_config", IMAGE_PROCESSORS)
    folder = fetch(source, beside=IMAGE_PROCESSORS)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    sides = processor.get("crop_size" if processor.get("do_center_crop") else "size") or {}
    height, width = (
        sides.get(side) or sides.get("shortest_edge") or config.get("image_size", 0) for side in ("height", "width")
    )
    mean, std = processor["image_mean"], processor["image_std"]
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    resample = "bilinear" if processor.get("resample") in (2, "bilinear") else "bicubic"
    return config | {
        "preprocessing": to_plain(Preprocessing((height, width), (0, 0), resample, tuple(mean), tuple(std)))
    }


@contextmanager
def _keeping_averages(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which BatchNorm's averages do not move."""
    norms = [(module, module.momentum) for module in modules if isinstance(module, nn.BatchNorm2d)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:  # computing again is left by an exception
        for norm, momentum in norms:
            norm.momentum = momentum


def torchvision_model(name: str, *options: Any) -> VisionModel:
    """torchvision's classifier or detector of a name."""
    return (TorchvisionDetector if name.partition(":")[2].startswith(DETECTORS) else TorchvisionGrid)(name, *options)


def torchvision_names() -> list[str]:
    """torchvision's classifiers and detectors."""
    names = list_models(module=torchvision.models) + list_models(module=torchvision.models.detection)
    return [name for name in names if name.startswith((*FAMILIES, *DETECTORS))]


def torchvision_weights(kind: str) -> dict[str, Tensor]:
    """torchvision's weights of a model, from its cache or fetched. Raises ValueError where no server answers."""
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
        raise ValueError(f"{path}: cannot be read as weights ({_reason(error)})") from None
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


def fit_weights(network: nn.Module, state: dict[str, Tensor], name: str, path: str, others: Iterable[str] = ()) -> None:
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


def _reason(error: Exception) -> str:
    """The first sentence of a library's message."""
    return next(iter(str(error).strip().splitlines()), "").split(". ")[0] or type(error).__name__


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


def _parts(module: nn.Module, body: nn.Module) -> Iterator[nn.Module]:
    """The children of `body`, and the largest modules and single parameters around it, in their order."""
    if own := list(module.parameters(recurse=False)):
        yield nn.ParameterList(own)
    for child in module.children():
        if any(one is body for one in child.modules()):
            yield from _parts(child, body)
        else:
            yield child
