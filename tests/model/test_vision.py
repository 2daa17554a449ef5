"""Vision models: features against the library's own model, boxes, stages, weights files, records."""

import json
import os
import socket
import threading

import pytest
import safetensors.torch
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from lib.data.dataset import is_same_encoder
from lib.model import vision
from lib.model.vision import build_vision, load_recorded, load_vision

SQUEEZENET = "torchvision:squeezenet1_1"


def pictures(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(model: vision.VisionModel, pictures: torch.Tensor) -> torch.Tensor:
    """What torchvision's own transformation makes of them."""
    return torchvision.transforms.functional.normalize(
        pictures.float() / 255, model.preprocessing.mean, model.preprocessing.std
    )


def assert_stages_hold_every_parameter_once(model: vision.VisionModel) -> None:
    held = [id(parameter) for stage in model.stages() for parameter in stage.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(weights=None).eval()


@pytest.fixture(scope="module")
def squeezenet_file(squeezenet, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet.state_dict(), path)
    return str(path)


# What gives the map, and what is taken of it: of Transformers the tokens without the class token
CLASSIFIERS = {
    "squeezenet1_1": lambda model: (model.features, model.classifier[2]),
    "resnet18": lambda model: model.layer4,
    "mobilenet_v3_small": lambda model: model.features,
    "regnet_y_400mf": lambda model: model.trunk_output,
    "swin_t": lambda model: model.permute,
    "vit_b_32": lambda model: model.encoder,
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifiers_regions_are_the_cells_of_its_last_map_and_the_whole_picture(kind, monkeypatch):
    torch.manual_seed(0)
    size = {"image_size": 96} if kind.startswith("vit") else {}
    classifier = torchvision.models.get_model(kind, weights=None, **size).eval()
    monkeypatch.setattr(vision, "read_weights", lambda path: classifier.state_dict())
    model = load_vision(f"torchvision:{kind}", 4, "file", image_size=96)
    taken = []
    where = CLASSIFIERS[kind](classifier)
    for module in where if isinstance(where, tuple) else (where,):
        module.register_forward_hook(lambda module, given, output: taken.append(output))
    with torch.inference_mode():
        classifier(pixels(model, pictures(2, 96)))
        found = model.describe(pictures(2, 96), [(480, 640), (333, 500)])
    maps = torch.cat(taken, 1) if taken[0].dim() == 4 else taken[0][:, 1:].mT.unflatten(2, (3, 3))
    expected = torch.cat([maps.mean((2, 3))[:, None], adaptive_avg_pool2d(maps, 2).flatten(2).mT], 1)
    assert model.width == maps.shape[1]
    assert model.regions == 5
    torch.testing.assert_close(torch.stack([one.features for one in found]), expected, rtol=1e-4, atol=1e-5)
    assert found[1].boxes[0].tolist() == [0, 0, 500, 333]


def test_boxes_are_the_cells_windows_in_pixels_of_the_original_picture():
    model = build_vision(SQUEEZENET, {}, 4, 64)  # a map of 3 x 3, whose windows overlap in the middle
    (found,) = model.describe(pictures(1), [(300, 600)])
    rows, columns = [(0, 200), (100, 300)], [(0, 400), (200, 600)]
    expected = [[left, top, right, bottom] for top, bottom in rows for left, right in columns]
    torch.testing.assert_close(found.boxes, torch.tensor(expected).float())


def test_a_map_is_pooled_to_the_largest_grid_of_its_aspect_ratio():
    assert vision.pooled_shape(13, 13, 36) == (6, 6)
    assert vision.pooled_shape(27, 27, 49) == (7, 7)
    assert vision.pooled_shape(7, 7, 49) == vision.pooled_shape(7, 7, 0) == vision.pooled_shape(7, 7, 64) == (7, 7)
    assert vision.pooled_shape(8, 16, 36) == (4, 8)
    assert vision.pooled_shape(2, 90, 36) == (1, 36)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "densenet121", "swin_t", "vit_b_32"])
def test_stages_hold_every_parameter_once_the_top_one_first(name):
    with torch.device("meta"):
        model = build_vision(f"torchvision:{name}", {}, 36)
    assert_stages_hold_every_parameter_once(model)
    assert len(model.stages()) == 5
    lowest = "class_token" if name == "vit_b_32" else next(iter(model.network.state_dict()))
    assert any(one is model.network.get_parameter(lowest) for one in model.stages()[-1].parameters())


@pytest.mark.parametrize(("kind", "size"), [("vit_b_32", 100), ("maxvit_t", 100), ("squeezenet1_1", 8)])
def test_pictures_of_a_size_that_a_model_does_not_take_are_refused_in_one_line(kind, size):
    with torch.device("meta"), pytest.raises(ValueError, match=f"does not take pictures of {size} x {size}") as caught:
        build_vision(f"torchvision:{kind}", {}, 36, size)
    assert "\n" not in str(caught.value)


def test_resnet_is_thawed_layer_by_layer():
    model = build_vision("torchvision:resnet18", {}, 36, 64)
    layers = [getattr(model.network, f"layer{i}") for i in (4, 3, 2, 1)]
    assert [list(stage) for stage in model.stages()[:4]] == [[layer] for layer in layers]


def test_training_reaches_every_parameter_and_a_picture_is_independent_of_its_batch():
    model = build_vision("torchvision:resnet18", {}, 4, 64)
    together, alone = model(pictures(2)), model(pictures(2)[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
    assert model.regions == 4
    together.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Detectors


DETECTORS = {  # what the library's own detector is made with, to do as ours does
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 5},
    "maskrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 5},
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "detections_per_img": 5},
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_detectors_regions_are_its_best_boxes_with_features_of_its_own_maps(kind, monkeypatch):
    torch.manual_seed(0)
    sides = {"min_size": 96, "max_size": {"fasterrcnn_mobilenet_v3_large_320_fpn": 192}.get(kind, 160)}
    detector = torchvision.models.get_model(kind, weights=None, weights_backbone=None, **DETECTORS[kind], **sides)
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d) and "resnet50" in kind:
            norm.eps = 0.0  # as it is with torchvision's own weights
    monkeypatch.setattr(vision, "read_weights", lambda path: detector.eval().state_dict())
    model = load_vision(f"torchvision:{kind}", 5, "file", image_size=96)
    assert model.preprocessing.limits == (96, sides["max_size"])
    inputs = [pictures(1, side)[0, :, :96] for side in (120, 130, 128)]
    for one in (detector, model.network):
        if hasattr(one, "rpn"):
            one.rpn._post_nms_top_n = {"testing": 50}  # of 1000 proposals: for speed
    taken = []
    detector.backbone.register_forward_hook(lambda module, given, output: taken.append(output))
    with torch.inference_mode():
        found = model.describe(inputs, [(96, 120), (960, 1300), (48, 64)])
        own = [detector([picture / 255])[0] for picture in inputs]
        for regions, expected, picture, maps, scale in zip(found, own, inputs, taken, (1, 10, 0.5), strict=True):
            if kind.startswith("retinanet"):
                pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
                features = pool(maps, [expected["boxes"]], [picture.shape[1:]]).mean((2, 3))
            else:
                heads = detector.roi_heads
                features = heads.box_head(heads.box_roi_pool(maps, [expected["boxes"]], [picture.shape[1:]]))
            torch.testing.assert_close(regions.boxes, expected["boxes"] * scale, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(regions.features, features, rtol=1e-3, atol=1e-3)
            objects = torch.stack([expected["labels"], expected["scores"]], 1)
            torch.testing.assert_close(regions.objects, objects, rtol=1e-3, atol=1e-5)
            assert regions.features.shape == (5, model.width)
    assert model.categories[1] == "person"
    assert not any("mask" in name for name in model.state_dict())  # the heads that regions do not need
    with pytest.raises(ValueError, match="cannot be trained along"):
        model.refuse_training()


def test_a_picture_in_which_nothing_is_found_is_one_region():
    model = build_vision("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", {}, 5, 64)
    model.network.roi_heads.score_thresh = 1.0
    with torch.inference_mode():
        (found,) = model.describe([pictures(1)[0]], [(640, 320)])
    assert found.boxes.tolist() == [[0, 0, 320, 640]]
    assert found.objects.tolist() == [[0, 0]]
    assert found.features.shape == (1, 1024)


# Hugging Face

SIDES = {"image_size": 32, "patch_size": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, **SIDES}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 8}
DINO = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, **SIDES}
SQUARE, SHORTEST = {"height": 32, "width": 32}, {"shortest_edge": 40}
TRANSFORMERS = {  # configuration, image processor, what gives the last states of the patches, tokens before them
    "clip": (
        lambda: transformers.CLIPConfig(text_config=TEXT, vision_config=VISION),
        lambda: transformers.CLIPImageProcessor(size=SHORTEST, crop_size=SQUARE),
        lambda model: model.vision_model.encoder,
        1,
    ),
    "siglip": (
        lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=VISION),
        lambda: transformers.SiglipImageProcessor(size=SQUARE),
        lambda model: model.vision_model.post_layernorm,
        0,
    ),
    "dinov2": (
        lambda: transformers.Dinov2Config(**DINO),
        lambda: transformers.BitImageProcessor(size=SHORTEST, crop_size=SQUARE),
        lambda model: model.layernorm,
        1,
    ),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**DINO),
        lambda: transformers.BitImageProcessor(size=SHORTEST, crop_size=SQUARE),
        lambda model: model.layernorm,
        5,
    ),
    "vit": (
        lambda: transformers.ViTConfig(**VISION),
        lambda: transformers.ViTImageProcessor(size=SQUARE),
        lambda model: model.layernorm,
        1,
    ),
}


