"""The models that strategies, resumes, kills and skipped steps are tested with, as settings."""

from collections.abc import Mapping

MODELS: Mapping[str, tuple[str, ...]] = {
    "burgess": (),  # the default
    # Attention, group normalisation and nested modules; 16 pixels, as its steps take longer.
    "resnet-mini": ("model.backbone={kind: resnet, preset: resnet-mini}", "data.decode.size=16"),
}
# Steps in a row that are compared; ZeRO-3 gathers each small tensor by itself, on CPUs slowly.
WINDOW_STEPS: Mapping[str, int] = {"burgess": 10, "resnet-mini": 4}


def is_determined(name: str) -> bool:
    """Whether rounding does not decide what becomes of a parameter.

    Softmax ignores the keys' bias. The gradient is noise, which Adam turns into whole steps.
    """
    return not name.endswith("to_k.bias")
