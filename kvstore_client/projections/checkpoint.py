"""Where a training stands, in one file that is whole or not there."""

from dataclasses import asdict
from pathlib import Path

import torch

from kvstore_client.projections.training import Training


def save(training: Training, file: Path, data_sha256: str) -> None:
    draft = file.with_name(f"{file.name}.draft")
    torch.save(
        {
            "made_from": _made_from(training, data_sha256),
            "losses": training.losses,
            "bases": training.bases.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "adapters": [parameter.detach() for parameter in training.adapters],
        },
        draft,
    )
    draft.rename(file)


def restore(training: Training, file: Path, data_sha256: str) -> None:
    """Goes on where the file was written; ValueError, naming what differs, if it is of another training."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        found = saved["made_from"]
    except Exception as error:  # what torch raises for a file that is none is not one type
        raise ValueError(f"{file.name} is no checkpoint") from error
    for name, ours in _made_from(training, data_sha256).items():
        if found.get(name) != ours:
            raise ValueError(f"{file.name} is of a training with {name} {found.get(name)}, this one has {ours}")
    training.bases.load_state_dict(saved["bases"])
    training.optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for parameter, value in zip(training.adapters, saved["adapters"], strict=True):
            parameter.copy_(value)
    training.losses = saved["losses"]


def _made_from(training: Training, data_sha256: str) -> dict[str, object]:
    settings = {
        name: [*value] if isinstance(value, tuple) else value for name, value in asdict(training.settings).items()
    }
    return {**settings, "start": training.start.sha256, "data": data_sha256}
