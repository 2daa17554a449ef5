"""The processes of a job that torchrun has started: who they are, how they connect, how they end together.

A program that was started without torchrun is a job of one process. PyTorch is imported only inside `joined` and what
follows it, so that flags can be read before.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

HANG_TIMEOUT = 600.0  # seconds without a heartbeat of any process, after which the job counts as hanging
CHECK_INTERVAL = 5.0  # seconds between two looks at the heartbeats
TORCH_TIMEOUT = timedelta(minutes=30)  # PyTorch's own for a collective; longer, as HANG_TIMEOUT's message says more
STAGGER = 5.0  # seconds that a node's other processes hold back an error, which mostly is that of the first one
EXIT_WAIT = 10.0  # seconds in which torchrun ends the remaining processes after one has failed


class PeerLost(Exception):
    """Another process of the job has ended; that process, or torchrun, says what went wrong."""

    exit_code = 1


class CannotMeet(Exception):
    """The processes of the job cannot find each other where MASTER_ADDR and MASTER_PORT say."""

    exit_code = 2


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1  # schedulers set WORLD_SIZE alone, too


def rank() -> int:
    """This process's number in the job, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that prints, logs and saves."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its node, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def local_count() -> int:
    """Number of the job's processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def own_cores() -> int:
    """Cores of this node for this process: those that the job may use, divided among its processes here; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_count())


def is_restarted() -> bool:
    """Whether torchrun has started the job's processes again after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def job() -> str:
    """A name of this job, the same for all its processes and after torchrun's restarts, different for any other job."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":  # random with --standalone, otherwise that of --rdzv_id
        return name
    agent = os.getppid() if local_count() == world_size() else ""  # on several nodes each has its own torchrun
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} {agent}"


def misdescribed() -> str:
    """What is wrong with the variables by which a launcher describes a job; empty where nothing is."""
    if "RANK" not in os.environ:
        return ""
    wanted = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
    given = {name: os.environ[name] for name in wanted if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            return f"the variable {name} is {value!r}, not a number; torchrun sets it"
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world_size() > 1 and name not in os.environ:
            return f"the variables RANK and WORLD_SIZE are set, but not {name}: start with torchrun, or unset RANK"
    return ""


def keep_quiet() -> None:
    """Let all processes but the first print errors only. To be called before PyTorch is imported."""
    if world_size() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of DistributedDataParallel
    if not is_first():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


@contextmanager
def joined(device: "torch.device") -> Iterator[None]:
    """Connects the processes of the job while the context lasts: NCCL between GPUs, gloo otherwise.

    device: this process's own, on CUDA the current one. Raises CannotMeet, or PeerLost when another process ends.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    store = _connect(hosts=is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    stopped = threading.Event()
    watchdog = threading.Thread(target=_watch, args=(stopped,), daemon=True)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TORCH_TIMEOUT)
        watchdog.start()
        try:
            yield
        finally:
            stopped.set()
            watchdog.join()  # a thread that is within the store when Python ends aborts the process
        dist.barrier()  # afterwards the process that hosts the store may end at any time
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise PeerLost("another process of the job has ended") from None
    dist.destroy_process_group()


@contextmanager
def local_main_first() -> Iterator[None]:
    """The first process of each node runs the block, then the others, which find the files that it has written."""
    import torch.distributed as dist

    if local_rank() > 0:
        dist.barrier()
    _busy.set()
    try:
        yield
    finally:
        _busy.clear()
    if world_size() > 1 and local_rank() == 0:
        dist.barrier()
    global _heartbeats
    _heartbeats = 0  # from here on all processes do the same, so that the one with the fewest is the one that hangs


def print_error(message: str) -> None:
    """Print on stderr why this process fails. If all processes of a node fail alike, the first one alone is heard."""
    if world_size() == 1:
        print(message, file=sys.stderr)
        return
    if local_rank() > 0:
        time.sleep(STAGGER)  # torchrun ends this process meanwhile if another has failed
    kind, _, text = message.partition(": ")
    message = f"{kind}: rank {rank()}: {text}" if text else message
    print(message, file=sys.stderr, flush=True)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether PyTorch says by this error that another process has ended."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection closed by peer" in str(error)


def _connect(hosts: bool = False) -> "Store":
    """The store by which the processes find each other: torchrun's, or one that this process hosts.

    Each of torchrun's restarts has its own keys there, because those of the failed attempt would mislead it
    (https://github.com/pytorch/pytorch/issues/135712).
    """
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(address, port, is_master=hosts, timeout=TORCH_TIMEOUT)
    except RuntimeError as error:
        why = "the port is taken" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise CannotMeet(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: the processes cannot meet there ({why})"
        ) from None
    return PrefixStore(f"attempt {attempt}", store)


# Hanging processes

_heartbeats = 0  # of this process
at_heartbeat: Callable[[], None] | None = None  # called at each, from where an exception may end the work
_busy = threading.Event()  # set while this process does something long without heartbeats, a download say


def heartbeat() -> None:
    """Tell the watchdog that this process makes progress: an item of a progress bar is done, a collective begins."""
    global _heartbeats
    _heartbeats += 1
    if at_heartbeat:
        at_heartbeat()


def _watch(stopped: threading.Event) -> None:
    """End a job that hangs. The processes count their heartbeats in the store, and each reads the counts of all."""
    store, keys = _connect(), [f"heartbeats of {other}" for other in range(world_size())]
    counts, since, while_busy = [], time.monotonic(), 0
    while True:
        while_busy += _busy.is_set()
        try:
            store.set(keys[rank()], f"{_heartbeats} {while_busy}")
            all_there = store.check(keys)  # multi_get would wait for the others, and not end with this process
            now = [tuple(map(int, count.split())) for count in store.multi_get(keys)] if all_there else []
        except RuntimeError:  # the process that hosts the store has ended
            if not stopped.is_set():
                _exit("torchrun or the first process of the job has ended" if local_rank() == 0 else "")
            return
        if stopped.wait(CHECK_INTERVAL):
            return
        if now != counts or not now:
            counts, since = now, time.monotonic()
        elif time.monotonic() - since > HANG_TIMEOUT:
            _exit(_describe_hang([heartbeats for heartbeats, _ in counts]))


def _describe_hang(counts: list[int]) -> str:
    """The error message; empty for all processes but the first of those that wait, which prints it."""
    hanging = [other for other, count in enumerate(counts) if count == min(counts)]
    waiting = [other for other in range(len(counts)) if other not in hanging]
    if rank() != (waiting or hanging)[0]:
        return ""
    who = f"rank {', '.join(map(str, hanging))} hangs" if waiting else "all processes hang"
    return f"{who}: no process of the job has made progress for {HANG_TIMEOUT:.0f} seconds; what was saved stays"


def _exit(message: str) -> NoReturn:
    """End the whole process from the watchdog's thread."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(STAGGER)
    os._exit(1)


def launch() -> int:
    """torchrun without its traceback: `python -m lib.distributed FLAGS PROGRAM ...`, its exit code the program's."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(None))
    except SignalException as received:
        return 128 + received.sigval
    except ChildFailedError as failed:
        first, failure = failed.get_first_failure()
        if failure.exitcode < 0:  # otherwise it has said why
            print(f"error: rank {first}: {failure.message}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(launch())