def write_transformer(kind: str, folder) -> str:
    """A model of random weights as it lies on the hub."""
    config, processor, *_ = TRANSFORMERS[kind]
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config()).save_pretrained(folder)
    processor().save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformers_regions_are_the_last_states_of_its_patches(kind, tmp_path):
    model = load_vision(write_transformer(kind, tmp_path), 4)
    own = transformers.AutoModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    taken = []
    _, _, last, before = TRANSFORMERS[kind]
    last(own).register_forward_hook(lambda module, given, output: taken.append(output))
    inputs = processor(list(pictures(2, 32)), do_resize=False, do_center_crop=False, return_tensors="pt")
    tower = getattr(own, "vision_model", own)
    tower(inputs["pixel_values"])
    states = taken[0] if isinstance(taken[0], torch.Tensor) else taken[0].last_hidden_state
    assert states.shape[1] == 16 + before
    maps = states[:, before:].mT.unflatten(2, (4, 4))
    features = model(pictures(2, 32))
    torch.testing.assert_close(features, adaptive_avg_pool2d(maps, 2).flatten(2).mT, rtol=1e-4, atol=1e-5)
    assert model.preprocessing.size == (32, 32)
    assert model.preprocessing.resample == ("bilinear" if kind == "vit" else "bicubic")
    assert model.describe(pictures(1, 32), [(64, 128)])[0].boxes[1].tolist() == [64, 0, 128, 32]
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_stages_hold_every_parameter_once(model)
    assert [len(stage) for stage in model.stages()][-1:] == [2 if kind == "clip" else 1]  # embeddings, and CLIP's norm
    larger = load_vision(model.name, 0, image_size=64)
    assert larger.regions == 64


