"""The processes of a job that torchrun has started: who they are, how they meet, how they end together.

A program that torchrun has not started is a job of one process; it needs nothing of this.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

PATIENCE = 600.0  # seconds without any sign of life from any process, after which the job hangs
WATCH_EVERY = 5.0  # seconds
TIMEOUT = timedelta(minutes=30)  # of PyTorch's own, after PATIENCE
STAGGER = 2.0  # seconds by which a process lets the node's first one speak first: mostly both would say the same
WAIT_FOR_THE_END = 10.0  # seconds in which torchrun ends a process that has lost another one


class PeerLost(Exception):
    """Another process of the same job has gone; what went wrong is for that one, or for torchrun, to say."""

    exit_code = 1


_signs = 0  # of life that this process has given: items of progress bars, arrivals at collectives
_excused = threading.Event()  # set while this process is busy with something that gives no signs of life


def world_size() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


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
    """How many of the job's processes share this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def is_restarted() -> bool:
    """Whether torchrun has started this job's processes anew after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def job() -> str:
    """A name that all processes of a job share, those that torchrun starts anew too, and no other job has."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":  # torchrun's own for each job with --standalone, else what --rdzv_id says
        return name
    agent = os.getppid() if local_count() == world_size() else ""  # one torchrun on each node
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} {agent}"


def keep_quiet() -> None:
    """Let all but the first process print nothing but errors. To be called before PyTorch is imported."""
    if world_size() > 1:  # else DistributedDataParallel talks of what is meant so, see training/step.py
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_first():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


@contextmanager
def joined(device) -> Iterator[None]:
    """Within this context the job's processes can talk to each other: over NCCL between GPUs, else over gloo.

    device: the torch.device that this process computes on. Raises PeerLost where another process has gone.
    """
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _connect(hosts=is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    watch = _Watch()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    watch.start()
    try:
        yield
        watch.stop()  # before the others, of whom one may hold what the watch looks at, can go
        dist.barrier()
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise PeerLost("another process of the job has gone") from None
    dist.destroy_process_group()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Within this context the first process of each node works alone; then the others, who find what it has left."""
    import torch.distributed as dist

    many = dist.is_available() and dist.is_initialized()
    if many and local_rank() > 0:
        dist.barrier()
    _excused.set()
    try:
        yield
    finally:
        _excused.clear()
    if many and local_rank() == 0:
        dist.barrier()


def speak(message: str) -> None:
    """Say on stderr why this process fails. Where all of a job fail alike, one of each node is heard."""
    if world_size() == 1:
        print(message, file=sys.stderr)
        return
    if local_rank() > 0:
        time.sleep(STAGGER)  # torchrun ends this process meanwhile if another has failed
    kind, _, text = message.partition(": ")
    message = f"{kind}: rank {rank()}: {text}" if text else message
    print(message, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun, whose word is the last one, then quotes
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)


def wait_for_the_end() -> None:
    """After another process has gone: torchrun ends this one, too, and names the one that failed."""
    time.sleep(WAIT_FOR_THE_END)


def end_at_once(number: int) -> None:
    """End as a signal's default does."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _connect(hosts: bool = False):
    """The store through which the processes find each other; hosts: it lies in this process, none of torchrun's.

    What a failed attempt has left in torchrun's would mislead the next one, so each has its own names there
    (https://github.com/pytorch/pytorch/issues/135712).
    """
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt {attempt}", TCPStore(address, port, is_master=hosts, timeout=TIMEOUT))


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether it is how PyTorch says that another process has gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection closed by peer" in str(error)


class _Watch(threading.Thread):
    """Ends a job of which one process hangs: each tells the others how far it is, and looks whether anybody moves."""

    def __init__(self):
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        store, names = _connect(), [f"signs of {other}" for other in range(world_size())]
        signs, since, extra = [], time.monotonic(), 0
        while True:
            extra += _excused.is_set()
            try:
                store.set(names[rank()], str(_signs + extra))
                now = [int(value) for value in store.multi_get(names)]
            except RuntimeError:  # with the store torchrun has gone, or the first process
                now = None
            if self._stopped.wait(WATCH_EVERY if now else 0):
                return
            if now is None:
                self._end("torchrun or the job's first process has gone", speaker=local_rank() == 0)
            if now != signs:
                signs, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                self._end(*_who_hangs(signs))

    def _end(self, message: str, speaker: bool) -> None:
        if speaker:
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(STAGGER)
        os._exit(1)


def give_sign_of_life() -> None:
    """Count that this process has moved: an item of a progress bar is done, a place is reached where processes wait."""
    global _signs
    _signs += 1


def _who_hangs(signs: list[int]) -> tuple[str, bool]:
    """What to say of a standstill, and whether this process is the one to say it."""
    hanging = [other for other, sign in enumerate(signs) if sign == min(signs)]
    waiting = [other for other in range(len(signs)) if other not in hanging] or hanging
    who = f"rank {', '.join(map(str, hanging))} hangs" if waiting is not hanging else "all processes hang"
    message = f"{who}: no process of the job has moved for {PATIENCE:.0f} seconds; the last checkpoint stays"
    return message, waiting[0] == rank()
