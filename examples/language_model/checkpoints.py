"""A folder with all of a run: its settings, its checkpoints, and the pictures it made.

It is made by the first run and belongs to the program from then on. Any other folder that
holds something is left alone.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from examples.command import Refusal
from examples.language_model.model import LanguageModel

SETTINGS = "settings.json"


class History:
    """The losses so far: of training, step by step, and of validation where judged."""

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0
        self.train = np.full(steps, np.nan, np.float32)
        self.validation = np.full(steps, np.nan, np.float32)

    def add(self, loss: float) -> None:
        """Adds the loss of one more step."""
        self.train[self.done] = loss
        self.done += 1

    def judge(self, loss: float) -> None:
        """Adds the validation loss after the last step."""
        self.validation[self.done - 1] = loss

    def line(self) -> str:
        """Says where the run stands, in a line."""
        recent = np.mean(self.train[max(self.done - 20, 0) : self.done])
        judged = self.validation[self.done - 1]
        return f"step {self.done:4}   training {recent:.3f}   validation {judged:.3f}"


def open_folder(path: str, settings: Mapping) -> pathlib.Path:
    """Makes the folder of a run, or opens it if its run had the same settings.

    Raises:
        Refusal: If it holds something else, or a run with other settings.
    """
    folder = pathlib.Path(path)
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{path}: this is a file; name a folder by --out.")
    if (folder / SETTINGS).is_file():
        _compare(path, _read(folder / SETTINGS), dict(settings))
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise Refusal(f"{path}: this folder holds something else; name a new one by --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise Refusal(f"{path}: cannot be written, {error.strerror}.") from None
    return folder


def _read(path: pathlib.Path) -> dict:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise Refusal(f"{path}: cannot be read; name a new folder by --out.")
    return settings


def _compare(path: str, before: dict, now: dict) -> None:
    names = [name for name in now if before.get(name) != now[name]]
    if not names:
        return
    there = ", ".join(f"{name} {before.get(name)}" for name in names)
    asked = ", ".join(f"{name} {now[name]}" for name in names)
    raise Refusal(
        f"{path}: the run there has {there}, but this one has {asked}; give the same "
        f"options to go on with it, or name a new folder by --out."
    )


class Checkpoints:
    """The checkpoints of a run, the last two; each is written whole or not at all."""

    def __init__(self, folder: pathlib.Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            folder.resolve() / "checkpoints", options=options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(
        self, model: LanguageModel, optimizer: nnx.Optimizer, history: History
    ) -> None:
        """Keeps all that the next step depends on."""
        state = _state(model, optimizer, history)
        self._manager.save(history.done, args=ocp.args.StandardSave(state), force=True)

    def restore(
        self, model: LanguageModel, optimizer: nnx.Optimizer, history: History
    ) -> None:
        """Puts the last checkpoint, if there is one, into these."""
        step = self._manager.latest_step()
        if step is None:
            return
        like = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, _state(model, optimizer, history)
        )
        state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        nnx.update(model, state["model"])
        nnx.update(optimizer, state["optimizer"])
        history.done = step
        history.train[:] = state["train"]
        history.validation[:] = state["validation"]


def _state(model, optimizer, history) -> dict:
    return {
        "model": nnx.state(model),
        "optimizer": nnx.state(optimizer),
        "train": history.train,
        "validation": history.validation,
    }