def test_a_record_says_where_weights_are_from_whatever_folder_it_is_read(squeezenet_file, monkeypatch, tmp_path):
    monkeypatch.chdir(os.path.dirname(squeezenet_file))
    record = load_vision(SQUEEZENET, 4, os.path.basename(squeezenet_file), 64).record()
    monkeypatch.chdir(tmp_path)
    assert load_recorded(record).record() == record


def test_a_transformer_is_found_by_its_record_and_built_without_its_files(tmp_path):
    model = load_vision(write_transformer("siglip", tmp_path / "model"), 4)
    assert load_recorded(json.loads(json.dumps(model.record()))).record() == model.record()
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    record = load_recorded(model.record(), str(moved)).record()  # of another name, and all else the same
    assert (record["encoder"], is_same_encoder(record, model.record())) == (f"hf:{moved}", True)
    moved.rename(tmp_path / "model")
    weights = str((tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights.safetensors"))
    from_file = load_vision(model.name, 4, weights)
    assert torch.equal(from_file(pictures(1, 32)), model(pictures(1, 32)))
    built = build_vision("hf:elsewhere", json.loads(json.dumps(model.config)), 4)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(pictures(1, 32)), model(pictures(1, 32)))


def test_a_transformer_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    naflex = {name: value for name, value in VISION.items() if name != "image_size"}
    transformers.Siglip2Config(text_config=TEXT, vision_config=naflex).save_pretrained(tmp_path / "naflex")
    transformers.Siglip2ImageProcessor().save_pretrained(tmp_path / "naflex")
    transformers.ViTConfig(**VISION).save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("naflex", "NaFlex"),
        ("bare", "image processor"),
        ("empty", "Unrecognized model"),
        ("no", "no such fold"),
    ):
        with pytest.raises(ValueError, match=f"^hf:{tmp_path}/{name} cannot be loaded: .*{reason}") as caught:
            load_vision(f"hf:{tmp_path / name}")
        assert "\n" not in str(caught.value)


