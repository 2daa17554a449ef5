"""Files of torch.save, proven whole and harmless before torch.load sees them.

torch.load(weights_only=True) runs no code from a file, but it compares no checksum and allocates whatever the file asks
for. So each record's checksum is compared first, and the pickle is followed with stand-ins for its tensors: only plain
types, tensors, OrderedDict and argparse.Namespace may occur, and every tensor's storage must be there in full.

The usual form is a zip archive: data.pkl, and one record of raw numbers for each storage, never compressed. Files from
before PyTorch 1.6 are five pickles followed by the storages, without checksums. (Forms: torch/serialization.py.)
"""

import argparse
import io
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from lib.cli import InputError, reason

ALLOWED_TYPES = [argparse.Namespace]  # the only type beside tensors and plain ones that loading may create
ITEM_SIZES = {
    **{"torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2, "torch BFloat16Storage": 2},
    **{"torch LongStorage": 8, "torch IntStorage": 4, "torch ShortStorage": 2, "torch CharStorage": 1},
    **{"torch ByteStorage": 1, "torch BoolStorage": 1},
}
ORDERED_DICT, NAMESPACE, TENSOR = "collections OrderedDict", "argparse Namespace", "torch._utils _rebuild_tensor_v2"
NAMES = {ORDERED_DICT, NAMESPACE, TENSOR, *ITEM_SIZES}  # all that a pickle may ask for

MAX_PICKLE = 2**25  # bytes; names, settings and a tokenizer of 100,000 words need a fifth of it
MAX_VALUES = 10**6  # in the content, and instructions of its pickle; a large run has a tenth of it
MAX_DIMENSIONS = 8
ARCHIVE, ARCHIVE_END = b"PK\x03\x04", 98  # an archive's first bytes; the size of its three closing records
FOLDER = 0x10  # of a record's attributes; PyTorch takes whatever is in memory for the content of such a record
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles of the older form


def load(path: Path, mapped: bool = False) -> object:
    """The content of a file of torch.save, tensors on the CPU. Raises InputError where it is damaged or harmful.

    mapped: tensors are read when they are first used, so that what nobody uses takes no memory.
    """
    try:
        with open(path, "rb") as file:
            _prove(file)
            mapped = mapped and _is_archive(file)
        with torch.serialization.safe_globals(ALLOWED_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch thinks of a file is said once, in the error
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _refuse_shared(content, path.stat().st_size)
    except Exception as error:  # damaged bytes raise almost anything
        raise not_a_checkpoint(path, error) from None
    return content


def verify(path: Path) -> None:
    """Compare all checksums of a file of torch.save, without loading it. Raises InputError where it is damaged.

    The form from before PyTorch 1.6 has no checksums; its pickles and its length are looked at instead.
    """
    try:
        with open(path, "rb") as file:
            if _is_archive(file):
                _open_sound_archive(file)
            else:
                _prove(file)
    except Exception as error:
        raise not_a_checkpoint(path, error) from None


def not_a_checkpoint(path: Path, error: Exception) -> InputError:
    """What to raise for a file that could not be read."""
    # The first sentence only: PyTorch goes on to advise loading without restriction.
    return InputError(f"{path}: damaged, or not a checkpoint ({reason(error).split('. ')[0]})")


def _prove(file: BinaryIO) -> None:
    """Raises ValueError, or what a library raises, unless torch.load can be trusted with the file."""
    if _is_archive(file):
        archive = _open_sound_archive(file)
        folder = archive.namelist()[0].split("/")[0]
        if archive.getinfo(f"{folder}/data.pkl").file_size > MAX_PICKLE:
            raise ValueError("its pickle is far too large")
        _, storages = follow(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        for key, size in storages.items():
            if archive.getinfo(f"{folder}/data/{key}").file_size != size:
                raise ValueError(f"its storage {key} is not of the size that the pickle states")
    else:
        _prove_legacy(file)


def _is_archive(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(len(ARCHIVE)) == ARCHIVE  # as torch.load decides it


def _open_sound_archive(file: BinaryIO) -> zipfile.ZipFile:
    """The archive, once all of its checksums proved right. A compressed record could grow without end: none may be."""
    size = file.seek(0, io.SEEK_END)
    _refuse_second_directory(file, size)
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("a compressed archive")
    if any(record.external_attr & FOLDER for record in records):
        raise ValueError("a record that is marked as a folder")
    if sum(max(record.file_size, record.compress_size) for record in records) > size:
        raise ValueError("its records overlap")
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("two records of one name")
    if damaged := archive.testzip():
        raise ValueError(f"the checksum of its record {damaged} is wrong")
    return archive


def _refuse_second_directory(file: BinaryIO, size: int) -> None:
    """Two readers of zip archives could find two directories in one file, unless it ends exactly as PyTorch ends it."""
    if size < ARCHIVE_END:
        raise ValueError("truncated")
    file.seek(size - ARCHIVE_END)
    end = struct.unpack("<4s36xQQ 4s4xQ4x 4s16xH", file.read(ARCHIVE_END))
    directory_size, directory, locator_of_end = end[1], end[2], end[4]
    signatures = (end[0], end[3], end[5]) == (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")
    here = directory + directory_size == locator_of_end == size - ARCHIVE_END
    if not (signatures and here and end[6] == 0):
        raise ValueError("truncated, or no archive of PyTorch")


def _prove_legacy(file: BinaryIO) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE))
    start = tuple(follow(pickles)[0] for _ in LEGACY_START)
    if start != LEGACY_START:
        raise ValueError("no file of PyTorch")
    follow(pickles)  # about the machine that wrote it
    _, storages = follow(pickles)
    keys, _ = follow(pickles)
    if sorted(keys) != sorted(storages) or pickles.tell() + sum(8 + size for size in storages.values()) != size:
        raise ValueError("truncated, or with storages that do not add up")


# Following a pickle


class _Name(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    size: int  # bytes


class _Tensor(NamedTuple):
    storage: _Storage


class _Object(dict):
    """An OrderedDict or Namespace, which can be given attributes."""


PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def follow(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """Follow one pickle without creating what it asks for.

    Knows the instructions that torch.save writes. Returns the content with stand-ins for tensors and types, and the
    size in bytes of each storage. Takes no more memory than the file times a constant. Raises ValueError where anything
    else occurs, or what damaged bytes lead to.
    """
    stack, outer, memo, storages, copied = [], [], {}, {}, 0
    for instruction, argument, position in islice(pickletools.genops(file), MAX_VALUES):
        name = instruction.name
        if name in PLAIN:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in TUPLES:
            items = tuple(stack.pop() for _ in range(TUPLES[name]))[::-1]
            stack.append(items)
        elif name == "TUPLE":
            items, stack = tuple(stack), outer.pop()
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            items, stack = ([stack.pop()], stack) if name == "APPEND" else (stack, outer.pop())
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items, stack = ([stack.pop(), stack.pop()][::-1], stack) if name == "SETITEM" else (stack, outer.pop())
            _set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = _expect(stack.pop(), tuple)
            stack.append(_create(_expect(stack.pop(), _Name).name, arguments))
        elif name == "BUILD":
            copied += len(_expect(stack.pop(), dict))
            _expect(stack[-1], _Object)
            if copied > position:  # a large dict given to many objects
                raise ValueError("it multiplies its content")
        elif name == "STOP":
            return stack.pop(), storages
        elif name != "PROTO":
            raise ValueError(f"its pickle holds {name}, which no checkpoint needs")
    raise ValueError("its pickle does not end")


def _expect(value: object, kind: type):
    if not isinstance(value, kind):
        raise ValueError(f"its pickle holds a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _set_items(target: object, items: list) -> None:
    """Keys are texts or numbers: finding the hash of nested tuples can take for ever."""
    keys = items[::2]
    if len(items) % 2 or not all(type(key) in (str, int) for key in keys):
        raise ValueError("a key in its pickle is neither text nor number")
    _expect(target, dict).update(zip(keys, items[1::2], strict=True))


def _named(name: str) -> _Name:
    if name not in NAMES:
        raise ValueError(f"it asks for {ascii(name[:100])[1:-1].replace(' ', '.')}, which is not allowed")
    return _Name(name)


def _storage(identity: object, storages: dict[str, int]) -> _Storage:
    """identity: ("storage", its type, its key, its device, its numbers), in the older form with a last None."""
    kind, named, key, _, numbers, *view = _expect(identity, tuple)
    if kind != "storage" or any(part is not None for part in view) or type(key) is not str or type(numbers) is not int:
        raise ValueError("its pickle holds a storage of no known form")
    size = numbers * ITEM_SIZES[_expect(named, _Name).name]
    if size < 0 or storages.setdefault(key, size) != size:
        raise ValueError(f"its pickle states two sizes of storage {key}")
    return _Storage(key, size)


def _create(name: str, arguments: tuple) -> object:
    """A stand-in for what a type or function of NAMES would create."""
    if name in (ORDERED_DICT, NAMESPACE) and not arguments:
        return _Object()
    if name != TENSOR:
        raise ValueError(f"it calls {name.replace(' ', '.')} in a way that torch.save does not write")
    storage, offset, shape, strides, gradient, hooks = arguments
    numbers = (offset, *_expect(shape, tuple)[:MAX_DIMENSIONS], *_expect(strides, tuple)[:MAX_DIMENSIONS])
    plain = all(type(number) is int for number in numbers) and type(gradient) is bool and hooks == {}
    if not plain or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("its pickle holds a tensor of no known form")
    return _Tensor(_expect(storage, _Storage))


def _refuse_shared(content: object, size: int) -> None:
    """Content that refers to its parts many times over unfolds to far more than the file holds: refuse it."""
    waiting, values, tensor_bytes = [content], 0, 0
    while waiting:
        value = waiting.pop()
        values += 1
        if isinstance(value, torch.Tensor):
            tensor_bytes += value.numel() * value.element_size()
        elif isinstance(value, (dict, OrderedDict)):
            waiting += value.values()
        elif isinstance(value, argparse.Namespace):
            waiting += vars(value).values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        if values > MAX_VALUES or tensor_bytes > size or len(waiting) > MAX_VALUES:
            raise ValueError("its content refers to the same parts again and again")
