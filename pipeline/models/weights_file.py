"""Files of frozen networks that the user names, each with its digest."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from safetensors.torch import load_file
from torch import Tensor

from pipeline.common.component import Component, LocalPath
from pipeline.common.errors import UserError

STATE_DICT = "state dict of tensors: write one with torch.save, or as .safetensors"
NOT_READABLE = "name a file that this machine reads"


def _digest(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise ValueError(f"must be 64 hexadecimal digits, as sha256sum prints them, not {text!r}")
    return text.lower()


class WeightsFile(Component):
    """A file of this machine, which must have the digest."""

    path: LocalPath  # the file, on a disk of this machine
    # Of the whole file, as sha256sum prints it.
    sha256: Annotated[str, AfterValidator(_digest)]

    def check(self) -> None:
        """Raise UserError if the file is missing or has another digest; reads all of it."""
        try:
            with Path(self.path).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}), but evaluation.metrics names it "
                f"as the file with sha256 {self.sha256}: {NOT_READABLE}, or leave the metric out."
            ) from None
        if found != self.sha256:
            raise UserError(
                f"{self.path} has sha256 {found}, but evaluation.metrics expects {self.sha256}: it "
                "is another file, or damaged. Figures of different networks do not compare: fetch "
                "the expected file, or write down the digest of this one if it is the right one."
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state dict in the file: safetensors, or one that torch.save wrote.

        Runs no code from the file. Raises UserError, also if the file does not have its digest.
        """
        self.check()
        try:
            if self.path.endswith(".safetensors"):
                return load_file(self.path)
            found: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # each format has errors of its own
            raise UserError(self._is_no(STATE_DICT)) from error
        if not isinstance(found, dict) or not all(torch.is_tensor(v) for v in found.values()):
            raise UserError(self._is_no(STATE_DICT))
        return found

    def _is_no(self, what: str) -> str:
        """Say that the file, though it has the digest, is of another kind."""
        return f"{self.path} has the sha256 that evaluation.metrics expects, but holds no {what}."
