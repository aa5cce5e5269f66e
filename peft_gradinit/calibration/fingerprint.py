"""Which model a measurement is of."""

from torch import Tensor, nn

from ..errors import CalibrationError
from ..statistics import hash_weight


def model_fingerprint(model: nn.Module, skip: tuple[str, ...]) -> dict[str, str]:
    """Hash every base weight, under the names that it has without adapters.

    Args:
        model: the base model, with or without adapters.
        skip: parameters whose names contain one of these are not base weights.

    Returns:
        Hashes by parameter name.
    """
    hashes = {}
    for name, parameter in model.named_parameters():
        if not any(part in name for part in skip):
            check_not_meta(name, parameter)
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            hashes[plain.replace("_orig_mod.", "")] = hash_weight(parameter)
    return hashes


def check_not_meta(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that has no values.

    Args:
        name: full name of the parameter.
        parameter: of the model.

    Raises:
        CalibrationError: if it is on the meta device.
    """
    if parameter.device.type == "meta":
        raise CalibrationError(
            f"{name} is on the meta device, so the model cannot run and cannot be calibrated; load "
            "the weights first."
        )
