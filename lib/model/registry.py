"""The parts of a model by name. A new part is a class or function in a file, and a line here (docs/extending.md).

Every part is called with `embed_size` (losses: with scores and margin) and with its options. On the command line and in
checkpoints a part is its name and its options: `--gate open:start=1.4`, {"name": "open", "options": {"start": 1.4}}.
Nothing is imported before it is asked for, so that flags can be read without PyTorch.
"""

import ast
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

SIMILARITIES = {
    "xdim": "lib.model.xdim:XDimSimilarity",
    "independent": "lib.model.baselines:IndependentSimilarity",
    "gpo": "lib.model.pooling:GpoSimilarity",
}
GATES = {
    "adaptive": "lib.model.xdim:AdaptiveGate",
    "open": "lib.model.baselines:OpenGate",
    "fixed": "lib.model.baselines:FixedGate",
    "dense": "lib.model.baselines:DenseGate",
    "diagonal": "lib.model.baselines:DiagonalGate",
    "uniform": "lib.model.baselines:UniformGate",
}
GLOBAL_HEADS = {"gpo": "lib.model.pooling:GpoHead"}
IMAGE_ENCODERS = {"regions": "lib.model.encoders:RegionEncoder", "pixels": "lib.model.encoders:PixelEncoder"}
TEXT_ENCODERS = {"transformer": "lib.model.encoders:TextEncoder"}
# By what stands before the colon of a vision model's name; called with (name, regions, image_size, whole, weights,
# config), where weights are "" (its own), a file, or None (random).
VISION = {
    "torchvision": "lib.model.vision:torchvision_model",
    "hf": "lib.model.vision:HuggingFacePatches",
    "scenes": "lib.prepare.scenes:SceneVision",
}
LOSSES = {"hinge": "lib.losses:hinge", "ramped": "lib.losses:ramped"}

PARTS = {
    "similarity": SIMILARITIES,
    "gate": GATES,
    "global_head": GLOBAL_HEADS,
    "image_encoder": IMAGE_ENCODERS,
    "text_encoder": TEXT_ENCODERS,
    "loss": LOSSES,
    "vision": VISION,
}
# Parameters of parts that flags, the data or the program give.
NO_OPTIONS = ("embed_size", "scores", "margin", "gate", "img_dim", "mask_padding", "config", "pad_id", "backbone")
NO_OPTIONS += ("image_size", "vision")
PAPERS_GATE = "adaptive"
PUBLISHED_GATES = ("adaptive", "open", "fixed")  # they differ in training only: the published code scores them alike


def parse_part(kind: str, text: str) -> dict[str, Any]:
    """ "NAME" or "NAME:option=value,option=value" as {"name", "options"}. Raises ValueError for an unknown name."""
    name, _, rest = text.partition(":")
    if kind == "image_encoder" and name in VISION:  # torchvision:resnet50 is pixels:model=torchvision:resnet50
        name, rest = "pixels", f"model={text}"
    if name not in PARTS[kind]:
        raise ValueError(f"--{kind} {name}: expected {', '.join(PARTS[kind])}")
    options = {}
    for option in filter(None, rest.split(",")):
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ValueError(f"--{kind} {text}: expected {name}:option=value,option=value")
        options[key] = _literal(value)
    return {"name": name, "options": options}


def is_from_pixels(part: Mapping[str, Any]) -> bool:
    """Whether an image encoder takes pictures instead of region features."""
    return part["name"] == "pixels"


def find(kind: str, name: str) -> Any:
    """The class or function of a part. Raises ValueError for an unknown name."""
    if name not in PARTS[kind]:
        raise ValueError(f"unknown {kind} {name!r}: expected {', '.join(PARTS[kind])}")
    module, _, attribute = PARTS[kind][name].partition(":")
    return getattr(import_module(module), attribute)


