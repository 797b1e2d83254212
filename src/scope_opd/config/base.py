"""What every table of a config is made of: strict values, bounded numbers."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path in which ``~`` is the home folder."""
AlarmAction = Literal["off", "warn", "stop"]


class Table(BaseModel):
    """Base of every table: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, protected_namespaces=())
