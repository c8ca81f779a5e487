"""Features of a merge brought to the blend of its parents', in closed form, in the order of execution."""

from hf_llfc.calibration.engine import Calibration, Finished, MapChange, Settings, Source, calibrate_model
from hf_llfc.calibration.ridge import RIDGES, RidgeTrial, choose_ridge

__all__ = [
    "RIDGES",
    "Calibration",
    "Finished",
    "MapChange",
    "RidgeTrial",
    "Settings",
    "Source",
    "calibrate_model",
    "choose_ridge",
]