def build(kind: str, part: Mapping[str, Any], embed_size: int, **given: Any) -> Any:
    """The module of a part, with random weights. given: arguments that are no options. Raises ValueError."""
    try:
        return find(kind, part["name"])(embed_size, **part["options"], **given)
    except TypeError as error:
        raise ValueError(f"--{kind} {part['name']}: its options do not fit it ({error})") from None


def check_options(kind: str, part: Mapping[str, Any]) -> None:
    """Raises ValueError naming an option that a part does not take, lacks, or takes as a value of another type."""
    takes = {k: default for k, default in _parameters(find(kind, part["name"])).items() if k not in NO_OPTIONS}
    given = part["options"]
    for option in [*given, *takes]:
        if option not in takes:
            known = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise ValueError(f"--{kind} {part['name']}: has no option {option!r}; {known}")
        if (value := given.get(option, takes[option])) is inspect.Parameter.empty:
            raise ValueError(f"--{kind} {part['name']}: needs the option {option!r}")
        wanted = type(takes[option])
        if wanted in (bool, int, float) and type(value) not in (wanted, *([int] if wanted is float else [])):
            raise ValueError(f"--{kind} {part['name']}: {option}={value!r} is no {wanted.__name__}")


def _parameters(make: Any) -> dict[str, Any]:
    """The parameters of a function, or of a class and, as far as it passes **options on, those it extends: their names,
    and their defaults as `inspect` has them."""
    defaults: dict[str, Any] = {}
    for one in make.__mro__[:-1] if inspect.isclass(make) else (make,):
        parameters = inspect.signature(one).parameters.values()
        named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        defaults = {each.name: each.default for each in named} | defaults
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    defaults.pop("self", None)
    return defaults


def describe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that the command line's flags ask for; the text encoder's configuration is yet to be added.

    flags: by name, as in lib/config.py; what is left out has the published model's value. Raises ValueError.
    """
    similarity = _part("similarity", flags, "xdim")
    of_similarity, gate = find("similarity", similarity["name"]), flags.get("gate", PAPERS_GATE)
    if "gate" in inspect.signature(of_similarity).parameters:
        similarity["options"]["gate"] = _part("gate", flags, PAPERS_GATE)
    elif gate != PAPERS_GATE:
        raise ValueError(f"--gate {gate}: --similarity {similarity['name']} has no gate")
    head = {"global_head": _part("global_head", flags, "")} if flags.get("global_head") else {}
    if head and not of_similarity.unit_vectors:
        raise ValueError(f"--global_head: --similarity {similarity['name']} is one vector a side itself")
    if head and (kept := [f"--{name}" for name in ("no_imgnorm", "no_txtnorm") if flags.get(name)]):
        raise ValueError(f"{', '.join(kept)}: cannot be had with --global_head")
    unit = of_similarity.unit_vectors and not head  # a head pools regions and words as they are
    images = {
        "img_dim": flags.get("img_dim", 2048),
        "normalize": unit and not flags.get("no_imgnorm", False),
        "mask_padding": flags.get("mask_padding", False),
        "image_size": flags.get("image_size", 0),
    }
    words = {"normalize": unit and not flags.get("no_txtnorm", False)}
    return {
        "embed_size": flags.get("embed_size", 1024),
        "image_encoder": _part("image_encoder", flags, "regions", **images),
        "text_encoder": _part("text_encoder", flags, "transformer", **words),
        "similarity": similarity,
        **head,
    }


def _part(kind: str, flags: Mapping[str, Any], default: str, **of_flags: Any) -> dict[str, Any]:
    """A part as the flags ask for it; of_flags: options that have flags of their own, for parts that take them."""
    part = parse_part(kind, flags.get(kind, default))
    check_options(kind, part)
    takes = _parameters(find(kind, part["name"]))
    return {**part, "options": {name: value for name, value in of_flags.items() if name in takes} | part["options"]}


def _literal(text: str) -> Any:
    """A number, True, False or None as such; anything else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