# Weights


@pytest.mark.parametrize("form", ["float16", "state_dict", "model", "ddp", "safetensors"])
def test_every_form_of_a_weights_file_gives_the_same_features(form, squeezenet, squeezenet_file, tmp_path):
    state = squeezenet.state_dict()
    path = str(tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth"))
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "float16":
        torch.save({name: value.half() for name, value in state.items()}, path)
    elif form == "ddp":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save({form: state}, path)
    expected, found = (load_vision(SQUEEZENET, 4, file, 64) for file in (squeezenet_file, path))
    tolerance = 1e-2 if form == "float16" else 0
    torch.testing.assert_close(found(pictures()), expected(pictures()), rtol=tolerance, atol=tolerance)
    assert next(found.parameters()).dtype == torch.float32


def test_weights_of_another_model_are_refused_with_the_first_names(tmp_path, squeezenet_file):
    with pytest.raises(
        ValueError, match=r"squeezenet.pth: not the weights of torchvision:resnet18; missing: conv1.weig"
    ):
        load_vision("torchvision:resnet18", 36, squeezenet_file)
    state = torch.load(squeezenet_file)
    torch.save(state | {"features.12.more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"unknown: features\.12\.more$"):
        load_vision(SQUEEZENET, 36, str(tmp_path / "more.pth"))
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"of another shape: features\.0\.weight$"):
        load_vision(SQUEEZENET, 36, str(tmp_path / "shape.pth"))


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    for name in ("missing.pth", "text.pth", "text.safetensors", "tensor.pth", "numbers.pth", "pickle.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            load_vision(SQUEEZENET, 36, str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_an_unknown_name_is_answered_with_the_three_nearest():
    with pytest.raises(ValueError, match="torchvision:resnet50, torchvision:resnet") as caught:
        load_vision("resnet5O")
    assert str(caught.value).count("torchvision:") == 3


def test_without_a_network_there_is_one_line_that_waits_for_no_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(vision, "FIRST_ANSWER", 0.5)
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: ended.wait(600))  # a name server that is silent
    with pytest.raises(ValueError, match=r"no answer within 0\.5 seconds.*; give a file of weights"):
        load_vision(SQUEEZENET)
    ended.set()


# Records


def test_a_record_finds_the_same_model_and_refuses_other_weights(squeezenet, squeezenet_file, tmp_path):
    model = load_vision(SQUEEZENET, 4, squeezenet_file, 64)
    record = json.loads(json.dumps(model.record()))
    assert record["weights_file"] == squeezenet_file
    again = load_recorded(record)
    assert again.record() == record
    assert torch.equal(again(pictures()), model(pictures()))
    other = str(tmp_path / "other.pth")
    torch.save({name: value * 2 for name, value in squeezenet.state_dict().items()}, other)
    found = load_vision(SQUEEZENET, 4, other, 64).record()["weights"]
    with pytest.raises(ValueError, match=f"{found}.*{record['weights']}"):
        load_recorded(record, other)
