"""What a run says: to the terminal, to run.log, to TensorBoard."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib.errors import InputError


class RunLog:
    """Prints lines beside a progress bar, keeps them in FOLDER/run.log, and writes figures for TensorBoard."""

    def __init__(self, folder: Path, tensorboard_folder: Path, step: int):
        """step: finished steps; figures of later ones, left by a run that is now resumed, are dropped."""
        flag, place = "--model_name", folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "run.log", "a", encoding="utf-8")
            flag, place = "--logger_name", tensorboard_folder
            self._writer = SummaryWriter(tensorboard_folder, purge_step=step or None)
        except OSError as error:
            raise InputError(f"{flag} {place}: cannot be written ({error.strerror or error})") from None

    def say(self, text: str) -> None:
        """Print lines and keep them."""
        tqdm.write(text)
        self._file.write(text + "\n")
        self._file.flush()

    def figures(self, step: int, **values: float) -> None:
        """Write figures of a step; a name's first underscore-separated word is its group in TensorBoard."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def close(self) -> None:
        """Finish both files."""
        self._writer.close()
        self._file.close()
