"""Features of a merge brought to the blend of its parents', in closed form, in the order of execution."""

from hf_llfc.calibration.engine import Calibration, Finished, MapChange, Settings, Source, calibrate_model

__all__ = ["Calibration", "Finished", "MapChange", "Settings", "Source", "calibrate_model"]
