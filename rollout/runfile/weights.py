"""Weights: a state_dict in a file, loaded without unpickling anything else, and the PyHealth model it belongs to."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.cohort.digest import digest_of
from rollout.data.classes import check_arguments, check_model_class, named_class
from rollout.data.quiet import quiet_pyhealth
from rollout.files import write_whole
from rollout.runfile.hugging_face import check_folder

OF_FOLDERS, FOLDER = ("TransformersModel", "TransformerDeID"), "model_name"
"""PyHealth's models around one of transformers, and the argument that names it."""
UNNAMED = ("TorchvisionModel", "PromptEHR", "MedLink", "ConCare")
"""Models of PyHealth's that are read, but of no cohort, or of none that a dataset and task can be named for."""
SHOWN = 4
"""Differences between weights and model that an error lists."""
MOST_SIZE, MOST_LAYERS = 65_536, 1_024
"""What a whole number among a model's arguments may be at most, and one that counts layers."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state_dict by `torch.load(weights_only=True)`, onto the CPU.

    Raises:
        ValueError: If the file cannot be read so, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"weights must be a state_dict, as torch.save(model.state_dict(), path) writes it; {path} cannot be loaded "
            f"with weights_only=True: {reason}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"weights must be a state_dict, parameter name → tensor, got {type(state).__name__} in {path}; save "
            "model.state_dict() alone"
        )
    return dict(state)


def write_weights(model: torch.nn.Module, path: str | Path) -> str:
    """Write a model's state_dict, whole or not at all; return its `weights_digest`."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(Path(path), buffer.getvalue())
    return weights_digest(state)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and values, however they were saved."""
    return digest_of(dict(state))


def check_model(name: str, arguments: Mapping[str, Any]) -> None:
    """Check a model's name and arguments; PyHealth is imported, nothing built.

    Raises:
        ValueError: If PyHealth has no such model, it has no attention readout, or it does not take an argument.
    """
    model = named_class("model", name, "[model] class")
    if not is_read_by_run_files(model):
        check_model_class(model, "[model] class")
    check_arguments(model, arguments, ("dataset",), "[model] arguments")
    if takes_folder(name):
        check_pretrained(arguments)
    for key, value in arguments.items():
        most = MOST_LAYERS if key.endswith("layers") else MOST_SIZE
        if type(value) is int and not 0 <= value <= most:
            raise ValueError(f"[model] arguments: {key} must be from 0 to {most:,}, got {value}")


def is_read_by_run_files(model: type) -> bool:
    """Whether rollout knows how a model without readout methods is read, and a run file can give it samples."""
    from rollout.pyhealth.zoo import is_read

    return is_read(model) and model.__name__ not in UNNAMED


def takes_folder(name: str) -> bool:
    """Whether a model of PyHealth's reads its architecture and tokenizer from a folder, or downloads them."""
    return name in OF_FOLDERS


def check_pretrained(arguments: Mapping[str, Any]) -> None:
    """Refuse all but a local folder that holds architecture, weights and tokenizer, and no code.

    Raises:
        ValueError: naming what lacks.
    """
    given = arguments.get(FOLDER)
    if given is None or not Path(given).is_dir():
        raise ValueError(
            f"[model] arguments: {FOLDER} must be a folder with config.json, model.safetensors and the tokenizer's "
            f"files, for nothing is downloaded, got {given!r}: no such folder"
        )
    check_folder(Path(given), f"[model] arguments: {FOLDER}")


def build_model(name: str, arguments: Mapping[str, Any], dataset: Any, device: str = "cpu") -> Any:
    """Build a model of `pyhealth.models` for a dataset; torch's random numbers are left as they were.

    Args:
        name: Of its class.
        arguments: Beside the dataset.
        dataset: That it is for.
        device: `"meta"` for its names and shapes alone, which take no memory.

    Raises:
        ValueError: If it does not take its arguments.
    """
    model = named_class("model", name, "[model] class")
    with quiet_pyhealth(), torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            return model(dataset=dataset, **arguments)
        except Exception as error:
            raise ValueError(f"[model]: {name} did not take its arguments: {type(error).__name__}: {error}") from error


def load_model(name: str, arguments: Mapping[str, Any], dataset: Any, state: Mapping[str, Tensor], source: str) -> Any:
    """Build a model with its weights. That they fit is seen from its shapes, before it takes memory.

    Args:
        name: Of its class.
        arguments: Beside the dataset.
        dataset: That it is for.
        state: Parameter name → tensor.
        source: What to call the weights in an error.

    Raises:
        ValueError: If it does not take its arguments, or weights do not fit.
    """
    try:
        check_weights(build_model(name, arguments, dataset, "meta"), state, source)
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError | NotImplementedError):
            raise  # otherwise it has a part that cannot be made without memory, such as a pretrained one
    model = build_model(name, arguments, dataset)
    check_weights(model, state, source)
    model.load_state_dict(dict(state))
    return model


def check_weights(model: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that do not fit a model.

    Args:
        model: That they were trained as, on any device.
        state: Parameter name → tensor.
        source: What to call them in an error.

    Raises:
        ValueError: If names or shapes differ, saying which and what that may come from.
    """
    differ = differences(model.state_dict(), state)
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise ValueError(
            f"{source} does not fit the model: {'; '.join(differ[:SHOWN])}{more}. Embeddings of other sizes come from "
            "another vocabulary than the weights were trained with, other sizes and names from other [model] arguments"
        )


def differences(model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Where weights differ from what a model needs: missing names, unknown names, shapes."""
    missing = [f"{name} is missing" for name in model if name not in state]
    unknown = [f"{name} is unknown to the model" for name in state if name not in model]
    shapes = [
        f"{name} must be {list(tensor.shape)}, got {list(state[name].shape)}"
        for name, tensor in model.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return shapes + missing + unknown
