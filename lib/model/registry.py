"""The parts of a model by name. A new part is a class or function in a file, and a line here (docs/extending.md).

Every part is called with `embed_size` (losses: with scores and margin) and with its options. On the command line and in
checkpoints a part is its name and its options: `--gate open:start=1.4`, {"name": "open", "options": {"start": 1.4}}.
Nothing is imported before it is asked for, so that flags can be read without PyTorch.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

SIMILARITIES = {
    "xdim": "lib.model.xdim:XDimSimilarity",
    "independent": "lib.model.baselines:IndependentSimilarity",
    "gpo": "lib.model.baselines:GpoSimilarity",
}
GATES = {
    "adaptive": "lib.model.xdim:AdaptiveGate",
    "open": "lib.model.baselines:OpenGate",
    "fixed": "lib.model.baselines:FixedGate",
    "dense": "lib.model.baselines:DenseGate",
    "diagonal": "lib.model.baselines:DiagonalGate",
}
IMAGE_ENCODERS = {"regions": "lib.model.encoders:RegionEncoder"}
TEXT_ENCODERS = {"transformer": "lib.model.encoders:TextEncoder"}
LOSSES = {"hinge": "lib.losses:hinge", "ramped": "lib.losses:ramped"}

PARTS = {
    "similarity": SIMILARITIES,
    "gate": GATES,
    "image_encoder": IMAGE_ENCODERS,
    "text_encoder": TEXT_ENCODERS,
    "loss": LOSSES,
}
PAPERS_GATE = "adaptive"
PUBLISHED_GATES = ("adaptive", "open", "fixed")  # they differ in training only: the published code scores them alike


def parse_part(kind: str, text: str) -> dict[str, Any]:
    """ "NAME" or "NAME:option=value,option=value" as {"name", "options"}. Raises ValueError for an unknown name."""
    name, _, rest = text.partition(":")
    if name not in PARTS[kind]:
        raise ValueError(f"--{kind} {name}: expected {', '.join(PARTS[kind])}")
    options = {}
    for option in filter(None, rest.split(",")):
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ValueError(f"--{kind} {text}: expected {name}:option=value,option=value")
        options[key] = _literal(value)
    return {"name": name, "options": options}


def find(kind: str, name: str) -> Any:
    """The class or function of a part. Raises ValueError for an unknown name."""
    if name not in PARTS[kind]:
        raise ValueError(f"unknown {kind} {name!r}: expected {', '.join(PARTS[kind])}")
    module, _, attribute = PARTS[kind][name].partition(":")
    return getattr(import_module(module), attribute)


def build(kind: str, part: Mapping[str, Any], embed_size: int, **given: Any) -> Any:
    """The module of a part, with random weights. given: arguments that are no options. Raises ValueError."""
    make = find(kind, part["name"])
    check_options(kind, part, make)
    return make(embed_size, **part["options"], **given)


def check_options(kind: str, part: Mapping[str, Any], make: Callable) -> None:
    """Raises ValueError naming an option that a part does not take."""
    parameters = inspect.signature(make).parameters
    takes = list(parameters)
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in part["options"]:
        if option not in takes and not any_name:
            raise ValueError(f"--{kind} {part['name']}: has no option {option!r}; it takes {', '.join(takes[1:])}")


def describe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that the command line's flags ask for; the text encoder's configuration is yet to be added.

    flags: by name, as in lib/config.py; what is left out has the published model's value. Raises ValueError.
    """
    similarity = parse_part("similarity", flags.get("similarity", "xdim"))
    of_similarity, gate = find("similarity", similarity["name"]), flags.get("gate", PAPERS_GATE)
    if "gate" in inspect.signature(of_similarity).parameters:
        similarity["options"]["gate"] = parse_part("gate", gate)
    elif gate != PAPERS_GATE:
        raise ValueError(f"--gate {gate}: --similarity {similarity['name']} has no gate")
    image = parse_part("image_encoder", flags.get("image_encoder", "regions"))
    text = parse_part("text_encoder", flags.get("text_encoder", "transformer"))
    of_images = {
        "img_dim": flags.get("img_dim", 2048),
        "normalize": of_similarity.unit_vectors and not flags.get("no_imgnorm", False),
        "mask_padding": flags.get("mask_padding", False),
    }
    takes = inspect.signature(find("image_encoder", image["name"])).parameters
    image["options"] = {name: value for name, value in of_images.items() if name in takes} | image["options"]
    text["options"] = {
        "normalize": of_similarity.unit_vectors and not flags.get("no_txtnorm", False),
        **text["options"],
    }
    return {
        "embed_size": flags.get("embed_size", 1024),
        "image_encoder": image,
        "text_encoder": text,
        "similarity": similarity,
    }


def _literal(text: str) -> Any:
    """A number, True, False or None as such; anything else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
